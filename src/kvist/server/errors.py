"""Errors as OpenAI's clients expect them: `{"error": {message, type, param, code}}`.

Whatever goes wrong between a request and its answer ends here: what kvist raises on purpose, what
pydantic finds wrong with a body, unknown paths, and defects, which are logged and told without
details.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from kvist.errors import ContextTooLong, EngineDead, KvistError, NotSupported

log = logging.getLogger("kvist.server")


class ErrorDetail(BaseModel):
    """What was wrong, with which parameter."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Every answer that is not a success."""

    error: ErrorDetail


class ApiError(Exception):
    """A refusal with its status.

    Args:
        status: HTTP's.
        message: what was wrong, with which value, and what to do.
        param: the parameter's name.
        code: for programs.
        headers: to go with the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """OpenAI's name for errors of this status."""
        return _KINDS.get(self.status, "server_error" if self.status >= 500 else _INVALID)

    def body(self) -> dict[str, Any]:
        """The JSON of it."""
        detail = ErrorDetail(message=str(self), type=self.kind, param=self.param, code=self.code)
        return {"error": detail.model_dump()}


_INVALID = "invalid_request_error"
_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    504: "timeout_error",
}


def refused(error: KvistError, param: str | None = None) -> ApiError:
    """What kvist raised, as an answer."""
    message = str(error)
    if isinstance(error, EngineDead):
        return ApiError(503, message, code="engine_dead")
    if isinstance(error, ContextTooLong):
        return ApiError(400, message, param=param, code="context_length_exceeded")
    if isinstance(error, NotSupported):
        return ApiError(400, message, param=param, code="not_supported")
    name = message.split(" ", 1)[0].split("[")[0]
    return ApiError(400, message, param=param or (name if name in _PARAMETERS else None))


# Parameters that messages of `RequestError` begin with.
_PARAMETERS = {
    "temperature", "top_k", "top_p", "min_p", "max_tokens", "min_tokens", "stop", "seed", "n",
    "stop_token_ids", "logprobs", "prompt_logprobs", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "messages", "prompt", "tools",
}  # fmt: skip


def answer(error: ApiError) -> JSONResponse:
    """The response for an error."""
    return JSONResponse(error.body(), error.status, headers=error.headers)


def install(app: FastAPI) -> None:
    """Have every exception of an endpoint end as one of these errors."""

    async def on_api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return answer(error)

    async def on_kvist_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, KvistError)
        return answer(refused(error))

    async def on_validation_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return answer(_invalid(error.errors()))

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is no {request.method} {request.url.path} here"
        elif error.status_code == 405:
            message = f"{request.url.path} does not take {request.method}"
        return answer(ApiError(error.status_code, message, headers=error.headers))

    async def on_defect(request: Request, error: Exception) -> JSONResponse:
        return answer(ApiError(500, "the server has failed at this; its log says how"))

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(KvistError, on_kvist_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_defect)


def _invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Pydantic's findings in one line: the first that says most."""
    # Of a union's branches each complains; the deepest one is about what was really sent.
    first = max(errors, key=lambda found: len(found["loc"]))
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "cannot be read")
        return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")
    param = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        return ApiError(
            400,
            f"there is no parameter {param}; leave it out",
            param=param,
            code="unknown_parameter",
        )
    if first["type"] == "missing" and not param:
        return ApiError(
            400, "the request has no body; send JSON with Content-Type: application/json"
        )
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param or 'the body'}: {message}{_value(first)}", param=param or None)


def _path(location: Sequence[Any]) -> str:
    """`messages[0].content`: where in the body, without the names of a union's branches."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in ("body", "query", "path") and str(part).isidentifier() and part.islower():
            path += f".{part}" if path else part
    return path.removesuffix(".str").removesuffix(".int")


def _value(found: Mapping[str, Any]) -> str:
    value = found.get("input")
    if found["type"] == "missing" or isinstance(value, Mapping):
        return ""
    written = " ".join(repr(value).split())
    return f" (not {written if len(written) <= 60 else written[:57] + '...'})"
