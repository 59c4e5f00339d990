"""A cache in a file: a conversation goes on in another process, to the bit, without a prefill.

One safetensors file with the tokens, fingerprints of what computed them, and each layer's planes as
they are encoded, by position: so it does not matter which layout reads them, as long as nothing
that was let go of is missing there. What belongs to another model, tokenizer, codec or retention
is refused with the reason. For single prefixes of a pool that serves, see `prefix_file`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kvist.cache.batch import Batch
from kvist.cache.files import open_file, write_file
from kvist.cache.protocol import KV, SIDES, Codec, Planes, Side, State
from kvist.core.retention import KeepAll, Retention, SlidingWindow, first_needed
from kvist.core.spec import AttentionSpec
from kvist.errors import CacheError

FORMAT = "kvist.cache"
VERSION = "1"

# Layouts that never let go of a token: what their layers lack was never written (filled late).
KEEPING = frozenset({"dynamic", "static"})

Ranges = tuple[range, ...]


class Putting(Protocol):
    """A cache bound to one step that takes what is encoded already; a `KVCache`."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> KV:
        """See `KVCache.update`."""

    def state(self, layer_idx: int) -> State:
        """See `KVCache.state`."""

    def put(self, layer_idx: int, planes: Mapping[Side, Planes]) -> None:
        """Write planes, each `[N, kv_heads, ...]`, in place of `update`."""


class Saveable(Protocol):
    """What saving asks of a layout, beside the `Cache` that it is."""

    @property
    def layout(self) -> str:
        """Its name in `LAYOUTS`."""

    @property
    def codec(self) -> Codec:
        """How tokens are written."""

    @property
    def retention(self) -> Retention:
        """Which tokens stay."""

    @property
    def specs(self) -> tuple[AttentionSpec, ...]:
        """What each layer keeps, retention applied."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """See `Cache.lengths`."""

    @property
    def max_chunk(self) -> int | None:
        """See `Cache.max_chunk`."""

    def bind(self, batch: Batch, *, backend: str | None = None) -> Putting:
        """See `Cache.bind`."""

    def commit(self, batch: Batch) -> None:
        """See `Cache.commit`."""

    def reset(self) -> None:
        """See `Cache.reset`."""

    def held(self, layer_idx: int, row: int) -> Ranges:
        """Positions of a sequence that a layer holds, ascending."""

    def read(self, layer_idx: int, row: int, positions: Tensor) -> dict[Side, dict[str, Tensor]]:
        """Planes of these positions `[T]`, encoded: each `[T, kv_heads, ...]`."""

    def lose(self, layer_idx: int, row: int, before: int) -> None:
        """Forget what a layer holds of a sequence before a position, sinks apart."""


@dataclass(frozen=True)
class SavedCache:
    """What a file says of the cache in it, to make one for it with `make_cache`.

    Args:
        path: the file.
        model: fingerprint of the weights that computed it.
        tokenizer: fingerprint of what the tokens mean.
        codec: name of the codec.
        codec_fingerprint: all that the planes' meaning depends on.
        layout: where the tokens lay.
        retention: which of them stayed.
        tokens: the token ids of each row, those of the cache first, perhaps some more.
        lengths: how many of them the cache holds.
    """

    path: Path
    model: str
    tokenizer: str
    codec: str
    codec_fingerprint: str
    layout: str
    retention: Retention
    tokens: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]


def save_cache(
    cache: Saveable,
    path: Path,
    *,
    model: str,
    tokenizer: str,
    tokens: Sequence[Sequence[int]],
) -> None:
    """Write a cache to a file: all of it, or none.

    Args:
        cache: between two steps.
        path: the file; one that is there is replaced.
        model: fingerprint of the weights.
        tokenizer: fingerprint of the tokenizer; empty where there is none.
        tokens: each row's token ids: those that it holds, and perhaps some behind them, such as
            the one that was sampled last.

    Raises:
        CacheError: fewer tokens than the cache holds, or the file cannot be written.
    """
    lengths = cache.lengths
    if len(tokens) != len(lengths) or any(
        len(ids) < n for ids, n in zip(tokens, lengths, strict=True)
    ):
        raise CacheError(
            f"the cache holds {list(lengths)} tokens, but the token ids of "
            f"{[len(ids) for ids in tokens]} were given"
        )
    layers = range(len(cache.specs))
    held = [[cache.held(i, row) for i in layers] for row in range(len(lengths))]
    tensors: dict[str, Tensor] = {}
    for row, ids in enumerate(tokens):
        tensors[_tokens_key(row)] = torch.tensor(ids, dtype=torch.long)
        for layer_idx, ranges in enumerate(held[row]):
            positions = _positions(ranges)
            if len(positions):
                for side, planes in cache.read(layer_idx, row, positions).items():
                    for name, plane in planes.items():
                        tensors[_key(row, layer_idx, side, name)] = plane.contiguous().cpu()
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "tokenizer": tokenizer,
        "codec": cache.codec.name,
        "codec_fingerprint": cache.codec.fingerprint,
        "layout": cache.layout,
        "retention": json.dumps(_describe(cache.retention)),
        "specs": json.dumps([_numbers(spec) for spec in cache.specs]),
        "lengths": json.dumps(lengths),
        "held": json.dumps([[[(r.start, r.stop) for r in x] for x in row] for row in held]),
    }
    write_file(path, tensors, metadata)


def saved_cache(path: Path) -> SavedCache:
    """What a file says of the cache in it.

    Raises:
        CacheError: no file, not one of these, of another format version, or damaged.
    """
    with open_file(path, "a saved cache") as file:
        return _describe_file(path, file, _metadata(path, file))


def load_cache(path: Path, cache: Saveable, *, model: str, tokenizer: str) -> SavedCache:
    """Fill an empty cache from a file; it then goes on exactly as the saved one would have.

    Args:
        path: what `save_cache` wrote.
        cache: empty, with as many rows as were saved.
        model: fingerprint of the weights that will go on from it.
        tokenizer: fingerprint of the tokenizer.

    Returns:
        What the file says, with the tokens.

    Raises:
        CacheError: it is of another model, tokenizer, codec, retention or format version, lacks
            what this layout would hold, does not fit, or is damaged; the message says which. The
            cache is empty then.
    """
    with open_file(path, "a saved cache") as file:
        metadata = _metadata(path, file)
        saved = _describe_file(path, file, metadata)
        _check_same(saved, metadata, cache, model, tokenizer)
        held = _held(path, metadata, saved, cache)
        try:
            _fill(file, saved, cache, held)
            _forget_what_is_missing(saved, cache, held)
        except BaseException as error:
            cache.reset()
            if isinstance(error, RuntimeError | KeyError):
                raise CacheError(f"{path} is damaged: {error}") from error
            raise
    return saved


# Reading.


def _metadata(path: Path, file: Any) -> dict[str, str]:
    metadata: dict[str, str] = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise CacheError(f"{path} is not a cache that kvist has saved")
    if metadata.get("version") != VERSION:
        raise CacheError(
            f"{path} has version {metadata.get('version')!r} of the format, and this kvist reads "
            f"{VERSION!r}; compute the cache again"
        )
    return metadata


def _describe_file(path: Path, file: Any, metadata: dict[str, str]) -> SavedCache:
    try:
        lengths = tuple(_whole(n) for n in json.loads(metadata["lengths"]))
        tokens = [tuple(file.get_tensor(_tokens_key(row)).tolist()) for row in range(len(lengths))]
        saved = SavedCache(
            path=path,
            model=metadata["model"],
            tokenizer=metadata["tokenizer"],
            codec=metadata["codec"],
            codec_fingerprint=metadata["codec_fingerprint"],
            layout=metadata["layout"],
            retention=_retention(json.loads(metadata["retention"])),
            tokens=tuple(tokens),
            lengths=lengths,
        )
    except (KeyError, ValueError, TypeError) as error:
        raise CacheError(f"{path} is damaged: its metadata lack or garble {error}") from error
    if any(len(ids) < n for ids, n in zip(tokens, lengths, strict=True)):
        raise CacheError(f"{path} is damaged: it has fewer token ids than the cache holds tokens")
    return saved


def _check_same(
    saved: SavedCache, metadata: dict[str, str], cache: Saveable, model: str, tokenizer: str
) -> None:
    """Raise for the first thing that differs."""
    expected = {
        "model": (saved.model, model),
        "tokenizer": (saved.tokenizer, tokenizer),
        "codec": (saved.codec_fingerprint, cache.codec.fingerprint),
        "retention": (str(saved.retention), str(cache.retention)),
        "layers": (metadata.get("specs"), json.dumps([_numbers(spec) for spec in cache.specs])),
        "number of rows": (len(saved.lengths), len(cache.lengths)),
    }
    for what, (there, here) in expected.items():
        if there != here:
            raise CacheError(f"{saved.path} has another {what}: {there!r}, and here it is {here!r}")
    if any(cache.lengths):
        raise CacheError(f"a saved cache is loaded into an empty one, not {list(cache.lengths)}")


def _held(
    path: Path, metadata: dict[str, str], saved: SavedCache, cache: Saveable
) -> list[list[Ranges]]:
    """For each row and layer the positions in the file."""
    try:
        held = [
            [tuple(range(_whole(start), _whole(stop)) for start, stop in ranges) for ranges in row]
            for row in json.loads(metadata["held"])
        ]
    except (KeyError, ValueError, TypeError) as error:
        raise CacheError(f"{path} is damaged: it does not say what it holds") from error
    fits = [len(row) for row in held] == [len(cache.specs)] * len(saved.lengths) and all(
        _within(ranges, (range(length),))
        for row, length in zip(held, saved.lengths, strict=True)
        for ranges in row
    )
    if not fits:
        raise CacheError(f"{path} is damaged: what it holds is not what it says of its layers")
    return held


def _fill(file: Any, saved: SavedCache, cache: Saveable, held: list[list[Ranges]]) -> None:
    """Write the planes, in steps that the layout takes; zeros where the file has nothing."""
    most = cache.max_chunk or max(saved.lengths, default=0)
    while cache.lengths != saved.lengths:
        spans = [
            range(at, min(at + most, end))
            for at, end in zip(cache.lengths, saved.lengths, strict=True)
        ]
        new = [ids[span.start : span.stop] for ids, span in zip(saved.tokens, spans, strict=True)]
        batch = Batch.pack(new, cache.lengths, logits="none")
        bound = cache.bind(batch)
        for layer_idx, spec in enumerate(cache.specs):
            planes: dict[Side, dict[str, Tensor]] = {}
            for side in SIDES:
                planes[side] = {
                    name: torch.cat(
                        [
                            _part(
                                file,
                                _key(row, layer_idx, side, name),
                                held[row][layer_idx],
                                span,
                                torch.zeros(len(span), *shape, dtype=dtype),
                            )
                            for row, span in enumerate(spans)
                        ]
                    )
                    for name, (shape, dtype) in cache.codec.planes(spec, side, layer_idx).items()
                }
            bound.put(layer_idx, planes)
        cache.commit(batch)


def _part(file: Any, key: str, held: Ranges, span: range, out: Tensor) -> Tensor:
    """The positions `span` of a plane, `[len(span), kv_heads, ...]`, written into zeros `out`."""
    before = 0  # tokens in the file before this range
    for positions in held:
        start, stop = max(positions.start, span.start), min(positions.stop, span.stop)
        if start < stop:
            plane = file.get_slice(key)
            shape, dtype = tuple(plane.get_shape()), out.dtype
            if shape != (sum(map(len, held)), *out.shape[1:]):
                raise RuntimeError(f"{key} has the shape {list(shape)}")
            first = before + start - positions.start
            tokens = plane[first : first + stop - start]
            if tokens.dtype != dtype:
                raise RuntimeError(f"{key} is {tokens.dtype}, not {dtype}")
            out[start - span.start : stop - span.start] = tokens
        before += len(positions)
    return out


def _forget_what_is_missing(saved: SavedCache, cache: Saveable, held: list[list[Ranges]]) -> None:
    """Let the cache hold nothing that the file did not; raise if it would then lack something."""
    for row, layers in enumerate(held):
        length = saved.lengths[row]
        for layer_idx, there in enumerate(layers):
            if _within((range(length),), there):
                continue
            alike = cache.layout == saved.layout or {cache.layout, saved.layout} <= KEEPING
            if alike and not _within(cache.held(layer_idx, row), there):
                cache.lose(layer_idx, row, there[-1].start if there else length)
            here, spec = cache.held(layer_idx, row), cache.specs[layer_idx]
            needed = (range(min(spec.sinks, length)), range(first_needed(spec, length), length))
            wanted = tuple(_common(part, need) for part in there for need in needed)
            if not _within(here, there) or not _within(wanted, here):
                raise CacheError(
                    f"{saved.path} was saved from a {saved.layout} cache that had let go of what "
                    f"lay behind its windows, and this {cache.layout} cache would need it to go "
                    f"back; load it into a {saved.layout} cache made in the same way"
                )


# Ranges of positions.


def _positions(ranges: Ranges) -> Tensor:
    return torch.cat([torch.arange(0), *(torch.arange(r.start, r.stop) for r in ranges)])


def _common(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _within(inner: Ranges, outer: Ranges) -> bool:
    """Whether each of the inner ranges lies in one of the outer; these are disjoint, ascending."""
    merged: list[range] = []
    for part in outer:
        if merged and merged[-1].stop == part.start:
            part = range(merged.pop().start, part.stop)
        merged.append(part)
    return all(
        not part or any(part.start >= o.start and part.stop <= o.stop for o in merged)
        for part in inner
    )


# What is written about a cache.


def _key(row: int, layer_idx: int, side: Side, name: str) -> str:
    return f"rows.{row}.layers.{layer_idx}.{side}.{name}"


def _tokens_key(row: int) -> str:
    return f"rows.{row}.token_ids"


def _numbers(spec: AttentionSpec) -> list[int | None]:
    return [spec.num_kv_heads, spec.head_dim, spec.window, spec.sinks]


def _whole(n: object) -> int:
    """A count out of JSON; raises ValueError for anything else."""
    if not isinstance(n, int) or n < 0:
        raise ValueError(f"the number {n!r}")
    return n


def _describe(retention: Retention) -> dict[str, Any]:
    if isinstance(retention, SlidingWindow):
        return {"name": "sliding", "window": retention.window, "sinks": retention.sinks}
    return {"name": retention.name}


def _retention(described: Mapping[str, Any]) -> Retention:
    """The policy that `_describe` described; raises ValueError for one that is not known."""
    if described["name"] == "all":
        return KeepAll()
    if described["name"] == "sliding":
        return SlidingWindow(int(described["window"]), int(described["sinks"]))
    raise ValueError(f"the retention {described['name']!r}")
