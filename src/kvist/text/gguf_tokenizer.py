"""Rebuilds a byte-level BPE tokenizer from a GGUF file's metadata.

A GGUF carries the vocabulary and the merges, but only the *name* of the rule that cuts text into
pieces before the merges apply. A wrong rule gives plausible ids that the model never saw in
training, so a name that is not in the table below is refused. Called by `Tokenizer.from_checkpoint`
alone; reading the GGUF file itself is the loader's work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvist.errors import CheckpointError, NotSupported

if TYPE_CHECKING:
    import tokenizers

__all__ = ["build", "describes_tokenizer", "special_tokens"]

# Values of `tokenizer.ggml.token_type`.
_CONTROL = 3
_USER_DEFINED = 4
_UNUSED = 5


@dataclass(frozen=True)
class _Splitting:
    """How text becomes pieces; `pattern` None stands for GPT-2's own, which `ByteLevel` has."""

    pattern: str | None = None
    digits_apart: bool = False  # each digit is a piece, cut out before the pattern applies
    nfc: bool = False  # text is brought to Unicode's composed form first
    whole_pieces: bool = False  # a piece that is itself a token skips the merges
    add_bos: bool = False  # llama.cpp's default for this name, where the file does not say


def _word_pattern(digits: str) -> str:
    """The split that cl100k made common; its descendants differ in how many digits go together."""
    contraction = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    word = r"[^\r\n\p{L}\p{N}]?\p{L}+"
    punctuation = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    space = r"\s*[\r\n]+|\s+(?!\S)|\s+"
    return "|".join((contraction, word, digits, punctuation, space))


# Names as llama.cpp's converter writes them. "default" is what files say whose converter did not
# know better; transformers reads it as GPT-2's, and so does this.
_SPLITTINGS: Mapping[str, _Splitting] = {
    "default": _Splitting(),
    "gpt-2": _Splitting(),
    "smollm": _Splitting(digits_apart=True),
    "qwen2": _Splitting(_word_pattern(r"\p{N}"), nfc=True),
    "llama-bpe": _Splitting(_word_pattern(r"\p{N}{1,3}"), whole_pieces=True, add_bos=True),
}

_NAMED_TOKENS: Mapping[str, str] = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def describes_tokenizer(metadata: Mapping[str, Any]) -> bool:
    """Whether the metadata name a tokenizer at all (a GGUF may hold tensors alone)."""
    return metadata.get("tokenizer.ggml.model") not in (None, "none", "no_vocab")


def build(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Build the tokenizer that `tokenizer.ggml.*` describes; ids are the indices of the tokens.

    Tokens of type *unused* are left out: converters pad the vocabulary with them up to the
    embedding's rows, and the model's own tokenizer does not know them.

    Raises:
        NotSupported: another kind of tokenizer, or a splitting rule that is not known by name.
        CheckpointError: keys are missing, or contradict each other.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as pre

    splitting = _splitting(metadata)
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    types = _token_types(metadata, len(tokens))
    vocabulary = _vocabulary(tokens, types)
    try:
        model = models.BPE(
            vocab=vocabulary,
            merges=_merges(metadata),
            ignore_merges=splitting.whole_pieces,
        )
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(
            f"the GGUF's tokenizer.ggml.merges do not fit its tokens: {error}; fetch the file again"
        ) from error

    backend = Tokenizer(model)
    if splitting.nfc:
        backend.normalizer = normalizers.NFC()
    bytes_of_pieces = pre.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None)
    if splitting.pattern is not None:
        split = pre.Split(Regex(splitting.pattern), behavior="isolated")
        backend.pre_tokenizer = pre.Sequence([split, bytes_of_pieces])
    elif splitting.digits_apart:
        digits = pre.Digits(individual_digits=True)
        backend.pre_tokenizer = pre.Sequence([digits, bytes_of_pieces])
    else:
        backend.pre_tokenizer = bytes_of_pieces
    backend.decoder = decoders.ByteLevel()

    def added(wanted: int) -> list[AddedToken]:
        return [
            AddedToken(token, normalized=False, special=wanted == _CONTROL)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type == wanted
        ]

    # They are in the vocabulary already, so adding them changes no id: it makes them whole in text.
    backend.add_special_tokens(added(_CONTROL))
    backend.add_tokens(added(_USER_DEFINED))
    _add_ends(backend, metadata, special_tokens(metadata), default_bos=splitting.add_bos)
    return backend


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The strings of `bos_token`, `eos_token`, `unk_token`, `pad_token`, those that are set.

    Raises:
        CheckpointError: an id lies outside the vocabulary.
    """
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    named = {}
    for name, key in _NAMED_TOKENS.items():
        if (token_id := metadata.get(key)) is None:
            continue
        if not 0 <= int(token_id) < len(tokens):
            raise CheckpointError(
                f"the GGUF's {key} is {token_id}, but its vocabulary has {len(tokens)} tokens"
            )
        named[name] = tokens[int(token_id)]
    return named


def _splitting(metadata: Mapping[str, Any]) -> _Splitting:
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise NotSupported(
            f"a GGUF tokenizer of kind {kind!r} (only 'gpt2', byte-level BPE, can be rebuilt); "
            "load the model from its directory with tokenizer.json, or pass token ids"
        )
    name = metadata.get("tokenizer.ggml.pre")
    if name is None:
        raise NotSupported(
            "a GGUF without tokenizer.ggml.pre does not say how its tokenizer splits text; "
            "convert the model again with a current llama.cpp, or pass token ids"
        )
    if name not in _SPLITTINGS:
        raise NotSupported(
            f"the GGUF's tokenizer splits text by the rule {name!r}, which kvist does not know "
            f"(it knows {', '.join(sorted(_SPLITTINGS))}); load the model from its directory with "
            "tokenizer.json, or pass token ids"
        )
    return _SPLITTINGS[name]


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(key)
    if values is None or len(values) == 0:
        raise CheckpointError(f"the GGUF lacks {key}; fetch the file again")
    strings = list(values)
    for index, value in enumerate(strings):
        if not isinstance(value, str):
            raise CheckpointError(f"the GGUF's {key}[{index}] is {value!r}, not a string")
    return strings


def _token_types(metadata: Mapping[str, Any], count: int) -> Sequence[int]:
    """A type for each token; the named tokens are control tokens whatever the file says."""
    values = metadata.get("tokenizer.ggml.token_type")
    types = [1] * count if values is None else [int(value) for value in values]
    if len(types) != count:
        raise CheckpointError(
            f"the GGUF has {count} tokens, but {len(types)} entries in tokenizer.ggml.token_type"
        )
    # The token for unknown text may be an ordinary one; the ends of a text never are.
    for name in ("bos_token", "eos_token", "pad_token"):
        token_id = metadata.get(_NAMED_TOKENS[name])
        if token_id is not None and 0 <= int(token_id) < count:  # if not, `special_tokens` says so
            types[int(token_id)] = _CONTROL
    return types


def _vocabulary(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    vocabulary: dict[str, int] = {}
    for index, (token, token_type) in enumerate(zip(tokens, types, strict=True)):
        if token_type == _UNUSED:
            continue
        if (first := vocabulary.setdefault(token, index)) != index:
            raise CheckpointError(
                f"the GGUF's vocabulary holds {token!r} twice, as ids {first} and {index}"
            )
    return vocabulary


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = []
    for index, merge in enumerate(_strings(metadata, "tokenizer.ggml.merges")):
        left, space, right = merge.partition(" ")
        if not (left and space and right):
            raise CheckpointError(
                f"the GGUF's tokenizer.ggml.merges[{index}] is {merge!r}, not two tokens"
            )
        merges.append((left, right))
    return merges


def _add_ends(
    backend: tokenizers.Tokenizer,
    metadata: Mapping[str, Any],
    named: Mapping[str, str],
    *,
    default_bos: bool,
) -> None:
    """Let an encoding with special tokens begin with bos and end with eos, as the file says."""
    from tokenizers import processors

    wanted_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", default_bos))
    wanted_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    bos = named.get("bos_token") if wanted_bos else None
    eos = named.get("eos_token") if wanted_eos else None
    ends = [token for token in (bos, eos) if token is not None]
    if not ends:
        return
    backend.post_processor = processors.TemplateProcessing(
        single=[token for token in (bos, "$A", eos) if token is not None],
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(ends)],
    )
