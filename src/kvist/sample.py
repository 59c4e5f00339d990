"""One sample in the making: its tokens, the text that is certain so far, and why it ends.

Joins a token sequence (`core/sequence.py`) with detokenisation and stop strings; the loop and the
engine push sampled tokens in, streams and results come out. It computes nothing.
"""

import time

from kvist.core.params import ResolvedParams
from kvist.core.record import RequestRecord
from kvist.core.request import ImageSpan
from kvist.core.results import Delta, Result, Timings, TokenLogprob, Usage
from kvist.core.sequence import Sequence
from kvist.text.detokenize import Detokenizer, StopStrings
from kvist.text.tokenizer import Tokenizer


class Sample:
    """One output of one prompt, growing token by token."""

    def __init__(
        self,
        prompt_ids: tuple[int, ...],
        params: ResolvedParams,
        tokenizer: Tokenizer | None,
        eos_token_ids: frozenset[int],
        *,
        prompt_index: int = 0,
        sample_index: int = 0,
        slot: int = 0,
        images: tuple[ImageSpan, ...] = (),
    ) -> None:
        """A sample that has its prompt and nothing else yet; the clock starts here.

        `slot` is where the sampler keeps what it needs to know of it, `images` are its prompt's.
        """
        self.sequence = Sequence(prompt_ids, params, eos_token_ids, sample_index)
        self.prompt_index = prompt_index
        self.slot = slot
        self.images = images
        self.request_id = ""  # the engine's name for its request
        self.prompt_logprobs: list[TokenLogprob | None] = [None]
        self.finish_reason: str | None = None
        self.record: RequestRecord | None = None
        self._error: str | None = None
        # The text follows the prompt's: it keeps the space between the two.
        self._detokenizer = (
            None if tokenizer is None else Detokenizer(tokenizer, prompt_ids=prompt_ids)
        )
        self._stops = StopStrings(params.stop)
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._stop_reason: str | int | None = None
        self._shown = (0, 0)  # pieces of text and tokens that `delta` has given out
        self._began = self._first = self._last = time.perf_counter()

    @property
    def params(self) -> ResolvedParams:
        """The sampling parameters."""
        return self.sequence.params

    @property
    def name(self) -> str:
        """What an error message calls it."""
        sample = f", sample {self.sequence.sample_index}" if self.params.n > 1 else ""
        return f"prompt {self.prompt_index}{sample}"

    def push(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Add a sampled token; sets `finish_reason` where it is the last."""
        self._last = time.perf_counter()
        if not self.sequence.output_ids:
            self._first = self._last
        reason = self.sequence.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        if reason == "stop" and token in self.params.stop_token_ids:
            self._stop_reason = token
        if self._detokenizer is not None:
            piece = self._detokenizer.push(token)
            if reason is not None:
                piece += self._detokenizer.flush()
            certain, _ = self._stops.push(piece)
            if reason is not None:
                certain += self._stops.flush()
            self._text.append(certain)
            if self._stops.matched is not None:
                reason, self._stop_reason = "stop", self._stops.matched
        self.finish_reason = reason

    @property
    def stopped_by_text(self) -> bool:
        """Whether a stop string has ended it, which nobody who sees only tokens can know."""
        return self._stops.matched is not None

    def end(self, reason: str, record: RequestRecord, error: str | None = None) -> None:
        """The engine has let go of it; `reason` counts unless its own tokens ended it before."""
        self.record, self._error = record, error
        if self.finish_reason is None and self._detokenizer is not None:
            held, _ = self._stops.push(self._detokenizer.flush())
            self._text.append(held + self._stops.flush())
        if self.finish_reason is None or error is not None:
            self.finish_reason = reason

    def delta(self) -> Delta:
        """What has come since the last delta; with the result once it is finished."""
        (pieces, tokens), ids = self._shown, self.sequence.output_ids
        self._shown = (len(self._text), len(ids))
        return Delta(
            text="".join(self._text[pieces:]),
            token_ids=tuple(ids[tokens:]),
            logprobs=tuple(self._logprobs[tokens:]),
            sample_index=self.sequence.sample_index,
            result=self.result() if self.finish_reason is not None else None,
            prompt_logprobs=None if tokens else self._known_of_prompt(),
        )

    def result(self) -> Result:
        """The finished sample."""
        assert self.finish_reason is not None, "not finished"
        prompt, output = self.sequence.prompt_ids, self.sequence.output_ids
        return Result(
            text="".join(self._text),
            token_ids=tuple(output),
            finish_reason=self.finish_reason,
            usage=Usage(len(prompt), len(output), self.record.cached_tokens if self.record else 0),
            timings=Timings(self._first - self._began, self._last - self._first),
            logprobs=None if self.params.logprobs is None else tuple(self._logprobs),
            prompt_logprobs=self._known_of_prompt(),
            stop_reason=self._stop_reason,
            prompt_index=self.prompt_index,
            sample_index=self.sequence.sample_index,
            record=self.record,
            error=self._error,
        )

    def _known_of_prompt(self) -> tuple[TokenLogprob | None, ...] | None:
        """Complete before the first token is sampled."""
        return None if self.params.prompt_logprobs is None else tuple(self.prompt_logprobs)
