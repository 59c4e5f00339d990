"""From prompts to requests and from events to samples: the text side of the engine.

`LLM` and `AsyncLLM` share it. It keeps the samples of unfinished requests, gives each event to the
sample that it belongs to, and tells the engine where a stop string has ended one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvist.core.params import ResolvedParams, SamplingParams
from kvist.core.plan import (
    Event,
    FailedEvent,
    PromptLogprobsEvent,
    TokenLogprobs,
    TokensEvent,
)
from kvist.core.request import Request
from kvist.core.results import TokenLogprob
from kvist.engine import Engine
from kvist.errors import NotSupported, RequestError
from kvist.grammar import CompiledGrammar, Grammars, Parse
from kvist.loading.image_prompt import PreparedPrompt
from kvist.loading.model import Model, Prompt
from kvist.prepare import prepare
from kvist.sample import Sample


@dataclass(frozen=True)
class Job:
    """A request and the samples that it will fill."""

    request: Request
    samples: list[Sample]

    @property
    def finished(self) -> bool:
        """Whether all samples have ended, well or not."""
        return all(sample.record is not None for sample in self.samples)


def make_jobs(
    model: Model,
    prompts: Sequence[Prompt | PreparedPrompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
    ids: Callable[[int], str],
    *,
    priority: int = 0,
    cache_salt: str = "",
    grammar: CompiledGrammar | Sequence[CompiledGrammar | None] | None = None,
    grammars: Grammars | None = None,
    max_length: int | None = None,
) -> list[Job]:
    """Check every prompt and parameter, and make a request of each.

    Args:
        model: with tokenizer and defaults.
        prompts: text, token ids or chat messages.
        params: one for all, or one each.
        ids: the request id of the prompt with this index.
        priority: lower goes first.
        cache_salt: prefixes are shared only among requests of the same salt.
        grammar: what the outputs are held to; one for all, or one or None for each prompt.
        grammars: the engine's, where there is a grammar.
        max_length: the engine's longest prompt plus output; None is the model's.

    Raises:
        RequestError: one of them makes no sense; nothing has been queued then.
    """
    jobs: dict[int, list[Sample]] = {}
    for sample in prepare(model, prompts, params, max_length):
        if sample.params.num_beams > 1:
            raise NotSupported(
                f"num_beams={sample.params.num_beams} in the engine; use kvist.generate"
            )
        sample.request_id = ids(sample.prompt_index)
        jobs.setdefault(sample.prompt_index, []).append(sample)
    held = list(grammar) if isinstance(grammar, Sequence) else [grammar] * len(jobs)
    if len(held) != len(jobs):
        raise RequestError(f"{len(held)} grammars for {len(jobs)} prompts")
    return [
        Job(
            Request(
                samples[0].request_id,
                samples[0].sequence.prompt_ids,
                samples[0].params,
                samples[0].images,
                priority=priority,
                cache_salt=cache_salt,
                eos_token_ids=model.eos_token_ids,
                grammar=None if one is None else _begin(grammars, one, samples[0].params),
            ),
            samples,
        )
        for samples, one in zip(jobs.values(), held, strict=True)
    ]


def _begin(grammars: Grammars | None, grammar: CompiledGrammar, params: ResolvedParams) -> Parse:
    """A grammar for one request, which has to let it say where the output ends."""
    assert grammars is not None, "a grammar without an engine's grammars"
    if params.min_tokens or params.ignore_eos:
        raise RequestError(
            "min_tokens and ignore_eos do not go with a grammar, which says where the output ends"
        )
    return grammars.begin(grammar)


class Desk:
    """Unfinished jobs by request id; takes the engine's events in."""

    def __init__(self, engine: Engine) -> None:
        """The engine must be stepped by whoever owns this desk, on one thread."""
        self.engine = engine
        self.jobs: dict[str, Job] = {}

    def add(self, job: Job) -> None:
        """Queue a job; raises RequestError if the engine can never serve it."""
        self.engine.add(job.request)
        self.jobs[job.request.id] = job

    def abort(self, request_id: str) -> list[Sample]:
        """End a job now; its unfinished samples end with the reason "abort"."""
        touched = self.take(self.engine.abort(request_id))
        self.jobs.pop(request_id, None)  # an engine that was broken off says nothing of it
        return touched

    def take(self, events: Sequence[Event]) -> list[Sample]:
        """Give each event to its sample; returns the samples that have something new."""
        touched: dict[Sample, None] = {}  # a set that keeps its order
        for event in events:
            job = self.jobs.get(event.request_id)
            if job is None:
                continue
            if isinstance(event, PromptLogprobsEvent):
                for sample in job.samples:
                    ids = sample.sequence.prompt_ids[event.start :]
                    sample.prompt_logprobs += [
                        TokenLogprob(token, *one)
                        for token, one in zip(ids, event.logprobs, strict=False)
                    ]
                continue
            sample = job.samples[event.sample_index]
            touched[sample] = None
            if isinstance(event, TokensEvent):
                self._push(event, sample)
                if sample.stopped_by_text:
                    self.take(self.engine.finish(event.request_id, event.sample_index))
                continue
            if isinstance(event, FailedEvent):
                sample.end("error", event.record, event.message)
            else:
                sample.end(event.reason, event.record)
            if job.finished:
                self.jobs.pop(event.request_id, None)
        return list(touched)

    def _push(self, event: TokensEvent, sample: Sample) -> None:
        logprobs: Sequence[TokenLogprobs | None] = event.logprobs or [None] * len(event.tokens)
        for token, one in zip(event.tokens, logprobs, strict=True):
            if not sample.finish_reason:
                found = None if one is None else TokenLogprob(token, *one)
                sample.push(token, found)
