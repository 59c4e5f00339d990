"""The encoder cache: each picture is encoded once, bytes are bounded, chunks take their slice."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvist.core.request import ImageSpan
from kvist.errors import RequestError
from kvist.runner.encoder_cache import EncodedImages, covered, place_images

LENGTH, HIDDEN = 3, 4
NBYTES = LENGTH * HIDDEN * 4


class Encoder:
    """Gives each picture its own number and remembers how many it was shown at once."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(pixels))
        return pixels.mean(dim=(1, 2, 3))[:, None, None].expand(-1, LENGTH, HIDDEN)


def span(number: int, start: int = 0, length: int = LENGTH) -> ImageSpan:
    return ImageSpan(start, length, f"picture {number}", torch.full((3, 2, 2), float(number)))


@pytest.fixture
def encoder() -> Encoder:
    return Encoder()


def test_equal_digests_are_encoded_once(encoder: Encoder) -> None:
    cache = EncodedImages(encoder)
    found = cache.embeddings([span(1), span(2), span(1, start=9)])
    assert encoder.calls == [2]
    assert {d: float(e[0, 0]) for d, e in found.items()} == {"picture 1": 1, "picture 2": 2}
    cache.embeddings([span(2), span(3)])
    assert encoder.calls == [2, 1]


def test_many_pictures_are_encoded_in_batches(encoder: Encoder) -> None:
    EncodedImages(encoder, batch=4).embeddings(span(i) for i in range(10))
    assert encoder.calls == [4, 4, 2]


def test_the_least_recently_used_goes_first(encoder: Encoder) -> None:
    cache = EncodedImages(encoder, max_bytes=2 * NBYTES)
    cache.embeddings([span(1), span(2)])
    cache.embeddings([span(1)])
    cache.embeddings([span(3)])
    assert ["picture 1" in cache, "picture 2" in cache, "picture 3" in cache] == [True, False, True]
    assert cache.nbytes == 2 * NBYTES


def test_more_than_fits_is_returned_all_the_same(encoder: Encoder) -> None:
    cache = EncodedImages(encoder, max_bytes=NBYTES)
    assert len(cache.embeddings(span(i) for i in range(5))) == 5
    assert len(cache) == 1
    nothing_kept = EncodedImages(encoder, max_bytes=0)
    assert len(nothing_kept.embeddings([span(1)])) == 1
    assert len(nothing_kept) == nothing_kept.nbytes == 0


def test_forgetting_frees_the_bytes(encoder: Encoder) -> None:
    cache = EncodedImages(encoder)
    cache.embeddings([span(1)])
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)


def test_a_span_of_another_length_than_the_encoders_is_refused(encoder: Encoder) -> None:
    with pytest.raises(RequestError, match=r"has 5 places in the prompt, but .* gives 3"):
        EncodedImages(encoder).embeddings([span(1, length=5)])


def chunks(total: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, total)) for start in range(0, total, size))


@given(
    gaps=st.lists(st.integers(0, 4), max_size=5),
    size=st.integers(1, 20),
    row=st.integers(0, 5),
)
def test_chunks_put_every_picture_where_the_whole_prompt_has_it(
    gaps: list[int], size: int, row: int
) -> None:
    spans, start = [], 0
    for number, gap in enumerate(gaps):
        spans.append(span(number + 1, start + gap))
        start = spans[-1].stop
    total = start + 2
    images = {s.digest: torch.arange(LENGTH)[:, None] + 10.0 * (i + 1) for i, s in enumerate(spans)}
    whole = place_images(torch.zeros(total, 1), covered(spans, 0, total), images)
    parts = []
    for first, last in chunks(total, size):
        packed = torch.zeros(row + last - first, 1)
        place_images(packed, covered(spans, first, last, row), images)
        assert not packed[:row].any()
        parts.append(packed[row:])
    assert torch.equal(torch.cat(parts), whole)
    assert int((whole > 0).sum()) == LENGTH * len(spans)
