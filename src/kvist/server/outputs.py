"""One output of a request: from the engine's deltas to reasoning, words and tool calls.

The same reading serves whole answers and streams, so that the two cannot differ. Writes no JSON.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvist.core.results import Delta, Result, TokenLogprob
from kvist.loading.model import Model
from kvist.server.hermes import CallParser, Part
from kvist.text.thinking import ThinkingParser, opens_thinking

Logprobs = tuple[TokenLogprob, ...]


@dataclass
class Output:
    """What has come of one sample so far.

    Args:
        thinking: separates reasoning from the answer; None leaves it in the text.
        calls: finds tool calls; None leaves them in the text.
    """

    thinking: ThinkingParser | None = None
    calls: CallParser | None = None
    reasoning_tokens: int = 0
    result: Result | None = None
    _ended: bool = field(default=False, repr=False)

    def take(self, delta: Delta) -> list[Part]:
        """What a step adds to it, in order."""
        if self.thinking is not None and self.thinking.inside:
            self.reasoning_tokens += len(delta.token_ids)
        parts = self._read(delta.text)
        if delta.result is not None:
            self.result = delta.result
            parts += self._rest()
        return parts

    @property
    def finish_reason(self) -> str:
        """Why it ended, as OpenAI puts it."""
        assert self.result is not None, "not finished"
        reason = self.result.finish_reason
        called = self.calls is not None and self.calls.calls > 0
        return "tool_calls" if called and reason == "stop" else reason

    def _read(self, text: str) -> list[Part]:
        if self.thinking is None:
            return self._words(text)
        parts: list[Part] = []
        for piece in self.thinking.push(text):
            parts += [Part("reasoning", piece.text)] if piece.thinking else self._words(piece.text)
        return parts

    def _words(self, text: str) -> list[Part]:
        if self.calls is not None:
            return self.calls.push(text)
        return [Part("content", text)] if text else []

    def _rest(self) -> list[Part]:
        parts: list[Part] = []
        if self.thinking is not None:
            for piece in self.thinking.flush():
                if piece.thinking:
                    parts.append(Part("reasoning", piece.text))
                else:
                    parts += self._words(piece.text)
        return parts + (self.calls.flush() if self.calls is not None else [])


def prompt_opens_thinking(model: Model, prompt_ids: Sequence[int]) -> bool:
    """Whether the prompt ends inside a thought, so that the output begins there."""
    if model.tokenizer is None:
        return False
    return opens_thinking(model.tokenizer.decode(prompt_ids[-16:], skip_special_tokens=False))


@dataclass(frozen=True)
class TokenText:
    """A token as log-probabilities show it."""

    text: str
    bytes: list[int] | None


def token_text(model: Model, token_id: int) -> TokenText:
    """The text of a single token; what is no whole character shows as U+FFFD, its bytes do not."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return TokenText(f"token_id:{token_id}", None)
    if tokenizer.is_byte_level:
        written = tokenizer.token_bytes(token_id)
        return TokenText(written.decode(errors="replace"), list(written))
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    return TokenText(text, list(text.encode()))


def visible(model: Model, logprobs: Iterable[TokenLogprob]) -> list[TokenLogprob]:
    """Those of tokens that stand in the text: not the one that ended it."""
    hidden = frozenset() if model.tokenizer is None else model.tokenizer.special_ids
    return [one for one in logprobs if one.token_id not in hidden]
