"""What is refused before any work is done, and how the sentence reads."""

import re

import pytest
from harness import FULL, Harness, make_request, sliding

from kvist.core.limits import SchedulerConfig
from kvist.core.request import ImageSpan
from kvist.core.tables import CacheGroup
from kvist.errors import CacheError, ConfigError, ContextTooLong, RequestError


def test_an_empty_prompt_is_refused():
    with pytest.raises(RequestError, match="prompt is empty"):
        make_request("r", [])


@pytest.mark.parametrize("spans", [[(0, 0)], [(3, 2)], [(0, 2), (1, 2)], [(2, 1), (0, 1)]], ids=str)
def test_an_image_outside_the_prompt_or_over_another_is_refused(spans):
    images = tuple(ImageSpan(start, length, "cat") for start, length in spans)
    with pytest.raises(RequestError, match=r"image at \[\d+, \d+\) overlaps another or leaves"):
        make_request("r", [1] * 4, images=images)


def test_the_last_sampled_token_needs_no_place_in_the_cache():
    assert make_request("r", [1] * 4, max_tokens=3).max_tokens_in_cache == 6


def refusal(harness: Harness, *args: object, **kwargs: object) -> str:
    with pytest.raises(RequestError) as caught:
        harness.add(make_request("r", *args, **kwargs))  # type: ignore[arg-type]
    assert not harness.scheduler.has_unfinished
    return str(caught.value)


def test_more_than_the_model_takes_is_refused_with_both_numbers():
    harness = Harness([CacheGroup(FULL, 100)], max_model_len=12)
    message = refusal(harness, [1] * 8, max_tokens=5)
    assert "8 prompt + 5 new tokens = 13" in message
    assert "takes 12" in message


def test_more_than_the_pool_holds_is_refused_with_both_numbers():
    harness = Harness([CacheGroup(FULL, 4)], block_size=4)
    with pytest.raises(ContextTooLong, match=r"need 4 blocks of 4, but the cache has 3"):
        harness.add(make_request("r", [1] * 10, max_tokens=4))
    harness.add(make_request("r", [1] * 10, max_tokens=3))
    harness.drain()


def test_a_window_makes_long_requests_fit_in_a_small_pool():
    harness = Harness([CacheGroup(sliding(4), 6)], block_size=2)
    harness.add(make_request("r", [1] * 30, max_tokens=10))
    harness.drain()


@pytest.mark.parametrize("ahead", [False, True])
def test_the_smallest_pool_that_a_window_is_let_into_is_enough(ahead):
    # Three tokens of window behind the next, one of slack, one under way, the next: 4 blocks of 2.
    request = make_request("r", [1] * 9, max_tokens=12)
    harness = Harness([CacheGroup(sliding(4), 5)], block_size=2)
    harness.add(request)
    harness.drain(ahead=ahead)
    with pytest.raises(ContextTooLong, match="need 4 blocks of 2, but the cache has 3"):
        Harness([CacheGroup(sliding(4), 4)], block_size=2).add(request)


def test_an_image_that_no_step_could_encode_is_refused_with_both_numbers():
    harness = Harness([CacheGroup(FULL, 100)], max_image_tokens=4)
    message = refusal(harness, [1] * 8, images=(ImageSpan(0, 5, "cat"),))
    assert "an image of 5 tokens" in message
    assert "encodes 4" in message


def test_two_requests_of_one_id_are_refused_while_the_first_lives():
    harness = Harness([CacheGroup(FULL, 100)])
    harness.add(make_request("r", [1]))
    with pytest.raises(RequestError, match="r is already running"):
        harness.scheduler.add(make_request("r", [1]))
    harness.drain()
    harness.add(make_request("r", [1]))


@pytest.mark.parametrize(
    ("config", "value"),
    [
        ({"max_num_seqs": 0}, "0"),
        ({"max_batch_tokens": -1}, "-1"),
        ({"max_chunk_tokens": 0}, "0"),
        ({"watermark": 1.0}, "1.0"),
        ({"max_image_tokens": 8, "encoder_cache_tokens": 4}, "4"),
    ],
)
def test_a_configuration_that_could_do_nothing_is_refused(config, value):
    with pytest.raises(ConfigError, match=re.escape(value)):
        SchedulerConfig(**config)


@pytest.mark.parametrize(("groups", "size"), [([], 4), ([1], 4), ([8], 0)])
def test_a_cache_without_room_is_refused(groups, size):
    with pytest.raises(CacheError, match="at least 2 blocks"):
        Harness([CacheGroup(FULL, n) for n in groups], block_size=size)
