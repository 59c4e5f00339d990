"""Grammars: which tokens may come next, so that an output is the JSON, or the call, it has to be.

llguidance does the parsing; here its grammars become what the engine asks for: a handle for each
token's mask, and the mask of a handle. A grammar sees token ids alone and remembers where it was,
so that a step costs it one token. Compiled by `LLM.grammars` and `AsyncLLM.grammars`, asked by
scheduler and runner.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvist.errors import MissingDependency, RequestError
from kvist.loading.model import Model

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# A grammar comes with a request: what it may cost at most, in llguidance's own units. Ordinary
# schemas stay orders of magnitude below.
LIMITS: dict[str, Any] = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 500_000,
    "precompute_large_lexemes": False,
}
KEPT = 64  # compiled grammars
# JSON is held to the spacing that `json.dumps` writes, which is what models have seen most.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_rule(schema: Any) -> str:
    """What a grammar's source says where JSON of this schema shall stand."""
    if isinstance(schema, Mapping):
        schema = {**schema, "x-guidance": _SPACING}
    return f"%json {json.dumps(schema)}"


class Grammars:
    """An engine's grammars, and the masks that are about to be used."""

    def __init__(self, model: Model) -> None:
        """Nothing is imported before the first grammar comes."""
        self.vocab_size = model.config.vocab_size
        self.eos_token_ids = sorted(model.eos_token_ids)
        self.device = model.device
        self._tokenizer = model.tokenizer
        self._ours: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = Lock()
        self._handles = count(1)
        self._masks: dict[int, Tensor] = {}

    def json(self, schema: Mapping[str, Any] | None = None) -> "CompiledGrammar":
        """JSON that fits a schema, in `json.dumps`'s spacing; None allows any object.

        Raises:
            RequestError, MissingDependency: as `compile`.
        """
        if schema is not None and not isinstance(schema, Mapping):
            raise RequestError(
                f"a schema is a mapping, such as {{'type': 'object'}}, not {schema!r}; "
                "a pydantic model's is model_json_schema()"
            )
        return self.compile(f"start: {json_rule({'type': 'object'} if schema is None else schema)}")

    def regex(self, pattern: str) -> "CompiledGrammar":
        r"""Text that a regular expression matches whole.

        The syntax is Rust's, where `\d` is any script's digit.

        Raises:
            RequestError, MissingDependency: as `compile`.
        """
        with self._lock:
            self._tokens()
        from llguidance import LLMatcher

        return self.compile(LLMatcher.grammar_from_regex(pattern))

    def choice(self, texts: Sequence[str]) -> "CompiledGrammar":
        """One of these texts.

        Raises:
            RequestError, MissingDependency: as `compile`.
        """
        if isinstance(texts, str) or not texts:
            raise RequestError(f"a choice is a list of texts, at least one, not {texts!r}")
        return self.compile(f"start: {' | '.join(json.dumps(text) for text in texts)}")

    def compile(self, source: str) -> "CompiledGrammar":
        """Make a grammar of llguidance's dialect of Lark; takes milliseconds, on any thread.

        Raises:
            RequestError: it is wrong, too complex, or the model has no tokenizer.
            MissingDependency: llguidance is not installed.
        """
        with self._lock:
            matcher = self._compiled.pop(source, None) or self._new_matcher(source)
            self._compiled[source] = matcher
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return CompiledGrammar(self, matcher)

    def begin(self, grammar: "CompiledGrammar") -> "Parse":
        """The grammar as one request asks it.

        Raises:
            RequestError: it is another engine's.
        """
        if grammar.grammars is not self:
            raise RequestError(
                "this grammar was compiled for another engine; compile it by this one's grammars"
            )
        return Parse(grammar)

    def tag(self, text: str) -> str:
        """A tag such as `<think>` as a grammar writes it: its own token, if it has one, else text.

        Raises:
            RequestError, MissingDependency: as `compile`.
        """
        with self._lock:
            ours = self._tokens()
        token = None if self._tokenizer is None else self._tokenizer.token_to_id(text)
        return text if token is not None and ours.is_special_token(token) else json.dumps(text)

    def mask_of(self, handle: int) -> Tensor:
        """The mask of a handle, bool `[vocab_size]`; each is asked for once."""
        return self._masks.pop(handle)

    def keep(self, mask: Tensor) -> int:
        """A handle for a mask that is about to be used."""
        handle = next(self._handles)
        self._masks[handle] = mask
        # A step that breaks off leaves its masks behind; no more than that many rows have one.
        self._masks.pop(handle - 4096, None)
        return handle

    def _tokens(self) -> "LLTokenizer":
        """The tokenizer as llguidance reads it; seconds for a large one, once."""
        if self._ours is None:
            if self._tokenizer is None:
                raise RequestError("this model has no tokenizer, so no format can be held to")
            try:
                from llguidance import LLTokenizer
            except ImportError as error:
                raise MissingDependency(
                    "grammars need llguidance; install it: pip install 'kvist[grammars]'"
                ) from error
            self._ours = LLTokenizer(
                self._tokenizer.backend.to_str(),
                n_vocab=self.vocab_size,
                eos_token=self.eos_token_ids[0] if self.eos_token_ids else None,
            )
        return self._ours

    def _new_matcher(self, source: str) -> "LLMatcher":
        tokens = self._tokens()
        from llguidance import LLMatcher, LLParserLimits

        matcher = LLMatcher(tokens, source, log_level=0, limits=LLParserLimits(**LIMITS))
        if matcher.is_error():
            raise RequestError(f"the format cannot be used: {_reason(matcher)}")
        return matcher


@dataclass(frozen=True, eq=False)
class CompiledGrammar:
    """What outputs are held to, in any number of requests; made by `Grammars` alone."""

    grammars: Grammars
    start: "LLMatcher"


@dataclass
class _Place:
    """A matcher, and the tokens that it has seen."""

    matcher: "LLMatcher"
    seen: list[int] = field(default_factory=list)


class Parse:
    """Implements `core.request.Grammar` for one request, all of its samples."""

    def __init__(self, grammar: CompiledGrammar) -> None:
        """Made by `Grammars.begin` alone."""
        self._grammars = grammar.grammars
        self._start = grammar.start
        self._places: list[_Place] = []

    def mask(self, output_ids: Sequence[int]) -> int:
        """See `core.request.Grammar`.

        Raises:
            RequestError: the output does not fit the grammar, or it became too complex.
        """
        place = self._place(output_ids)
        fresh = list(output_ids[len(place.seen) :])
        if fresh and not place.matcher.is_stopped():
            place.matcher.consume_tokens(fresh)
        place.seen += fresh
        # An error stops a matcher too; an end is the only other reason.
        if place.matcher.is_error():
            raise RequestError(_reason(place.matcher))
        return self._grammars.keep(self._allowed(place.matcher))

    def _place(self, output_ids: Sequence[int]) -> _Place:
        """One whose tokens this output begins with: the sample's own, or a new one."""
        for place in self._places:
            seen = len(place.seen)
            if seen <= len(output_ids) and list(output_ids[:seen]) == place.seen:
                return place
        self._places.append(_Place(self._start.deep_copy()))
        return self._places[-1]

    def _allowed(self, matcher: "LLMatcher") -> Tensor:
        grammars = self._grammars
        allowed = torch.zeros(grammars.vocab_size, dtype=torch.bool)
        ends = matcher.is_stopped() or matcher.is_accepting()
        if not matcher.is_stopped():
            packed = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)
            bits = packed[:, None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8))
            known = bits.bitwise_and_(1).flatten()[: grammars.vocab_size]
            allowed[: len(known)] = known.bool()
        if matcher.is_error():
            raise RequestError(_reason(matcher))
        if grammars.eos_token_ids:
            allowed[grammars.eos_token_ids] = ends
        if not allowed.any():
            raise RequestError("no token of the vocabulary fits the format here")
        return allowed.to(grammars.device)


def _reason(matcher: "LLMatcher") -> str:
    """Llguidance's complaint, its first line."""
    return next(iter(matcher.get_error().splitlines()), "it is too complex")[:300]
