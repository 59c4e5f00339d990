"""Matrices in fp8 (e4m3) with a scale for each row: made, read back, and multiplied by torch.

The rows of a projection's weights are its output channels; the rows of activations are tokens. This
is the reference for the kernels, and what runs where they do not. Imports no Triton.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3


@dataclass(frozen=True)
class Fp8Weight:
    """A projection's weights in 8 bits.

    Args:
        values: `[N, K]` float8_e4m3fn.
        scale: `[N]` float32; row n is `values[n] * scale[n]`.
        rounds_activations: whether activations are rounded to fp8 too, each token by its own scale,
            where a product has many rows.
    """

    values: Tensor
    scale: Tensor
    rounds_activations: bool = False

    @property
    def shape(self) -> torch.Size:
        """`[N, K]`, as of any other weights."""
        return self.values.shape

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """`[N, K]` in a wider type."""
        return dequantize(self.values, self.scale, dtype)


Weight = Tensor | Fp8Weight


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """`[rows, K]` of any floating-point type -> values `[rows, K]` fp8, scales `[rows]` float32.

    A row's largest magnitude becomes the largest that fp8 has.
    """
    wide = x.float()
    # Divided by a tensor: by a plain number, torch multiplies by its reciprocal on a GPU.
    scale = wide.abs().amax(-1) / torch.full((), LARGEST, device=x.device)
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    return (wide / scale[:, None]).clamp(-LARGEST, LARGEST).to(FP8), scale


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`[rows, K]` fp8 and scales `[rows]` float32 -> `[rows, K]`."""
    return (values.float() * scale[:, None]).to(dtype)


def linear(x: Tensor, w: Weight) -> Tensor:
    """`[rows, K]` and weights `[N, K]` -> `[rows, N]`, in x's type."""
    if isinstance(w, Tensor):
        return F.linear(x, w)
    if w.rounds_activations:
        x = dequantize(*quantize(x), x.dtype)
    if x.dtype == torch.float16:  # sums of unscaled products may be too large for it
        return F.linear(x, w.dequantize(x.dtype))
    # Every number of fp8 is one of the wider types: only the result needs the scales.
    return (F.linear(x, w.values.to(x.dtype)) * w.scale).to(x.dtype)
