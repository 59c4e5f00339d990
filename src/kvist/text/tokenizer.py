"""The one tokenizer: a thin, immutable wrapper over `tokenizers.Tokenizer`.

It gives the ids and the text that transformers gives for the same files, whether they come from
tokenizer.json or from a GGUF's metadata. Rendering chats, streaming text and finding files are not
its business. `kvist.load` makes one for each model; everything that deals in text asks it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kvist.errors import CheckpointError, RequestError
from kvist.text import gguf_tokenizer

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Tokenizer", "TokenizerSource", "find_tokenizer"]

# The names by which chat templates and tokenizer_config.json call special tokens.
_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class TokenizerSource(Protocol):
    """The part of a checkpoint that a tokenizer is made from."""

    @property
    def path(self) -> Path:
        """The checkpoint's directory or file."""

    @property
    def tokenizer_json(self) -> Path | None:
        """Where tokenizer.json is, if it exists."""

    @property
    def tokenizer_config(self) -> Mapping[str, Any]:
        """The content of tokenizer_config.json, or nothing."""

    @property
    def chat_template(self) -> str | None:
        """The jinja source of the chat template."""

    @property
    def gguf_metadata(self) -> Mapping[str, Any] | None:
        """A GGUF's metadata, `tokenizer.ggml.*` among them."""


@dataclass(frozen=True, eq=False, repr=False)
class Tokenizer:
    """Text to token ids and back.

    Args:
        backend: the library's tokenizer; not to be changed after it was handed over.
        special_tokens: `{"eos_token": "<|im_end|>", ...}`, as chat templates want them.
        chat_template: jinja source, for `kvist.text.chat.render`.
    """

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None

    @classmethod
    def from_checkpoint(cls, checkpoint: TokenizerSource) -> Tokenizer:
        """Make the tokenizer of a checkpoint: tokenizer.json if it has one, else the GGUF's.

        Raises:
            CheckpointError: there is no tokenizer, or it is damaged.
            NotSupported: a kind of tokenizer that a GGUF names and kvist cannot rebuild.
        """
        if (tokenizer := find_tokenizer(checkpoint)) is None:
            raise CheckpointError(
                f"{checkpoint.path}: no tokenizer.json; download it again with its tokenizer, "
                "save one there with transformers' save_pretrained, or pass token ids"
            )
        return tokenizer

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"

    # --- text <-> ids

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Return the text's ids; special tokens that are written out in it become their ids.

        Args:
            text: any Unicode text, also the empty one.
            add_special_tokens: begin with bos (and end with eos) if the model's own encoding does.
                A rendered chat template has them already.

        Raises:
            RequestError: not a string, or one with a lone surrogate, which is no Unicode text.
        """
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise RequestError(_not_text(text)) from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of some ids; bytes that are no UTF-8 become U+FFFD.

        Ids that the vocabulary does not have (embeddings often have more rows) stand for no text.

        Raises:
            RequestError: an id that is no number between 0 and 2**32.
        """
        try:
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError) as error:
            raise RequestError(f"{_first_bad_id(ids)!r} is not a token id") from error

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it, or None."""
        return self.backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's spelling of an id, or None for an id that it does not have."""
        try:
            return self.backend.id_to_token(token_id)
        except OverflowError:
            return None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token of a byte-level vocabulary adds to the text; b"" if unknown.

        Only meaningful where `is_byte_level`.
        """
        known = self._bytes
        if (found := known.get(token_id)) is None:
            found = known[token_id] = _spelled_bytes(self.id_to_token(token_id) or "")
        return found

    # --- what it knows of itself

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest id, added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that `decode` leaves out by default."""
        # Asked by trying, since a token's own flag does not show that it was made special later.
        decode = self.backend.decode
        return frozenset(
            i
            for i in self.backend.get_added_tokens_decoder()
            if decode([i], skip_special_tokens=False) and not decode([i], skip_special_tokens=True)
        )

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text, if the tokenizer has one (see `add_bos`)."""
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text or a turn."""
        return self._named_id("eos_token")

    @cached_property
    def add_bos(self) -> bool:
        """Whether the model's own default encoding begins with bos."""
        bos = self.bos_token_id
        return bos is not None and self.encode("", add_special_tokens=True)[:1] == [bos]

    @cached_property
    def decoder_parts(self) -> tuple[dict[str, Any], ...]:
        """The library's description of the decoder, step by step; empty if it has none."""
        if self.backend.decoder is None:
            return ()
        spec = json.loads(self.backend.decoder.__getstate__())
        return tuple(spec["decoders"]) if spec["type"] == "Sequence" else (spec,)

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether every token stands for bytes, whatever its neighbours are."""
        return [part["type"] for part in self.decoder_parts if part["type"] != "Fuse"] == [
            "ByteLevel"
        ]

    @cached_property
    def fingerprint(self) -> str:
        """A digest of vocabulary and merges: equal where ids mean the same.

        It stays the same over versions of the library and of kvist, so that a cache saved to disk
        can tell whether it was made with this tokenizer. Computed when first asked for.
        """
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        model = json.loads(self.backend.to_str())["model"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges") or ()]
        # A unigram model has scores instead of merges; its vocabulary is a list of pairs.
        scores = model["vocab"] if isinstance(model.get("vocab"), list) else None
        in_order = sorted(vocabulary.items(), key=lambda item: item[1])
        content = json.dumps([in_order, merges, scores], separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        return {}

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_to_id(token)


def find_tokenizer(checkpoint: TokenizerSource) -> Tokenizer | None:
    """Make the tokenizer of a checkpoint, or None if it has none and takes token ids only.

    Raises:
        CheckpointError: there is one, but it is damaged.
        NotSupported: a GGUF names a tokenizer that kvist cannot rebuild.
    """
    if checkpoint.tokenizer_json is not None:
        return _from_json(checkpoint, checkpoint.tokenizer_json)
    metadata = checkpoint.gguf_metadata
    if metadata is None or not gguf_tokenizer.describes_tokenizer(metadata):
        return None
    return Tokenizer(
        gguf_tokenizer.build(metadata),
        gguf_tokenizer.special_tokens(metadata),
        checkpoint.chat_template or metadata.get("tokenizer.chat_template"),
    )


def _from_json(checkpoint: TokenizerSource, path: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(
            f"{path} cannot be read as a tokenizer: {error}; fetch it again, or update the "
            "tokenizers package if the file is newer than it"
        ) from error
    # Some files carry the settings of the training that they were saved from.
    backend.no_truncation()
    backend.no_padding()

    config = _with_legacy_names(checkpoint)
    _add_missing_tokens(backend, config, path)
    special_tokens = {
        name: content for name in _NAMED_TOKENS if (content := _content(config.get(name)))
    }
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    extra = [c for token in extra if (c := _content(token))] if isinstance(extra, list) else []
    # Not those that the vocabulary lacks: they would get ids for which the model has no row.
    names = (*special_tokens.values(), *extra)
    backend.add_special_tokens([n for n in names if backend.token_to_id(n) is not None])
    _set_ends(backend, config, special_tokens)
    return Tokenizer(backend, special_tokens, checkpoint.chat_template or _template(config))


def _with_legacy_names(checkpoint: TokenizerSource) -> Mapping[str, Any]:
    """The config, completed from special_tokens_map.json, where older checkpoints keep names."""
    config = checkpoint.tokenizer_config
    path = checkpoint.path / "special_tokens_map.json"
    if "added_tokens_decoder" in config or not path.is_file():
        return config
    try:
        legacy = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}; fetch it again") from error
    return {**legacy, **{name: value for name, value in config.items() if value}}


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], path: Path
) -> None:
    """Add tokens that tokenizer_config.json lists and tokenizer.json lacks, at their own ids."""
    from tokenizers import AddedToken

    listed = config.get("added_tokens_decoder") or {}
    for index, token in sorted(listed.items(), key=lambda item: int(item[0])):
        content = _content(token)
        if content is None or backend.token_to_id(content) is not None:
            continue
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        chosen = {flag: bool(token[flag]) for flag in flags if flag in token}
        backend.add_tokens([AddedToken(content, **chosen)])
        if (actual := backend.token_to_id(content)) != int(index):
            raise CheckpointError(
                f"{path} lacks the token {content!r}, which tokenizer_config.json beside it gives "
                f"the id {index}, but the next free id is {actual}; fetch both again"
            )


def _set_ends(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> None:
    """Where the config says whether to add bos and eos, that holds instead of the file's rule."""
    from tokenizers import processors

    if config.get("add_bos_token") is None and config.get("add_eos_token") is None:
        return
    bos = special_tokens.get("bos_token") if config.get("add_bos_token") else None
    eos = special_tokens.get("eos_token") if config.get("add_eos_token") else None
    ids = [(token, backend.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token]
    backend.post_processor = processors.TemplateProcessing(
        single=[token for token in (bos, "$A", eos) if token], special_tokens=ids
    )


def _template(config: Mapping[str, Any]) -> str | None:
    """The template in tokenizer_config.json; of several named ones, the default."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _content(token: object) -> str | None:
    """A special token's text; configs write it plainly or as an object with flags."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


@cache
def _byte_of_letter() -> Mapping[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for letters from U+0100.

    Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(0x100)) - set(printable))
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def _spelled_bytes(token: str) -> bytes:
    """The bytes that a token spells in GPT-2's alphabet; a token with any other letter is text."""
    alphabet = _byte_of_letter()
    try:
        return bytes(alphabet[letter] for letter in token)
    except KeyError:
        return token.encode()


def _not_text(text: object) -> str:
    if not isinstance(text, str):
        return f"text to encode must be a string, not {type(text).__name__}"
    place = next(i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff")
    return (
        f"the text has a lone surrogate, {text[place]!a}, at character {place}; it is not valid "
        "Unicode: decode its bytes as UTF-8 first"
    )


def _first_bad_id(ids: Sequence[object]) -> object:
    return next((i for i in ids if not isinstance(i, int) or not 0 <= i < 2**32), ids)
