"""A stream gives what generate() gives, piece by piece, and never takes anything back."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvist
from kvist import Delta, Result, SamplingParams
from kvist.errors import RequestError
from tiny_models import CountingStep, reference, tiny

PROMPTS = reference("dense_tied").prompts


def joined(deltas: list[Delta]) -> tuple[str, tuple[int, ...]]:
    return "".join(d.text for d in deltas), tuple(i for d in deltas for i in d.token_ids)


def result_of(deltas: list[Delta]) -> Result:
    assert all(delta.result is None for delta in deltas[:-1])
    assert deltas[-1].result is not None
    return deltas[-1].result


def text_of(model: kvist.Model, ids: tuple[int, ...]) -> str:
    return model.require_tokenizer().decode(ids)


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_pieces_join_to_what_generate_gives(
    model: kvist.Model, prompt: list[int], temperature: float
) -> None:
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=40, logprobs=1)
    deltas = list(kvist.stream(model, prompt, params))
    result = result_of(deltas)
    [whole] = kvist.generate(model, [prompt], params)
    assert joined(deltas) == (result.text, result.token_ids) == (whole.text, whole.token_ids)
    assert tuple(e for d in deltas for e in d.logprobs) == result.logprobs
    assert [len(d.token_ids) for d in deltas] == [1] * len(result.token_ids)
    assert result.finish_reason == whole.finish_reason
    assert result.text == text_of(model, result.token_ids)


def test_the_text_so_far_is_always_a_beginning_of_the_whole(model: kvist.Model) -> None:
    """The reference's outputs are full of characters that are cut into tokens."""
    cut = 0
    for prompt in PROMPTS:
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
        deltas = list(kvist.stream(model, prompt, params))
        result, so_far = result_of(deltas), ""
        for i, delta in enumerate(deltas):
            so_far += delta.text
            assert result.text.startswith(so_far)
            cut += so_far != text_of(model, result.token_ids[: i + 1])
    assert cut > 0


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(range(len(PROMPTS))),
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 6)), min_size=1, max_size=3),
    st.lists(st.text(max_size=3), max_size=2),
)
def test_a_stop_string_never_leaks_into_a_stream(
    which: int, places: list[tuple[int, int]], others: list[str]
) -> None:
    """Not a character of it, wherever tokens cut it, and whichever of several comes first."""
    known = reference("dense_tied")
    prompt, ids = known.prompts[which], known.greedy[which][:32]
    text = text_of(known.model, ids)
    stops = {text[at : at + length] for at, length in places} | {"".join(o) for o in others}
    stops.discard("")
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, stop=sorted(stops))
    deltas = list(kvist.stream(known.model, prompt, params))
    result = result_of(deltas)
    met = [at for stop in stops if (at := text.find(stop)) >= 0]
    expected = text[: min(met)] if met else text
    assert result.text == expected
    so_far = ""
    for delta in deltas:
        so_far += delta.text
        assert expected.startswith(so_far)
    assert so_far == expected
    assert result.token_ids == ids[: len(result.token_ids)]
    if met:
        assert result.finish_reason == "stop"
        assert result.stop_reason in stops
        assert text.startswith(str(result.stop_reason), min(met))
    else:
        assert (result.finish_reason, result.stop_reason) == ("length", None)
    assert kvist.generate(known.model, [prompt], params)[0].text == expected


def test_generation_ends_with_the_token_that_completes_the_stop_string() -> None:
    known = reference("dense_tied")
    ids = known.greedy[3]
    texts = [text_of(known.model, ids[:n]) for n in range(40)]
    # A token of several whole characters that the text did not have before.
    at, stop = next(
        (n, after.removeprefix(before))
        for n, (before, after) in enumerate(pairwise(texts), start=1)
        if after.startswith(before)
        and after.removeprefix(before).strip("\ufffd")[1:]
        and after.find(after.removeprefix(before)) == len(before)
    )
    step = CountingStep(known.model)
    params = SamplingParams(temperature=0, max_tokens=64, stop=stop)
    [result] = kvist.generate(known.model, [known.prompts[3]], params, step=step)
    assert len(result.token_ids) == at == len(step.tokens)
    assert (result.finish_reason, result.stop_reason) == ("stop", stop)


def test_text_that_only_began_like_a_stop_string_comes_out_at_the_end(model: kvist.Model) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    [free] = kvist.generate(model, [PROMPTS[1]], params)
    params = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, stop=free.text[-1] + "\u2603"
    )
    deltas = list(kvist.stream(model, PROMPTS[1], params))
    assert joined(deltas) == (free.text, free.token_ids)
    assert result_of(deltas).finish_reason == "length"


def test_a_model_without_a_tokenizer_streams_token_ids() -> None:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    deltas = list(kvist.stream(tiny(), [1, 2], params))
    assert joined(deltas) == ("", result_of(deltas).token_ids)
    assert len(deltas) == 5


def test_every_piece_comes_as_soon_as_its_step_is_done(model: kvist.Model) -> None:
    step = CountingStep(model)
    stream = kvist.stream(
        model, [1, 2, 3], SamplingParams(max_tokens=9, ignore_eos=True), step=step
    )
    assert step.tokens == []
    for steps, _ in enumerate(stream, start=1):
        assert len(step.tokens) == steps


def test_streams_of_one_model_may_be_read_in_turns_or_left(model: kvist.Model) -> None:
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    expected = [list(kvist.stream(model, p, params)) for p in PROMPTS[1:3]]
    left = kvist.stream(model, PROMPTS[0], params)
    next(left)
    pairs = zip(*(kvist.stream(model, p, params) for p in PROMPTS[1:3]), strict=True)
    found = [list(deltas) for deltas in zip(*pairs, strict=True)]
    assert [joined(deltas) for deltas in found] == [joined(deltas) for deltas in expected]


def test_what_is_wrong_is_raised_by_the_call_not_by_the_first_piece(model: kvist.Model) -> None:
    with pytest.raises(RequestError, match="empty"):
        kvist.stream(model, [])
    with pytest.raises(RequestError, match="n=2"):
        kvist.stream(model, [1], SamplingParams(n=2))
