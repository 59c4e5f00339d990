"""Image embeddings by content digest, and their way into a chunk's token embeddings.

Each digest is encoded once and kept while there is room. A chunk takes the slice of each span that
it covers, by position: looking for the image token's id instead goes wrong as soon as a prompt is
computed in chunks or begins in the cache. The loop calls `with_images`; a scheduler keeps books of
its own on what is encoded (`core.images`) and its runner needs nothing of this.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvist.cache import Batch
from kvist.core.plan import ImageSlice
from kvist.core.request import ImageSpan
from kvist.errors import RequestError
from kvist.models import CausalLM

DEFAULT_MAX_BYTES = 256 << 20
DEFAULT_BATCH = 16


class EncodedImages:
    """Encoded images, least recently used out first."""

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        batch: int = DEFAULT_BATCH,
    ) -> None:
        """Make an empty cache.

        Args:
            encode: pixels `[n, 3, H, W]` -> `[n, length, hidden]`, such as
                `VisionLanguageModel.encode_images`.
            max_bytes: what is kept at most; 0 keeps nothing.
            batch: images in one forward at most.
        """
        self._encode = encode
        self._max_bytes = max_bytes
        self._batch = batch
        self._held: OrderedDict[str, Tensor] = OrderedDict()
        self.nbytes = 0

    def embeddings(self, spans: Iterable[ImageSpan]) -> dict[str, Tensor]:
        """The embeddings of some spans by digest, each `[length, hidden]`.

        All of them are returned, however little is kept; what is not held is encoded, once.

        Raises:
            RequestError: the encoder gives another number of embeddings than a span has places.
        """
        wanted = {span.digest: span for span in spans}
        found = {}
        for digest in wanted:
            if digest in self._held:
                self._held.move_to_end(digest)
                found[digest] = self._held[digest]
        missing = [span for digest, span in wanted.items() if digest not in found]
        for start in range(0, len(missing), self._batch):
            part = missing[start : start + self._batch]
            encoded = self._encode(torch.stack([span.pixels for span in part]))
            for span, embeddings in zip(part, encoded, strict=True):
                # A row of its own, so that dropping it frees it.
                found[span.digest] = self._hold(span.digest, embeddings.clone())
        for digest, span in wanted.items():
            if len(found[digest]) != span.length:
                raise RequestError(
                    f"the image at {span.start} has {span.length} places in the prompt, but the "
                    f"encoder gives {len(found[digest])} embeddings"
                )
        return found

    def _hold(self, digest: str, embeddings: Tensor) -> Tensor:
        self._held[digest] = embeddings
        self.nbytes += embeddings.nbytes
        while self.nbytes > self._max_bytes:
            _, dropped = self._held.popitem(last=False)
            self.nbytes -= dropped.nbytes
        return embeddings

    def __len__(self) -> int:
        """How many images are held."""
        return len(self._held)

    def __contains__(self, digest: str) -> bool:
        """Whether this image is held."""
        return digest in self._held

    def clear(self) -> None:
        """Forget all."""
        self._held.clear()
        self.nbytes = 0


def covered(spans: Iterable[ImageSpan], start: int, stop: int, row: int = 0) -> list[ImageSlice]:
    """The parts of a sequence's spans that its chunk of positions `[start, stop)` covers.

    Args:
        spans: of the whole prompt.
        start, stop: positions of the chunk.
        row: where the chunk's first token stands in the packed tensors.

    Returns:
        `row_offset` counts packed rows, so slices of several sequences can be put together.
    """
    slices = []
    for span in spans:
        # Positions [first, last) lie in both the span and the chunk.
        first, last = max(span.start, start), min(span.stop, stop)
        if first < last:
            slices.append(
                ImageSlice(span.digest, first - span.start, row + first - start, last - first)
            )
    return slices


def place_images(
    embeddings: Tensor, slices: Sequence[ImageSlice], images: Mapping[str, Tensor]
) -> Tensor:
    """Put image embeddings in the place of tokens' own, in place.

    Args:
        embeddings: `[N, hidden]`, packed.
        slices: which parts of which images, from `covered` or a plan.
        images: digest -> `[length, hidden]`, at least those that the slices name.

    Returns:
        `embeddings`.
    """
    for digest, offset, row, length in slices:
        embeddings[row : row + length] = images[digest][offset : offset + length]
    return embeddings


def with_images(
    batch: Batch, lm: CausalLM, spans: Sequence[Sequence[ImageSpan]], images: EncodedImages
) -> Batch:
    """The batch with embeddings, if one of its chunks covers a part of an image; else itself.

    Args:
        batch: its sequences' chunks begin where the cache ends.
        lm: embeds the tokens.
        spans: of each sequence's whole prompt, in the batch's order.
        images: encodes what these chunks need and it does not hold.
    """
    slices: list[ImageSlice] = []
    needed: list[ImageSpan] = []
    chunks = zip(batch.query_spans, batch.cached_lens, batch.kv_lens, spans, strict=True)
    for (row, _), start, stop, own in chunks:
        slices += covered(own, start, stop, row)
        needed += (span for span in own if span.start < stop and span.stop > start)
    if not slices:
        return batch
    embeddings = place_images(lm.embed(batch.token_ids), slices, images.embeddings(needed))
    return replace(batch, embeddings=embeddings)
