"""The contracts between a model, its cache and attention, and nothing else.

A model sees `KVCache` and hands the `KV` that comes back to `attend`; it knows no layout, codec,
block, batch size, rank or device. Storage (`Cache`) and its view for one step (`KVCache`) are two
objects: `cache.bind(batch)` makes the one from the other.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from kvist.cache.batch import Batch
from kvist.core.spec import AttentionSpec

Side = Literal["key", "value"]
SIDES: tuple[Side, Side] = ("key", "value")
Shape = tuple[int, ...]
Planes = Mapping[str, Tensor]


class Codec(Protocol):
    """*How* a token's keys and values are written: planes of numbers, token by token.

    A plane's shape for one token begins with `kv_heads`, so layouts may put the heads where reading
    is fastest. Every leading dimension before `[kv_heads, head_dim]` is a token dimension. What is
    written for a token depends on that token alone: a full block never changes and may be shared.
    """

    @property
    def name(self) -> str:
        """What users call it."""

    @property
    def lossless(self) -> bool:
        """Whether decoding gives back what was encoded."""

    @property
    def fingerprint(self) -> str:
        """Names all that the planes' meaning depends on; saved caches are refused by it."""

    def planes(
        self, spec: AttentionSpec, side: Side, layer_idx: int
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        """Name -> (`[kv_heads, ...]` for one token, dtype)."""

    def encode(self, x: Tensor, side: Side, layer_idx: int) -> dict[str, Tensor]:
        """`[..., kv_heads, head_dim]` in the model's basis -> planes `[..., kv_heads, ...]`."""

    def decode(self, planes: Planes, side: Side, layer_idx: int) -> Tensor:
        """Planes `[..., kv_heads, ...]` -> `[..., kv_heads, head_dim]` in the model's basis."""

    def to_basis(self, q: Tensor, layer_idx: int) -> Tensor:
        """Queries `[N, heads, head_dim]` in the planes' basis, for kernels that read them."""

    def from_basis(self, out: Tensor, layer_idx: int) -> Tensor:
        """Rotate attention's output back from the planes' basis to the model's."""


class KV(Protocol):
    """One layer of the cache as this step's queries may see it.

    `memo` is shared by all layers of a step: what depends only on lengths and specs (masks) is
    computed by the first layer that needs it.
    """

    @property
    def batch(self) -> Batch:
        """The step's lengths and positions."""

    @property
    def spec(self) -> AttentionSpec:
        """The layer's heads, window and sinks."""

    @property
    def backend(self) -> str | None:
        """The kernel asked for by name; None lets `attend` choose."""

    @property
    def memo(self) -> dict[Any, Any]:
        """Scratch that lives as long as the step."""

    @property
    def in_order(self) -> bool:
        """Whether every sequence's key i has position i, none absent."""

    @property
    def dense_is_view(self) -> bool:
        """Whether `dense` reads in place, so that a kernel may prefer it to `sequence`."""

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """All sequences, padded at the end: keys, values, key positions.

        Returns:
            keys and values `[B, T, kv_heads, head_dim]` in the model's own basis, zero where
            nothing is; key positions `[B, T]` or `[B, kv_heads, T]`, -1 = absent.
        """

    def sequence(self, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """One sequence, without padding: keys, values, key positions.

        Returns:
            keys and values `[T, kv_heads, head_dim]`; key positions `[T]` or `[kv_heads, T]`, or
            None where key i has position i.
        """

    def observe(self, q: Tensor) -> None:
        """Look at the queries `[N, heads, head_dim]`, for retention that scores."""


class State(Protocol):
    """A recurrent layer's state for the sequences of this step (families to come)."""

    def read(self) -> tuple[Tensor, ...]:
        """The states, each `[B, *shape]`."""

    def write(self, *states: Tensor) -> None:
        """The states after this step; they count only once the step is committed."""


@runtime_checkable
class KVCache(Protocol):
    """All that a model knows of caching: a cache bound to one step's batch."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> KV:
        """Write this step's keys and values; return all that its queries may attend to.

        Room was reserved by `bind`, so this cannot fail for lack of it, and lengths advance only
        in `commit`.

        Args:
            key_states: `[N, kv_heads, head_dim]`, already rotated by RoPE.
            value_states: `[N, kv_heads, head_dim]`.
            layer_idx: which layer writes.

        Raises:
            UnknownLayer: `layer_idx` is not one of the cache's layers.
        """

    def state(self, layer_idx: int) -> State:
        """A recurrent layer's state.

        Raises:
            UnknownLayer: the layer is not recurrent.
        """


@runtime_checkable
class Cache(Protocol):
    """Storage: where the planes of some sequences lie from step to step."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Committed tokens of each sequence."""

    @property
    def nbytes(self) -> int:
        """Bytes that the storage takes."""

    @property
    def max_chunk(self) -> int | None:
        """Most new tokens of a sequence in one step; None where there is no such limit."""

    def bind(self, batch: Batch, *, backend: str | None = None) -> KVCache:
        """Reserve room for the batch and return its view; the only place that grows or fails.

        A step that is never committed leaves the lengths as they were.

        Raises:
            CacheFull: no room, before anything is written.
            CacheError: the batch does not go on where the cache ends.
        """

    def commit(self, batch: Batch) -> None:
        """Advance the lengths; called once, after the whole forward."""

    def crop(self, length: int | Sequence[int]) -> None:
        """Go back to at most `length` tokens: the same for all sequences, or one for each.

        A negative length drops that many from the end of the longest. Shorter sequences stay.

        Raises:
            CacheError: this layout no longer has what going back that far would need.
        """

    def reorder(self, rows: list[int]) -> None:
        """Make sequence i what sequence `rows[i]` was: drop, permute, or repeat (a fork).

        Lazy: copies nothing before the next step writes.
        """

    def reset(self) -> None:
        """Forget all tokens; memory may be kept."""
