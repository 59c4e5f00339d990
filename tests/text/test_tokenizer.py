"""tokenizer.json: the same ids and text as transformers, and clear words where it is wrong."""

import dataclasses
import json
import subprocess
import sys

import pytest
from hard_texts import HARD, texts
from hypothesis import given
from hypothesis import strategies as st
from small_files import QWEN3, Files

from kvist.errors import CheckpointError, RequestError
from kvist.text.tokenizer import Tokenizer, find_tokenizer


@pytest.fixture(scope="module")
def theirs():
    """The same files, as transformers reads them."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(QWEN3)


@given(text=texts)
def test_ids_equal_transformers(qwen3, theirs, text):
    assert qwen3.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert qwen3.encode(text, add_special_tokens=True) == theirs.encode(text)


@given(ids=st.lists(st.integers(0, 600), max_size=20), skip=st.booleans())
def test_text_of_any_ids_equals_transformers(qwen3, theirs, ids, skip):
    expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert qwen3.decode(ids, skip_special_tokens=skip) == expected


def test_special_tokens_and_template_equal_transformers(qwen3, theirs):
    assert qwen3.special_tokens == theirs.special_tokens_map
    assert qwen3.special_ids == set(theirs.all_special_ids) | {504}  # <|im_start|>, special by flag
    assert qwen3.eos_token_id == theirs.eos_token_id == 505
    assert qwen3.bos_token_id is None
    assert qwen3.vocab_size == len(theirs) == 512
    assert qwen3.chat_template == theirs.chat_template


def test_special_tokens_in_text_are_parsed(qwen3):
    assert qwen3.encode("<|im_start|><think><|im_end|>") == [504, 508, 505]


def test_text_comes_back_whole(qwen3):
    for text in HARD:
        if text != "e\u0301 Å A\u030a ﬁ":  # which the normaliser composes
            assert qwen3.decode(qwen3.encode(text), skip_special_tokens=False) == text


def test_special_tokens_are_left_out_of_text_on_request(qwen3):
    ids = qwen3.encode("a<|im_end|>b</think>")
    assert qwen3.decode(ids) == "ab</think>"
    assert qwen3.decode(ids, skip_special_tokens=False) == "a<|im_end|>b</think>"


def test_ids_may_come_in_any_sequence(qwen3):
    assert qwen3.decode((64, 65)) == qwen3.decode(range(64, 66)) == qwen3.decode([64, 65]) == "ab"


def test_ids_beyond_the_vocabulary_have_no_text(qwen3):
    assert qwen3.decode([64, 512, 100_000, 65]) == "ab"
    assert qwen3.id_to_token(512) is None
    assert qwen3.id_to_token(-1) is None
    assert qwen3.token_to_id("no such token") is None


@pytest.mark.parametrize("ids", [[64, -1], [2**40], ["a"], [1.5]])
def test_what_is_no_id_is_named(qwen3, ids):
    with pytest.raises(RequestError, match=f"{ids[-1]!r} is not a token id"):
        qwen3.decode(ids)


def test_lone_surrogate_is_refused_with_its_place(qwen3):
    with pytest.raises(RequestError, match=r"lone surrogate, '\\ud83d', at character 2"):
        qwen3.encode("ab\ud83d")


def test_only_strings_are_encoded(qwen3):
    with pytest.raises(RequestError, match="not bytes"):
        qwen3.encode(b"ab")


def test_truncation_and_padding_of_training_are_dropped(saved):
    def change(tokenizer):
        tokenizer["truncation"] = {
            "direction": "Right",
            "max_length": 4,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        tokenizer["padding"] = {
            "strategy": {"Fixed": 8},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "!",
        }

    tokenizer = Tokenizer.from_checkpoint(saved(change))
    assert len(tokenizer.encode("zqzqzq")) == 6
    assert len(tokenizer.encode("z")) == 1


def test_bos_is_added_where_the_config_says_so(saved):
    files = saved(bos_token="<|endoftext|>", eos_token="<|im_end|>", add_bos_token=True)
    tokenizer = Tokenizer.from_checkpoint(files)
    assert tokenizer.add_bos
    assert tokenizer.bos_token_id == 503
    assert tokenizer.encode("a", add_special_tokens=True) == [503, 64]
    assert tokenizer.encode("a") == [64]


def test_bos_is_added_where_the_tokenizer_says_so(saved):
    def change(tokenizer):
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {
                "<|endoftext|>": {"id": "<|endoftext|>", "ids": [503], "tokens": ["<|endoftext|>"]}
            },
        }

    assert Tokenizer.from_checkpoint(saved(change, bos_token="<|endoftext|>")).add_bos
    unwanted = saved(change, bos_token="<|endoftext|>", add_bos_token=False)
    assert not Tokenizer.from_checkpoint(unwanted).add_bos


def test_eos_is_added_where_the_config_says_so(saved):
    files = saved(eos_token={"content": "<|im_end|>", "special": True}, add_eos_token=True)
    tokenizer = Tokenizer.from_checkpoint(files)
    assert tokenizer.encode("a", add_special_tokens=True) == [64, 505]
    assert not tokenizer.add_bos


def test_named_tokens_are_special_whatever_their_flag(saved):
    tokenizer = Tokenizer.from_checkpoint(
        saved(eos_token="</think>", additional_special_tokens=["<think>"])
    )
    assert {508, 509} <= tokenizer.special_ids
    assert tokenizer.decode([508, 64, 509]) == "a"


def test_named_tokens_that_the_vocabulary_lacks_get_no_id(saved):
    tokenizer = Tokenizer.from_checkpoint(saved(bos_token="<s>"))
    assert tokenizer.bos_token_id is None
    assert tokenizer.vocab_size == 512
    assert tokenizer.special_tokens == {"bos_token": "<s>"}


def test_names_are_found_in_special_tokens_map(saved):
    files = saved(eos_token=None)
    (files.path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    assert Tokenizer.from_checkpoint(files).eos_token_id == 505


def test_tokens_that_only_the_config_lists_are_added(saved):
    listed = {"512": {"content": "<extra>", "special": True, "__type": "AddedToken"}}
    tokenizer = Tokenizer.from_checkpoint(saved(added_tokens_decoder=listed))
    assert tokenizer.encode("a<extra>") == [64, 512]
    assert 512 in tokenizer.special_ids


def test_listed_token_whose_id_is_taken_is_refused(saved):
    files = saved(added_tokens_decoder={"600": {"content": "<extra>"}})
    with pytest.raises(CheckpointError, match=r"'<extra>'.* 600, but the next free id is 512"):
        Tokenizer.from_checkpoint(files)


def test_default_is_taken_of_several_templates(saved):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert Tokenizer.from_checkpoint(saved(chat_template=named)).chat_template == "D"


def test_checkpoints_own_template_goes_before_the_configs(saved):
    files = dataclasses.replace(saved(chat_template="old"), chat_template="new")
    assert Tokenizer.from_checkpoint(files).chat_template == "new"


def test_missing_tokenizer_is_an_error_or_none_as_wanted(tmp_path):
    assert find_tokenizer(Files(tmp_path)) is None
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json.* pass token ids"):
        Tokenizer.from_checkpoint(Files(tmp_path))


def test_gguf_without_a_tokenizer_has_none(tmp_path):
    assert find_tokenizer(Files(tmp_path, gguf_metadata={"general.architecture": "llama"})) is None


@pytest.mark.parametrize("content", ["", "{", '{"model": {}}', "\u00e9"])
def test_damaged_tokenizer_json_names_the_file(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read.* fetch it again"):
        find_tokenizer(Files(tmp_path, path))


def test_truncated_tokenizer_json_names_the_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes((QWEN3 / "tokenizer.json").read_bytes()[:10_000])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_checkpoint(Files(tmp_path, path))


def test_fingerprint_is_the_vocabularys_and_stays_the_same(qwen3, saved):
    assert qwen3.fingerprint == Tokenizer.from_checkpoint(saved()).fingerprint
    # Written down, since caches saved by one version are to be read by the next.
    assert qwen3.fingerprint == "7581611055a7bac16c6dadaccb1aabdf5a693f7390d483a92025f891c7acdfb8"


def test_fingerprint_changes_with_the_merges_and_with_the_ids(qwen3, saved):
    def swap_merges(tokenizer):
        merges = tokenizer["model"]["merges"]
        merges[0], merges[1] = merges[1], merges[0]

    def swap_ids(tokenizer):
        vocab = tokenizer["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    prints = {Tokenizer.from_checkpoint(saved(c)).fingerprint for c in (swap_merges, swap_ids)}
    assert len(prints | {qwen3.fingerprint}) == 3


def test_bytes_of_tokens_join_to_the_text(qwen3):
    text = "naïve 我 😀"
    assert b"".join(map(qwen3.token_bytes, qwen3.encode(text))) == text.encode()
    assert qwen3.token_bytes(999) == b""
    assert qwen3.is_byte_level


def test_importing_the_text_room_loads_no_library():
    modules = "kvist.text.tokenizer, kvist.text.chat, kvist.text.detokenize"
    code = f"import sys, json, {modules}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert not loaded & {"tokenizers", "jinja2", "transformers", "huggingface_hub", "gguf"}
