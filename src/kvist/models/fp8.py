"""Projections whose weights are kept in fp8: half of bfloat16's bytes, for a little of quality.

Put into a decoder after it is built and before its weights are read (`kvist.load(weights="fp8")`),
which the loader then quantises one by one; no model file knows of it. Embedding, norms, head and
routers stay as they are. Fused kernels multiply by the same numbers (kernels/fp8.py).
"""

import torch
from torch import Tensor, nn

from kvist.errors import ConfigError
from kvist.kernels.fp8 import Fp8Weight, linear, quantize
from kvist.models.decoder import Decoder

WEIGHTS = ("auto", "fp8", "fp8-dynamic")
"""auto: as the checkpoint has them; fp8-dynamic rounds activations, too, token by token."""


class Fp8Linear(nn.Linear):
    """A linear layer with a scale for each output channel.

    Args:
        like: the layer that it takes the place of, on the meta device.
        rounds_activations: see `Fp8Weight`.
    """

    scale: Tensor

    def __init__(self, like: nn.Linear, *, rounds_activations: bool = False) -> None:
        """Take the place of a layer; `take` gives it its weights."""
        # Not drawn at random first, which would take minutes of a large model.
        with_bias = like.bias is not None
        super().__init__(like.in_features, like.out_features, bias=with_bias, device="meta")
        self.weight, self.bias = like.weight, like.bias
        self.rounds_activations = rounds_activations
        scale = torch.ones(like.out_features, device=like.weight.device)
        self.register_buffer("scale", scale, persistent=False)

    def take(self, weight: Tensor) -> None:
        """Quantise these weights, `[N, K]`, and keep them."""
        values, self.scale = quantize(weight)
        self.weight = nn.Parameter(values, requires_grad=False)

    @property
    def nbytes(self) -> int:
        """Of weights and scales, read or not."""
        return self.weight.numel() + self.scale.nbytes

    @property
    def matrix(self) -> Fp8Weight:
        """The weights as kernels take them."""
        return Fp8Weight(self.weight.data, self.scale, self.rounds_activations)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, in]` -> `[N, out]`."""
        y = linear(x, self.matrix)
        return y if self.bias is None else y + self.bias


def check_weights(weights: str) -> None:
    """Raise ConfigError where there are no weights of this name."""
    if weights not in WEIGHTS:
        raise ConfigError(f"no weights {weights!r}; there are: {', '.join(WEIGHTS)}")


def use_fp8(lm: Decoder, weights: str) -> None:
    """Let a decoder without weights keep its projections in fp8.

    Args:
        lm: built under `torch.device("meta")`.
        weights: a name in `WEIGHTS`.
    """
    if weights == "auto":
        return
    projections = {name.removeprefix("*.") for name in lm.tensor_parallel_plan}
    for module in list(lm.model.layers.modules()):
        for name, child in list(module.named_children()):
            if name in projections and isinstance(child, nn.Linear):
                rounding = weights == "fp8-dynamic"
                setattr(module, name, Fp8Linear(child, rounds_activations=rounding))
