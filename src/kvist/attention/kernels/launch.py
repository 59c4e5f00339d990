"""Launches of the paged attention kernels: shapes, splits and tile sizes, from a `PagedKV`.

Lengths come from the host's copy, so that nothing waits for the device. Imports Triton; imported
only by `attention.kernels.triton_attention` and by steps that know they run on a GPU.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from kvist.attention.kernels.decode_kernels import combine_kernel, split_kernel
from kvist.attention.kernels.formats import FP8, INT4, INT8, PLAIN, Format
from kvist.attention.kernels.prefill_kernels import prefill_kernel, runs_kernel
from kvist.core.spec import AttentionSpec
from kvist.kernels.jit import cdiv, dependent_launch, next_power_of_2

LOG2_E = 1.4426950408889634
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Splits:
    """Where a context is split, as a function of its own length.

    A split takes `shortest` keys in contexts of up to `target / 4` of them, which leave most of a
    GPU idle; in longer ones so many times two more that `target` splits suffice, but no more than
    `longest`. Both are powers of two, `longest` the larger.
    """

    shortest: int = 64
    longest: int = 1024
    target: int = 16

    @property
    def doublings(self) -> int:
        """How often the shortest split doubles at most."""
        return (self.longest // self.shortest).bit_length() - 1

    @property
    def limits(self) -> tuple[int, ...]:
        """The longest context for each length of split but the last."""
        first = self.target * self.shortest // 4
        return (first, *(self.target * self.shortest << i for i in range(1, self.doublings)))

    def length(self, count: int) -> int:
        """Keys of each split of a context with `count` visible keys."""
        return self.shortest << sum(count > limit for limit in self.limits)

    def most(self, limit: int) -> int:
        """Splits that any context of up to `limit` visible keys has at most."""
        # The number is largest where a length of split ends, or at the limit.
        ends = [n for n in self.limits if n < limit]
        return max(-(-n // self.length(n)) for n in (*ends, max(limit, 1)))


@dataclass(frozen=True)
class Tuning:
    """Tile sizes and how the compiler is to spread them."""

    tile: int
    warps: int
    stages: int


# By the number of sequences that decode together: few need splits to fill a GPU, many do not.
SPLITS = Splits(target=64)
CROWD, CROWDED = 32, Splits(shortest=256)
THRONG, THRONGED = 96, Splits(shortest=4096, longest=8192)
# Measured on an H200. A tile's block numbers are loaded before its keys, so that two tiles are on
# their way only from five stages on.
DECODE = {
    PLAIN: Tuning(64, 4, 3),
    FP8: Tuning(32, 1, 5),
    INT8: Tuning(64, 4, 5),
    INT4: Tuning(32, 1, 5),
}
CROWDED_PLAIN = Tuning(128, 4, 3)  # of so many sequences that splits are longer than a tile
# A prefill program's rows are queries times heads of a group. Few rows to a program make more
# programs; of plain keys many rows are better once there is work for all.
ROWS = 64
PREFILL = {
    PLAIN: Tuning(64, 4, 2),
    FP8: Tuning(128, 4, 3),
    INT8: Tuning(128, 4, 2),
    INT4: Tuning(128, 4, 2),
}
LONG_PLAIN, LONG_ROWS, LONG_FROM = Tuning(64, 4, 3), 128, 1 << 16  # a step's rows in all
# Of a decode step, about: a sequence's splits are spread over several programs only up to it.
WARPS = 16384
# Products of float32 are single multiplications, all written out: in the tiles above they take a
# compiler two minutes, in these two seconds.
DECODE_FLOAT32 = Tuning(64, 8, 2)
PREFILL_FLOAT32, ROWS_FLOAT32 = Tuning(16, 4, 2), 32


@dataclass(frozen=True)
class Pages:
    """One layer of a paged pool as kernels read it."""

    keys: Format
    values: Format
    spec: AttentionSpec
    block_size: int
    block_table: Tensor
    kv_lens: Tensor
    query_starts: Tensor

    def constants(self, heads: int) -> dict[str, Any]:
        """What the kernels are compiled for."""
        plain = self.keys.kind == PLAIN
        return {
            "HEADS": heads,
            "KV_HEADS": self.spec.num_kv_heads,
            "HEAD_DIM": self.spec.head_dim,
            "BLOCK_SIZE": self.block_size,
            "WINDOW": self.spec.window or 0,
            "SINKS": self.spec.sinks if self.spec.window else 0,
            "K_KIND": self.keys.kind,
            "K_GROUPS": self.keys.groups,
            "V_KIND": self.values.kind,
            "V_GROUPS": self.values.groups,
            "Q_DTYPE": _TYPES[self.keys.values.dtype] if plain else tl.float16,
            "PACKED": self.keys.values.device.type == "cuda",
        }

    def pointers(self) -> tuple[Tensor, ...]:
        """The planes in the kernels' order; those that a codec lacks are never read."""
        planes: list[Tensor] = []
        for side in (self.keys, self.values):
            scales = side.values if side.scales is None else side.scales
            planes += [side.values, scales, scales if side.zeros is None else side.zeros]
        return (*planes, self.block_table, self.kv_lens, self.query_starts)

    @property
    def in_float32(self) -> bool:
        """Whether products are computed in float32."""
        return torch.float32 in (self.keys.values.dtype, self.values.values.dtype)

    def visible(self, kv_len: int) -> int:
        """Keys that a sequence's last query sees."""
        if self.spec.window is None:
            return kv_len
        return min(kv_len, self.spec.window + self.spec.sinks)


@dataclass(frozen=True)
class Workspace:
    """What the splits of a decode step leave for the kernel that puts them together."""

    partial: Tensor  # [B, heads, splits, head_dim] float32
    stats: Tensor  # [B, heads, splits, 2] float32: maximum in base 2, sum
    max_splits: int

    @classmethod
    def make(cls, pages: Pages, heads: int, splits: int) -> Any:
        """Uninitialised room for the sequences of these pages."""
        rows, device = pages.kv_lens.shape[0], pages.kv_lens.device
        shape = (rows, heads, splits)
        return cls(
            torch.empty(*shape, pages.spec.head_dim, dtype=torch.float32, device=device),
            torch.empty(*shape, 2, dtype=torch.float32, device=device),
            splits,
        )


def splits_for(rows: int) -> Splits:
    """Where contexts are split in a step of so many sequences."""
    return THRONGED if rows >= THRONG else CROWDED if rows >= CROWD else SPLITS


def _decode_tuning(pages: Pages, rows: int) -> Tuning:
    if pages.in_float32:
        return DECODE_FLOAT32
    kind = pages.values.kind
    # Longer tiles of wider heads are more than the shared memory of smaller GPUs holds.
    crowded = kind == PLAIN and rows >= CROWD and pages.spec.head_dim <= 128
    return CROWDED_PLAIN if crowded else DECODE[kind]


def decode(
    q: Tensor,
    pages: Pages,
    out: Tensor,
    work: Workspace,
    scale: float,
    *,
    ragged: bool,
    splits: Splits | None = None,
    tuning: Tuning | None = None,
    dependent: bool = False,
    rotate: bool = False,
) -> None:
    """Attention of the sequences with one query each, into `out`.

    Args:
        q: `[N, heads, head_dim]` in the planes' basis, contiguous.
        pages: the layer, with tables and lengths of B sequences.
        out: like q; other sequences' rows are left alone.
        work: from `Workspace.make`, for at least the splits that these lengths have.
        scale: factor of the scores.
        ragged: whether sequences may have other numbers of queries; where not, row b is
            sequence b.
        splits: where contexts are split; by default as usual for so many sequences.
        tuning: tile sizes; by default those of the codec.
        dependent: start before the kernel before has ended (programmatic dependent launch).
        rotate: bring the output back from the Hadamard basis of the values.
    """
    heads, count = q.shape[1], pages.kv_lens.shape[0]
    tuning = tuning or _decode_tuning(pages, count)
    splits = splits or splits_for(count)
    kv_heads = pages.spec.num_kv_heads
    constants = pages.constants(heads)
    common = {
        "WINDOW": constants["WINDOW"],
        "SINKS": constants["SINKS"],
        "RAGGED": ragged,
        "MIN_SPLIT": splits.shortest,
        "DOUBLINGS": splits.doublings,
        "TARGET": splits.target,
        "DIRECT": pages.values.kind in (PLAIN, FP8) and not rotate,
        "DEPENDENT": dependent,
        **dependent_launch(dependent),
    }
    # No more programs than fill the GPU: one that finds nothing to do costs as much as a short one.
    wanted = cdiv(WARPS, tuning.warps * count * kv_heads)
    spread = min(work.max_splits, next_power_of_2(wanted))
    split_kernel[(kv_heads, spread, count)](
        q,
        *pages.pointers(),
        work.partial,
        work.stats,
        out,
        pages.block_table.stride(0),
        work.max_splits,
        scale * LOG2_E,
        **{**constants, **common},
        ROWS=max(16, next_power_of_2(heads // kv_heads)),
        TILE=tuning.tile,
        num_warps=tuning.warps,
        num_stages=tuning.stages,
    )
    if work.max_splits == 1 and common["DIRECT"]:
        return
    combine_kernel[(heads, count)](
        work.partial,
        work.stats,
        pages.kv_lens,
        pages.query_starts,
        out,
        work.max_splits,
        HEADS=heads,
        HEAD_DIM=pages.spec.head_dim,
        HEAD_DOUBLINGS=pages.spec.head_dim.bit_length() - 1,
        ROTATE=rotate,
        **common,
        num_warps=2,
    )


def list_runs(pages: Pages, queries: int, room: int, whole: range = range(0)) -> Tensor:
    """`[room, 2]` int32: (sequence, first query) of every run of `queries` queries.

    For all sequences of several queries but those that have nothing cached and a length in `whole`.
    Room for more is filled with runs behind the last query.
    """
    count, device = pages.kv_lens.shape[0], pages.kv_lens.device
    runs = torch.empty(room, 2, dtype=torch.int32, device=device)
    runs_kernel[(count,)](
        pages.kv_lens,
        pages.query_starts,
        runs,
        count,
        room,
        whole.start,
        whole.stop - 1,
        QUERIES=queries,
        SEQUENCES=max(64, next_power_of_2(count)),
        TILE=128,
        num_warps=1,
    )
    return runs


def prefill_tuning(pages: Pages, q: Tensor) -> tuple[Tuning, int]:
    """Tile sizes for a step's queries `[N, heads, head_dim]`, and how many make a run.

    The same for numbers of queries that a recording is padded to as for those up to them.
    """
    heads = q.shape[1]
    if pages.in_float32:
        tuning, rows = PREFILL_FLOAT32, ROWS_FLOAT32
    elif pages.values.kind == PLAIN and next_power_of_2(len(q)) * heads >= LONG_FROM:
        tuning, rows = LONG_PLAIN, LONG_ROWS
    else:
        tuning, rows = PREFILL[pages.values.kind], ROWS
    return tuning, run_length(heads, pages.spec.num_kv_heads, rows)


def run_length(heads: int, kv_heads: int, rows: int) -> int:
    """Queries that with the heads of a group make so many rows."""
    return max(1, rows // next_power_of_2(heads // kv_heads))


def prefill(
    q: Tensor,
    pages: Pages,
    out: Tensor,
    runs: Tensor,
    scale: float,
    *,
    tuning: Tuning,
    queries: int,
) -> None:
    """Attention of the sequences with several queries, into `out`.

    Args:
        q: `[N, heads, head_dim]` in the planes' basis, contiguous.
        pages: the layer, with tables and lengths of B sequences.
        out: like q; other sequences' rows are left alone.
        runs: from `list_runs`.
        scale: factor of the scores.
        tuning: tile sizes.
        queries: of a run, a power of two.
    """
    heads, kv_heads = q.shape[1], pages.spec.num_kv_heads
    prefill_kernel[(kv_heads, runs.shape[0])](
        q,
        *pages.pointers(),
        runs,
        out,
        pages.block_table.stride(0),
        scale * LOG2_E,
        **pages.constants(heads),
        QUERIES=queries,
        GROUP=next_power_of_2(heads // kv_heads),
        TILE=tuning.tile,
        num_warps=tuning.warps,
        num_stages=tuning.stages,
    )


def most_splits(pages: Pages, longest: int, splits: Splits) -> int:
    """Splits of a step whose longest sequence has so many keys, at most, as a power of two.

    So that there are few kinds of launch.
    """
    return next_power_of_2(splits.most(pages.visible(longest)))
