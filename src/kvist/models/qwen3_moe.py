"""Qwen3 with a mixture of experts: a router sends each token to a few of many small MLPs.

All else is Qwen3. Tokens are grouped by expert, so that the cost follows the experts that were
chosen, and each expert's weights are read once a step.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvist.errors import ConfigError
from kvist.models.config import DecoderConfig, positive, read_decoder
from kvist.models.decoder import Decoder, GatedMLP


@dataclass(frozen=True)
class MoeConfig(DecoderConfig):
    """A decoder some of whose layers have experts instead of one MLP.

    Args:
        num_experts: experts of a layer.
        experts_per_token: how many of them a token visits.
        expert_size: intermediate size of an expert.
        normalise: whether the chosen experts' weights are scaled to sum to one.
        sparse_layers: for each layer, whether it has experts.
    """

    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    normalise: bool = False
    sparse_layers: tuple[bool, ...] = ()


def read_qwen3_moe(config: Mapping[str, Any]) -> MoeConfig:
    """config.json of a `qwen3_moe` model; raises ConfigError or NotSupported."""
    # Unlike the dense family it has no head_dim of its own, and a window is every layer's.
    shared = read_decoder(config, qk_norm=True, rope_theta=1e6)
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    experts = positive(config, "num_experts", config.get("num_local_experts"))
    per_token = positive(config, "num_experts_per_tok")
    if per_token > experts:
        raise ConfigError(f"num_experts_per_tok {per_token} is more than num_experts {experts}")
    step, dense = positive(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    layers = range(shared.num_layers)
    windowed = replace(shared, windows=tuple(window for _ in layers))
    fields = asdict(windowed) | {"rope": shared.rope}
    return MoeConfig(
        **fields,
        num_experts=experts,
        experts_per_token=per_token,
        expert_size=positive(config, "moe_intermediate_size"),
        normalise=bool(config.get("norm_topk_prob", False)),
        sparse_layers=tuple(i not in dense and (i + 1) % step == 0 for i in layers),
    )


class SparseMLP(nn.Module):
    """A router and its experts (Shazeer et al., 2017)."""

    def __init__(self, config: MoeConfig) -> None:
        """One gate, `num_experts` gated MLPs."""
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            GatedMLP(config.hidden_size, config.expert_size) for _ in range(config.num_experts)
        )
        self.experts_per_token = config.experts_per_token
        self.normalise = config.normalise

    def forward(self, x: Tensor) -> Tensor:
        """`[N, hidden]` -> `[N, hidden]`."""
        probabilities = torch.softmax(self.gate(x), dim=-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self.experts_per_token, dim=-1)  # [N, k]
        if self.normalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = weights.to(x.dtype)
        # The N * k visits, sorted by expert: those of expert e are [starts[e], starts[e + 1]).
        visits = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        tokens = visits // self.experts_per_token
        factors = weights.flatten()[visits, None]
        out = torch.zeros_like(x)
        for expert, rows, scale in zip(
            self.experts, tokens.split(counts), factors.split(counts), strict=True
        ):
            if len(rows):
                out.index_add_(0, rows, expert(x[rows]) * scale)
        return out


class Qwen3MoeForCausalLM(Decoder):
    """Qwen3-MoE (Yang et al., 2025)."""

    def __init__(self, config: MoeConfig) -> None:
        """Experts where the configuration says so, a dense MLP elsewhere."""

        def make_mlp(layer_idx: int) -> nn.Module:
            if config.sparse_layers[layer_idx]:
                return SparseMLP(config)
            return GatedMLP(config.hidden_size, config.intermediate_size)

        super().__init__(config, make_mlp)
