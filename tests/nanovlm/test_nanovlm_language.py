"""nanoVLM's LanguageModel, both modes: logits, caches, padding and `generate()` as it has them."""

import pytest
import torch
from torch import Tensor
from vlm_cases import TOLERANCE, case

from kvist.errors import ContextTooLong, RequestError
from kvist.models.nanovlm_language import LanguageModel


def tokens(name: str) -> LanguageModel:
    return LanguageModel(case(name).loaded.model.language, use_tokens=True)


def embeddings(name: str) -> LanguageModel:
    return LanguageModel(case(name).loaded.model.language, use_tokens=False)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


@pytest.fixture(autouse=True)
def _inference() -> object:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize(
    ("name", "length"),
    [("vlm_tied", 1), ("vlm_tied", 7), ("vlm_tied", 33), ("vlm_tied", 100), ("vlm_untied", 33)],
)
def test_prefill_gives_nanovlms_logits(name: str, length: int) -> None:
    reference = case(name).ref
    logits, cache = tokens(name)(reference[f"lm.{length}.input_ids"])
    assert_close(logits, reference[f"lm.{length}.prefill_logits"])
    assert cache.lengths == (length,)


@pytest.mark.parametrize("name", ["vlm_tied", "vlm_untied"])
def test_each_blocks_cache_holds_nanovlms_keys_and_values(name: str) -> None:
    reference = case(name).ref
    _, cache = tokens(name)(reference["lm.33.input_ids"])
    for i, (keys, values) in enumerate(cache):  # type: ignore[arg-type, misc]
        assert_close(keys, reference[f"lm.33.kv.{i}.key"])
        assert_close(values, reference[f"lm.33.kv.{i}.value"])


@pytest.mark.parametrize(
    ("name", "length"), [("vlm_tied", 7), ("vlm_tied", 100), ("vlm_untied", 33)]
)
def test_forced_decoding_gives_nanovlms_logits(name: str, length: int) -> None:
    reference, lm = case(name).ref, tokens(name)
    _, cache = lm(reference[f"lm.{length}.input_ids"])
    steps = []
    for i, token in enumerate(reference[f"lm.{length}.forced_ids"][0]):
        logits, cache = lm(token.view(1, 1), kv_cache=cache, start_pos=length + i)
        steps.append(logits)
    assert_close(torch.cat(steps, dim=1), reference[f"lm.{length}.decode_logits"])


@pytest.mark.parametrize("name", ["vlm_tied", "vlm_untied"])
@pytest.mark.parametrize("case_name", ["1", "7", "33", "100", "batch4"])
def test_generate_gives_nanovlms_ids(name: str, case_name: str) -> None:
    reference = case(name).ref
    prompt, expected = (reference[f"lm.{case_name}.{n}"] for n in ("input_ids", "generate_ids"))
    new = expected.shape[1] - prompt.shape[1]
    assert torch.equal(tokens(name).generate(prompt, max_new_tokens=new), expected)


def test_left_padded_rows_give_nanovlms_logits() -> None:
    reference, lm = case("vlm_tied").ref, tokens("vlm_tied")
    mask = reference["lm.leftpad.attention_mask"]
    logits, cache = lm(reference["lm.leftpad.input_ids"], attention_mask=mask)
    assert_close(logits[:, -1], reference["lm.leftpad.prefill_last_logits"])
    assert not logits[mask == 0].any()
    width, steps = mask.shape[1], []
    for i, column in enumerate(reference["lm.leftpad.forced_ids"].T):
        mask = torch.cat((mask, torch.ones(3, 1, dtype=mask.dtype)), dim=1)
        logits, cache = lm(column[:, None], mask, cache, start_pos=width + i)
        steps.append(logits)
    assert_close(torch.cat(steps, dim=1), reference["lm.leftpad.decode_logits"])


def test_a_prompt_in_parts_is_the_prompt_at_once() -> None:
    ids, lm = case("vlm_tied").ref["lm.33.input_ids"], tokens("vlm_tied")
    whole, _ = lm(ids)
    first, cache = lm(ids[:, :20])
    second, _ = lm(ids[:, 20:], kv_cache=cache, start_pos=20)
    assert_close(torch.cat((first, second), dim=1), whole)


@pytest.mark.parametrize("name", ["vlm_tied", "vlm_untied"])
def test_embeddings_in_and_hidden_states_out(name: str) -> None:
    reference, lm = case(name).ref, embeddings(name)
    hidden, _ = lm(reference["lm_embeds.inputs"])
    assert_close(hidden, reference["lm_embeds.prefill_hidden"])
    grown = lm.generate(reference["lm_embeds.inputs"], max_new_tokens=8)
    assert_close(grown, reference["lm_embeds.generate"])


def test_a_prompt_without_batch_is_a_batch_of_one() -> None:
    lm = tokens("vlm_tied")
    assert lm.generate(torch.tensor([5, 6, 7]), max_new_tokens=2).shape == (1, 5)
    assert lm.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=0).shape == (1, 3)


def test_past_the_models_positions_it_refuses() -> None:
    lm = tokens("vlm_tied")
    with pytest.raises(ContextTooLong, match="1025 positions, but the model's limit is 1024"):
        lm(torch.zeros(1, 1025, dtype=torch.long))


def test_contradictions_between_mask_cache_and_position_are_refused() -> None:
    lm, ids = tokens("vlm_tied"), torch.zeros(2, 4, dtype=torch.long)
    _, cache = lm(ids)
    with pytest.raises(RequestError, match=r"rows have \[3, 3\] tokens .* cache holds \[4, 4\]"):
        lm(ids, kv_cache=cache, start_pos=3)
    with pytest.raises(RequestError, match=r"start_pos 2"):
        lm(ids, start_pos=2)
    with pytest.raises(RequestError, match=r"attention_mask is \[2, 3\]; it must be \[2, 4\]"):
        lm(ids, attention_mask=torch.ones(2, 3))
