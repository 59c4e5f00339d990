"""The paged layout on a GPU: the CPU's results, and a step that never waits for the device."""

import pytest
import torch
from paged_models import poison, random_tokens, run, tiny_model

from kvist.cache import CODECS, Batch, make_codec
from kvist.cache.dense import DynamicCache
from kvist.cache.paged import PagedPool
from kvist.cache.paged_cache import PagedCache
from kvist.core.plan import BlockCopy, GroupChanges, HostMove, TableChange
from kvist.core.spec import AttentionSpec

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_ragged_batch_on_a_gpu_equals_the_cpu():
    model, sequences = tiny_model("qwen3"), [random_tokens(37, seed=1), random_tokens(20, seed=2)]
    codec = make_codec("plain", torch.float32)
    expected = run(model, DynamicCache(model.specs, codec, rows=2), sequences, [40, 40])
    cache = PagedCache(model.specs, codec, rows=2, block_size=4, num_blocks=40, device="cuda")
    for pool in cache.pool.pools:
        poison(pool)
    ours = run(model.to("cuda"), cache, sequences, [5, 1])
    for a, b in zip(ours, expected, strict=True):
        assert (a.cpu() - b).abs().max() < 1e-3


@pytest.mark.parametrize("codec", CODECS)
def test_plan_and_step_never_wait_for_the_gpu(codec):
    pool = PagedPool(
        [AttentionSpec(2, 16), AttentionSpec(2, 16, window=6)],
        make_codec(codec, torch.float32),
        num_blocks=40,
        host_blocks=4,
        block_size=4,
        max_slots=4,
        max_blocks=16,
        max_tokens=64,
        device="cuda",
    )
    x = torch.randn(4, 2, 16, device="cuda")
    written = torch.randint(0, 256, (1, pool.pools[0].bytes_per_block)).byte()
    pool.pools[0].write_blocks([7], written.cuda())

    def step() -> None:
        changes = GroupChanges(
            saves=(HostMove(7, 1),),
            loads=(HostMove(8, 1),),
            copies=(BlockCopy(8, 9),),
            tables=(TableChange(0, 0, (1, 2, 3)), TableChange(1, 0, (4, 5))),
        )
        pool.apply([changes, changes], admitted=[0, 1])
        bound = pool.bind(Batch.pack([[1, 2, 3], [4]], [6, 4], device="cuda"))
        for layer_idx in (0, 1):
            bound.update(x, x, layer_idx)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert pool.pools[0].read_blocks([9]).cpu().equal(written)
    assert pool.hosts[0]._data.is_pinned()
