"""What `crop` means, for every layout alike."""

from collections.abc import Sequence

from kvist.errors import CacheError


def cropped(lengths: Sequence[int], to: int | Sequence[int]) -> list[int]:
    """The lengths after `crop(to)`.

    Args:
        lengths: tokens of each sequence.
        to: a length for all (negative drops that many from the end of the longest), or one for
            each sequence. Shorter sequences stay as they are.

    Raises:
        CacheError: not as many lengths as there are sequences, or one below zero.
    """
    if isinstance(to, int):
        limit = to if to >= 0 else max(max(lengths, default=0) + to, 0)
        return [min(n, limit) for n in lengths]
    if len(to) != len(lengths) or any(n < 0 for n in to):
        raise CacheError(
            f"crop takes a length >= 0 for each of {len(lengths)} rows, not {list(to)}"
        )
    return [min(n, limit) for n, limit in zip(lengths, to, strict=True)]
