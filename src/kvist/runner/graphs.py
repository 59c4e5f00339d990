"""Decode steps as CUDA graphs: recorded once for each size of batch, then replayed in one launch.

For steps whose kernels read lengths, tables and places from the paged pool's own buffers, which
stay where they are from step to step (`FusedStep`). Prefill, mixed and too large steps go through
unchanged. Recording is lazy, so that start-up stays short.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvist.cache import Batch, KVCache
from kvist.cache.paged import PagedPool
from kvist.cache.paged_view import GroupView, PagedBinding
from kvist.runner.step import StepFunction

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
# Kernels launch as many splits of the context as the longest of a bucket has.
CONTEXTS = (256, 16384, 65536, 262144)


@dataclass(frozen=True)
class _Recording:
    """A graph, the buffers that it reads its tokens from, and where it leaves its logits."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    binding: PagedBinding
    logits: Tensor


class GraphedStep:
    """Replays recordings of `step` for decode batches on `pool`; made by `graphed`."""

    def __init__(self, step: StepFunction, pool: PagedPool, buckets: Sequence[int]) -> None:
        """Record nothing yet."""
        self.step, self.pool = step, pool
        limit = min(pool.max_slots, pool.max_tokens)
        self.buckets = sorted({min(b, limit) for b in buckets})
        self._recordings: dict[tuple[int, int], _Recording] = {}
        self._addresses: tuple[int, ...] = ()
        self._memory: Any = None  # shared by all recordings

    def __call__(self, batch: Batch, cache: KVCache) -> Tensor:
        """See `StepFunction`. The logits of a replayed step are overwritten by the next one."""
        key = self._key(batch, cache)
        if key is None:
            return self.step(batch, cache)
        assert isinstance(cache, PagedBinding)
        addresses = _addresses(cache)
        if addresses != self._addresses:  # the pool has grown: what was recorded reads elsewhere
            self._recordings.clear()
            self._addresses = addresses
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._recordings[key] = self._record(key, batch, cache)
        else:
            self._fill(recording.batch, recording.binding, batch)
        recording.graph.replay()
        cache.written |= recording.binding.written
        return recording.logits[: batch.num_tokens]

    def _key(self, batch: Batch, cache: KVCache) -> tuple[int, int] | None:
        """The bucket of rows and of context, or None where the step is not to be replayed."""
        rows = batch.num_sequences
        if (
            not isinstance(cache, PagedBinding)
            or batch.embeddings is not None
            or batch.rope_positions is not None
            or set(batch.query_lens) != {1}
            or batch.logit_rows.shape[0] != rows
            or rows > self.buckets[-1]
        ):
            return None
        longest = max(batch.kv_lens)
        context = next((n for n in CONTEXTS if n >= longest), None)
        return None if context is None else (next(b for b in self.buckets if b >= rows), context)

    def _fill(self, static: Batch, binding: PagedBinding, batch: Batch) -> None:
        """Put this step's tokens where the recording reads them; `bind` has done the rest.

        Rows that only pad have no keys (`bind` leaves length 0) and write to the null block.
        """
        rows = batch.num_tokens
        static.token_ids[:rows].copy_(batch.token_ids)
        static.positions[:rows].copy_(batch.positions)
        if rows < static.num_tokens:
            for view in binding.views:
                view.slot_mapping[rows:].zero_()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _record(self, key: tuple[int, int], batch: Batch, cache: PagedBinding) -> _Recording:
        """Run the step once, for its kernels to be compiled, then record it.

        Running it more than once is harmless: it writes the same keys to the same places.
        """
        rows, context = key
        device = self.pool.device
        static = Batch(
            token_ids=torch.zeros(rows, dtype=torch.long, device=device),
            positions=torch.zeros(rows, dtype=torch.long, device=device),
            query_lens=(1,) * rows,
            kv_lens=(context,) * rows,
            logit_rows=torch.arange(rows, device=device),
            slots=(self.pool.null_slot,) * rows,
        )
        views = tuple(
            GroupView(
                view.pool,
                view.tables,
                static,
                _first(view.block_table, rows),
                _first(view.slot_mapping, rows),
            )
            for view in cache.views
        )
        lens, starts = _first(cache.kv_lens, rows), _first(cache.query_starts, rows + 1)

        def bind() -> PagedBinding:
            return PagedBinding(self.pool.group_of, static, cache.backend, views, lens, starts)

        binding = bind()
        self._fill(static, binding, batch)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self.step(static, bind())
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            logits = self.step(static, binding)
        self._memory = graph.pool()
        return _Recording(graph, static, binding, logits)


def _first(buffer: Tensor, rows: int) -> Tensor:
    """The first rows of the pool's buffer that `buffer` is a prefix of, perhaps beyond its own."""
    return buffer.as_strided((rows, *buffer.shape[1:]), buffer.stride())


def _addresses(cache: PagedBinding) -> tuple[int, ...]:
    """Where a recording would read: they change only when a pool grows."""
    planes = [
        next(iter(view.pool.planes[view.pool.group.layers[0]]["key"].values()))
        for view in cache.views
    ]
    tables = [view.block_table for view in cache.views]
    return tuple(t.data_ptr() for t in (cache.kv_lens, *tables, *planes))


def graphed(step: StepFunction, pool: PagedPool, buckets: Sequence[int] = BUCKETS) -> StepFunction:
    """The step as CUDA graphs on this pool; the step itself where there is no CUDA.

    Args:
        step: asks the device nothing, and reads lengths, tables and places from the pool.
        pool: the pool that all its batches are bound to.
        buckets: sizes of batches to record; a batch is padded to the next of them.
    """
    return GraphedStep(step, pool, buckets) if pool.device.type == "cuda" else step
