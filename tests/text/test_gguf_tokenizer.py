"""Tokenizers rebuilt from GGUF metadata: the ids that the model was trained with."""

import json
from pathlib import Path

import pytest
from hard_texts import HARD, texts
from hypothesis import given
from hypothesis import strategies as st
from small_files import QWEN3, Files

from kvist.errors import CheckpointError, NotSupported
from kvist.text.tokenizer import Tokenizer, find_tokenizer


def rebuilt(metadata, **changes):
    changed = {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    kept = {k: v for k, v in {**metadata, **changed}.items() if v is not None}
    return Tokenizer.from_checkpoint(Files(Path("model.gguf"), gguf_metadata=kept))


def as_hub_json(metadata, pre_tokenizer, *, ignore_merges=False):
    """A tokenizer.json's tokenizer of the same vocabulary, put together by hand."""
    from tokenizers import Tokenizer as Backend

    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return Backend.from_str(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [
                    {"id": i, "content": tokens[i], "special": kind == 3, **added}
                    for i, kind in enumerate(types)
                    if kind in (3, 4)
                ],
                "pre_tokenizer": pre_tokenizer,
                "decoder": {
                    "type": "ByteLevel",
                    "add_prefix_space": True,
                    "trim_offsets": True,
                    "use_regex": True,
                },
                "model": {
                    "type": "BPE",
                    "vocab": {token: i for i, token in enumerate(tokens)},
                    "merges": metadata["tokenizer.ggml.merges"],
                    "ignore_merges": ignore_merges,
                },
            }
        )
    )


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_ONLY = {**BYTES, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What the tokenizer.json of SmolLM2, GPT-2 and Llama 3 say under "pre_tokenizer".
ON_THE_HUB = {
    "smollm": {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]},
    "gpt-2": BYTES,
    "default": BYTES,
    "llama-bpe": {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": LLAMA3},
                "behavior": "Isolated",
                "invert": False,
            },
            BYTES_ONLY,
        ],
    },
}


@pytest.fixture(scope="module", params=ON_THE_HUB)
def pair(request, smollm2_metadata, qwen3_metadata):
    """One vocabulary, rebuilt from metadata and as its tokenizer.json would have it."""
    metadata = smollm2_metadata if request.param == "smollm" else qwen3_metadata
    theirs = as_hub_json(
        metadata, ON_THE_HUB[request.param], ignore_merges=request.param == "llama-bpe"
    )
    return rebuilt(metadata, pre=request.param), theirs


@given(text=texts)
def test_ids_equal_those_of_tokenizer_json(pair, text):
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


@given(ids=st.lists(st.integers(0, 511), max_size=20), skip=st.booleans())
def test_text_equals_that_of_tokenizer_json(pair, ids, skip):
    ours, theirs = pair
    decoded = theirs.decode(ids, skip_special_tokens=skip)
    assert ours.decode(ids, skip_special_tokens=skip) == decoded


@given(text=texts)
def test_qwen2_rule_gives_the_ids_of_qwen3s_own_tokenizer(qwen3, qwen3_metadata, text):
    assert rebuilt(qwen3_metadata).encode(text) == qwen3.encode(text)


def test_rebuilt_tokenizer_is_the_same_as_the_original(qwen3, qwen3_metadata):
    ours = rebuilt(qwen3_metadata)
    assert ours.fingerprint == qwen3.fingerprint
    assert ours.special_ids == qwen3.special_ids
    assert ours.eos_token_id == qwen3.eos_token_id
    assert ours.vocab_size == qwen3.vocab_size
    ids = list(range(512))
    assert ours.decode(ids) == qwen3.decode(ids)


def test_smollm_cuts_digits_out_before_it_looks_at_spaces(smollm2_metadata):
    tokenizer = rebuilt(smollm2_metadata)
    assert pieces(tokenizer, "x  12") == ["x", "ĠĠ", "1", "2"]
    assert pieces(tokenizer, " 1") == ["Ġ", "1"]
    plain = rebuilt(smollm2_metadata, pre="gpt-2")
    assert pieces(plain, "x  12") == ["x", "Ġ", "Ġ", "1", "2"]


def test_qwen2_composes_characters_first(qwen3_metadata):
    tokenizer = rebuilt(qwen3_metadata)
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
    plain = rebuilt(qwen3_metadata, pre="gpt-2")
    assert plain.encode("e\u0301") != plain.encode("\u00e9")


def pieces(tokenizer, text):
    return [tokenizer.id_to_token(i) for i in tokenizer.encode(text)]


def test_control_tokens_are_special_and_user_defined_ones_are_not(qwen3_metadata):
    tokenizer = rebuilt(qwen3_metadata)
    ids = tokenizer.encode("<|im_start|><think>a</think><|im_end|>")
    assert ids == [504, 508, 64, 509, 505]
    assert tokenizer.decode(ids) == "<think>a</think>"


def test_named_tokens_are_special_without_token_types(smollm2_metadata):
    tokenizer = rebuilt(smollm2_metadata, token_type=None)
    assert tokenizer.special_ids == {1, 2}
    assert tokenizer.encode("<|im_start|>") == [1]


def test_special_tokens_and_template_come_from_the_metadata(smollm2_metadata):
    tokenizer = rebuilt(smollm2_metadata)
    assert tokenizer.special_tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
    }
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_id == 2
    assert not tokenizer.add_bos
    assert "SmolLM, trained by Hugging Face" in tokenizer.chat_template


def test_padding_of_the_vocabulary_is_unknown(qwen3_metadata):
    tokens = [*qwen3_metadata["tokenizer.ggml.tokens"], "[PAD512]", "[PAD513]"]
    types = [*qwen3_metadata["tokenizer.ggml.token_type"], 5, 5]
    tokenizer = rebuilt(qwen3_metadata, tokens=tokens, token_type=types)
    assert tokenizer.vocab_size == 512
    assert tokenizer.decode([64, 512]) == "a"
    assert tokenizer.encode("[PAD512]") == rebuilt(qwen3_metadata).encode("[PAD512]")


@pytest.mark.parametrize(
    ("ends", "ids"),
    [
        ({}, [64]),
        ({"add_bos_token": True}, [503, 64]),
        ({"add_eos_token": True}, [64, 505]),
        ({"add_bos_token": True, "add_eos_token": True}, [503, 64, 505]),
        ({"add_bos_token": None, "pre": "llama-bpe"}, [503, 64]),  # its default in llama.cpp
        ({"add_bos_token": True, "bos_token_id": None}, [64]),
    ],
)
def test_ends_are_added_as_the_file_says(qwen3_metadata, ends, ids):
    tokenizer = rebuilt(qwen3_metadata, **{"bos_token_id": 503, **ends})
    assert tokenizer.encode("a", add_special_tokens=True) == ids
    assert tokenizer.encode("a") == [64]
    assert tokenizer.add_bos == (ids[0] == 503)


@pytest.mark.parametrize("kind", ["llama", "bert", "t5", "rwkv"])
def test_other_kinds_of_tokenizer_are_refused_by_name(smollm2_metadata, kind):
    with pytest.raises(NotSupported, match=f"{kind!r}.* pass token ids"):
        rebuilt(smollm2_metadata, model=kind)


def test_unknown_splitting_rule_is_refused_by_name(smollm2_metadata):
    with pytest.raises(NotSupported, match=r"'tekken'.*it knows .*qwen2, smollm"):
        rebuilt(smollm2_metadata, pre="tekken")


def test_file_that_names_no_splitting_rule_is_refused(smollm2_metadata):
    with pytest.raises(NotSupported, match=r"without tokenizer\.ggml\.pre"):
        rebuilt(smollm2_metadata, pre=None)


@pytest.mark.parametrize("kind", [None, "none", "no_vocab"])
def test_file_without_vocabulary_has_no_tokenizer(kind):
    metadata = {} if kind is None else {"tokenizer.ggml.model": kind}
    assert find_tokenizer(Files(Path("model.gguf"), gguf_metadata=metadata)) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": None}, r"lacks tokenizer\.ggml\.tokens"),
        ({"tokens": []}, r"lacks tokenizer\.ggml\.tokens"),
        ({"tokens": ["a", 7], "token_type": [1, 1]}, r"tokens\[1\] is 7, not a string"),
        ({"token_type": [1, 1, 3]}, r"952 tokens, but 3 entries"),
        ({"merges": None}, r"lacks tokenizer\.ggml\.merges"),
        ({"merges": ["Ġ t", "Ġa"]}, r"merges\[1\] is 'Ġa', not two tokens"),
        ({"merges": ["Ġ t", "q zzz"]}, r"merges do not fit its tokens.*zzz"),
        ({"eos_token_id": 952}, r"eos_token_id is 952, but its vocabulary has 952 tokens"),
        ({"bos_token_id": -1}, r"bos_token_id is -1"),
    ],
)
def test_contradictions_in_the_metadata_are_named(smollm2_metadata, changes, words):
    with pytest.raises(CheckpointError, match=words):
        rebuilt(smollm2_metadata, **changes)


def test_token_that_is_there_twice_is_refused(smollm2_metadata):
    tokens = list(smollm2_metadata["tokenizer.ggml.tokens"])
    tokens[300] = tokens[299]
    with pytest.raises(CheckpointError, match="twice, as ids 299 and 300"):
        rebuilt(smollm2_metadata, tokens=tokens)


def test_fixture_is_enough_for_real_text(smollm2_metadata):
    # SmolLM2's vocabulary has no token for some bytes, those of most control characters among them.
    tokenizer = rebuilt(smollm2_metadata)
    for text in HARD:
        if "\x04" not in text:
            assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_config_beside_it_changes_nothing(qwen3_metadata):
    files = Files(QWEN3, tokenizer_config={"eos_token": "?"}, gguf_metadata=qwen3_metadata)
    assert Tokenizer.from_checkpoint(files).eos_token_id == 505
