"""What a request asks of sampling: temperature and filters, limits, stops, what to report.

`SamplingParams` is what a user writes. A field left at None takes the model's own default
(`generation_config.json`), else the field's usual one; `resolve` settles that once, at the door,
so that nothing behind it ever meets a None it has to interpret. Standard library only.
"""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from typing import Any

from kvist.core.rng import fresh_seed
from kvist.errors import RequestError

DEFAULT_MAX_TOKENS = 256
MAX_LOGPROBS = 50


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop, for one request.

    Temperature 0 is greedy: the filters and the seed then have no effect. The order is the
    field's usual one: logit bias, penalties, temperature, top-k, top-p, min-p.

    Args:
        temperature: 0 (greedy) or a positive divisor of the logits. None: the model's default,
            which is greedy unless its generation_config.json asks for sampling.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens up to this much probability, (0, 1].
        min_p: keep tokens at least this fraction as likely as the likeliest, [0, 1].
        max_tokens: new tokens at most. None: the model's default, else 256.
        min_tokens: no end-of-sequence and no stop token before this many.
        stop: strings that end the output; they are not part of it.
        stop_token_ids: token ids that end the output, beside the model's end-of-sequence ids.
        ignore_eos: go on after the model's end-of-sequence ids.
        seed: the same seed gives the same draws alone or in any batch. None: a fresh one.
        n: samples of the same prompt.
        logprobs: None for none; k >= 0 for each token's own log-probability and the k likeliest.
        prompt_logprobs: the same for the prompt's tokens.
        repetition_penalty: > 0; over 1 makes tokens of prompt and output less likely (CTRL).
        presence_penalty: subtracted once from tokens already in the output, [-2, 2].
        frequency_penalty: subtracted for each time a token is in the output, [-2, 2].
        logit_bias: token id -> added to its logit.
        num_beams: > 1 searches with that many beams instead of sampling.
        filter_first: nanoVLM's order: top-k and top-p see the logits before the temperature, and
            top-p drops the token that crosses it. min-p then has no effect.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    num_beams: int = 1
    filter_first: bool = False

    def __post_init__(self) -> None:
        """Refuse what makes no sense, naming the field, the value and what would do."""
        for one in fields(SamplingParams):
            if one.default is not None and getattr(self, one.name) is None:
                raise RequestError(f"{one.name} must not be None; leave it out for its default")
        stop = (self.stop,) if isinstance(self.stop, str) else _tuple("stop", self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", _tuple("stop_token_ids", self.stop_token_ids))
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(
                f"logit_bias must map token ids to numbers, such as {{5: -1.0}}, not "
                f"{self.logit_bias!r}"
            )
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        _number("temperature", self.temperature, 0.0, None)
        _integer("top_k", self.top_k, 0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0)
        _integer("seed", self.seed, None)
        _integer("n", self.n, 1)
        _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        _number("repetition_penalty", self.repetition_penalty, 0.0, None, above=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _integer("num_beams", self.num_beams, 1)
        for name in ("ignore_eos", "filter_first"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise RequestError(f"{name} must be True or False, not {value!r}")
        for text in stop:
            if not isinstance(text, str) or not text:
                raise RequestError(f"stop must be non-empty strings, not {text!r}")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0)
        for token, bias in self.logit_bias.items():
            _integer("logit_bias token", token, 0)
            _number("logit_bias value", bias, None, None)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}"
            )

    def resolve(self, generation_config: Mapping[str, Any]) -> "ResolvedParams":
        """Settle every default against the model's generation_config.json.

        As in transformers, the model samples only if its file says `do_sample`; a temperature or
        a filter given by the user speaks for itself.
        """
        samples = bool(generation_config.get("do_sample", False))

        def settle(name: str, usual: Any, given: Any) -> Any:
            if given is not None:
                return given
            value = generation_config.get(name) if samples else None
            return usual if value is None else value

        asked = any(x is not None for x in (self.temperature, self.top_k, self.top_p, self.min_p))
        temperature = settle("temperature", 1.0 if asked or samples else 0.0, self.temperature)
        penalty = self.repetition_penalty
        if penalty is None:
            penalty = generation_config.get("repetition_penalty") or 1.0
        max_tokens = self.max_tokens
        if max_tokens is None:
            given = generation_config.get("max_new_tokens")
            max_tokens = max(given or DEFAULT_MAX_TOKENS, self.min_tokens)
        values = {f.name: getattr(self, f.name) for f in fields(SamplingParams)}
        values |= {
            "temperature": float(temperature),
            "top_k": int(settle("top_k", 0, self.top_k)),
            "top_p": float(settle("top_p", 1.0, self.top_p)),
            "min_p": float(settle("min_p", 0.0, self.min_p)),
            "max_tokens": max_tokens,
            "repetition_penalty": float(penalty),
            "seed": fresh_seed() if self.seed is None else self.seed,
        }
        return ResolvedParams(**values)


@dataclass(frozen=True)
class ResolvedParams(SamplingParams):
    """Sampling parameters with nothing left open; what the engine and the sampler see."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = DEFAULT_MAX_TOKENS
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    repetition_penalty: float = 1.0

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0

    def with_max_tokens(self, max_tokens: int) -> "ResolvedParams":
        """The same parameters with another limit."""
        return replace(self, max_tokens=max_tokens)


def _tuple(name: str, values: Any) -> tuple[Any, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence | Set):
        raise RequestError(f"{name} must be a list, not {values!r}")
    return tuple(values)


def _number(
    name: str, value: float | None, low: float | None, high: float | None, *, above: bool = False
) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"{name} must be a finite number, not {value!r}")
    too_low = low is not None and (value <= low if above else value < low)
    too_high = high is not None and value > high
    if too_low or too_high:
        opening = "(" if above else "["
        span = f"{opening}{low}, {high}]" if high is not None else f"{'>' if above else '>='} {low}"
        raise RequestError(f"{name} must be {'in ' if high is not None else ''}{span}, not {value}")


def _integer(name: str, value: int | None, low: int | None, high: int | None = None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be a whole number, not {value!r}")
    if low is not None and value < low:
        raise RequestError(f"{name} must be >= {low}, not {value}")
    if high is not None and value > high:
        raise RequestError(f"{name} must be <= {high}, not {value}")
