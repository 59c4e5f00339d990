"""Tokens to text while they come, one sequence at a time, and the search for stop strings in it.

`Detokenizer` gives text as soon as it is certain and never takes any back; `StopStrings` holds text
back for as long as it may be the beginning of a stop string. Neither ends a sequence: they say what
may be shown. Called once for every sampled token, by `generate()` and by the engine's output side.
"""

from __future__ import annotations

import codecs
import re
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from kvist.errors import RequestError

if TYPE_CHECKING:
    from kvist.text.tokenizer import Tokenizer

__all__ = ["Detokenizer", "StopStrings"]


class Detokenizer:
    """Incremental detokenisation of one sequence.

    What all calls return, joined, equals `tokenizer.decode` of the same ids, for any ids at all:
    cut characters and invalid bytes give the same U+FFFD. How soon text comes depends on the
    tokenizer's decoder:

    - byte-level (GPT-2, Llama 3, Qwen, SmolLM): a token's text at once, less the last one to three
      bytes if they may be the start of a character;
    - SentencePiece's and other decoders in which a token's text depends only on whether it is the
      first: at once too, but a run of byte tokens waits for its end, since one invalid byte makes
      the library replace the whole run;
    - any other decoder may still change all it said: the text comes with `flush`.

    Cost: constant for each token, whatever came before.

    Args:
        tokenizer: the model's.
        skip_special_tokens: leave out what `tokenizer.special_ids` names, as if it were not there.
        prompt_ids: tokens before the first one pushed. The text then is what follows the prompt's,
            so that a first word keeps its leading space in SentencePiece vocabularies, and a
            character that the prompt leaves unfinished is finished in the output.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoding = _decoding(tokenizer)
        self._decoding.begin(i for i in reversed(prompt_ids) if i not in self._hidden)

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is certain now, often "" ."""
        return "" if token_id in self._hidden else self._decoding.push(token_id)

    def flush(self) -> str:
        """Return the rest, at the sequence's end; nothing may be pushed afterwards."""
        return self._decoding.flush()


class _Decoding(Protocol):
    """One way to decode visible tokens one by one."""

    def begin(self, prompt_backwards: Iterable[int]) -> None: ...
    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


def _decoding(tokenizer: Tokenizer) -> _Decoding:
    if tokenizer.is_byte_level:
        return _ByteLevel(tokenizer)
    if all(_is_local(part) for part in tokenizer.decoder_parts):
        return _Windowed(tokenizer)
    return _AtTheEnd(tokenizer)


def _is_local(part: dict[str, Any]) -> bool:
    """Whether a decoder's step gives each token its text by itself, but for the first one's."""
    match part["type"]:
        case "ByteFallback" | "Fuse" | "Metaspace" | "BPEDecoder" | "WordPiece":
            return True
        case "Replace":  # a longer pattern could span tokens, an empty text hide one
            pattern = part["pattern"].get("String", "")
            return len(pattern) == 1 and bool(part["content"])
        case "Strip":  # more could reach into the second token, `stop` takes back the last
            return bool(part["start"] <= 1 and part["stop"] == 0)
    return False


class _ByteLevel:
    """Tokens are bytes, so an incremental UTF-8 decoder is all it takes.

    Python's "replace" and the library put U+FFFD in the same places: one for each maximal part of
    a sequence that could have become a character (Unicode standard, 3.9, "U+FFFD substitution").
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def begin(self, prompt_backwards: Iterable[int]) -> None:
        # UTF-8 finds its own step: the last three bytes hold all of an unfinished character.
        tail = b""
        for token_id in prompt_backwards:
            tail = self._tokenizer.token_bytes(token_id) + tail
            if len(tail) >= 3:
                break
        self._utf8.decode(tail)

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Windowed:
    """Decodes a few tokens that were shown together with the new ones; shows the difference.

    The shown ones absorb whatever the decoder does to the first token of a text.
    """

    _BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._falls_back = any(part["type"] == "ByteFallback" for part in tokenizer.decoder_parts)
        self._ids: list[int] = []  # [0, shown) was shown, as `_text`; the others wait
        self._shown = 0
        self._text = ""

    def begin(self, prompt_backwards: Iterable[int]) -> None:
        tail: list[int] = []
        for token_id in prompt_backwards:
            if not self._tokenizer.id_to_token(token_id):
                continue
            tail.append(token_id)
            if not self._is_byte(token_id):
                break
        self._ids = tail[::-1]
        self._shown = len(tail)
        self._text = self._decode(self._ids)
        if tail and self._is_byte(tail[0]):
            self._text = self._text.rstrip("\ufffd")

    def push(self, token_id: int) -> str:
        if self._tokenizer.id_to_token(token_id) is None:
            return ""
        self._ids.append(token_id)
        return "" if self._is_byte(token_id) else self._advance()

    def flush(self) -> str:
        return self._advance()

    def _advance(self) -> str:
        new = self._decode(self._ids)[len(self._text) :]
        if new:  # then the tokens that waited have text, and can stand in for all before them
            self._ids = self._ids[self._shown :]
            self._text = self._decode(self._ids)
        self._shown = len(self._ids)
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _is_byte(self, token_id: int) -> bool:
        token = self._tokenizer.id_to_token(token_id) or ""
        return self._falls_back and self._BYTE.fullmatch(token) is not None


class _AtTheEnd:
    """Keeps all tokens and decodes them once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._prompt: list[int] = []
        self._ids: list[int] = []

    def begin(self, prompt_backwards: Iterable[int]) -> None:
        self._prompt = [*prompt_backwards][::-1]

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        return ""

    def flush(self) -> str:
        decode = self._tokenizer.decode
        before = decode(self._prompt, skip_special_tokens=False)
        return decode([*self._prompt, *self._ids], skip_special_tokens=False)[len(before) :]


class StopStrings:
    """Finds the stop string that begins earliest in a text that comes in pieces.

    Where two begin at the same place, the shorter one is found. The result does not depend on how
    the text was cut; it may take a few characters more to see that no other one began earlier.
    One pass over the text, whatever the number and length of stop strings (Aho and Corasick, 1975).

    Args:
        stops: the strings; none at all is fine, an empty one is not.

    Attributes:
        matched: the stop string that was met, or None so far; look again after `flush`.

    Raises:
        RequestError: not a list of non-empty strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str):
            raise RequestError(f"stop must be a list of strings; write [{stops!r}]")
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise RequestError(f"a stop string must be a non-empty string, not {stop!r}")
        self.matched: str | None = None
        self._trie = _Trie(stops)
        # What is held back is what the node spells: the longest end of the text so far that begins
        # some stop string. All before it was shown.
        self._node = 0
        # Once a stop string was found, only this much of the held text stands before it. While that
        # is more than nothing, one that began earlier is still possible.
        self._found: str | None = None
        self._before = 0

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece of text.

        Returns:
            The text that can be shown now, and whether a stop string was met. If so, the text ends
            before it, and all later pieces give ("", True).
        """
        if self.matched is not None:
            return "", True
        if self._node == 0 and self._trie.children[0].keys().isdisjoint(text):
            return text, False
        shown: list[str] = []
        for character in text:
            if self._settled(character, shown):
                self.matched = self._found
                return "".join(shown), True
        return "".join(shown), False

    def flush(self) -> str:
        """Return what was held back, at the text's end; "" if a stop string was met before."""
        if self.matched is not None:
            return ""
        held = self._trie.spelled(self._node)
        self._node, self.matched = 0, self._found
        return held if self._found is None else held[: self._before]

    def _settled(self, character: str, shown: list[str]) -> bool:
        """Take one character, show what it sets free, say whether the earliest stop is known."""
        trie, old = self._trie, self._node
        new = self._node = trie.following(old, character)
        # The held text is what `old` spelled, then the character; it shrinks to what `new` spells.
        free = trie.depth[old] + 1 - trie.depth[new]
        if self._found is not None:
            free = min(free, self._before)
            self._before -= free
        if free:
            shown.append(trie.spelled(old, free) + (character if free > trie.depth[old] else ""))
        if self._found is None or self._before:
            # The longest stop string that ends here is the one that began first.
            length = trie.longest_match[new]
            before = trie.depth[new] - length
            if length and (self._found is None or before < self._before):
                self._found = trie.spelled(new)[before:]
                self._before = before
        return self._found is not None and self._before == 0


class _Trie:
    """Aho and Corasick's automaton; node 0 is its root, and spells nothing."""

    def __init__(self, words: Sequence[str]) -> None:
        self.children: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.longest_match = [0]  # length of the longest word that ends what the node spells
        self._word = [""]  # some word that begins with what the node spells
        self._fallback = [0]  # the node of the longest proper end of it
        for word in words:
            node = 0
            for depth, character in enumerate(word, start=1):
                if character not in self.children[node]:
                    self.children[node][character] = len(self.children)
                    self.children.append({})
                    self.depth.append(depth)
                    self.longest_match.append(0)
                    self._word.append(word)
                    self._fallback.append(0)
                node = self.children[node][character]
            self.longest_match[node] = len(word)
        # Breadth first, so that a node's fallback, which is shallower, is finished before it.
        queue = deque(self.children[0].values())
        while queue:
            parent = queue.popleft()
            for character, node in self.children[parent].items():
                fallback = self.following(self._fallback[parent], character)
                self._fallback[node] = fallback
                self.longest_match[node] = self.longest_match[node] or self.longest_match[fallback]
                queue.append(node)

    def following(self, node: int, character: str) -> int:
        """The node after one more character."""
        while (child := self.children[node].get(character)) is None and node:
            node = self._fallback[node]
        return child or 0

    def spelled(self, node: int, limit: int | None = None) -> str:
        """The text that leads to a node, or its first `limit` characters."""
        depth = self.depth[node]
        return self._word[node][: depth if limit is None else min(depth, limit)]
