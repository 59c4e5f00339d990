"""Streamed text: certain when shown, and whole in the end, for any ids and any decoder."""

import json

import pytest
from hard_texts import HARD, texts
from hypothesis import assume, given
from hypothesis import strategies as st

from kvist.text.detokenize import Detokenizer
from kvist.text.tokenizer import Tokenizer

LLAMA = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": True,
    "trim_offsets": True,
    "use_regex": True,
}
DECODERS = {
    "llama": {"type": "Sequence", "decoders": LLAMA},
    "gemma": {"type": "Sequence", "decoders": LLAMA[:3]},
    "metaspace": {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "always",
        "split": True,
    },
    "wordpiece": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "bpe": {"type": "BPEDecoder", "suffix": "</w>"},
    "none": None,
    # These may change what they said: all text comes at the end.
    "ctc": {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
    "bytes_then_strip": {
        "type": "Sequence",
        "decoders": [BYTE_LEVEL, {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
    },
}
AT_THE_END = {"ctc", "bytes_then_strip"}
WORDS = [
    *["<unk>", "<s>", "</s>", "▁", "▁▁▁", "▁the", "▁a", "b", "re", "é", "我", "\ufffd", ".", ","],
    *["##ing", "##s", "n't", "end</w>", "mid", "|", "<pad>", "Ġword", "Ã", "©", " x", "  "],
]
BYTES = [f"<0x{byte:02X}>" for byte in (0x0A, 0x41, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xFF)]
NUM_IDS = len(WORDS) + len(BYTES) + 2  # the last two are unknown


def with_decoder(name):
    """A vocabulary of whole words, and some decoder."""
    from tokenizers import Tokenizer as Backend

    vocab = {token: i for i, token in enumerate([*WORDS, *BYTES])}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": WORDS[i], "special": True, **flags} for i in range(3)]
    model = {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True}
    spec = {"version": "1.0", "added_tokens": added, "decoder": DECODERS[name], "model": model}
    return Tokenizer(Backend.from_str(json.dumps(spec)), {"bos_token": "<s>"})


@pytest.fixture(scope="module", params=DECODERS)
def tokenizer(request):
    return with_decoder(request.param)


def streamed(tokenizer, ids, **options):
    """All pieces, in order, with the rest last."""
    detokenizer = Detokenizer(tokenizer, **options)
    return [detokenizer.push(i) for i in ids] + [detokenizer.flush()]


def assert_stream_is_right(tokenizer, ids, skip):
    pieces = streamed(tokenizer, ids, skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)
    for count in range(len(ids)):
        # Were the sequence to end here, all that was shown would still be right.
        so_far = tokenizer.decode(ids[:count], skip_special_tokens=skip)
        assert so_far.startswith("".join(pieces[:count]))


@given(ids=st.lists(st.integers(0, 520), max_size=30), skip=st.booleans())
def test_any_ids_of_a_byte_level_vocabulary_give_their_text(qwen3, ids, skip):
    assert_stream_is_right(qwen3, ids, skip)


@given(data=st.binary(max_size=40))
def test_any_bytes_give_their_text(qwen3, data):
    ids_of_bytes = {qwen3.token_bytes(i): i for i in range(256)}
    assert_stream_is_right(qwen3, [ids_of_bytes[bytes([byte])] for byte in data], skip=False)


@given(ids=st.lists(st.integers(0, NUM_IDS - 1), max_size=20), skip=st.booleans())
def test_any_ids_of_any_decoder_give_their_text(tokenizer, ids, skip):
    assert_stream_is_right(tokenizer, ids, skip)


@given(ids=st.lists(st.sampled_from(range(len(WORDS), NUM_IDS)), max_size=20))
def test_any_run_of_fallback_bytes_gives_its_text(tokenizer, ids):
    assert_stream_is_right(tokenizer, [*ids, WORDS.index("b"), *ids], skip=True)


@given(text=texts)
def test_no_half_character_is_ever_shown(qwen3, text):
    assume("\ufffd" not in text)
    pieces = streamed(qwen3, qwen3.encode(text))
    assert all("\ufffd" not in piece for piece in pieces)
    assert pieces[-1] == ""


def test_text_is_shown_as_soon_as_it_is_certain(qwen3):
    text = "a€b"
    ids = [next(i for i in range(256) if qwen3.token_bytes(i) == bytes([b])) for b in text.encode()]
    assert streamed(qwen3, ids) == ["a", "", "", "€", "b", ""]


def test_an_invalid_byte_is_shown_at_once(qwen3):
    ids_of_bytes = {qwen3.token_bytes(i): i for i in range(256)}
    ids = [ids_of_bytes[bytes([byte])] for byte in (0xFF, 0xE2, 0x41)]
    assert streamed(qwen3, ids) == ["\ufffd", "", "\ufffdA", ""]


def test_a_character_cut_by_the_end_is_flushed_as_a_replacement(qwen3):
    ids_of_bytes = {qwen3.token_bytes(i): i for i in range(256)}
    assert streamed(qwen3, [ids_of_bytes[b"\xe2"], ids_of_bytes[b"\x82"]]) == ["", "", "\ufffd"]


def test_skipped_special_tokens_do_not_cut_a_character(qwen3):
    ids_of_bytes = {qwen3.token_bytes(i): i for i in range(256)}
    ids = [ids_of_bytes[b"\xc3"], 505, ids_of_bytes[b"\xa9"]]
    assert streamed(qwen3, ids) == ["", "", "é", ""]


def test_words_of_sentencepiece_come_at_once_and_its_bytes_in_a_run():
    tokenizer = with_decoder("llama")
    ids = [tokenizer.token_to_id(t) for t in ("▁the", "<0xE2>", "<0x82>", "<0xAC>", "b", "▁a")]
    assert streamed(tokenizer, ids) == ["the", "", "", "", "€b", " a", ""]


def test_decoders_that_may_take_text_back_give_it_at_the_end():
    for name in DECODERS:
        tokenizer = with_decoder(name)
        pieces = streamed(tokenizer, [WORDS.index("b"), WORDS.index("re"), WORDS.index("mid")])
        assert (pieces[:-1] == ["", "", ""]) == (name in AT_THE_END)


def test_first_word_after_a_prompt_keeps_its_space():
    tokenizer = with_decoder("llama")
    the, a = tokenizer.token_to_id("▁the"), tokenizer.token_to_id("▁a")
    assert streamed(tokenizer, [the, a]) == ["the", " a", ""]
    assert streamed(tokenizer, [the, a], prompt_ids=[a]) == [" the", " a", ""]
    assert streamed(tokenizer, [the, a], prompt_ids=[tokenizer.bos_token_id]) == ["the", " a", ""]


def test_character_that_the_prompt_left_unfinished_is_finished(qwen3):
    ids_of_bytes = {qwen3.token_bytes(i): i for i in range(256)}
    prompt = [64, ids_of_bytes[b"\xe2"], 505, ids_of_bytes[b"\x82"]]
    assert streamed(qwen3, [ids_of_bytes[b"\xac"], 64], prompt_ids=prompt) == ["€", "a", ""]

    tokenizer = with_decoder("llama")
    a, e2, x82, xac = (tokenizer.token_to_id(t) for t in ("▁a", "<0xE2>", "<0x82>", "<0xAC>"))
    assert streamed(tokenizer, [x82, xac, a], prompt_ids=[a, e2]) == ["", "", "€ a", ""]


@given(
    prompt=st.lists(st.integers(0, NUM_IDS - 1), max_size=8),
    ids=st.lists(st.integers(0, NUM_IDS - 1), max_size=8),
)
def test_text_continues_the_prompts(tokenizer, prompt, ids):
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    # Otherwise the ids change what the prompt says, which was shown or known before.
    assume(whole.startswith(before) and not before.endswith("\ufffd"))
    assert before + "".join(streamed(tokenizer, ids, prompt_ids=prompt)) == whole


@given(prompt=texts, text=texts)
def test_text_continues_a_byte_level_prompts(qwen3, prompt, text):
    pieces = streamed(qwen3, qwen3.encode(text), prompt_ids=qwen3.encode(prompt))
    assert "".join(pieces) == qwen3.decode(qwen3.encode(text))


def test_work_grows_with_the_tokens_and_no_faster(monkeypatch):
    tokenizer = with_decoder("llama")
    decoded = []
    decode = Tokenizer.decode

    def spy(self, ids, **options):
        decoded.append(len(ids))
        return decode(self, ids, **options)

    monkeypatch.setattr(Tokenizer, "decode", spy)
    names = ["▁the", "▁", "\ufffd", "▁▁▁", *BYTES, *["<0xFF>"] * 200, "b", "▁"]
    ids = [tokenizer.token_to_id(name) for name in names] * 5
    streamed(tokenizer, ids)
    assert sum(decoded) < 4 * len(ids)


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_stream_whole(qwen3, smollm2_metadata, text):
    assert "".join(streamed(qwen3, qwen3.encode(text), skip_special_tokens=False)) == qwen3.decode(
        qwen3.encode(text), skip_special_tokens=False
    )
