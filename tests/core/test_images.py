"""Images: encoded once, before they are needed, within a budget; dropped when nobody needs them."""

from harness import FULL, Harness, make_request

from kvist.core.images import EncoderCache
from kvist.core.plan import ImageSlice
from kvist.core.request import ImageSpan
from kvist.core.tables import CacheGroup


def an_engine(**options: object) -> Harness:
    defaults: dict[str, object] = {"max_image_tokens": 6, "encoder_cache_tokens": 8}
    return Harness([CacheGroup(FULL, 60)], 4, **(defaults | options))


def with_image(id: str, start: int, length: int, digest: str, total: int = 12, **options: object):
    return make_request(id, [1] * total, images=(ImageSpan(start, length, digest),), **options)


def test_an_image_is_encoded_once_for_all_its_chunks_and_requests():
    harness = an_engine(max_chunk_tokens=4)
    harness.add(with_image("a", 2, 6, "cat"))
    harness.add(with_image("b", 3, 6, "cat"))
    plans = [harness.schedule()]
    harness.commit()
    plans += [harness.step() for _ in range(3)]
    assert [encode.digest for plan in plans for encode in plan.encodes] == ["cat"]
    assert plans[0].rows[0].images == (ImageSlice("cat", 0, 2, 2),)
    assert plans[1].rows[0].images == (ImageSlice("cat", 2, 0, 4),)
    harness.drain()


def test_a_chunk_ends_before_an_image_that_this_step_cannot_encode():
    harness = an_engine()
    images = (ImageSpan(1, 4, "cat"), ImageSpan(6, 4, "dog"))
    harness.add(make_request("r", [1] * 12, images=images))
    first, second = harness.step(), harness.step()
    assert len(first.rows[0].tokens) == 6
    assert [encode.digest for encode in second.encodes] == ["dog"]
    assert len(second.rows[0].tokens) == 6
    harness.drain()


def test_a_request_whose_image_has_to_wait_holds_up_no_text():
    harness = an_engine()
    harness.add(with_image("a", 0, 6, "cat"))
    harness.add(with_image("b", 0, 6, "dog"))
    harness.add(make_request("c", [2] * 5))
    plan = harness.step()
    assert [len(row.tokens) for row in plan.rows] == [12, 5]
    harness.drain()


def test_images_that_nobody_needs_are_dropped_for_new_ones_oldest_first():
    harness = an_engine()
    for digest in ("cat", "dog", "cow"):
        harness.add(with_image(digest, 0, 4, digest, max_tokens=1))
        plan = harness.step()
        assert plan.dropped_images == (("cat",) if digest == "cow" else ())
    harness.drain()
    assert set(harness.runner.images) == {"dog", "cow"}


def test_a_cached_prefix_needs_no_encoder():
    harness = an_engine()
    harness.add(with_image("a", 0, 4, "cat", max_tokens=1))
    harness.drain()
    for digest in ("dog", "cow"):
        harness.add(with_image(digest, 0, 4, digest, max_tokens=1))
        harness.drain()
    harness.add(with_image("b", 0, 4, "cat", max_tokens=1))
    assert harness.schedule().encodes == ()
    harness.commit()
    harness.drain()


def test_an_image_stays_while_any_sequence_still_needs_it():
    cache = EncoderCache(step_budget=8, capacity=8)
    cat, dog = (ImageSpan(0, 6, digest) for digest in ("cat", "dog"))
    cache.begin_step()
    assert cache.claim(1, [cat], 0, 6) == 6
    assert cache.claim(2, [cat], 0, 3) == 3
    cache.release(1, [cat], upto=6)
    cache.release(2, [cat], upto=5)
    cache.begin_step()
    assert cache.claim(3, [dog], 0, 6) == 0, "the second still needs the cat's last token"
    cache.release(2, [cat], upto=6)
    assert cache.claim(3, [dog], 0, 6) == 6
    encodes, _ = cache.collect()
    assert [encode.digest for encode in encodes] == ["dog"]


def test_an_image_given_up_in_the_step_that_would_encode_it_is_left_out_of_the_plan():
    cache = EncoderCache(step_budget=12, capacity=8)
    cat, dog = (ImageSpan(0, 6, digest) for digest in ("cat", "dog"))
    cache.begin_step()
    cache.claim(1, [cat], 0, 6)
    cache.release(1, [cat], upto=6)
    cache.claim(2, [dog], 0, 6)
    encodes, dropped = cache.collect()
    assert [encode.digest for encode in encodes] == ["dog"]
    assert dropped == ()


def test_an_image_of_a_request_that_ended_before_it_was_planned_is_never_encoded():
    # Its grammar fails while the plan is made, and the next request takes its place in the cache.
    class Broken:
        def mask(self, output_ids):
            raise ValueError("broken")

    harness = an_engine(max_image_tokens=8, max_batch_tokens=40)
    harness.add(with_image("a", 0, 8, "cat", total=8, grammar=Broken()))
    harness.add(with_image("b", 0, 8, "dog", total=8))
    harness.step()
    assert harness.logs["a", 0].reason == "error"
    harness.drain()
