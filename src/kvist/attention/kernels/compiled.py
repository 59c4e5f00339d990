"""Decode attention over quantised planes in CUDA C++ (decode.cu): what it takes, splits, launches.

It reads the planes that Triton's kernels read, at a speed that their instructions do not allow
there. `launch.decode` stays its stand-in: for planes of 16 bits, which Triton reads as fast as
memory is, for windows and for sizes that it was not written for, for few sequences, and for GPUs
that nobody tried it on. Called by `triton_attention`.
"""

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kvist.attention.kernels.formats import FP8, INT4, INT8, PLAIN, Format
from kvist.attention.kernels.launch import LOG2_E, Pages, Splits
from kvist.errors import NotSupported
from kvist.kernels import nvrtc

DECODE, LIST = (Path(__file__).with_name(name) for name in ("decode.cu", "list.cu"))
KEYS, DIM, LANES, MOST_WARPS = 16, 128, 32, 8  # as in the source

KV_HEADS = (8,)  # as it was tried with; the source takes any even number
MOST_TOKENS = 1023 << 10  # of a sequence: as many splits as the list has bits for
FEWEST = 16  # sequences of a step; fewer leave most of a GPU without a program
# By the number of sequences that decode together.
SPLITS = Splits(shortest=64, target=128)
CROWD, CROWDED = 32, Splits(shortest=128, target=64)
THRONG, THRONGED = 64, Splits(shortest=256, target=64)


@dataclass(frozen=True)
class Tuning:
    """Tiles of 16 tokens in shared memory, and programs of eight warps on a multiprocessor."""

    stages: int
    per_sm: int


TUNING = {FP8: Tuning(3, 2), INT8: Tuning(3, 2), INT4: Tuning(5, 2)}  # by the larger planes
_ROW = {FP8: 128, INT8: 128, INT4: 64}  # bytes of a key or value of one head
_SCALES = {FP8: 2, INT8: 2, INT4: 16}  # likewise, zeros with them
_PAD = 64  # bytes behind each four of a tile's tokens in shared memory


@dataclass(frozen=True)
class Plan:
    """A step's splits, listed on the device, and what they leave for each other."""

    items: Tensor  # [most splits, 4] int32
    count: Tensor  # [1] int32
    ended: Tensor  # [B, kv_heads] int32: splits that came to their end
    partial: Tensor  # [B, heads, splits, head_dim] float32
    stats: Tensor  # [B, heads, splits, 2] float32: maximum in base 2, sum
    max_splits: int


def splits_for(rows: int) -> Splits:
    """Where contexts are split in a step of so many sequences."""
    return THRONGED if rows >= THRONG else CROWDED if rows >= CROWD else SPLITS


def can_decode(q: Tensor, pages: Pages, *, rotate: bool) -> bool:
    """Whether the kernel takes this step of this layer; compiles it when it is first asked."""
    spec, kinds = pages.spec, (pages.keys.kind, pages.values.kind)
    group = q.shape[1] // spec.num_kv_heads
    if q.device.type != "cuda" or pages.kv_lens.shape[0] < FEWEST or PLAIN in kinds:
        return False
    if spec.head_dim != DIM or spec.window is not None or pages.block_size % KEYS:
        return False
    if spec.num_kv_heads not in KV_HEADS or q.dtype == torch.float32:
        return False
    if pages.block_table.shape[1] * pages.block_size > MOST_TOKENS:
        return False
    four = all(side.groups == 4 for side in (pages.keys, pages.values) if side.kind == INT4)
    if group not in ((1, 2, 4) if INT4 in kinds else range(1, 9)) or not four:
        return False
    return nvrtc.available(q.device.index or 0) and _kernel(q, pages, rotate) is not None


def make_plan(pages: Pages, heads: int, most: int, *, ragged: bool) -> Plan:
    """List the splits of a step on the device.

    Args:
        pages: any of the layers that read these lengths.
        heads: of queries.
        most: no sequence has more splits.
        ragged: whether sequences may have other numbers of queries; those are left out.
    """
    lens, kv_heads = pages.kv_lens, pages.spec.num_kv_heads
    rows, device = lens.shape[0], lens.device
    plan = Plan(
        torch.empty(rows * most, 4, dtype=torch.int32, device=device),
        torch.empty(1, dtype=torch.int32, device=device),
        torch.empty(rows, kv_heads, dtype=torch.int32, device=device),
        torch.empty(rows, heads, most, DIM, dtype=torch.float32, device=device),
        torch.empty(rows, heads, most, 2, dtype=torch.float32, device=device),
        most,
    )
    splits = splits_for(rows)
    options = _macros(MIN_SPLIT=splits.shortest, DOUBLINGS=splits.doublings, TARGET=splits.target)
    nvrtc.load(LIST, device.index or 0, "list_kernel", 0, options)(
        (1, 1),
        1024,
        lens,
        pages.query_starts,
        plan.items,
        plan.count,
        plan.ended,
        rows,
        kv_heads,
        int(ragged),
    )
    return plan


def decode(
    q: Tensor, pages: Pages, out: Tensor, plan: Plan, scale: float, *, rotate: bool = False
) -> None:
    """As `launch.decode`, for what `can_decode` said yes to.

    Args:
        q: `[N, heads, head_dim]` in the planes' basis, contiguous.
        pages: the layer, with tables and lengths of B sequences.
        out: like q; rows of sequences that the plan leaves out are left alone.
        plan: from `make_plan`, for these lengths.
        scale: factor of the scores.
        rotate: bring the output back from the Hadamard basis of the values.
    """
    kv_heads, index = pages.spec.num_kv_heads, q.device.index or 0
    kernel, warps = _kernel(q, pages, rotate), min(kv_heads, MOST_WARPS)
    assert kernel is not None
    processors = torch.cuda.get_device_properties(index).multi_processor_count
    programs = processors * _per_sm(pages) * warps // kv_heads
    kernel(
        (min(plan.items.shape[0], max(1, programs)), kv_heads // warps),
        (warps + 1) * LANES,
        q,
        *_planes(pages.keys),
        *_planes(pages.values),
        pages.block_table,
        plan.items,
        plan.count,
        plan.partial,
        plan.stats,
        plan.ended,
        out,
        pages.block_table.stride(0),
        plan.max_splits,
        scale * LOG2_E,
    )


def _planes(side: Format) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, scales, zeros; what a format lacks is never looked at."""
    assert side.scales is not None
    return side.values, side.scales, side.scales if side.zeros is None else side.zeros


def _tuning(pages: Pages) -> Tuning:
    return TUNING[min(pages.keys.kind, pages.values.kind)]


def _per_sm(pages: Pages) -> int:
    """Programs on a multiprocessor; those of few warps are as many more."""
    return _tuning(pages).per_sm * (MOST_WARPS // min(pages.spec.num_kv_heads, MOST_WARPS))


def _kernel(q: Tensor, pages: Pages, rotate: bool) -> nvrtc.Kernel | None:
    """`decode_kernel` for this layer, None where it could not be compiled."""
    spec, kinds = pages.spec, (pages.keys.kind, pages.values.kind)
    warps, stages = min(spec.num_kv_heads, MOST_WARPS), _tuning(pages).stages
    tokens = sum(warps * _ROW[kind] + spec.num_kv_heads * _SCALES[kind] for kind in kinds)
    options = _macros(
        K_KIND=kinds[0],
        V_KIND=kinds[1],
        KV_HEADS=spec.num_kv_heads,
        GROUP=q.shape[1] // spec.num_kv_heads,
        BLOCK=pages.block_size,
        STAGES=stages,
        PER_SM=_per_sm(pages),
        MODEL_BFLOAT=int(q.dtype == torch.bfloat16),
        ROTATE=int(rotate),
    )
    return _load(q.device.index or 0, stages * (KEYS * tokens + 2 * KEYS // 4 * _PAD), options)


def _macros(**values: int) -> tuple[str, ...]:
    return tuple(f"-D{name}={value}" for name, value in values.items())


@cache
def _load(index: int, shared: int, options: tuple[str, ...]) -> nvrtc.Kernel | None:
    try:
        return nvrtc.load(DECODE, index, "decode_kernel", shared, options)
    except NotSupported as error:
        logging.getLogger("kvist").warning("%s; decoding by Triton's kernels", error)
        return None
