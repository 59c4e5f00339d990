"""The readable loop: prefill the prompts once, then decode token by token with the cache.

`decode` is the algorithm, about forty lines that a newcomer can follow; what stands around it turns
prompts into samples and tokens into results. The engine does the same for requests that come and
go, and is compared with this file.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, groupby

import torch
from torch import Tensor

from kvist.attention import check_backend
from kvist.beam import beam_search
from kvist.cache import Batch, Cache, Codec, make_cache
from kvist.cache.batch import LogitRows
from kvist.core.ngram import prompt_lookup
from kvist.core.params import SamplingParams
from kvist.core.results import Delta, Result, TokenLogprob
from kvist.core.retention import Retention
from kvist.errors import RequestError
from kvist.loading.model import Model, Prompt
from kvist.prepare import prepare
from kvist.runner.encoder_cache import with_images
from kvist.runner.executors import choose_step
from kvist.runner.follow import Guessed, follow
from kvist.runner.sampler import Sampler, check_finite, is_simple, logprobs_of
from kvist.runner.step import StepFunction
from kvist.sample import Sample

DEFAULT_CHUNK = 2048

# What each row of the cache belongs to, its new tokens, and which logits are wanted.
Forward = Callable[[Sequence[Sample], Sequence[Sequence[int]], LogitRows], tuple[Batch, Tensor]]


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
    speculate: int = 0,
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
        speculate: guess up to this many tokens a step from what the sequence said before, and
            check them all in one forward; the tokens are the same, only sooner.
        step: what computes a step; None takes the model's executor.

    Returns:
        One result for each prompt, in order; n of them where a prompt asks for n samples.

    Raises:
        RequestError: a prompt or parameter makes no sense; nothing has been computed then.
        NumericalError: NaN logits; names the step.
    """
    samples = prepare(model, prompts, params)
    for group in _together(samples):
        store = open_cache(model, group, cache, codec, retention)
        for _ in decode(model, group, store, attention, chunk, use_cache, speculate, step):
            pass
    return [sample.result() for sample in samples]


def _together(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples that run as one batch: all but those with beams, which search prompt by prompt."""
    batch = [s for s in samples if s.params.num_beams == 1]
    beams = groupby((s for s in samples if s.params.num_beams > 1), lambda s: s.prompt_index)
    return [group for group in (batch, *(list(family) for _, family in beams)) if group]


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
    speculate: int = 0,
    step: StepFunction | None = None,
) -> Iterator[Delta]:
    """Generate from one prompt, step by step; arguments as in `generate`.

    Yields:
        What each step adds: text that will not be taken back, and its tokens. The last `Delta`
        carries the whole `Result`.
    """
    if params is not None and (params.n > 1 or params.num_beams > 1):
        raise RequestError(
            f"stream gives one sample, not n={params.n}, num_beams={params.num_beams}; use generate"
        )
    samples = prepare(model, [prompt], params)
    store = open_cache(model, samples, cache, codec, retention)
    steps = decode(model, samples, store, attention, chunk, use_cache, speculate, step)
    return (samples[0].delta() for _ in steps)


@torch.inference_mode()
def decode(
    model: Model,
    samples: Sequence[Sample],
    cache: Cache,
    attention: str = "auto",
    chunk: int = DEFAULT_CHUNK,
    use_cache: bool = True,
    speculate: int = 0,
    step: StepFunction | None = None,
) -> Iterator[None]:
    """Run all samples to their ends, one step of each for every `next`; arguments as in `generate`.

    `cache` has one row for each prompt, and may hold the beginning of it already.
    """
    step = step or choose_step(model.executor, model)
    backend = check_backend(attention)
    sampler = Sampler(model.config.vocab_size, model.device)
    for sample in samples:
        sampler.admit(sample.slot, sample.params, sample.sequence.prompt_ids)

    def forward(
        rows: Sequence[Sample],
        tokens: Sequence[Sequence[int]],
        logits: LogitRows,
        *,
        largest_only: bool = False,
    ) -> tuple[Batch, Tensor]:
        batch = Batch.pack(
            tokens, cache.lengths, device=model.device, logits=logits, largest_only=largest_only
        )
        if model.images is not None:
            batch = with_images(batch, model.decoder, [row.images for row in rows], model.images)
        scores = step(batch, cache.bind(batch, backend=backend))
        cache.commit(batch)  # only a step that went through counts
        return batch, scores

    # Prefill: the prompts' tokens all at once, compute-bound.
    logits = prefill(forward, samples, cache, chunk)
    if samples[0].params.num_beams > 1:
        beams = partial(_continue, forward, samples[0])
        beam_search(beams, logits[0], cache, samples)
        return
    running, steps = list(samples), 0
    guesses: list[list[int]] = [[] for _ in samples]

    # Decode: a token of each sequence at a time, with the cache, memory-bound.
    while running:
        check_finite(logits, partial(_owner, running, guesses), steps)
        choose(sampler, logits, running, guesses)
        yield
        rows = [row for row, sample in enumerate(running) if not sample.finish_reason]
        if any(guesses):  # forget the wrong ones; the last token itself is not written yet
            cache.crop([sample.sequence.num_tokens - 1 for sample in running])
        if rows and len(rows) < len(running):
            cache.reorder(rows)
        running = [running[row] for row in rows]
        if not running:
            return
        if use_cache:
            guesses = [guess(sample, speculate, cache.max_chunk) for sample in running]
            new = [[s.sequence.output_ids[-1], *g] for s, g in zip(running, guesses, strict=True)]
        else:
            cache.reset()
            new = [[*s.sequence.prompt_ids, *s.sequence.output_ids] for s in running]
        wanted: LogitRows = "all" if any(guesses) else "last"
        plain = wanted == "last" and all(map(_likeliest, running))
        _, logits = forward(running, new, wanted, largest_only=plain)
        steps += 1


def prefill(forward: Forward, samples: Sequence[Sample], cache: Cache, chunk: int) -> Tensor:
    """Write all prompts into the cache, chunk by chunk; the logits that follow each sample's.

    Samples of one prompt share its prefill, and its cache until their first own token.
    """
    if chunk < 1:
        raise RequestError(f"chunk must be at least one token, not {chunk}")
    families = [list(group) for _, group in groupby(samples, lambda s: s.prompt_index)]
    first = [family[0] for family in families]
    prompts = [sample.sequence.prompt_ids for sample in first]
    whole = any(sample.params.prompt_logprobs is not None for sample in samples)
    chunk = min(chunk, cache.max_chunk or chunk)
    last: dict[int, Tensor] = {}
    while any(cached < len(p) for cached, p in zip(cache.lengths, prompts, strict=True)):
        starts = cache.lengths
        parts = [p[n : n + chunk] for n, p in zip(starts, prompts, strict=True)]
        batch, logits = forward(first, parts, "all" if whole else "last")
        rows = iter(logits)
        for i, (part, (begin, end)) in enumerate(zip(parts, batch.query_spans, strict=True)):
            if part and whole:
                note_prompt(families[i], starts[i], logits[begin:end])
                last[i] = logits[end - 1]
            elif part:
                last[i] = next(rows)
    owners = [i for i, family in enumerate(families) for _ in family]
    if families[0][0].params.num_beams > 1:
        return last[0][None]  # one prompt; its beams branch by themselves
    if len(owners) > len(families):
        cache.reorder(owners)
    return torch.stack([last[i] for i in owners])


def choose(
    sampler: Sampler, logits: Tensor, running: Sequence[Sample], guesses: Sequence[Sequence[int]]
) -> None:
    """Sample the next token of each sample, and those behind it that were guessed right.

    Args:
        sampler: knows each sample by its slot.
        logits: `[sum of 1 + guesses, vocab]`, the samples' rows one behind the other.
        running: the samples.
        guesses: for each sample the tokens that were guessed to follow.
    """
    begins = list(accumulate((1 + len(g) for g in guesses), initial=0))
    rows = [
        Guessed(
            slot=sample.slot,
            first=first,
            drafts=drafts,
            uniforms=(
                ()
                if sample.params.greedy
                else [sample.sequence.uniform(ahead=i) for i in range(1 + len(drafts))]
            ),
            banned=sample.sequence.ending_ids,
            num_banned=sample.params.min_tokens - len(sample.sequence.output_ids),
        )
        for sample, first, drafts in zip(running, begins, guesses, strict=False)
    ]
    for sample, row, tokens in zip(running, rows, follow(sampler, logits, rows), strict=True):
        logprobs: Sequence[TokenLogprob | None] = [None] * len(tokens)
        if sample.params.logprobs is not None:
            behind = logits[row.first : row.first + len(tokens)]
            logprobs = logprobs_of(behind, tokens, [sample.params.logprobs] * len(tokens))
        for token, logprob in zip(tokens, logprobs, strict=True):
            if not sample.finish_reason:
                sample.push(token, logprob)


def _continue(forward: Forward, sample: Sample, new: Sequence[Sequence[int]]) -> Tensor:
    """One more token of each beam of a sample."""
    return forward([sample] * len(new), new, "last")[1]


def guess(sample: Sample, most: int, max_chunk: int | None) -> list[int]:
    """Guesses at a sample's next tokens, no more than it may still produce."""
    left = sample.params.max_tokens - len(sample.sequence.output_ids) - 1
    limit = min(most, left, most if max_chunk is None else max_chunk - 1)
    return prompt_lookup(sample.sequence.prompt_ids, sample.sequence.output_ids, limit)


def _likeliest(sample: Sample) -> bool:
    """Whether the sample's next token is where the largest logit is, and no more is asked of it."""
    params = sample.params
    said = len(sample.sequence.output_ids)
    return params.greedy and is_simple(params) and params.min_tokens <= said


def _owner(running: Sequence[Sample], guesses: Sequence[Sequence[int]], row: int) -> str:
    """What an error calls the sample that a row of logits belongs to."""
    owners = [s for s, g in zip(running, guesses, strict=True) for _ in range(1 + len(g))]
    return owners[row].name


def note_prompt(siblings: Sequence[Sample], start: int, logits: Tensor) -> None:
    """Log-probabilities of a prompt's tokens behind `[start, start + L)`, for all its samples."""
    wanted = siblings[0].params.prompt_logprobs
    following = siblings[0].sequence.prompt_ids[start + 1 : start + 1 + len(logits)]
    if wanted is not None and following:
        rows = logits[: len(following)]
        found = logprobs_of(rows, following, [wanted] * len(following))
        for sample in siblings:
            sample.prompt_logprobs += found


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
        codec=model.codec(codec) if isinstance(codec, str) else codec,
        retention=retention,
        rows=sum(s.sequence.sample_index == 0 for s in samples),
        max_length=min(longest, model.max_length),
        dtype=model.dtype,
        device=model.device,
    )
