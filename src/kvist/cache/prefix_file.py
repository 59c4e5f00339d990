"""A prefix in a file: the cache of some leading tokens, to be had again after a restart.

One safetensors file with the tokens, a fingerprint of what computed them, and each layer's planes
token by token, so that a pool of smaller blocks can read it too (of any size, without windows).
What belongs to another model, codec or prompt is refused with the reason. Which blocks are written
or read is the caller's choice.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvist.cache.files import open_file, write_file
from kvist.cache.paged import PagedPool
from kvist.cache.protocol import SIDES
from kvist.core.plan import NULL_BLOCK
from kvist.errors import CacheError

FORMAT = "kvist.prefix"
VERSION = "1"

Table = Sequence[int]
"""A sequence's blocks in one group; entry i holds its positions from `i * block_size` on."""


def save_prefix(
    path: Path,
    pool: PagedPool,
    tables: Sequence[Table],
    token_ids: Sequence[int],
    *,
    model: str,
    extra: str = "",
) -> None:
    """Write the cache of `token_ids` to a file: all of it, or none.

    Args:
        path: the file; one that is there is replaced.
        pool: where the blocks are.
        tables: for each group the blocks that hold the tokens; null entries are left out.
        token_ids: the prefix.
        model: fingerprint of the weights that computed it.
        extra: what else its content depends on, such as an adapter or images.

    Raises:
        CacheError: the file cannot be written, or a table is too short.
    """
    tensors = {"token_ids": torch.tensor(token_ids, dtype=torch.long)}
    for g, table in _by_group(pool, tables):
        positions, places = _places(table, len(token_ids), pool.block_size)
        tensors[f"groups.{g}.positions"] = torch.from_numpy(positions)
        index = torch.from_numpy(places).to(pool.device)
        for layer_idx, name, plane in _planes(pool, g):
            tensors[f"layers.{layer_idx}.{name}"] = plane.index_select(0, index).cpu()
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "codec": _codec_of(pool),
        "extra": extra,
        "tokens": _digest(token_ids),
    }
    write_file(path, tensors, metadata)


@dataclass(frozen=True)
class PrefixFile:
    """A prefix's file whose fingerprints were found to fit; see `open_prefix`.

    Args:
        path: the file.
        token_ids: the tokens whose cache it holds.
    """

    path: Path
    token_ids: tuple[int, ...]
    _pool: PagedPool = field(repr=False)

    def restore(self, tables: Sequence[Table]) -> None:
        """Write the prefix into blocks of the pool.

        Args:
            tables: for each group the blocks to fill. Entries may be null where no query behind
                the prefix will look, which is what the file may leave out.

        Raises:
            CacheError: the file lacks tokens that a block would have to hold; nothing is written.
        """
        pool, size = self._pool, self._pool.block_size
        with open_file(self.path, "a prefix") as file:
            work = []
            for g, table in _by_group(pool, tables):
                wanted, places = _places(table, len(self.token_ids), size)
                held = file.get_tensor(f"groups.{g}.positions").numpy()
                missing = np.setdiff1d(wanted, held)
                if len(missing):
                    raise CacheError(
                        f"{self.path} does not hold position {missing[0]} of layers "
                        f"{list(pool.groups[g].layers)}, which was behind their window when it was "
                        f"written; leave its block out of the table, or use the exporter's "
                        f"block_size"
                    )
                work.append((np.searchsorted(held, wanted), places))
            for g, (rows, places) in enumerate(work):
                source, index = torch.from_numpy(rows), torch.from_numpy(places).to(pool.device)
                for layer_idx, name, plane in _planes(pool, g):
                    tokens = file.get_tensor(f"layers.{layer_idx}.{name}")[source]
                    plane.index_put_((index,), tokens.to(plane.device))


def open_prefix(
    path: Path,
    pool: PagedPool,
    *,
    model: str,
    token_ids: Sequence[int] | None = None,
    extra: str = "",
) -> PrefixFile:
    """Open a prefix's file for a pool and make sure that it belongs there.

    Args:
        path: what `save_prefix` wrote.
        pool: where it would be restored to.
        model: fingerprint of the weights that would go on from it.
        token_ids: the prefix that is expected; None takes the file's own.
        extra: what else its content depends on.

    Raises:
        CacheError: it is of another model, codec, prompt, shape or version, or damaged; the
            message says which.
    """
    with open_file(path, "a prefix") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise CacheError(f"{path} is not a prefix that kvist has exported")
        expected = {
            "version": VERSION,
            "model": model,
            "codec": _codec_of(pool),
            "extra": extra,
        }
        for what, value in expected.items():
            if metadata.get(what) != value:
                raise CacheError(
                    f"{path} has {what} {metadata.get(what)!r}, but {value!r} is needed; compute "
                    f"the prefix again"
                )
        held = tuple(file.get_tensor("token_ids").tolist())
        if _digest(held) != metadata.get("tokens"):
            raise CacheError(f"{path} is damaged: its tokens do not match their digest")
        if token_ids is not None:
            _check_tokens(path, held, token_ids)
        names = set(file.keys())
        for g in range(len(pool.groups)):
            for layer_idx, name, plane in _planes(pool, g):
                key = f"layers.{layer_idx}.{name}"
                if key not in names or file.get_slice(key).get_shape()[1:] != [*plane.shape[1:]]:
                    raise CacheError(f"{path}: {key} is missing or has another shape")
    return PrefixFile(path, held, pool)


def _planes(pool: PagedPool, group: int) -> list[tuple[int, str, Tensor]]:
    """Layer, name and plane by token place, `[places, kv_heads, ...]`, of one group."""
    return [
        (layer_idx, f"{side}.{name}", plane.flatten(0, 1))
        for layer_idx, sides in pool.pools[group].planes.items()
        for side in SIDES
        for name, plane in sides[side].items()
    ]


def _by_group(pool: PagedPool, tables: Sequence[Table]) -> Iterable[tuple[int, Table]]:
    if len(tables) != len(pool.groups):
        raise CacheError(f"{len(tables)} tables for {len(pool.groups)} groups of layers")
    return enumerate(tables)


def _places(table: Table, length: int, size: int) -> tuple[Any, Any]:
    """Positions below `length` whose block is not null, and their places in the pool."""
    if len(table) * size < length:
        raise CacheError(f"{len(table)} blocks of {size} tokens cannot hold {length} tokens")
    positions = np.arange(length)
    blocks = np.asarray(table, dtype=np.int64)[positions // size]
    held = blocks != NULL_BLOCK
    return positions[held], (blocks * size + positions % size)[held]


def _codec_of(pool: PagedPool) -> str:
    """All that decides what the bytes mean."""
    return pool.codec.fingerprint


def _digest(token_ids: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(token_ids, dtype="<i8").tobytes()).hexdigest()


def _check_tokens(path: Path, held: Sequence[int], wanted: Sequence[int]) -> None:
    """Raise, naming the first difference, unless the file holds exactly these tokens."""
    for i, (a, b) in enumerate(zip(held, wanted, strict=False)):
        if a != b:
            raise CacheError(f"{path} holds other tokens: {a} at position {i}, not {b}")
    if len(held) != len(wanted):
        raise CacheError(f"{path} holds {len(held)} tokens, not {len(wanted)}")
