"""The sampler draws what its parameters define: against plain Python, and transformers' warpers.

A grid of evenly spaced uniform numbers gives each token a share of the grid that is its probability
to within one draw, so whole distributions are compared without chance.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvist import SamplingParams
from kvist.core.rng import uniform
from kvist.errors import NumericalError
from kvist.runner.sampler import Sampler, check_finite, logprobs_of
from slow_sampler import chi_square, chi_square_limit, distribution, draw

VOCAB = 13
GRID = 200

# Sixteenths: two that float32 cannot tell apart would be a tie here and none in Python.
logits_ = st.lists(
    st.integers(-192, 192).map(lambda n: n / 16), min_size=VOCAB, max_size=VOCAB, unique=True
)
tokens_ = st.integers(0, VOCAB - 1)
# Values on which float32 and float64 agree about which tokens are left.
sampling_ = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.7]),
        "top_k": st.sampled_from([0, 1, 2, 5, VOCAB, 100]),
        "top_p": st.sampled_from([0.1, 0.503, 0.907, 1.0]),
        "min_p": st.sampled_from([0.0, 0.0203, 0.307, 1.0]),
    }
)
penalties_ = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
        "presence_penalty": st.sampled_from([0.0, 0.6, -0.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.4, -0.3]),
        "logit_bias": st.dictionaries(tokens_, st.floats(-5, 5, width=32), max_size=3),
    }
)


def counts_on_grid(logits: Tensor, given_: dict[str, Any], **history: Any) -> list[int]:
    """How often each token is drawn on the grid; penalties see the history as it stands."""
    prompt, output = history.get("prompt", ()), history.get("output", ())
    size = GRID // 2 if prompt else GRID
    params = SamplingParams(seed=0, **given_).resolve({})
    uniforms = [(i + 0.5) / size for i in range(size)]
    # With a history a slot each, so that what one row draws is not counted for the others.
    slots = list(range(size)) if prompt else [0] * size
    sampler = Sampler(len(logits))
    for slot in set(slots):
        sampler.admit(slot, params, tuple(prompt))
    for token in output:  # force the history in: only this token can be drawn
        only = torch.full((size, len(logits)), -torch.inf)
        only[:, token] = 1.0
        assert set(sampler.sample(only, slots, uniforms)) == {token}
    banned = [frozenset(history.get("banned", ()))] * size
    drawn = sampler.sample(logits.repeat(size, 1), slots, uniforms, banned)
    return [drawn.count(token) for token in range(len(logits))]


def agree(counts: list[int], expected: list[float]) -> bool:
    """Whether each token has its share of the grid, to within one draw."""
    size = sum(counts)
    return all(abs(n - p * size) <= 1.01 for n, p in zip(counts, expected, strict=True))


@settings(max_examples=150, deadline=None)
@given(logits_, sampling_)
def test_filters_leave_what_their_definitions_say(
    logits: list[float], given_: dict[str, Any]
) -> None:
    found = counts_on_grid(torch.tensor(logits), given_)
    assert agree(found, distribution(logits, **given_))


@settings(max_examples=40, deadline=None)
@given(
    logits_,
    penalties_,
    st.lists(tokens_, min_size=1, max_size=4),
    st.lists(tokens_, max_size=5),
    st.sets(tokens_, max_size=2),
)
def test_penalties_bias_and_bans_change_logits_as_their_definitions_say(
    logits: list[float],
    given_: dict[str, Any],
    prompt: list[int],
    output: list[int],
    banned: set[int],
) -> None:
    history: dict[str, Any] = {"prompt": prompt, "output": output, "banned": banned}
    found = counts_on_grid(torch.tensor(logits), given_ | {"temperature": 1.0}, **history)
    assert agree(found, distribution(logits, **given_, **history))


@pytest.mark.parametrize(
    ("warper", "given_"),
    [
        ("TemperatureLogitsWarper", {"temperature": 0.6}),
        ("TemperatureLogitsWarper", {"temperature": 3.0}),
        ("TopKLogitsWarper", {"top_k": 1}),
        ("TopKLogitsWarper", {"top_k": 7}),
        ("TopPLogitsWarper", {"top_p": 0.2}),
        ("TopPLogitsWarper", {"top_p": 0.95}),
        ("MinPLogitsWarper", {"min_p": 0.05}),
        ("MinPLogitsWarper", {"min_p": 0.6}),
    ],
    ids=str,
)
def test_each_filter_is_transformers(warper: str, given_: dict[str, float]) -> None:
    import transformers

    generator = torch.Generator().manual_seed(0)
    theirs = getattr(transformers, warper)(*given_.values())
    for scale in (0.5, 2.0, 6.0):
        logits = torch.randn(4, 40, generator=generator) * scale
        expected = theirs(torch.zeros(4, 1, dtype=torch.long), logits.clone()).softmax(-1)
        for row, probabilities in zip(logits, expected, strict=True):
            assert agree(counts_on_grid(row, given_), probabilities.tolist())


def test_filters_together_are_transformers_in_its_order() -> None:
    import transformers

    logits = torch.randn(8, 40, generator=torch.Generator().manual_seed(1)) * 3
    chain: Any = transformers.LogitsProcessorList(
        [
            transformers.TemperatureLogitsWarper(0.8),
            transformers.TopKLogitsWarper(12),
            transformers.TopPLogitsWarper(0.9),
            transformers.MinPLogitsWarper(0.03),
        ]
    )
    expected = chain(torch.zeros(8, 1).long(), logits.clone()).softmax(-1)
    given_ = {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.03}
    for row, probabilities in zip(logits, expected, strict=True):
        assert agree(counts_on_grid(row, given_), probabilities.tolist())


@pytest.mark.parametrize("penalty", [1.2, 2.0, 0.7])
def test_repetition_penalty_is_transformers(penalty: float) -> None:
    import transformers

    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2)) * 3
    prompt, output = [1, 4, 4], [7, 7, 0]
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    expected = theirs(torch.tensor([prompt + output]), logits[None].clone())[0].softmax(-1)
    given_ = {"repetition_penalty": penalty, "temperature": 1.0}
    assert agree(counts_on_grid(logits, given_, prompt=prompt, output=output), expected.tolist())


def test_logit_bias_is_transformers() -> None:
    import transformers

    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3))
    bias = {2: 1.5, 9: -3.0}
    theirs = transformers.SequenceBiasLogitsProcessor([[[t], b] for t, b in bias.items()])
    expected = theirs(torch.tensor([[0]]), logits[None].clone())[0].softmax(-1)
    assert agree(
        counts_on_grid(logits, {"logit_bias": bias, "temperature": 1.0}), expected.tolist()
    )


@pytest.mark.parametrize(
    "given_",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.5, "top_k": 5},
        {"temperature": 1.2, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.1},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_draws_of_a_seed_follow_the_distribution(given_: dict[str, Any]) -> None:
    logits = torch.randn(30, generator=torch.Generator().manual_seed(4)) * 2
    params = SamplingParams(seed=2024, **given_).resolve({})
    sampler = Sampler(30)
    sampler.admit(0, params, (0,))
    rows, counts = 1000, [0] * 30
    for step in range(4):
        uniforms = [uniform(2024, 0, step * rows + i) for i in range(rows)]
        for token in sampler.sample(logits.expand(rows, -1), [0] * rows, uniforms):
            counts[token] += 1
    statistic, degrees = chi_square(counts, distribution(logits.tolist(), **given_))
    assert statistic < chi_square_limit(degrees)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(logits_, sampling_, penalties_, st.floats(0, 1, exclude_max=True)), max_size=6
    ),
    st.randoms(use_true_random=False),
)
def test_a_row_does_not_depend_on_its_neighbours(rows: list[Any], order: Any) -> None:
    sampler = Sampler(VOCAB)
    for slot, (_, sampling, penalties, _) in enumerate(rows):
        sampler.admit(slot, SamplingParams(seed=0, **sampling, **penalties).resolve({}), (1, 2))
    alone = Sampler(VOCAB)
    expected = {}
    for slot, (logits, sampling, penalties, number) in enumerate(rows):
        alone.admit(0, SamplingParams(seed=0, **sampling, **penalties).resolve({}), (1, 2))
        expected[slot] = alone.sample(torch.tensor([logits]), [0], [number])
    slots = list(expected)
    order.shuffle(slots)
    if slots:
        stacked = torch.tensor([rows[slot][0] for slot in slots])
        together = sampler.sample(stacked, slots, [rows[slot][3] for slot in slots])
        assert [[token] for token in together] == [expected[slot] for slot in slots]


def test_the_draw_is_the_inverse_of_the_distribution_in_the_vocabularys_order() -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5))
    params = SamplingParams(temperature=1.0, seed=0).resolve({})
    sampler = Sampler(VOCAB)
    sampler.admit(0, params, (0,))
    probabilities = distribution(logits.tolist())
    numbers = [uniform(1, 0, i) for i in range(300)]
    drawn = sampler.sample(logits.expand(300, -1), [0] * 300, numbers)
    assert drawn == [draw(probabilities, number) for number in numbers]


@pytest.mark.parametrize("number", [0.0, math.nextafter(1.0, 0.0)])
def test_the_ends_of_the_unit_interval_draw_only_what_is_possible(number: float) -> None:
    sampler = Sampler(5)
    sampler.admit(0, SamplingParams(temperature=1.0, top_k=2, seed=0).resolve({}), (0,))
    logits = torch.tensor([[-9.0, 3.0, -torch.inf, 2.0, -9.0]])
    assert sampler.sample(logits, [0], [number]) == [1 if number == 0 else 3]


@pytest.mark.parametrize("temperature", [1e-2, 1e-8, 1e-38, 1e-45, 1e-300])
def test_the_colder_the_more_it_is_greedy_down_to_nothing(temperature: float) -> None:
    logits = torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(6)) * 5
    for top_p, min_p in ((1.0, 0.0), (0.9, 0.0), (1.0, 0.1)):
        params = SamplingParams(temperature=temperature, top_p=top_p, min_p=min_p, seed=0)
        sampler = Sampler(VOCAB)
        sampler.admit(0, params.resolve({}), (0,))
        drawn = sampler.sample(logits, [0] * 20, [0.5] * 20)
        assert drawn == logits.argmax(-1).tolist()


def test_greedy_takes_the_likeliest_whatever_the_filters_and_the_number() -> None:
    logits = torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(7))
    sampler = Sampler(VOCAB)
    sampler.admit(0, SamplingParams(temperature=0, top_k=3, min_p=0.4, seed=0).resolve({}), (0,))
    sampler.admit(1, SamplingParams(temperature=1, seed=0).resolve({}), (0,))
    drawn = sampler.sample(logits, [0, 1] * 10, [i / 20 for i in range(20)])
    assert drawn[::2] == logits[::2].argmax(-1).tolist()


def test_equal_scores_share_their_fate_at_a_filters_edge() -> None:
    logits = torch.tensor([2.0, 5.0, 5.0, 5.0, 1.0])
    for given_ in ({"top_k": 2}, {"top_p": 0.4}, {"min_p": 1.0}):
        assert agree(counts_on_grid(logits, given_), [0, 1 / 3, 1 / 3, 1 / 3, 0])


def test_logits_are_not_written_to() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(8))
    before = logits.clone()
    params = SamplingParams(
        temperature=0.7,
        top_k=4,
        top_p=0.9,
        min_p=0.1,
        seed=0,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logit_bias={3: 1.0},
    )
    sampler = Sampler(VOCAB)
    sampler.admit(0, params.resolve({}), (1, 2))
    sampler.sample(logits, [0], [0.5], [frozenset({4})])
    assert torch.equal(logits, before)


def test_a_slot_that_is_taken_again_forgets_its_last_sequence() -> None:
    params = SamplingParams(temperature=0, frequency_penalty=2.0, repetition_penalty=5.0)
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    sampler = Sampler(3)
    sampler.admit(0, params.resolve({}), (1,))
    first = [sampler.sample(logits, [0], [0.0])[0] for _ in range(3)]
    assert first == [0, 2, 1]
    sampler.release(0)
    sampler.admit(0, params.resolve({}), (1,))
    assert [sampler.sample(logits, [0], [0.0])[0] for _ in range(3)] == first


def test_log_probabilities_are_the_models_own_with_the_likeliest_beside_them() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(9)) * 4
    expected = logits.double().log_softmax(-1)
    found = logprobs_of(logits, [5, 0, 12], [2, None, 0])
    assert [entry.token_id for entry in found] == [5, 0, 12]
    for entry, row in zip(found, expected, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-5)
    best = expected[0].topk(2)
    assert [token for token, _ in found[0].top] == best.indices.tolist()
    assert [value for _, value in found[0].top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert found[1].top == found[2].top == ()


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    [entry] = logprobs_of(torch.tensor([[0.0, 1.0, 2.0]]), [0], [50])
    assert [token for token, _ in entry.top] == [2, 1, 0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_an_error_naming_step_and_sequence(value: float) -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, 4] = value
    with pytest.raises(NumericalError, match=r"prompt 7 .* at step 12"):
        check_finite(logits, ["prompt 0", "prompt 7", "prompt 8"].__getitem__, 12)


def test_logits_that_rule_tokens_out_are_fine_but_not_all_of_them() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 1:] = -torch.inf
    check_finite(logits, ["prompt 0"].__getitem__, 0)
    with pytest.raises(NumericalError):
        check_finite(torch.full((1, VOCAB), -torch.inf), ["prompt 0"].__getitem__, 0)


def test_a_rank_counts_the_likelier_tokens() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [5.0, 1.0, 2.0, 0.0]])
    ranks = [one.rank for one in logprobs_of(logits, [2, 0], [0, 0])]
    assert ranks == [3, 1]
    assert [one.rank for one in logprobs_of(logits[:1], [3], [None])] == [1]
