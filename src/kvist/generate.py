"""The readable loop: prefill the prompts once, then decode token by token with the cache.

`decode` is the algorithm, about forty lines that a newcomer can follow; what stands around it turns
prompts into samples and tokens into results. The engine does the same for requests that come and
go, and is compared with this file.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvist.attention import check_backend
from kvist.cache import Batch, Cache, Codec, make_cache
from kvist.cache.batch import LogitRows
from kvist.core.params import SamplingParams, refuse_unbuilt
from kvist.core.results import Delta, Result
from kvist.core.retention import Retention
from kvist.errors import ContextTooLong, RequestError
from kvist.loading.model import Model, Prompt
from kvist.runner.sampler import Sampler, check_finite, logprobs_of
from kvist.runner.step import StepFunction, model_step
from kvist.sample import Sample

DEFAULT_CHUNK = 2048


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    cache: str = "dynamic",
    codec: str | Codec = "plain",
    *,
    retention: Retention | None = None,
    attention: str = "auto",
    chunk: int = DEFAULT_CHUNK,
    use_cache: bool = True,
    step: StepFunction | None = None,
) -> list[Result]:
    """Generate from all prompts at once, ragged and without padding.

    Args:
        model: from `kvist.load`.
        prompts: a list; each is text, token ids, or chat messages.
        params: one for all, or one for each prompt; None takes the model's defaults.
        cache: layout, a name in `kvist.cache.LAYOUTS`.
        codec: how keys and values are written, a name in `kvist.cache.CODECS` or a codec.
        retention: which tokens stay; all by default.
        attention: a name in `kvist.attention.BACKENDS`, or "auto".
        chunk: most prompt tokens of a sequence in one forward.
        use_cache: False computes everything anew for each token, to see what a cache is worth.
        step: a drop-in for the model's own forward.

    Returns:
        One result for each prompt, in order; n of them where a prompt asks for n samples.

    Raises:
        RequestError: a prompt or parameter makes no sense; nothing has been computed then.
        NumericalError: NaN logits; names the step.
    """
    samples = prepare(model, prompts, params)
    store = open_cache(model, samples, cache, codec, retention)
    for _ in decode(model, samples, store, attention, chunk, use_cache, step):
        pass
    return [sample.result() for sample in samples]


def stream(
    model: Model,
    prompt: Prompt,
    params: SamplingParams | None = None,
    cache: str = "dynamic",
    codec: str | Codec = "plain",
    *,
    retention: Retention | None = None,
    attention: str = "auto",
    chunk: int = DEFAULT_CHUNK,
    use_cache: bool = True,
    step: StepFunction | None = None,
) -> Iterator[Delta]:
    """Generate from one prompt, step by step; arguments as in `generate`.

    Yields:
        What each step adds: text that will not be taken back, and its tokens. The last `Delta`
        carries the whole `Result`.
    """
    if params is not None and params.n > 1:
        raise RequestError(f"stream gives one sample, not n={params.n}; use generate")
    samples = prepare(model, [prompt], params)
    store = open_cache(model, samples, cache, codec, retention)
    steps = decode(model, samples, store, attention, chunk, use_cache, step)
    return (samples[0].delta() for _ in steps)


@torch.inference_mode()
def decode(
    model: Model,
    samples: Sequence[Sample],
    cache: Cache,
    attention: str = "auto",
    chunk: int = DEFAULT_CHUNK,
    use_cache: bool = True,
    step: StepFunction | None = None,
) -> Iterator[None]:
    """Run all samples to their ends, one token of each for every `next`.

    `cache` has one row for each prompt, and may hold the beginning of it already.
    """
    step = step or model_step(model.lm)
    backend = check_backend(attention)
    sampler = Sampler(model.config.vocab_size, model.device)
    for slot, sample in enumerate(samples):
        sampler.admit(slot, sample.params, sample.sequence.prompt_ids)

    def forward(tokens: Sequence[Sequence[int]], logits: LogitRows = "last") -> tuple[Batch, Tensor]:
        batch = Batch.pack(tokens, cache.lengths, device=model.device, logits=logits)
        scores = step(batch, cache.bind(batch, backend=backend))
        cache.commit(batch)  # only a step that went through counts
        return batch, scores

    # Prefill: the prompts' tokens all at once, compute-bound.
    logits = prefill(forward, samples, cache, chunk)

    # Decode: one token of each sequence at a time, with the cache, memory-bound.
    running, steps = list(range(len(samples))), 0
    while running:
        check_finite(logits, [samples[slot].name for slot in running], steps)
        choose(sampler, logits, running, samples)
        yield
        going = [row for row, slot in enumerate(running) if not samples[slot].finish_reason]
        if len(going) < len(running):
            running = [running[row] for row in going]
            if running:
                cache.reorder(going)
        if not running:
            return
        if use_cache:
            new = [samples[slot].sequence.output_ids[-1:] for slot in running]
        else:
            cache.reset()
            new = [
                [*s.prompt_ids, *s.output_ids] for s in (samples[slot].sequence for slot in running)
            ]
        _, logits = forward(new)
        steps += 1


def prefill(forward: Any, samples: Sequence[Sample], cache: Cache, chunk: int) -> Tensor:
    """Write all prompts into the cache, chunk by chunk; the logits that follow each sample's.

    Samples of one prompt share its prefill, and its cache until their first own token.
    """
    first = [slot for slot, sample in enumerate(samples) if sample.sequence.sample_index == 0]
    prompts = [samples[slot].sequence.prompt_ids for slot in first]
    whole = any(samples[slot].params.prompt_logprobs is not None for slot in first)
    chunk = min(chunk, cache.max_chunk or chunk)
    last: list[Tensor | None] = [None] * len(prompts)
    while any(cached < len(p) for cached, p in zip(cache.lengths, prompts, strict=True)):
        starts = cache.lengths
        parts = [p[n : n + chunk] for n, p in zip(starts, prompts, strict=True)]
        batch, logits = forward(parts, "all" if whole else "last")
        rows = iter(logits)
        for i, (part, (begin, end)) in enumerate(zip(parts, batch.query_spans, strict=True)):
            if not part:
                continue
            if whole:
                note_prompt(samples[first[i]], starts[i], logits[begin:end])
            last[i] = logits[end - 1] if whole else next(rows)
    owners = [i for i, slot in enumerate(first) for _ in range(samples[slot].params.n)]
    if len(owners) > len(first):
        cache.reorder(owners)
    return torch.stack([logits for i in owners if (logits := last[i]) is not None])


def choose(
    sampler: Sampler, logits: Tensor, slots: Sequence[int], samples: Sequence[Sample]
) -> None:
    """Sample the next token of each running sample and push it."""
    running = [samples[slot] for slot in slots]
    tokens = sampler.sample(
        logits,
        slots,
        [s.sequence.uniform() for s in running],
        [s.sequence.banned_ids() for s in running],
    )
    tops = [s.params.logprobs for s in running]
    asked = any(k is not None for k in tops)
    logprobs = logprobs_of(logits, tokens, tops) if asked else [None] * len(tokens)
    for sample, token, logprob in zip(running, tokens, logprobs, strict=True):
        sample.push(token, logprob if sample.params.logprobs is not None else None)


def note_prompt(sample: Sample, start: int, logits: Tensor) -> None:
    """Log-probabilities of the prompt's tokens behind the positions `[start, start + L)`."""
    wanted = sample.params.prompt_logprobs
    following = sample.sequence.prompt_ids[start + 1 : start + 1 + len(logits)]
    if wanted is not None and following:
        rows = logits[: len(following)]
        sample.prompt_logprobs += logprobs_of(rows, following, [wanted] * len(following))


def prepare(
    model: Model,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
) -> list[Sample]:
    """Check every prompt and parameter, before any work; one sample each, or n."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise RequestError(f"prompts is a list, such as [prompt], not {type(prompts).__name__}")
    if not prompts:
        raise RequestError("prompts is empty; give at least one")
    if params is None or isinstance(params, SamplingParams):
        given = [params or SamplingParams()] * len(prompts)
    else:
        given = list(params)
    if len(given) != len(prompts):
        raise RequestError(f"{len(given)} sampling parameters for {len(prompts)} prompts")
    samples = []
    for index, (prompt, asked) in enumerate(zip(prompts, given, strict=True)):
        refuse_unbuilt(asked)
        ids = model.encode(prompt)
        resolved = asked.resolve(model.generation_config)
        room = model.max_length - len(ids)
        if room < (1 if asked.max_tokens is None else resolved.max_tokens):
            raise ContextTooLong(
                f"prompt {index} has {len(ids)} tokens; with max_tokens "
                f"{resolved.max_tokens} it needs {len(ids) + resolved.max_tokens}, and the model's "
                f"limit is {model.max_length}"
            )
        if resolved.stop and model.tokenizer is None:
            raise RequestError(f"{model.name} has no tokenizer, so stop strings cannot be met")
        resolved = resolved.with_max_tokens(min(resolved.max_tokens, room))
        for token in (*resolved.stop_token_ids, *resolved.logit_bias):
            if token >= model.config.vocab_size:
                raise RequestError(
                    f"token id {token} is not in the vocabulary of {model.config.vocab_size}"
                )
        samples += [
            Sample(
                ids,
                resolved,
                model.tokenizer,
                model.eos_token_ids,
                prompt_index=index,
                sample_index=i,
            )
            for i in range(resolved.n)
        ]
    return samples


def open_cache(
    model: Model,
    samples: Sequence[Sample],
    layout: str,
    codec: str | Codec,
    retention: Retention | None,
) -> Cache:
    """An empty cache with a row for each prompt."""
    longest = max(len(s.sequence.prompt_ids) + s.params.max_tokens for s in samples)
    return make_cache(
        model.specs,
        layout=layout,
        codec=codec,
        retention=retention,
        rows=sum(s.sequence.sample_index == 0 for s in samples),
        max_length=min(longest, model.max_length),
        dtype=model.dtype,
        device=model.device,
    )
