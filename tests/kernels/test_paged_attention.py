"""The paged attention kernels compute what the reference computes, on every kind of plane."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kvist.attention import attend
from kvist.attention.kernels import MOST_PROMPTS, compiled
from kvist.attention.kernels.launch import (
    CROWD,
    CROWDED,
    SPLITS,
    THRONGED,
    Pages,
    Splits,
    list_runs,
)
from kvist.cache import Batch, make_codec
from kvist.cache.paged import PagedPool
from kvist.cache.paged_view import PagedBinding, PagedKV
from kvist.cache.protocol import Codec
from kvist.core.plan import GroupChanges, TableChange
from kvist.core.spec import AttentionSpec

HEAD_DIM = 64


# Name of a codec, dtype of the model, what kernels may differ by in units of the output's spread.
CASES: dict[str, tuple[str, torch.dtype, float]] = {
    "float32": ("plain", torch.float32, 5e-5),
    "bfloat16": ("plain", torch.bfloat16, 1e-1),
    "fp8": ("fp8", torch.float32, 1e-2),
    "int8": ("int8", torch.float32, 1e-2),
    "int4": ("int4", torch.float32, 2e-2),
    "k8v4": ("k8v4", torch.float32, 2e-2),
}


def bound(
    codec: Codec,
    spec: AttentionSpec,
    cached: Sequence[int],
    new: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    block_size: int = 4,
    backend: str | None = "triton",
) -> PagedBinding:
    """A pool whose sequences have random keys, in blocks of no order; all else is NaN."""
    longest = max(c + n for c, n in zip(cached, new, strict=True))
    width = -(-longest // block_size)
    count = len(cached) * width + 3
    pool = PagedPool(
        [spec],
        codec,
        num_blocks=count,
        block_size=block_size,
        max_slots=len(cached),
        max_blocks=width,
        max_tokens=len(cached) * longest,
        device=device,
    )
    for plane in pool.pools[0]._bytes:
        plane.fill_(0xFF)
    order = (torch.randperm(count - 1) + 1).tolist()
    tables = tuple(
        TableChange(b, 0, tuple(order[b * width : (b + 1) * width])) for b in range(len(cached))
    )
    pool.apply([GroupChanges(tables=tables)])

    def pack(lens: Sequence[int], before: Sequence[int]) -> Batch:
        return Batch.pack([[0] * n for n in lens], before, device=device)

    for lens, before in ((cached, [0] * len(cached)), (new, cached)):
        batch = pack(lens, before)
        binding = pool.bind(batch, backend=backend)
        shape = (batch.num_tokens, spec.num_kv_heads, spec.head_dim)
        k, v = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        if batch.num_tokens:
            binding.update(k, v, 0)
    return binding


def attention(binding: PagedBinding, q: Tensor, backend: str) -> Tensor:
    """Attention of the bound step over what was written, by the backend of this name."""
    binding.backend = backend
    return attend(q, PagedKV(binding, binding.views[0], 0), scale=q.shape[-1] ** -0.5)


def difference(binding: PagedBinding, heads: int, head_dim: int, dtype: torch.dtype) -> float:
    """Largest difference between kernels and reference, in units of the reference's spread."""
    device = binding.kv_lens.device
    q = torch.randn(binding.batch.num_tokens, heads, head_dim, device=device).to(dtype)
    ours = attention(binding, q, "triton").double()
    theirs = attention(binding, q, "reference").double()
    assert not ours.isnan().any()
    return float((ours - theirs).abs().max() / theirs.std())


def furthest(binding: PagedBinding, heads: int) -> float:
    """The largest difference of any head's output, as a part of that output's largest number.

    Both are rounded to bfloat16, which alone makes up to 0.008.
    """
    device = binding.kv_lens.device
    q = torch.randn(binding.batch.num_tokens, heads, 128, device=device).bfloat16()
    ours = attention(binding, q, "triton").double()
    theirs = attention(binding, q, "reference").double()
    return float(((ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)).max())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("case", CASES)
def test_decode_of_ragged_contexts_equals_the_reference(case, device):
    name, dtype, tolerance = CASES[case]
    spec = AttentionSpec(2, HEAD_DIM)
    binding = bound(make_codec(name, dtype), spec, [0, 70, 3, 200], [1] * 4, device, dtype)
    assert difference(binding, 6, HEAD_DIM, dtype) < tolerance


@pytest.mark.parametrize("case", CASES)
def test_prefill_in_a_mixed_step_equals_the_reference(case, device):
    name, dtype, tolerance = CASES[case]
    spec = AttentionSpec(2, HEAD_DIM)
    binding = bound(make_codec(name, dtype), spec, [0, 70, 5, 90], [37, 1, 0, 80], device, dtype)
    assert difference(binding, 6, HEAD_DIM, dtype) < tolerance


@pytest.mark.parametrize("window", [1, 9, 64])
@pytest.mark.parametrize("sinks", [0, 3])
def test_windows_and_sinks_equal_the_reference(window, sinks, device):
    spec = AttentionSpec(2, 16, window=window, sinks=sinks)
    binding = bound(
        make_codec("plain", torch.float32),
        spec,
        [0, 1, 5, 150, 90],
        [1, 1, 1, 1, 70],
        device,
        torch.float32,
    )
    assert difference(binding, 4, 16, torch.float32) < 1e-4


@pytest.mark.parametrize("block_size", [1, 16, 128])
def test_any_block_size(block_size, device):
    spec = AttentionSpec(1, 16)
    binding = bound(
        make_codec("plain", torch.float32),
        spec,
        [40, 20],
        [1, 17],
        device,
        torch.float32,
        block_size,
    )
    assert difference(binding, 2, 16, torch.float32) < 1e-4


def test_a_crowd_of_sequences_equals_the_reference(device):
    spec, codec = AttentionSpec(1, 16), make_codec("plain", torch.float32)
    cached = [3 * i % 40 for i in range(CROWD - 2)] + [700, 300]
    binding = bound(codec, spec, cached, [1] * CROWD, device, torch.float32, block_size=16)
    assert difference(binding, 2, 16, torch.float32) < 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="decode.cu runs on a GPU only")
@pytest.mark.parametrize("name", ["fp8", "int8", "int4", "k8v4"])
@pytest.mark.parametrize("heads", [8, 16, 32])
@pytest.mark.parametrize("block_size", [16, 32])
def test_the_compiled_kernel_equals_the_reference(name, heads, block_size, device):
    cached = [0, 14, 15, 16, 31, 63, 64, 65, 127, 128, 255, 256, 700, 1500, 1, 2, 3, 300]
    binding = bound(
        make_codec(name, torch.bfloat16),
        AttentionSpec(8, 128),
        cached,
        [1] * len(cached),
        device,
        torch.bfloat16,
        block_size,
    )
    compiled._load.cache_clear()
    assert furthest(binding, heads) < 4e-2
    assert compiled._load.cache_info().misses == 1, "it was not asked"
    ragged = bound(
        make_codec(name, torch.bfloat16),
        AttentionSpec(8, 128),
        cached,
        [1, 5] * (len(cached) // 2),
        device,
        torch.bfloat16,
        block_size,
    )
    assert furthest(ragged, heads) < 4e-2


def test_a_sequence_has_the_same_bits_with_and_without_neighbours(device):
    spec, q = AttentionSpec(1, 16), torch.randn(3, 2, 16, device=device)
    codec = make_codec("plain", torch.float32)
    torch.manual_seed(1)
    alone = bound(codec, spec, [150], [1], device, torch.float32)
    keys, values, _ = _whole(alone)
    together = bound(codec, spec, [150, 9, 400], [1, 1, 1], device, torch.float32)
    pool, batch = together.views[0].pool, together.batch
    blocks = together.views[0].block_table[0, : -(-batch.kv_lens[0] // 4)].long()
    for side, tensor in (("key", keys), ("value", values)):
        pool.planes[0][side]["x"][blocks] = _in_blocks(tensor, 4)
    ours = attention(together, q, "triton")[:1]
    assert ours.equal(attention(alone, q[:1], "triton"))


def _whole(binding: PagedBinding) -> tuple[Tensor, Tensor, Tensor | None]:
    return PagedKV(binding, binding.views[0], 0).sequence(0)


def _in_blocks(tokens: Tensor, size: int) -> Tensor:
    padding = -len(tokens) % size
    return torch.cat((tokens, tokens[:1].expand(padding, -1, -1))).unflatten(0, (-1, size))


@pytest.mark.parametrize(
    "splits",
    [
        *(SPLITS, CROWDED, THRONGED, compiled.SPLITS, compiled.CROWDED, compiled.THRONGED),
        *(Splits(16, 32, 4), Splits(32, 256, 8)),
    ],
)
def test_most_splits_is_never_exceeded(splits):
    for limit in (1, 15, 16, 17, 63, 300, 1024, 1025, 5000):
        counts = [-(-n // splits.length(n)) for n in range(1, limit + 1)]
        assert max(counts) == splits.most(limit)


@pytest.mark.parametrize("new", [(40,), (1, 13, 2, 1, 5), (5,) * 8, (2, 38)], ids=str)
def test_a_recordings_room_holds_the_runs_of_any_division(new, device):
    tokens, sequences, queries = 40, 8, 4
    room = tokens // queries + min(sequences, MOST_PROMPTS)
    starts = torch.zeros(sequences + 1, dtype=torch.int32)
    starts[1 : len(new) + 1] = torch.tensor(new).cumsum(0)  # behind the last they are zeros again
    lens = torch.zeros(sequences, dtype=torch.int32)
    lens[: len(new)] = torch.tensor(new) + 3
    table = torch.zeros(sequences, 16, dtype=torch.int32, device=device)
    spec = AttentionSpec(1, HEAD_DIM)
    pages = Pages(None, None, spec, 4, table, lens.to(device), starts.to(device))
    runs = list_runs(pages, queries, room).tolist()
    wanted = [[b, i] for b, n in enumerate(new) if n > 1 for i in range(0, n, queries)]
    assert sorted(runs[: len(wanted)]) == wanted
    assert all(first >= max(new) for _, first in runs[len(wanted) :])
