"""The tensors of one step: packed ids, positions, and host copies of the lengths.

Packed means that the new tokens of all sequences stand one behind the other, without padding. A
batch stands with the cache because views and kernels read it; the runner and the loop make it with
`Batch.pack`. Lengths are plain ints, so that nothing in a step has to ask the device for them.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kvist.errors import CacheError

LogitRows = Literal["last", "all", "none"] | Sequence[int]


_CODES = {torch.int64: "q", torch.int32: "i"}


def int_tensor(
    values: Sequence[int], device: str | torch.device, dtype: torch.dtype = torch.long
) -> Tensor:
    """`[len(values)]` on the device, without waiting for a GPU to take them over."""
    made, device = _on_host(values, dtype), torch.device(device)
    if device.type == "cuda":
        return made.pin_memory().to(device, non_blocking=True)
    return made if device.type == "cpu" else made.to(device)


def fill_ints(target: Tensor, values: Sequence[int]) -> None:
    """Write all of an int64 or int32 tensor, without waiting for a GPU to take them over."""
    made = _on_host(values, target.dtype).view(target.shape)
    target.copy_(made.pin_memory() if target.device.type == "cuda" else made, non_blocking=True)


def _on_host(values: Sequence[int], dtype: torch.dtype) -> Tensor:
    # Through an array: several times as fast as torch reads a list.
    packed = array(_CODES[dtype], values)
    return torch.frombuffer(packed, dtype=dtype) if packed else torch.empty(0, dtype=dtype)


@dataclass(frozen=True)
class Batch:
    """One step's input. N new tokens of B sequences, packed in the sequences' order.

    Args:
        token_ids: `[N]` int64.
        positions: `[N]` int64, each token's place in its own sequence; masks use these alone.
        query_lens: new tokens of each sequence; 0 is a sequence that waits.
        kv_lens: what each sequence may look at once this step is written, new tokens included.
        logit_rows: `[R]` int64, the rows of `[N]` whose logits the caller wants.
        slots: the storage row of each sequence (dense layouts: `0 .. B-1`).
        embeddings: `[N, hidden]` instead of the ids' own embeddings (images, soft prompts).
        rope_positions: `[N]` or `[axes, N]` where rotation does not follow `positions`.
        lasts_only: whether `logit_rows` are known to be the last of every sequence, in order.
        largest_only: whether nothing will be asked of the logits but where each row's largest is,
            and whether they are finite (`runner.greedy`); a step may leave the rest out.
        owners: `sequence_index`, where it is known already. Both follow from `query_lens` and
            `logit_rows`: `dataclasses.replace` these together.
    """

    token_ids: Tensor
    positions: Tensor
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    logit_rows: Tensor
    slots: tuple[int, ...]
    embeddings: Tensor | None = None
    rope_positions: Tensor | None = None
    lasts_only: bool = False
    largest_only: bool = False
    owners: Tensor | None = None

    @classmethod
    def pack(
        cls,
        tokens: Sequence[Sequence[int]],
        cached: Sequence[int],
        *,
        device: str | torch.device = "cpu",
        logits: LogitRows = "last",
        slots: Sequence[int] | None = None,
        largest_only: bool = False,
    ) -> "Batch":
        """Pack each sequence's new tokens behind what it has cached.

        Args:
            tokens: the new tokens of each sequence.
            cached: tokens that each sequence already has in the cache.
            device: where the tensors are made.
            logits: each sequence's last row, all rows, none, or the packed rows given.
            slots: storage rows; `0 .. B-1` unless given.
            largest_only: see the class.
        """
        query_lens = tuple(len(t) for t in tokens)
        kv_lens = tuple(c + n for c, n in zip(cached, query_lens, strict=True))
        ends = list(accumulate(query_lens))
        total = ends[-1] if ends else 0
        flat = array("q")
        for new in tokens:
            flat += array("q", new)
        # New tokens of sequence b take the positions [cached[b], cached[b] + query_lens[b]).
        if query_lens == (1,) * total:  # without numpy, which so few numbers would wait for
            flat.extend(cached)
            flat.extend(range(total))
        else:
            owners = np.repeat(np.arange(len(ends)), np.array(query_lens, np.int64))
            shifts = np.array([kv - end for kv, end in zip(kv_lens, ends, strict=True)], np.int64)
            flat.frombytes((np.arange(total) + shifts[owners]).tobytes())
            flat.frombytes(owners.tobytes())
        lasts = [end - 1 for end, n in zip(ends, query_lens, strict=True) if n]
        if isinstance(logits, str):
            every = range(total)
            rows: Sequence[int] = {"last": lasts, "all": every, "none": ()}[logits]
        else:
            rows = list(logits)
        flat.extend(rows)
        # All of it in one copy to the device.
        ids, positions, index, chosen = int_tensor(flat, device).split_with_sizes(
            [total] * 3 + [len(rows)]
        )
        return cls(
            token_ids=ids,
            positions=positions,
            query_lens=query_lens,
            kv_lens=kv_lens,
            logit_rows=chosen,
            slots=tuple(range(len(query_lens)) if slots is None else slots),
            lasts_only=len(lasts) == len(query_lens) and lasts == list(rows),
            largest_only=largest_only,
            owners=index,
        )

    def last_tokens(self) -> "Batch":
        """The step as its last tokens alone see it. Every sequence has new ones."""
        device, count = self.token_ids.device, self.num_sequences
        lasts = (
            self.logit_rows
            if self.lasts_only
            else int_tensor([end - 1 for _, end in self.query_spans], device)
        )
        return Batch(
            token_ids=self.token_ids[lasts],
            positions=self.positions[lasts],
            query_lens=(1,) * count,
            kv_lens=self.kv_lens,
            logit_rows=torch.arange(count, device=device),
            slots=self.slots,
        )

    @property
    def num_sequences(self) -> int:
        """B."""
        return len(self.query_lens)

    @property
    def num_tokens(self) -> int:
        """N."""
        return sum(self.query_lens)

    @cached_property
    def cached_lens(self) -> tuple[int, ...]:
        """Tokens of each sequence that were in the cache before this step."""
        return tuple(kv - n for kv, n in zip(self.kv_lens, self.query_lens, strict=True))

    @cached_property
    def query_spans(self) -> tuple[tuple[int, int], ...]:
        """`[start, end)` of each sequence's rows in the packed tensors."""
        return tuple(pairwise(accumulate(self.query_lens, initial=0)))

    @cached_property
    def uniform(self) -> bool:
        """Whether all sequences have equal query and key lengths."""
        return len(set(self.query_lens)) <= 1 and len(set(self.kv_lens)) <= 1

    @cached_property
    def sequence_index(self) -> Tensor:
        """`[N]` int64, which sequence each packed row belongs to."""
        if self.owners is not None:
            return self.owners
        lens = int_tensor(self.query_lens, self.positions.device)
        return torch.repeat_interleave(
            torch.arange(len(self.query_lens), device=lens.device),
            lens,
            output_size=sum(self.query_lens),
        )

    def check_cached(self, lengths: Sequence[int]) -> None:
        """Raise unless this batch goes on exactly where a cache of these lengths ends."""
        if tuple(lengths) != self.cached_lens:
            raise CacheError(
                f"the batch goes on at lengths {list(self.cached_lens)}, but the cache holds "
                f"{list(lengths)} tokens"
            )
