"""The small endpoints: models, tokens, health, metrics, and what the cache holds."""

import asyncio
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from kvist.errors import EngineDead
from kvist.server.errors import ApiError
from kvist.server.outputs import token_text
from kvist.server.prompts import chat_prompt, text_prompt
from kvist.server.served import served_by
from kvist.server.wire.completions import (
    DetokenizeAnswer,
    DetokenizeRequest,
    ModelBody,
    ModelsAnswer,
    TokenizeAnswer,
    TokenizeRequest,
)

READY_WITHIN = 10.0  # seconds between two steps, a long prompt's included

router = APIRouter()


class Status(BaseModel):
    """How the server is."""

    status: str


@router.get("/v1/models", tags=["models"], operation_id="list_models")
async def models(request: Request) -> ModelsAnswer:
    """What is served here."""
    served = served_by(request)
    return ModelsAnswer(data=[_model(request, name) for name in served.names])


@router.get("/v1/models/{model}", tags=["models"], operation_id="get_model")
async def model(model: str, request: Request) -> ModelBody:
    """One of them."""
    return _model(request, served_by(request).check_model(model))


def _model(request: Request, name: str) -> ModelBody:
    served = served_by(request)
    return ModelBody(
        id=name,
        created=served.created,
        root=served.names[0],
        max_model_len=served.engine.max_length,
    )


@router.post("/tokenize", tags=["tokens"], operation_id="tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> TokenizeAnswer:
    """A text's or a chat's token ids."""
    served = served_by(request)
    served.check_model(body.model)
    if body.messages is not None:
        prompt = await chat_prompt(
            served,
            body.messages,
            tools=body.tools or (),
            template=body.chat_template_kwargs,
            add_generation_prompt=body.add_generation_prompt,
        )
        ids = prompt.token_ids
    elif body.prompt:
        given = await text_prompt(served, body.prompt, add_special_tokens=body.add_special_tokens)
        ids = given.token_ids
    else:
        ids = ()
    return TokenizeAnswer(
        count=len(ids),
        max_model_len=served.engine.max_length,
        tokens=list(ids),
        token_strs=[token_text(served.model, token).text for token in ids]
        if body.return_token_strs
        else None,
    )


@router.post("/detokenize", tags=["tokens"], operation_id="detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> DetokenizeAnswer:
    """Token ids' text, special tokens included."""
    served = served_by(request)
    served.check_model(body.model)
    tokenizer = served.model.require_tokenizer()
    size = served.model.config.vocab_size
    wrong = next((token for token in body.tokens if token >= size), None)
    if wrong is not None:
        raise ApiError(400, f"{wrong} is not in the vocabulary of {size}", param="tokens")
    text = await served.aside(lambda: tokenizer.decode(body.tokens, skip_special_tokens=False))
    return DetokenizeAnswer(prompt=text)


@router.get("/health", tags=["operation"], operation_id="health")
async def health() -> Status:
    """Whether the process is alive; asks nothing of the engine."""
    return Status(status="alive")


@router.get("/ready", tags=["operation"], operation_id="ready", responses={503: {"model": Status}})
async def ready(request: Request) -> Any:
    """Whether requests may be sent here: the engine steps, and the server is not about to stop."""
    served = served_by(request)
    status = "ready"
    if served.gate.draining.is_set():
        status = "draining"
    elif not served.engine.alive:
        status = "the engine has ended"
    else:
        try:
            await asyncio.wait_for(served.engine.snapshot(), READY_WITHIN)
        except TimeoutError:
            status = f"the engine has not ended a step for {READY_WITHIN:g} s"
        except EngineDead as error:
            status = str(error)
    return JSONResponse({"status": status}, 200 if status == "ready" else 503)


@router.get(
    "/metrics",
    tags=["operation"],
    operation_id="metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """Everything that is measured, as Prometheus reads it."""
    served = served_by(request)
    try:
        snapshot = await served.engine.snapshot()
    except EngineDead:
        snapshot = None
    page = served.metrics.page(snapshot)
    return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/cache", tags=["operation"], operation_id="cache")
async def cache(request: Request) -> dict[str, Any]:
    """What the cache holds and who runs on it, as one picture between two steps."""
    return asdict(await served_by(request).engine.snapshot())
