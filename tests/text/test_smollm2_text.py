"""SmolLM2's own tokenizer and template, rebuilt from its GGUF, where it has been pulled."""

import json
from pathlib import Path

import pytest
from hard_texts import HARD
from small_files import SMOLLM2, Files

from kvist.loading.checkpoint import open_checkpoint
from kvist.loading.hub import pulled_path
from kvist.text import chat
from kvist.text.detokenize import Detokenizer
from kvist.text.tokenizer import Tokenizer

pytestmark = pytest.mark.smollm2

REFERENCE = json.loads((SMOLLM2 / "reference.json").read_text())


@pytest.fixture(scope="module")
def path() -> Path:
    path = pulled_path("smollm2-135m")
    if path is None:
        pytest.skip("SmolLM2-135M is not here; run `kvist pull smollm2-135m`")
    return path


@pytest.fixture(scope="module")
def smollm2(path):
    return Tokenizer.from_checkpoint(open_checkpoint(path))


@pytest.mark.parametrize("case", REFERENCE["cases"], ids=lambda case: case["prompt"])
def test_prompts_have_the_references_ids(smollm2, case):
    text = case["prompt"]
    if case["kind"] == "chat":
        messages = [{"role": "user", "content": text}]
        special_tokens = smollm2.special_tokens
        text = chat.render(smollm2.chat_template, messages, special_tokens=special_tokens)
    assert smollm2.encode(text) == case["prompt_ids"]


@pytest.mark.parametrize("case", REFERENCE["cases"], ids=lambda case: case["prompt"])
def test_output_streams_as_the_references_text(smollm2, case):
    detokenizer = Detokenizer(smollm2, prompt_ids=case["prompt_ids"])
    shown = "".join(map(detokenizer.push, case["greedy_ids"])) + detokenizer.flush()
    assert shown == smollm2.decode(case["greedy_ids"])
    assert shown == case["text"].removesuffix("<|im_end|>")


def test_perplexity_text_comes_back_with_its_ids(smollm2):
    ids = REFERENCE["ppl"]["ids"]
    assert smollm2.encode(smollm2.decode(ids)) == ids


def test_it_knows_its_special_tokens(smollm2):
    assert smollm2.vocab_size == 49_152
    assert smollm2.special_ids == set(range(17))
    assert (smollm2.bos_token_id, smollm2.eos_token_id, smollm2.add_bos) == (1, 2, False)


def test_first_merges_are_its_own(smollm2, smollm2_metadata):
    small = Tokenizer.from_checkpoint(Files(Path("small.gguf"), gguf_metadata=smollm2_metadata))
    assert small.chat_template == smollm2.chat_template
    assert small.special_tokens == smollm2.special_tokens
    # Words this common need no more merges than the small one has.
    for text in (" the in  in 12 he", " 1  2   3", "<|im_start|>on the<|im_end|>\n"):
        pieces = [smollm2.id_to_token(i) for i in smollm2.encode(text)]
        assert pieces == [small.id_to_token(i) for i in small.encode(text)]


def test_ids_equal_transformers(smollm2, path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers' own rebuilding forgets to cut digits out, which the model was trained with and
    # the tokenizer.json of its hub repository says; it shows only in spaces before digits.
    from tokenizers import pre_tokenizers as pre

    backend = theirs.backend_tokenizer
    backend.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    for text in HARD:
        assert smollm2.encode(text) == theirs.encode(text)
        ids = smollm2.encode(text)
        assert smollm2.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
