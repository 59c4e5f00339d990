"""The decoder-only transformer that Llama, SmolLM2 and Qwen3 share, from top to bottom.

Read it like the figure in the paper: norm, attention, norm, MLP, and around them the embedding and
the head. Tokens are packed: `[N, hidden]`, those of all sequences one behind the other, no padding.
A model knows of caching only `cache.update`, and of attention only `attend`.
"""

from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvist.attention import attend
from kvist.cache.protocol import KVCache
from kvist.core.spec import LayerSpec
from kvist.models.config import DecoderConfig
from kvist.models.rope import RotaryEmbedding, Rotation, rotate


class CausalLM(Protocol):
    """What the loop, the runner and the reports ask of a language model."""

    config: DecoderConfig
    specs: tuple[LayerSpec, ...]

    def embed(self, token_ids: Tensor) -> Tensor:
        """`[N]` -> `[N, hidden]`."""

    def forward(self, embeddings: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """`[N, hidden]` -> `[N, hidden]`.

        Args:
            embeddings: tokens' embeddings, or an image's, or both.
            positions: for rotation, `[N]` (or `[axes, N]`); masks follow the cache's batch.
            cache: bound to this step.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """`[R, hidden]`, the rows that the caller picked -> `[R, vocab]` float32."""


class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang & Sennrich, 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        """Normalise the last dimension of this size."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`[..., size]` -> `[..., size]`."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, over whatever the cache shows."""

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        """Projections of one layer; q and k are normalised per head where the family does so."""
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        hidden, q_size = config.hidden_size, config.num_heads * config.head_dim
        kv_size, bias = config.num_kv_heads * config.head_dim, config.attention_bias
        self.q_proj = nn.Linear(hidden, q_size, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_size, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, hidden, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm: nn.Module = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm: nn.Module = RMSNorm(config.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x: Tensor, rotation: Rotation, cache: KVCache) -> Tensor:
        """`[N, hidden]` -> `[N, hidden]`."""
        per_head = (-1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).unflatten(-1, per_head)), rotation)
        k = rotate(self.k_norm(self.k_proj(x).unflatten(-1, per_head)), rotation)
        v = self.v_proj(x).unflatten(-1, per_head)
        kv = cache.update(k, v, self.layer_idx)
        out = attend(q, kv, scale=self.scale)
        return self.o_proj(out.flatten(-2))  # type: ignore[no-any-return]


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer, 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, intermediate: int, *, bias: bool = False) -> None:
        """Three projections."""
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.up_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.down_proj = nn.Linear(intermediate, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, hidden]` -> `[N, hidden]`."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer: norm, attention, norm, MLP, with the residual stream around each."""

    def __init__(self, config: DecoderConfig, layer_idx: int, mlp: nn.Module) -> None:
        """Give the layer its place, which is its key in the cache."""
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp

    def forward(self, x: Tensor, rotation: Rotation, cache: KVCache) -> Tensor:
        """`[N, hidden]` -> `[N, hidden]`."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, cache)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Embedding, blocks and the last norm; named as in the hub's checkpoints."""

    def __init__(self, config: DecoderConfig, make_mlp: Callable[[int], nn.Module]) -> None:
        """`make_mlp(layer_idx)` gives each layer its MLP (dense, or a mixture of experts)."""
        super().__init__()
        # From an empty tensor: to draw random numbers for one on the meta device, torch imports
        # its compiler, which takes longer than to load a small model.
        empty = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(empty, freeze=False)
        self.layers = nn.ModuleList(Block(config, i, make_mlp(i)) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config.rope)

    def forward(self, x: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """`[N, hidden]` -> `[N, hidden]`."""
        rotation = self.rotary(positions, x.dtype)
        for layer in self.layers:
            x = layer(x, rotation, cache)
        return self.norm(x)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """A causal language model: the transformer and its head. Implements `CausalLM`."""

    # How to split the projections over ranks, applied after construction; no rank in the model.
    tensor_parallel_plan: ClassVar[dict[str, str]] = {
        "*.q_proj": "colwise",
        "*.k_proj": "colwise",
        "*.v_proj": "colwise",
        "*.o_proj": "rowwise",
        "*.gate_proj": "colwise",
        "*.up_proj": "colwise",
        "*.down_proj": "rowwise",
    }

    def __init__(
        self, config: DecoderConfig, make_mlp: Callable[[int], nn.Module] | None = None
    ) -> None:
        """Build the modules; weights are the loader's business."""
        super().__init__()

        def dense_mlp(layer_idx: int) -> nn.Module:
            return GatedMLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

        self.config = config
        self.specs: tuple[LayerSpec, ...] = config.specs
        self.model = Transformer(config, make_mlp or dense_mlp)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def embed(self, token_ids: Tensor) -> Tensor:
        """`[N]` -> `[N, hidden]`."""
        return self.model.embed_tokens(token_ids)  # type: ignore[no-any-return]

    def forward(self, embeddings: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """`[N, hidden]` -> `[N, hidden]`; see `CausalLM.forward`."""
        return self.model(embeddings, positions, cache)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """`[R, hidden]` -> `[R, vocab]` float32."""
        return self.lm_head(hidden).float()  # type: ignore[no-any-return]
