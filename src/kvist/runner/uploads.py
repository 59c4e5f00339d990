"""What the host says of a step's rows, at one address on the device, for recordings to read.

Token, position and slot of each row, and what its token is sampled with, in one copy a step. Made
by the runner, which tells it who takes a slot; its graphs send and read.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kvist.cache.paged import PagedPool
from kvist.core.params import ResolvedParams
from kvist.core.plan import PlanRow
from kvist.runner.sampler import kernel_params

Kind = Literal["logits", "greedy", "drawn", "filtered"]
"""What a recording leaves: logits, or tokens by the simplest sampling that serves its rows."""

# Rows of an upload: token, position, slot; temperature, k, p, min-p, uniform.
_ROWS, _PARAMS = 8, slice(3, 8)
_UPLOADS = 4  # that may be on their way


class Uploads:
    """One upload a step.

    Args:
        pool: whose slots the rows name.
        last: `[slots + 1]` int64, the token last sampled in each slot; read and written.
    """

    def __init__(self, pool: PagedPool, last: Tensor) -> None:
        """Nothing is sent yet."""
        capacity, device = pool.max_slots, pool.device
        self.last, self._null_slot, self._on_gpu = last, pool.null_slot, device.type == "cuda"
        self.rows = torch.zeros(_ROWS, capacity, dtype=torch.int64, device=device)
        # What the host writes for one step must stay until it was copied: sources take turns.
        self._sources = [
            torch.zeros(_ROWS, capacity, dtype=torch.int64, pin_memory=self._on_gpu)
            for _ in range(_UPLOADS)
        ]
        self._copied: list[torch.cuda.Event | None] = [None] * _UPLOADS
        self._turn = 0
        self._params = np.zeros((4, capacity + 1))  # of each slot; see `admit`

    def admit(self, slot: int, params: ResolvedParams, vocab_size: int) -> None:
        """A sequence with these parameters takes the slot."""
        self._params[:, slot] = kernel_params(params, vocab_size)

    def kind_of(self, rows: Sequence[PlanRow]) -> Kind:
        """The simplest sampling that serves these rows."""
        params = self._params[:, [row.slot for row in rows]]
        drawn = params[0] > 0
        if not drawn.any():
            return "greedy"
        return "filtered" if (drawn & ((params[1] > 0) | (params[2] < 1))).any() else "drawn"

    def send(self, rows: Sequence[PlanRow], bucket: int) -> None:
        """Copy the rows to where recordings read them; padding has position -1 and no keys."""
        source, copied = self._sources[self._turn], self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        count = len(rows)
        slots = [row.slot for row in rows]
        numbers = source.numpy()
        numbers[:, count:bucket] = 0
        numbers[1, count:bucket] = -1
        numbers[2, count:bucket] = self._null_slot
        numbers[0, :count] = [row.tokens[0] for row in rows]
        numbers[1, :count] = [row.start for row in rows]
        numbers[2, :count] = slots
        params = numbers[_PARAMS].view(np.float64)
        params[:4, :count] = self._params[:, slots]
        params[4, :count] = [row.uniforms[0] if row.uniforms else 0.0 for row in rows]
        self.rows.copy_(source, non_blocking=True)
        if self._on_gpu:
            event = torch.cuda.Event()
            event.record()
            self._copied[self._turn] = event
        self._turn = (self._turn + 1) % _UPLOADS

    def sample(self, logits: Tensor, kind: Kind) -> Tensor:
        """Start what samples a token for each of the first rows sent.

        Returns:
            `[R]` int64, -1 where logits were not finite; for "logits" those in float32.
        """
        from kvist.kernels.sampling import sample

        if kind == "logits":
            return logits.float()
        out = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        params = None if kind == "greedy" else self.rows[_PARAMS].view(torch.float64)
        sample(
            logits,
            params,
            out,
            filtered=kind == "filtered",
            slots=self.rows[2],
            last=self.last,
        )
        return out
