"""Randomness is a counter: what a seed gives is fixed for good, uniform, and free of order."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.core.rng import Purpose, fresh_seed, sample_key, uniform, uniform_at
from slow_sampler import chi_square, chi_square_limit

# A seed that someone wrote down must give the same text in every later version.
GOLDEN = {
    (0, 0, 0, Purpose.SAMPLE): 0.9477707979038982,
    (0, 0, 1, Purpose.SAMPLE): 0.7089899477483012,
    (0, 1, 0, Purpose.SAMPLE): 0.2897780054251692,
    (1, 0, 0, Purpose.SAMPLE): 0.5119878556507406,
    (42, 3, 1000, Purpose.SAMPLE): 0.3898836232059253,
    (42, 3, 1000, Purpose.ACCEPT): 0.9104785462638945,
    (42, 3, 1000, Purpose.RESAMPLE): 0.47938695163212675,
    (-1, 0, 0, Purpose.SAMPLE): 0.5560131396451891,
    (2**64, 0, 0, Purpose.SAMPLE): 0.6205363538474207,
}

DRAWS = 20_000


@pytest.mark.parametrize("place", GOLDEN, ids=str)
def test_seeds_keep_their_meaning(place: tuple[int, int, int, Purpose]) -> None:
    seed, sample, position, purpose = place
    assert uniform(*place) == GOLDEN[place]
    assert uniform_at(sample_key(seed, sample), position, purpose) == GOLDEN[place]


@pytest.mark.parametrize(
    "along",
    [
        pytest.param(lambda i: (7, 0, i, Purpose.SAMPLE), id="positions"),
        pytest.param(lambda i: (i, 0, 0, Purpose.SAMPLE), id="seeds"),
        pytest.param(lambda i: (7, i, 0, Purpose.SAMPLE), id="samples"),
        pytest.param(lambda i: (i << 64, 0, 5, Purpose.SAMPLE), id="high_words_of_seeds"),
        pytest.param(lambda i: (7, 0, i, Purpose.ACCEPT), id="another_purpose"),
    ],
)
def test_draws_are_uniform_and_neighbours_independent(
    along: Callable[[int], tuple[int, int, int, Purpose]],
) -> None:
    draws = [uniform(*along(i)) for i in range(DRAWS)]
    bins, grid = [0] * 64, [0] * 256
    for draw in draws:
        bins[int(draw * 64)] += 1
    for first, second in zip(draws[::2], draws[1::2], strict=True):
        grid[int(first * 16) * 16 + int(second * 16)] += 1
    for counts in (bins, grid):
        statistic, degrees = chi_square(counts, [1 / len(counts)] * len(counts))
        assert statistic < chi_square_limit(degrees)


def test_purposes_do_not_repeat_each_other() -> None:
    grid = [0] * 256
    for i in range(DRAWS):
        first, second = (uniform(7, 0, i, p) for p in (Purpose.SAMPLE, Purpose.ACCEPT))
        grid[int(first * 16) * 16 + int(second * 16)] += 1
    statistic, degrees = chi_square(grid, [1 / 256] * 256)
    assert statistic < chi_square_limit(degrees)


def test_no_draw_is_given_twice() -> None:
    places = [(s, n, p) for s in range(20) for n in range(10) for p in range(100)]
    assert len({uniform(*place) for place in places}) == len(places)


@given(st.integers(), st.integers(0, 2**40), st.integers(0, 2**40), st.sampled_from(Purpose))
def test_any_seed_gives_a_number_from_zero_up_to_one(
    seed: int, sample: int, position: int, purpose: Purpose
) -> None:
    draw = uniform(seed, sample, position, purpose)
    assert 0 <= draw < 1
    assert draw == uniform(seed, sample, position, purpose)
    assert draw * 2**53 % 1 == 0


def test_requests_without_a_seed_get_one_of_their_own() -> None:
    seeds = {fresh_seed() for _ in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
