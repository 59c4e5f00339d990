"""`/v1/completions`: texts and token ids to what follows them, in OpenAI's older shape."""

import time
from codecs import getincrementaldecoder
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from fastapi.responses import Response

from kvist.core.results import Delta, Result, TokenLogprob
from kvist.grammar import CompiledGrammar
from kvist.server.chat import Chunks
from kvist.server.errors import ApiError
from kvist.server.formats import format_source
from kvist.server.generation import Asked, Tally, asked_for, generate
from kvist.server.outputs import TokenText, token_text
from kvist.server.prompts import text_prompt
from kvist.server.served import Served, request_id_of, served_by
from kvist.server.sse import DONE, STREAMED, EventStream, Work
from kvist.server.wire.completions import (
    CompletionAnswer,
    CompletionRequest,
    TextChoice,
    TextLogprobs,
    prompts_of,
)

router = APIRouter(tags=["completions"])

Logprob = tuple[int, TokenLogprob | None]
"""A token, and what is known of it: nothing of a prompt's first."""


@router.post(
    "/v1/completions", response_model=CompletionAnswer, responses=STREAMED, operation_id="complete"
)
async def create(body: CompletionRequest, request: Request) -> Response:
    """Continue one or several texts."""
    served = served_by(request)
    model = served.check_model(body.model)
    prompts = prompts_of(body.prompt)
    if len(prompts) * body.n > served.settings.max_samples:
        raise ApiError(
            400,
            f"{len(prompts)} prompts x n {body.n} is more than {served.settings.max_samples}",
            param="prompt",
        )
    served.gate.check(len(prompts) * body.n)
    source = format_source(body.response_format, "never", served.engine.grammars.tag)
    params = body.sampling_params(
        max_tokens=body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )

    def grammar() -> CompiledGrammar | None:
        return None if source is None else served.engine.grammars.compile(source)

    asked = [
        asked_for(
            served,
            await text_prompt(served, prompt),
            params,
            await served.aside(grammar),
            priority=body.priority,
            cache_salt=body.cache_salt,
        )
        for prompt in prompts
    ]
    texts = [_echo(served, prompt, one) for prompt, one in zip(prompts, asked, strict=True)]
    tally = Tally(sum(len(one.prompt.token_ids) for one in asked))
    work = _Completion(
        request_id_of(request, "cmpl"), model, body, asked, texts if body.echo else None, tally
    )
    if body.stream:
        return EventStream(_stream(served, request, work))

    async def whole() -> str:
        return (await _whole(served, request, work)).model_dump_json()

    return Work(whole)


@dataclass
class _Completion:
    """What is under way."""

    id: str
    model: str
    body: CompletionRequest
    asked: list[Asked]
    echoes: list[str] | None
    tally: Tally
    created: int = field(default_factory=lambda: int(time.time()))

    def echo(self, index: int) -> str:
        """What an output begins with."""
        return "" if self.echoes is None else self.echoes[index // self.body.n]

    def prompt_of(self, index: int) -> tuple[int, ...]:
        """The prompt of an output."""
        return self.asked[index // self.body.n].prompt.token_ids


def _echo(served: Served, prompt: str | list[int], asked: Asked) -> str:
    """The prompt as text."""
    tokenizer = served.model.tokenizer
    if isinstance(prompt, str) or tokenizer is None:
        return prompt if isinstance(prompt, str) else ""
    return tokenizer.decode(asked.prompt.token_ids, skip_special_tokens=False)


async def _whole(served: Served, request: Request, work: _Completion) -> CompletionAnswer:
    results: dict[int, Result] = {}
    async with aclosing(generate(served, request, work.id, work.asked, work.tally)) as steps:
        async for news in steps:
            results |= {index: delta.result for index, delta in news if delta.result is not None}
    choices = []
    for index, result in sorted(results.items()):
        text, logprobs = _Choice(served, work, index).take(result)
        choices.append(
            TextChoice.model_construct(
                index=index, text=text, logprobs=logprobs, finish_reason=result.finish_reason
            )
        )
    return CompletionAnswer(
        id=work.id,
        created=work.created,
        model=work.model,
        choices=choices,
        usage=work.tally.usage(),
    )


class _Choice:
    """One output as the client reads it, after the prompt if that is echoed; whole or in pieces."""

    def __init__(self, served: Served, work: _Completion, index: int) -> None:
        tokenizer = served.model.tokenizer
        self._model = served.model
        self._top = work.body.logprobs
        self._prompt = work.prompt_of(index)
        self._echo = work.echo(index)
        self._begun = False
        self._hidden = frozenset() if tokenizer is None else tokenizer.special_ids
        self._place = 0
        # A character may be spread over tokens, and counts where it is complete.
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def take(self, news: Delta | Result) -> tuple[str, TextLogprobs | None]:
        """The text that a step or a result adds, and what is known of its tokens, if asked for."""
        text = news.text if self._begun else self._echo + news.text
        self._begun = True
        if self._top is None:
            return text, None
        # Only the first news have the prompt's, and only if that is echoed.
        known: list[Logprob] = [
            *zip(self._prompt, news.prompt_logprobs or (), strict=False),
            *((one.token_id, one) for one in news.logprobs or ()),
        ]
        written = [token_text(self._model, token) for token, _ in known]
        return text, TextLogprobs(
            tokens=[one.text for one in written],
            token_logprobs=[None if one is None else max(one.logprob, -9999.0) for _, one in known],
            top_logprobs=[
                None
                if one is None
                else {token_text(self._model, t).text: max(p, -9999.0) for t, p in one.top}
                for _, one in known
            ]
            if self._top
            else None,
            text_offset=[
                self._pass(token, one) for (token, _), one in zip(known, written, strict=True)
            ],
        )

    def _pass(self, token: int, written: TokenText) -> int:
        """Where this token begins; a special one is in the text only where the echo has it."""
        place = self._place
        if token not in self._hidden or self._echo.startswith(written.text, place):
            self._place += len(self._decoder.decode(bytes(written.bytes or ())))
        return place


async def _stream(
    served: Served, request: Request, work: _Completion
) -> AsyncGenerator[bytes, None]:
    body = work.body
    usage = body.stream_options is not None and body.stream_options.include_usage
    chunks = Chunks(work.id, work.created, work.model, usage=usage, kind="text_completion")
    choices: dict[int, _Choice] = {}
    async with aclosing(generate(served, request, work.id, work.asked, work.tally)) as steps:
        async for news in steps:
            pieces: list[str] = []
            for index, delta in news:
                if index not in choices:
                    choices[index] = _Choice(served, work, index)
                text, logprobs = choices[index].take(delta)
                result = delta.result
                if text or (logprobs and logprobs.tokens) or result is not None:
                    pieces.append(
                        chunks.text(
                            index,
                            text,
                            "null" if logprobs is None else logprobs.model_dump_json(),
                            None if result is None else result.finish_reason,
                        )
                    )
            if pieces:
                yield "".join(pieces).encode()
    last = chunks.usage(work.tally.usage()) if usage else ""
    yield last.encode() + DONE
