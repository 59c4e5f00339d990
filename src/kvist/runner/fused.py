"""A step made of fused kernels, from the weights of a dense decoder: a drop-in for `model_step`.

Few tokens (decoding) go through products that stream weights with norm, SwiGLU and residual sum
fused in; many tokens (prefill) through torch's matrix products between fused kernels. Float32
residual stream. Nothing in a step waits for the device, so decoding can be captured (graphs.py).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvist.attention import attend
from kvist.attention.kernels import (
    NAME,
    Encoding,
    Format,
    read_encoding,
    read_formats,
    triton_attention,
)
from kvist.cache import Batch, KVCache
from kvist.cache.block_pool import BlockPool
from kvist.cache.codecs.rotation import rotate
from kvist.cache.paged_view import GroupView, PagedBinding, PagedKV
from kvist.cache.protocol import KV
from kvist.errors import NotSupported
from kvist.kernels import can_launch_early, can_run, can_run_fp8
from kvist.kernels.fp8 import Fp8Weight, Weight
from kvist.models.decoder import Block, Decoder, GatedMLP, RMSNorm
from kvist.models.fp8 import Fp8Linear
from kvist.models.rope import rope_frequencies
from kvist.runner.step import StepFunction, model_step

if TYPE_CHECKING:
    from kvist.kernels.elementwise import Target

Rotation = tuple[Tensor, Tensor]  # cos and sin, each [N, head_dim / 2] float32


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights as the kernels want them."""

    input_norm: Tensor
    qkv: Weight  # [(heads + 2 kv_heads) * head_dim, hidden]
    head_norms: tuple[Tensor, Tensor] | None  # q's and k's, each [head_dim]
    o: Weight
    mlp_norm: Tensor
    gate_up: Weight  # [2 * intermediate, hidden]
    down: Weight


@dataclass(frozen=True)
class LayerPlanes:
    """One layer's planes as the kernels know them; None for what they do not."""

    pool: BlockPool
    formats: tuple[Format, Format] | None
    encoding: Encoding | None
    targets: "tuple[Target, Target] | None"

    @classmethod
    def of(cls, pool: BlockPool, layer_idx: int, head_dim: int) -> "LayerPlanes":
        """Read them once: they stay what they are as long as the pool."""
        formats = read_formats(pool.planes[layer_idx], pool.group.spec)
        encoding = formats and read_encoding(pool.codec, layer_idx, head_dim)
        if not (formats and encoding):
            return cls(pool, formats, None, None)
        return cls(pool, formats, encoding, (_target(formats[0]), _target(formats[1])))


def _layer_weights(block: Block) -> LayerWeights:
    attention, mlp = block.self_attn, block.mlp
    assert isinstance(mlp, GatedMLP)
    norms = None
    if isinstance(attention.q_norm, RMSNorm) and isinstance(attention.k_norm, RMSNorm):
        norms = (attention.q_norm.weight.data, attention.k_norm.weight.data)
    return LayerWeights(
        block.input_layernorm.weight.data,
        _joined(attention.q_proj, attention.k_proj, attention.v_proj),
        norms,
        _joined(attention.o_proj),
        block.post_attention_layernorm.weight.data,
        _joined(mlp.gate_proj, mlp.up_proj),
        _joined(mlp.down_proj),
    )


def _joined(*linears: nn.Linear) -> Weight:
    """Weights as one matrix, of which each layer's becomes a part: no memory is taken twice."""
    values = _joined_values(*linears)
    if not isinstance(linears[0], Fp8Linear):
        return values
    scales = [linear.scale for linear in linears if isinstance(linear, Fp8Linear)]
    return Fp8Weight(values, torch.cat(scales), linears[0].rounds_activations)


def _joined_values(*linears: nn.Linear) -> Tensor:
    weights = [linear.weight.data for linear in linears]
    rows, first = sum(len(w) for w in weights), weights[0]
    ends = [w.data_ptr() + w.nbytes for w in weights]
    one = first.untyped_storage().data_ptr()
    if all(w.untyped_storage().data_ptr() == one for w in weights) and all(
        end == w.data_ptr() for end, w in zip(ends, weights[1:], strict=False)
    ):
        return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))
    # As bytes where there are 8 bits, which not every version of torch joins as numbers.
    bits = [w.view(torch.uint8) if w.element_size() == 1 else w for w in weights]
    whole = torch.cat(bits).view(first.dtype)
    for linear, part in zip(linears, whole.split([len(w) for w in weights]), strict=True):
        linear.weight.data = part
    return whole


class FusedStep:
    """A decoder's forward over a paged cache; any other batch goes through the model itself.

    The q, k and v projections of a layer, and gate and up, are brought together in memory, so that
    each triple or pair can be read as one matrix; the model's own layers then read their parts.

    Args:
        lm: a dense decoder without biases (Llama, Qwen3), on a device that runs kernels.
        dependent: start each kernel of a decode step before the one before has ended
            (programmatic dependent launch, from compute capability 9.0 on); None: where it was
            measured to help, in steps of one token.
    """

    def __init__(self, lm: Decoder, *, dependent: bool | None = None) -> None:
        """Bring together what is read together."""
        config = lm.config
        blocks = [block for block in lm.model.layers if isinstance(block, Block)]
        dense = all(isinstance(block.mlp, GatedMLP) for block in blocks)
        if config.attention_bias or config.output_bias or config.mlp_bias or not dense:
            raise NotSupported("fused kernels run dense decoders without biases; use the model's")
        device = lm.lm_head.weight.device
        if not can_run(device) or config.head_dim % 2:
            raise NotSupported(f"fused kernels do not run on {device}; use the model's own step")
        if isinstance(blocks[0].self_attn.q_proj, Fp8Linear) and not can_run_fp8(device):
            raise NotSupported(f"{device} has no fp8 (it came with 8.9); use the model's own step")
        self.lm, self.config = lm, config
        # Of one row, of a few rows.
        self.dependent = (
            (can_launch_early(device), False) if dependent is None else (dependent,) * 2
        )
        self.layers = [_layer_weights(block) for block in blocks]
        self.fallback: StepFunction = model_step(lm)
        self._layer_planes: dict[int, LayerPlanes] = {}
        self.frequencies = rope_frequencies(config.rope).to(device)

    def __call__(self, batch: Batch, cache: KVCache) -> Tensor:
        """See `StepFunction`."""
        return self.raw(batch, cache).float()

    def variant(self, rows: int, context: int) -> str:
        """What computes a decode step of `rows` sequences of up to `context` keys each.

        A recording of one variant does not serve another.
        """
        return "fused"

    def limits(self, rows: int) -> tuple[int, ...]:
        """Contexts behind which something else computes a decode step of `rows` sequences."""
        return ()

    def raw(self, batch: Batch, cache: KVCache) -> Tensor:
        """The logits as the last product leaves them, for who reads any dtype."""
        positions = batch.positions if batch.rope_positions is None else batch.rope_positions
        if not isinstance(cache, PagedBinding) or positions.dim() != 1 or not batch.num_tokens:
            return self.fallback(batch, cache)
        given = batch.embeddings
        embeddings = self.lm.embed(batch.token_ids) if given is None else given
        angles = positions[:, None] * self.frequencies
        factor = self.config.rope.attention_factor
        rotation = angles.cos(), angles.sin()
        if factor != 1.0:
            rotation = rotation[0] * factor, rotation[1] * factor
        if batch.num_tokens == 1:
            return self._one_row(embeddings, rotation, cache, batch)
        return self._rows(embeddings, rotation, cache, batch)

    def rehearse(self, batch: Batch, cache: KVCache) -> Tensor:
        """What a step of this batch starts, in the first layer and one that is the last."""
        layers, self.layers = self.layers, self.layers[:2]
        try:
            return FusedStep.raw(self, batch, cache)
        finally:
            self.layers = layers

    def _one_row(
        self, embeddings: Tensor, rotation: Rotation, cache: PagedBinding, batch: Batch
    ) -> Tensor:
        """Matrix-vector products; the norms are their prologues, the residual sums epilogues."""
        from kvist.kernels.linear import gemv
        from kvist.runner.tuning import gemv_tuning

        config, eps, dependent = self.config, self.config.rms_norm_eps, self.dependent[0]
        x = embeddings.float()
        like: dict[str, Any] = {"dtype": embeddings.dtype, "device": x.device}
        normed: dict[str, Any] = {"eps": eps, "dependent": dependent}
        act = torch.empty(1, config.intermediate_size, **like)
        for i, layer in enumerate(self.layers):
            qkv = torch.empty(1, layer.qkv.shape[0], **like)
            tuning = gemv_tuning(layer.qkv)
            gemv(x, layer.qkv, qkv, norm=layer.input_norm, tuning=tuning, **normed)
            out = self._attention(i, qkv, rotation, cache, dependent)
            tuning = gemv_tuning(layer.o)
            gemv(out, layer.o, x, epilogue="add", tuning=tuning, dependent=dependent)
            tuning = gemv_tuning(layer.gate_up, matrices=2)
            norm = layer.mlp_norm
            gemv(x, layer.gate_up, act, norm=norm, epilogue="silu", tuning=tuning, **normed)
            tuning = gemv_tuning(layer.down)
            gemv(act, layer.down, x, epilogue="add", tuning=tuning, dependent=dependent)
        rows, head = batch.logit_rows.shape[0], self.lm.lm_head.weight
        logits = torch.empty(rows, config.vocab_size, dtype=torch.float32, device=x.device)
        if rows:
            norm = self.lm.model.norm.weight
            gemv(x, head, logits, norm=norm, tuning=gemv_tuning(head), **normed)
        return logits

    def _rows(
        self, embeddings: Tensor, rotation: Rotation, cache: PagedBinding, batch: Batch
    ) -> Tensor:
        """Matrix products; what each adds to the residual stream is added by the next norm."""
        from kvist.kernels.elementwise import rms_norm, silu_mul
        from kvist.kernels.linear import gemm, many_rows, most_rows
        from kvist.runner.tuning import gemm_tuning

        config, eps = self.config, self.config.rms_norm_eps
        few = embeddings.shape[0] <= most_rows(self.layers[0].qkv, embeddings.dtype)
        dependent = self.dependent[1] and few
        dtype, device = embeddings.dtype, embeddings.device

        def product(y: Tensor, w: Weight, *, residual: bool = False) -> Tensor:
            """`[rows, N]`; of a residual's few rows `[parts, rows, N]` float32."""
            if len(y) > most_rows(w, dtype, fused=residual):
                return many_rows(y, w)
            tuning = gemm_tuning(w, len(y), residual=residual)
            shape = (y.shape[0], w.shape[0])
            out = (
                torch.empty(tuning.splits, *shape, dtype=torch.float32, device=device)
                if residual
                else torch.empty(shape, dtype=dtype, device=device)
            )
            gemm(y, w, out, tuning=tuning, dependent=dependent)
            return out

        x = embeddings.to(torch.float32, copy=True)
        y = torch.empty_like(embeddings)
        delta: Tensor | None = None
        rows = batch.logit_rows
        # Behind the last layer's keys and values nobody reads rows without logits.
        fewer = len(rows) < batch.num_tokens
        for i, layer in enumerate(self.layers):
            rms_norm(x, layer.input_norm, eps, y, delta, dependent=dependent)
            ends = fewer and i == len(self.layers) - 1
            qkv = product(y, layer.qkv)
            out = self._attention(
                i, qkv, rotation, cache, dependent, lasts=ends and batch.lasts_only
            )
            if ends:
                x, y = x.index_select(0, rows), y[: len(rows)]
                out = out if len(out) == len(rows) else out.index_select(0, rows)
                if not len(rows):
                    return torch.empty(0, config.vocab_size, dtype=dtype, device=device)
            delta = product(out, layer.o, residual=True)
            rms_norm(x, layer.mlp_norm, eps, y, delta, dependent=dependent)
            if len(y) <= most_rows(layer.gate_up, dtype, fused=True):
                act = torch.empty(y.shape[0], config.intermediate_size, dtype=dtype, device=device)
                tuning = gemm_tuning(layer.gate_up, len(y), residual=False)
                gemm(y, layer.gate_up, act, silu=True, tuning=tuning, dependent=dependent)
            else:
                act = silu_mul(many_rows(y, layer.gate_up))
            delta = product(act, layer.down, residual=True)
        assert delta is not None
        if not fewer and not (batch.lasts_only and batch.query_lens == (1,) * len(rows)):
            # Not every row in its place.
            x, delta = x.index_select(0, rows), delta.index_select(-2, rows)
        hidden = torch.empty(len(rows), config.hidden_size, dtype=dtype, device=device)
        if len(rows):
            rms_norm(x, self.lm.model.norm.weight, eps, hidden, delta)
        return F.linear(hidden, self.lm.lm_head.weight)

    def _attention(
        self,
        layer_idx: int,
        qkv: Tensor,
        rotation: Rotation,
        cache: PagedBinding,
        dependent: bool,
        *,
        lasts: bool = False,
    ) -> Tensor:
        """Normalise, rotate, write, attend: `[N, heads * head_dim]`.

        With `lasts` only each sequence's last row is asked for: `[B, heads * head_dim]`, or all.
        """
        from kvist.kernels.elementwise import Target, rotate_and_write

        config, layer = self.config, self.layers[layer_idx]
        count = qkv.shape[0]
        like: dict[str, Any] = {"dtype": qkv.dtype, "device": qkv.device}
        q = torch.empty(count, config.num_heads, config.head_dim, **like)
        view = _view_of(cache, layer_idx)
        planes = self._layer_planes.get(layer_idx)
        if planes is None or planes.pool is not view.pool:
            planes = LayerPlanes.of(view.pool, layer_idx, config.head_dim)
            self._layer_planes[layer_idx] = planes
        encoding = planes.encoding
        if planes.targets:
            keys, values = planes.targets
        else:
            room = torch.empty(2, count, config.num_kv_heads, config.head_dim, **like)
            keys, values = Target(room[0]), Target(room[1])
        rotate_and_write(
            qkv,
            layer.head_norms,
            config.rms_norm_eps,
            rotation,
            q,
            keys,
            values,
            view.slot_mapping if encoding else None,
            mean=encoding.mean if encoding else None,
            dependent=dependent,
        )
        if encoding:
            cache.written.add(layer_idx)
            kv: KV = PagedKV(cache, view, layer_idx)
        else:
            kv = cache.update(keys.values, values.values, layer_idx)
        scale = config.head_dim**-0.5
        # In the interpreter only where asked for by name, since that is slow.
        asked = kv.backend == NAME or (kv.backend is None and q.device.type == "cuda")
        if asked and planes.formats and isinstance(kv, PagedKV):
            if lasts:
                q = q.index_select(0, cache.batch.logit_rows)
                kv = PagedKV(cache.last_tokens(), view, layer_idx)
            attended = triton_attention(
                q, kv, scale, dependent=dependent, encoding=encoding, formats=planes.formats
            )
            return attended.flatten(1)
        if encoding and encoding.keys_rotated:
            q = rotate(q)
        return attend(q, kv, scale=scale).flatten(1)


def _target(planes: Format) -> "Target":
    """Where one side of a layer is written, by token place."""
    from kvist.kernels.elementwise import Target

    return Target(
        planes.values.flatten(0, 1),
        planes.kind,
        None if planes.scales is None else planes.scales.flatten(0, 1),
        None if planes.zeros is None else planes.zeros.flatten(0, 1),
    )


def _view_of(cache: PagedBinding, layer_idx: int) -> GroupView:
    """The group that a layer belongs to."""
    return next(view for view in cache.views if layer_idx in view.pool.group.layers)
