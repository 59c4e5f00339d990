"""Sampling parameters: nonsense is refused by name, and what is left open is settled once."""

import math
import pickle
from dataclasses import fields
from typing import Any

import pytest

from kvist import SamplingParams
from kvist.core.params import DEFAULT_MAX_TOKENS, ResolvedParams
from kvist.errors import RequestError

SAMPLING = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("max_tokens", 0),
        ("max_tokens", 2.0),
        ("min_tokens", -1),
        ("min_tokens", None),
        ("seed", "lucky"),
        ("n", 0),
        ("logprobs", -1),
        ("logprobs", 51),
        ("logprobs", True),
        ("prompt_logprobs", -1),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("presence_penalty", None),
        ("frequency_penalty", -2.1),
        ("num_beams", 0),
        ("stop", ""),
        ("stop", ["end", ""]),
        ("stop", [3]),
        ("stop", 3),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["<eos>"]),
        ("stop_token_ids", 3),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {5: math.inf}),
        ("logit_bias", [5]),
        ("ignore_eos", "no"),
    ],
)
def test_senseless_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name}") as caught:
        SamplingParams(**{name: value})
    # The message shows the value, or that one of its items which is at fault.
    items = [*value, *value.values()] if isinstance(value, dict) else value
    candidates = [value, *items] if isinstance(items, list) else [value]
    assert any(repr(candidate) in str(caught.value) for candidate in candidates)
    assert "\n" not in str(caught.value)


def test_more_least_tokens_than_most_are_refused_with_both_numbers() -> None:
    with pytest.raises(RequestError, match="min_tokens 9 is more than max_tokens 8"):
        SamplingParams(min_tokens=9, max_tokens=8)


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0},
        {"temperature": 5},
        {"top_k": 0, "top_p": 1, "min_p": 0},
        {"min_p": 1},
        {"max_tokens": 1, "min_tokens": 1},
        {"seed": -(2**80)},
        {"logprobs": 0, "prompt_logprobs": 50},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"logit_bias": {0: -100}},
    ],
    ids=str,
)
def test_the_ends_of_every_range_belong_to_it(given: dict[str, Any]) -> None:
    params = SamplingParams(**given)
    assert {name: getattr(params, name) for name in given} == given


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="end").stop == ("end",)


def test_later_changes_to_what_was_passed_in_do_not_reach_the_parameters() -> None:
    stop, ids, bias = ["a"], [1], {2: 3.0}
    params = SamplingParams(stop=stop, stop_token_ids=ids, logit_bias=bias)
    stop.append("b")
    ids.append(2)
    bias[3] = 4.0
    kept = (params.stop, params.stop_token_ids, params.logit_bias)
    assert kept == (("a",), (1,), {2: 3.0})


@pytest.mark.parametrize(
    ("given", "file", "expected"),
    [
        pytest.param({}, {}, (0, 0, 1, 0), id="greedy_where_nothing_is_said"),
        pytest.param({}, SAMPLING, (0.6, 20, 0.95, 0.1), id="the_models_own"),
        pytest.param(
            {}, SAMPLING | {"do_sample": False}, (0, 0, 1, 0), id="not_if_it_does_not_sample"
        ),
        pytest.param({}, {"do_sample": True}, (1, 0, 1, 0), id="plain_sampling"),
        pytest.param({"temperature": 0}, SAMPLING, (0, 20, 0.95, 0.1), id="greedy_if_asked"),
        pytest.param({"temperature": 2}, SAMPLING, (2, 20, 0.95, 0.1), id="one_overridden"),
        pytest.param({"top_k": 0}, SAMPLING, (0.6, 0, 0.95, 0.1), id="zero_is_a_value"),
        pytest.param({"top_p": 0.5}, {}, (1, 0, 0.5, 0), id="a_filter_means_sampling"),
    ],
)
def test_open_fields_take_the_models_defaults_then_the_usual_ones(
    given: dict[str, Any], file: dict[str, Any], expected: tuple[float, ...]
) -> None:
    settled = SamplingParams(**given).resolve(file)
    assert settled.greedy == (expected[0] == 0)
    assert (settled.temperature, settled.top_k, settled.top_p, settled.min_p) == expected


@pytest.mark.parametrize(
    ("given", "file", "expected"),
    [
        ({}, {}, DEFAULT_MAX_TOKENS),
        ({}, {"max_new_tokens": 7}, 7),
        ({"max_tokens": 3}, {"max_new_tokens": 7}, 3),
        ({"min_tokens": 1000}, {"max_new_tokens": 7}, 1000),
    ],
)
def test_the_limit_of_new_tokens(
    given: dict[str, Any], file: dict[str, Any], expected: int
) -> None:
    assert SamplingParams(**given).resolve(file).max_tokens == expected


def test_a_models_repetition_penalty_holds_for_greedy_too() -> None:
    file = {"repetition_penalty": 1.2}
    assert SamplingParams().resolve(file).repetition_penalty == 1.2
    assert SamplingParams(repetition_penalty=1.0).resolve(file).repetition_penalty == 1.0


def test_nothing_is_open_once_resolved() -> None:
    settled = SamplingParams().resolve({})
    optional = {"logprobs", "prompt_logprobs"}
    unset = {f.name for f in fields(settled) if getattr(settled, f.name) is None}
    assert unset == optional


def test_a_given_seed_is_kept_and_a_missing_one_is_fresh() -> None:
    assert SamplingParams(seed=0).resolve({}).seed == 0
    assert SamplingParams().resolve({}).seed != SamplingParams().resolve({}).seed


def test_parameters_travel_between_processes() -> None:
    params = SamplingParams(temperature=0.7, stop=["a"], logit_bias={1: 2.0}, seed=3)
    settled = params.resolve(SAMPLING)
    assert pickle.loads(pickle.dumps(params)) == params
    restored = pickle.loads(pickle.dumps(settled))
    assert restored == settled
    assert isinstance(restored, ResolvedParams)
