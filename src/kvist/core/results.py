"""What a request gives back: text, ids, log-probabilities, why it ended, and what it cost.

Plain data, shared by the loop, the engine and the server. Standard library only.
"""

from dataclasses import dataclass

from kvist.core.record import RequestRecord


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log-probability under the model, before penalties and filters.

    `top` holds the likeliest tokens at that place, likeliest first, as many as were asked for;
    `rank` is 1 for the likeliest, and one more for each token that is likelier than this one.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens that a request took; `cached_tokens` of the prompt's were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Seconds, as the request saw them; in a batch they are shared with its neighbours.

    `prefill` is the time to the first token, `decode` the time from there to the last.
    """

    prefill: float
    decode: float


@dataclass(frozen=True)
class Result:
    """One finished sample.

    Args:
        text: the output, without special tokens and without the stop string that ended it.
        token_ids: every token that was sampled, the one that ended it included.
        finish_reason: "stop" (end of sequence, stop token or stop string) or "length"; from the
            engine also "abort" and "error".
        usage: tokens taken.
        timings: seconds taken.
        logprobs: one entry for each token, if asked for.
        prompt_logprobs: one for each prompt token, None for the first, if asked for.
        stop_reason: the stop string or token id that ended it, if one did.
        prompt_index: which of the prompts it answers.
        sample_index: which of that prompt's n samples it is.
        record: from the engine, what the cache did for it: hits by tier, why the rest missed,
            preemptions, times.
        error: why it failed, where `finish_reason` is "error".
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    stop_reason: str | int | None = None
    prompt_index: int = 0
    sample_index: int = 0
    record: RequestRecord | None = None
    error: str | None = None


@dataclass(frozen=True)
class Delta:
    """What one step of a stream adds; the last one carries the whole result.

    A sample's first has its prompt's log-probabilities, as the result does, if they were asked for.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    sample_index: int = 0
    result: Result | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
