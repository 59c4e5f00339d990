"""From a checked request to the engine and back: limits, time, measures and records of it all.

Every endpoint that generates goes through `generate`. It yields what each step adds, for all of the
request's outputs at once, so that a stream is written once a step.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request

from kvist.core.params import SamplingParams
from kvist.core.record import RequestRecord
from kvist.core.results import Delta
from kvist.errors import KvistError
from kvist.grammar import CompiledGrammar
from kvist.loading.image_prompt import PreparedPrompt
from kvist.server.errors import ApiError, refused
from kvist.server.logs import record_fields
from kvist.server.served import Served, log_fields, tenant_of
from kvist.server.wire.common import CachedTokens, OutputTokens, UsageBody

GRAMMAR_FAILED = "the grammar failed"  # as the scheduler begins to say it

News = list[tuple[int, Delta]]
"""What a step brings: which of the request's outputs, and what is new of it."""


@dataclass(frozen=True)
class Asked:
    """One prompt of a request, ready for the engine."""

    prompt: PreparedPrompt
    params: SamplingParams
    grammar: CompiledGrammar | None = None
    priority: int = 0
    cache_salt: str | None = None


@dataclass
class Tally:
    """What a request has taken so far."""

    prompt_tokens: int
    began: float = field(default_factory=time.perf_counter)
    output_tokens: int = 0
    first: float | None = None
    last: dict[int, float] = field(default_factory=dict)
    records: list[RequestRecord] = field(default_factory=list)

    def usage(self, reasoning_tokens: int | None = None) -> UsageBody:
        """As the client is told; a prompt counts once, as its first sample found it."""
        cached = sum(r.cached_device + r.cached_host for r in self.records if not r.sample_index)
        thought = None
        if reasoning_tokens is not None:
            thought = OutputTokens(reasoning_tokens=reasoning_tokens)
        return UsageBody(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.output_tokens,
            total_tokens=self.prompt_tokens + self.output_tokens,
            prompt_tokens_details=CachedTokens(cached_tokens=cached),
            completion_tokens_details=thought,
        )


def asked_for(
    served: Served,
    prompt: PreparedPrompt,
    params: SamplingParams,
    grammar: CompiledGrammar | None = None,
    **rest: Any,
) -> Asked:
    """A prompt with its limit of new tokens settled: what was asked, else what has room.

    Raises:
        ApiError: the prompt has no room for a token.
    """
    room = served.engine.max_length - len(prompt.token_ids)
    if room < 1:
        raise ApiError(
            400,
            f"the prompt has {len(prompt.token_ids)} tokens, and the model takes "
            f"{served.engine.max_length} with the output; shorten it",
            code="context_length_exceeded",
        )
    if params.max_tokens is None:
        usual = served.model.generation_config.get("max_new_tokens")
        wanted = max(int(usual or served.settings.default_max_tokens), params.min_tokens)
        params = replace(params, max_tokens=max(1, min(room, wanted), params.min_tokens))
    return Asked(prompt, params, grammar, **rest)


async def generate(
    served: Served, request: Request, name: str, asked: Sequence[Asked], tally: Tally
) -> AsyncGenerator[News, None]:
    """Run a request's prompts; outputs are numbered prompt by prompt.

    Leaving it early aborts what runs, within a step.

    Raises:
        ApiError: it was not let in, took too long, or the engine failed at it.
    """
    tenant = tenant_of(request)
    tally.began = getattr(request.state, "began", tally.began)
    if not served.keys.open and any(one.priority < 0 for one in asked):
        raise ApiError(
            400, "priority must be >= 0: a key may not overtake others", param="priority"
        )
    samples = sum(one.params.n for one in asked)
    most = served.settings.max_samples
    if samples > most:
        raise ApiError(400, f"{samples} outputs in one request; at most {most}", param="n")
    tokens = sum(
        len(one.prompt.token_ids) + one.params.n * (one.params.max_tokens or 0) for one in asked
    )
    streams = [
        served.engine.steps(
            one.prompt,
            one.params,
            request_id=name if len(asked) == 1 else f"{name}-{number}",
            priority=one.priority,
            cache_salt=tenant.cache_salt(one.cache_salt),
            grammar=one.grammar,
        )
        for number, one in enumerate(asked)
    ]
    first = [sum(one.params.n for one in asked[:number]) for number in range(len(asked))]
    limit = served.settings.request_timeout
    try:
        with served.gate.admit(tenant, samples, tokens):
            async with asyncio.timeout(limit), aclosing(_merged(streams)) as merged:
                async for step in merged:
                    news = [
                        (first[number] + delta.sample_index, delta)
                        for number, deltas in step
                        for delta in deltas
                    ]
                    _measure(served, tally, news)
                    yield news
    except TimeoutError:
        raise ApiError(504, f"the request took longer than {limit:g} s") from None
    except KvistError as error:
        raise refused(error) from error
    finally:
        _note(served, request, tally)


async def _merged(
    streams: Sequence[AsyncGenerator[list[Delta], None]],
) -> AsyncGenerator[list[tuple[int, list[Delta]]], None]:
    """What several streams bring: all that is there at a time, which is all of a step."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for deltas in only:
                yield [(0, deltas)]
        return
    ready: asyncio.Queue[tuple[int, list[Delta] | Exception | None]] = asyncio.Queue()

    async def follow(number: int, stream: AsyncGenerator[list[Delta], None]) -> None:
        end: Exception | None = None
        try:
            async with aclosing(stream):
                async for deltas in stream:
                    ready.put_nowait((number, deltas))
        except Exception as error:
            end = error
        ready.put_nowait((number, end))

    tasks = [asyncio.ensure_future(follow(i, stream)) for i, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            step: list[tuple[int, list[Delta]]] = []
            while left and not (step and ready.empty()):
                number, item = await ready.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    left -= 1
                else:
                    step.append((number, item))
            yield step
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _measure(served: Served, tally: Tally, news: News) -> None:
    """Count a step's news; raises where an output has failed."""
    now = time.perf_counter()
    metrics = served.metrics
    for index, delta in news:
        count = len(delta.token_ids)
        if count:
            tally.output_tokens += count
            before = tally.last.get(index)
            if tally.first is None:
                tally.first = now
                metrics.ttft.observe(now - tally.began)
            if before is not None:
                for _ in range(count):
                    metrics.itl.observe((now - before) / count)
            tally.last[index] = now
        result = delta.result
        if result is None:
            continue
        if result.record is not None:
            tally.records.append(result.record)
            metrics.output(result.record)
        if result.finish_reason == "error":
            # A grammar is the request's own; whatever else fails an output is not.
            own = (result.error or "").startswith(GRAMMAR_FAILED)
            raise ApiError(400 if own else 500, f"the output failed: {result.error}")
        if result.finish_reason == "abort":
            raise ApiError(503, "the request was aborted", code="aborted")


def _note(served: Served, request: Request, tally: Tally) -> None:
    """Leave what is known of a request for its line in the log."""
    took = time.perf_counter() - tally.began
    if tally.first is not None:
        served.metrics.e2e.observe(took)
    fields = log_fields(request)
    fields["prompt_tokens"] = tally.prompt_tokens
    fields["output_tokens"] = tally.output_tokens
    if tally.first is not None:
        fields["ttft_s"] = round(tally.first - tally.began, 6)
    if tally.records:
        fields["cache"] = [record_fields(record) for record in tally.records]
