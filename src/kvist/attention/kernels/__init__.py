"""Attention over the paged layout by Triton kernels that read planes and tables in place.

Registered as `triton` for every machine; `supports` says no where there is no Triton, no GPU or no
paged cache, and nothing of Triton is imported before it said yes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvist.attention.kernels.formats import (
    PLAIN,
    Encoding,
    Format,
    read_encoding,
    read_format,
)
from kvist.cache.paged_view import PagedKV
from kvist.cache.protocol import KV, SIDES, Side
from kvist.core.spec import AttentionSpec
from kvist.kernels import can_run

if TYPE_CHECKING:
    from kvist.attention.kernels.launch import Pages

NAME = "triton"
WHOLE_PROMPT = 1024  # tokens from which torch's attention over gathered keys is the faster
MOST_PROMPTS = 32  # of a step that is replayed
LONGEST = 1 << 30


def read_formats(
    planes: Mapping[Side, Mapping[str, Tensor]], spec: AttentionSpec
) -> tuple[Format, Format] | None:
    """A layer's keys and values as kernels read them, or None where they cannot.

    They can where head_dim is a power of two from 16 on, of integers from 32.
    """
    size = spec.head_dim
    if size < 16 or size & (size - 1):
        return None
    keys, values = (read_format(planes[side], size) for side in SIDES)
    return None if keys is None or values is None else (keys, values)


def _formats(kv: PagedKV) -> tuple[Format, Format] | None:
    return read_formats({side: kv.planes(side) for side in SIDES}, kv.spec)


def supports(kv: KV) -> bool:
    """Whether the kernels can read this view: a paged cache, on a device that runs kernels.

    In the interpreter only where asked for by name, since that is slow.
    """
    if not isinstance(kv, PagedKV) or not can_run(kv.kv_lens.device):
        return False
    if kv.kv_lens.device.type == "cpu" and kv.backend != NAME:
        return False
    return _formats(kv) is not None


def triton_attention(
    q: Tensor,
    kv: KV,
    scale: float,
    *,
    dependent: bool = False,
    encoding: Encoding | None = None,
    formats: tuple[Format, Format] | None = None,
) -> Tensor:
    """Shapes as in `attend`.

    Args:
        q: queries; with an encoding they are in the basis of the keys already.
        kv: a view that `supports` said yes to.
        scale: factor of the scores.
        dependent: whether the decode kernels may start before the kernel before them has ended.
        encoding: how the layer is written, where kernels know it.
        formats: of its planes, where they are known already.
    """
    from kvist.attention.kernels.launch import Pages, list_runs, prefill, prefill_tuning

    assert isinstance(kv, PagedKV)
    formats = formats or _formats(kv)
    assert formats is not None
    batch = kv.batch
    pages = Pages(*formats, kv.spec, kv.block_size, kv.block_table, kv.kv_lens, kv.query_starts)
    if encoding is None:
        q = kv.codec.to_basis(q, kv.layer_idx).contiguous()
    tuning, queries = prefill_tuning(pages, q)
    step = _division(kv, queries, plain=formats[0].kind == formats[1].kind == PLAIN)
    if step.fresh and batch.num_sequences == 1:
        return _whole_prompt(q, kv, 0, scale)
    out = torch.empty_like(q)
    for b in step.fresh:
        start, end = batch.query_spans[b]
        out[start:end] = _whole_prompt(q[start:end], kv, b, scale)
    back = encoding is not None and encoding.values_rotated and not step.ragged
    started: list[Callable[[], None]] = []
    if step.runs:
        listed = ("triton prefill", queries, step.whole)
        if listed not in kv.memo:
            kv.memo[listed] = list_runs(pages, queries, step.runs, step.whole)
        runs = kv.memo[listed]
        started.append(partial(prefill, q, pages, out, runs, scale, tuning=tuning, queries=queries))
    if step.longest:
        decode = partial(_decode, q, pages, out, kv, step, scale, dependent=dependent, rotate=back)
        started.append(decode)
    if len(started) == 2 and kv.is_recorded and q.device.type == "cuda":
        _side_by_side(q.device, *started)
    else:
        for start_kernels in started:
            start_kernels()
    return out if back else kv.codec.from_basis(out, kv.layer_idx)


def _decode(
    q: Tensor,
    pages: "Pages",
    out: Tensor,
    kv: PagedKV,
    step: "_Division",
    scale: float,
    *,
    dependent: bool,
    rotate: bool,
) -> None:
    """The sequences of one query each, into `out`."""
    from kvist.attention.kernels import compiled
    from kvist.attention.kernels.launch import Workspace, decode, most_splits, splits_for

    sequences, heads = kv.batch.num_sequences, q.shape[1]
    if compiled.can_decode(q, pages, rotate=rotate):
        most = most_splits(pages, step.longest, compiled.splits_for(sequences))
        key = ("compiled decode", heads, kv.spec.num_kv_heads, most)
        if key not in kv.memo:
            kv.memo[key] = compiled.make_plan(pages, heads, most, ragged=step.ragged)
        compiled.decode(q, pages, out, kv.memo[key], scale, rotate=rotate)
        return
    most = most_splits(pages, step.longest, splits_for(sequences))
    room = ("triton decode", heads, kv.spec.head_dim, most)
    if room not in kv.memo:
        kv.memo[room] = Workspace.make(pages, heads, most)
    decode(
        q,
        pages,
        out,
        kv.memo[room],
        scale,
        ragged=step.ragged,
        dependent=dependent,
        rotate=rotate,
    )


def _side_by_side(
    device: torch.device, prompts: Callable[[], None], decodes: Callable[[], None]
) -> None:
    """Few programs that compute for long, beside many that wait for memory."""
    here, beside = torch.cuda.current_stream(device), _second_stream(device)
    beside.wait_stream(here)
    try:
        with torch.cuda.stream(beside):
            prompts()
        decodes()
    finally:  # a recording must not end before the two are one again
        here.wait_stream(beside)


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


@dataclass(frozen=True)
class _Division:
    """Which kernel is for which of a step's sequences.

    Args:
        longest: keys of the longest that has one query; 0 where none has.
        ragged: whether others have more.
        whole: lengths from which on prompts with nothing cached are faster by torch's own kernels.
        fresh: those prompts.
        runs: of queries of the other prompts, or room for them.
    """

    longest: int
    ragged: bool
    whole: range
    fresh: tuple[int, ...]
    runs: int


def _division(kv: PagedKV, queries: int, *, plain: bool) -> _Division:
    """Looked up once a step for all layers of a kind, since batches are long."""
    key = ("division", queries, kv.spec.window, plain)
    if key not in kv.memo:
        kv.memo[key] = (_divide_any if kv.is_recorded else _divide)(kv, queries, plain)
    division: _Division = kv.memo[key]
    return division


def _divide(kv: PagedKV, queries: int, plain: bool) -> _Division:
    batch, window, whole = kv.batch, kv.spec.window, range(0)
    on_gpu = kv.kv_lens.device.type == "cuda"
    if on_gpu and plain and kv.planes("key")["x"].dtype != torch.float32:
        whole = range(WHOLE_PROMPT, 1 + (window or LONGEST))
    longest, fresh, runs = 0, [], 0
    for b, (n, new) in enumerate(zip(batch.kv_lens, batch.query_lens, strict=True)):
        if new == 1:
            longest = max(longest, n)
        elif n == new and n in whole:
            fresh.append(b)
        else:
            runs += -(-new // queries)
    ragged = batch.query_lens != (1,) * batch.num_sequences
    return _Division(longest, ragged, whole, tuple(fresh), runs)


def _divide_any(kv: PagedKV, queries: int, plain: bool) -> _Division:
    """With room for any division of as many tokens among as many sequences."""
    batch = kv.batch
    if batch.query_lens == (1,) * batch.num_sequences:
        return _Division(max(batch.kv_lens), False, range(0), (), 0)
    runs = batch.num_tokens // queries + min(batch.num_sequences, MOST_PROMPTS)
    longest = max(batch.kv_lens) if batch.num_sequences > 1 else 0
    return _Division(longest, True, range(0), (), runs)


def _whole_prompt(q: Tensor, kv: PagedKV, index: int, scale: float) -> Tensor:
    """Causal attention of the queries `[n, heads, head_dim]` of a sequence of n tokens."""
    keys, values, _ = kv.sequence(index)
    mixed = scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        is_causal=True,
        scale=scale,
        enable_gqa=True,
    )
    return mixed[0].transpose(0, 1)


__all__ = [
    "NAME",
    "PLAIN",
    "Encoding",
    "Format",
    "read_encoding",
    "read_format",
    "read_formats",
    "supports",
    "triton_attention",
]
