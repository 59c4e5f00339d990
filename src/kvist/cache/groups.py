"""Groups of layers: those of equal spec share a pool, a block table and a null block.

A block holds the same tokens for every layer of its group, whatever each layer's codec makes of
them, so equal specs are all that a group asks for. Plain arithmetic over specs and codecs: the
paged layout, the engine that gives its block manager one pool for each group, and the planner that
divides the memory between them all start here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvist.cache.protocol import Codec
from kvist.cache.size import layer_bytes_per_token
from kvist.core.retention import KeepAll, Retention
from kvist.core.spec import AttentionSpec, LayerSpec
from kvist.core.tables import CacheGroup
from kvist.errors import CacheError


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose caches keep the same positions of a sequence.

    Args:
        spec: what each of them keeps.
        layers: their indices in the model, ascending.
    """

    spec: AttentionSpec
    layers: tuple[int, ...]


def group_layers(
    specs: Sequence[LayerSpec], retention: Retention | None = None
) -> tuple[LayerGroup, ...]:
    """Layers of equal spec together, in the order in which a model first has them.

    Args:
        specs: one for each layer (`model.specs`).
        retention: which tokens stay; all by default.

    Raises:
        CacheError: a layer is recurrent.
    """
    policy = retention or KeepAll()
    layers: dict[AttentionSpec, list[int]] = {}
    for layer_idx, spec in enumerate(specs):
        if not isinstance(spec, AttentionSpec):
            raise CacheError(f"the paged layout holds attention layers only, not {spec}")
        layers.setdefault(policy.apply(spec), []).append(layer_idx)
    return tuple(LayerGroup(spec, tuple(members)) for spec, members in layers.items())


def bytes_per_token(group: LayerGroup, codec: Codec) -> int:
    """What one token takes in all layers of the group, keys and values."""
    return sum(layer_bytes_per_token(group.spec, codec, layer_idx) for layer_idx in group.layers)


def blocks_for(
    memory_bytes: int,
    groups: Sequence[LayerGroup],
    codec: Codec,
    *,
    block_size: int,
    context: int,
    chunk: int,
    slack: int = 1,
) -> tuple[int, ...]:
    """How many blocks each group's pool gets, null block included, within `memory_bytes` in all.

    Memory is divided so that sequences of `context` tokens run out of all groups at once: a group
    with a window needs fewer blocks for each of them.

    Args:
        memory_bytes: for all pools together.
        groups: from `group_layers`.
        codec: how tokens are written.
        block_size: token places of a block.
        context: length of a typical long sequence, in tokens.
        chunk: most new tokens of a sequence in one step.
        slack: tokens that a sequence may go back, for guesses.

    Raises:
        CacheError: not even one block for each group fits; the message has both numbers.
    """
    sizes = [block_size * bytes_per_token(group, codec) for group in groups]
    blocks = [
        CacheGroup(group.spec, num_blocks=2).most_blocks(context, chunk, slack, block_size)
        for group in groups
    ]
    one_sequence = sum(n * size for n, size in zip(blocks, sizes, strict=True))
    spare = memory_bytes - sum(sizes)  # the null blocks
    counts = tuple(1 + spare * n // one_sequence for n in blocks)
    if min(counts) < 2:
        raise CacheError(
            f"{memory_bytes:,} bytes are too few for a paged cache, whose smallest size is "
            f"{2 * sum(sizes):,} bytes: {len(groups)} pools of 2 blocks of {block_size} tokens; "
            f"give it more memory or a smaller block_size"
        )
    return counts
