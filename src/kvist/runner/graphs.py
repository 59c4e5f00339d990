"""Decode steps as CUDA graphs: from the host's numbers to the sampled tokens in one launch.

Each size of batch is recorded when it is first met, so that start-up stays short, and then
replayed. A recording takes its rows from one upload, its keys' places from the pool's tables, its
tokens from where the last step left them, and leaves the sampled ones there: a step needs nothing
that the host would have to wait for. `prompt_graphs` is for steps that prefill. Made by the runner.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvist.attention.kernels import NAME, read_formats
from kvist.cache import Batch
from kvist.cache.paged import PagedPool
from kvist.core.plan import PlanRow
from kvist.runner.fused import FusedStep
from kvist.runner.recorder import Recorder, Recording
from kvist.runner.step import StepFunction
from kvist.runner.uploads import Kind, Uploads

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
# Kernels have room for as many splits of the context as the longest of a bucket has. Few buckets:
# a batch whose longest sequence ends must not meet sizes that were never recorded.
CONTEXTS = (4096, 16384, 65536, 262144)


def can_record(step: StepFunction, pool: PagedPool, backend: str | None = None) -> bool:
    """Whether this step, bound to this pool, can be replayed.

    It must find lengths, tables and places on the device, and so must attention: other kernels
    would be recorded with the lengths of one step.
    """
    return (
        isinstance(step, FusedStep)
        and pool.device.type == "cuda"
        and backend in (None, NAME)
        and all(
            read_formats(planes, blocks.group.spec) is not None
            for blocks in pool.pools
            for planes in blocks.planes.values()
        )
    )


class DecodeGraphs:
    """Recordings of one step function on one pool.

    Args:
        step: waits for nothing, and reads lengths, tables and places from the pool.
        pool: whose tables the rows' slots name.
        uploads: what the host says of a step's rows.
        recorder: what records.
        backend: attention by name.
        buckets: sizes of batches to record; a batch is padded to the next of them.
    """

    def __init__(
        self,
        step: FusedStep,
        pool: PagedPool,
        uploads: Uploads,
        recorder: Recorder,
        *,
        backend: str | None = None,
        buckets: Sequence[int] = BUCKETS,
    ) -> None:
        """Record nothing yet."""
        self.step, self.pool, self.uploads, self.backend = step, pool, uploads, backend
        limit = min(pool.max_slots, pool.max_tokens)
        self.buckets = sorted({min(b, limit) for b in buckets})
        self._recordings: dict[tuple[int, int, Kind, str], Recording] = {}
        self._recorder = recorder
        capacity = self.buckets[-1]
        # Ids and positions. Zeros at first, since a rehearsal places nothing and yet looks ids up.
        self._placed = torch.zeros(2, capacity, dtype=torch.int64, device=pool.device)
        self._every_row = torch.arange(capacity, device=pool.device)

    def fits(self, rows: Sequence[PlanRow]) -> bool:
        """Whether these rows can be replayed: one known or last sampled token each, no more."""
        return 0 < len(rows) <= self.buckets[-1] and all(
            len(row.tokens) == 1 and row.sample and not row.prompt_targets and not row.images
            for row in rows
        )

    def run(self, rows: Sequence[PlanRow], kind: Kind) -> Tensor:
        """Start a step.

        Returns:
            `[R]` int64, the tokens, -1 where logits were not finite; or for "logits" those,
            `[R, vocab]`. The next step writes over them.
        """
        count, longest = len(rows), 1 + max(row.start for row in rows)
        bucket = next(b for b in self.buckets if b >= count)
        contexts = (n for n in (*CONTEXTS, *self.step.limits(bucket)) if n >= longest)
        context = min(contexts, default=1 << longest.bit_length())
        key = bucket, context, kind, self.step.variant(bucket, context)
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._recordings[key] = self._record(bucket, context, kind)
        self.uploads.send(rows, bucket)
        recording.replay()
        return recording.out[:count]

    def rehearse(self) -> None:
        """Start the kernels of steps of one sequence, with few layers of the model."""
        kinds: tuple[Kind, ...] = ("greedy", "drawn")
        for kind in kinds:
            self._whole_step(self.buckets[0], CONTEXTS[0], kind, self.step.rehearse)

    def _record(self, bucket: int, context: int, kind: Kind) -> Recording:
        """Record the step on rows that only pad."""
        self.uploads.send((), bucket)
        return self._recorder.record(
            partial(self._whole_step, bucket, context, kind, self.step.raw)
        )

    def _whole_step(
        self, bucket: int, context: int, kind: Kind, forward: Callable[[Batch, Any], Tensor]
    ) -> Tensor:
        """What a recording holds, the model's part of it by `forward`."""
        from kvist.kernels.inputs import place

        pool = self.pool
        ids, positions = self._placed[:, :bucket]
        batch = Batch(
            token_ids=ids,
            positions=positions,
            query_lens=(1,) * bucket,
            kv_lens=(context,) * bucket,
            logit_rows=self._every_row[:bucket],
            slots=(pool.null_slot,) * bucket,
            lasts_only=True,
        )
        binding = pool.bind_unfilled(batch, backend=self.backend)
        for view in binding.views:
            place(
                self.uploads.rows,
                self.uploads.last,
                view.tables.device_table,
                ids,
                positions,
                binding.kv_lens,
                view.block_table,
                view.slot_mapping,
                pool.block_size,
            )
        return self.uploads.sample(forward(batch, binding), kind)
