"""When a sequence ends, which ids it may not sample, and what it draws."""

from kvist.core.params import ResolvedParams
from kvist.core.rng import Purpose, uniform
from kvist.core.sequence import Sequence

EOS = frozenset({9})


def a_sequence(sample_index: int = 0, **params: object) -> Sequence:
    return Sequence([1, 2, 3], ResolvedParams(**params), EOS, sample_index)  # type: ignore[arg-type]


def test_the_models_end_of_sequence_token_ends_it_and_is_kept():
    sequence = a_sequence(max_tokens=5)
    assert sequence.append(4) is None
    assert sequence.append(9) == "stop"
    assert sequence.output_ids == [4, 9]
    assert sequence.num_tokens == 5


def test_a_stop_token_ends_it_like_the_models_own():
    assert a_sequence(stop_token_ids=(7,)).append(7) == "stop"


def test_the_limit_of_new_tokens_ends_it():
    sequence = a_sequence(max_tokens=2)
    assert [sequence.append(4), sequence.append(4)] == [None, "length"]


def test_a_stop_at_the_limit_counts_as_a_stop():
    assert a_sequence(max_tokens=1).append(9) == "stop"


def test_ignoring_end_of_sequence_leaves_the_requests_own_stop_tokens():
    sequence = a_sequence(ignore_eos=True, stop_token_ids=(7,))
    assert sequence.append(9) is None
    assert sequence.ending_ids == {7}
    assert sequence.append(7) == "stop"


def test_before_min_tokens_ending_ids_are_banned_and_end_nothing():
    sequence = a_sequence(min_tokens=2, max_tokens=9, stop_token_ids=(7,))
    assert sequence.banned_ids() == {7, 9}
    assert sequence.append(9) is None, "a sampler that ignores the ban does not end it early"
    sequence.append(4)
    assert sequence.banned_ids() == frozenset()
    assert sequence.append(9) == "stop"


def test_a_draw_depends_on_seed_sample_and_output_position_only():
    sequence = a_sequence(sample_index=2, seed=5)
    assert sequence.uniform() == uniform(5, 2, 0)
    assert sequence.uniform(ahead=3) == uniform(5, 2, 3)
    sequence.append(4)
    assert sequence.uniform(Purpose.ACCEPT) == uniform(5, 2, 1, Purpose.ACCEPT)
