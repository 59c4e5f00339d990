"""Which codecs there are, and what each is made of.

Measured on SmolLM2-135M, docs/quality.md: perplexity and divergence of each beside its bits.
"""

from collections.abc import Callable

import torch

from kvist.cache.codecs.calibration import Calibration
from kvist.cache.codecs.fp8 import FP8
from kvist.cache.codecs.int4 import Int4
from kvist.cache.codecs.int8 import Int8
from kvist.cache.codecs.layered import parse_layers
from kvist.cache.codecs.plain import Plain
from kvist.cache.codecs.quantized import Quantized
from kvist.cache.protocol import Codec
from kvist.errors import CacheError

Calibrate = Callable[[], Calibration | None]
"""Gives the mean of a model's keys; called only by codecs that take it away from them."""


def _uncalibrated() -> None:
    return None


CODECS: dict[str, Callable[[torch.dtype, torch.dtype | None, Calibrate], Codec]] = {
    "plain": lambda dtype, stored, calibrate: Plain(dtype, stored),
    "int8": lambda dtype, stored, calibrate: Quantized("int8", Int8(), Int8(), dtype),
    "fp8": lambda dtype, stored, calibrate: Quantized("fp8", FP8(), FP8(), dtype),
    # Keys decide where attention looks, and need the bits more than values do.
    "k8v4": lambda dtype, stored, calibrate: Quantized("k8v4", Int8(), Int4(), dtype),
    "int4": lambda dtype, stored, calibrate: Quantized("int4", Int4(), Int4(), dtype, calibrate()),
}


def make_codec(
    name: str,
    dtype: torch.dtype,
    calibrate: Calibrate = _uncalibrated,
    *,
    stored: torch.dtype | None = None,
) -> Codec:
    """The codec of this name for a model that computes in `dtype`.

    Args:
        name: one of `CODECS`, or one with others for some layers: `int4,0-1=int8`.
        dtype: in which it decodes.
        calibrate: gives the mean of the model's keys (`Model.calibration`). Without it int4 takes
            the mean as zero: right, but with more error; planes and bytes are the same.
        stored: in which `plain` keeps keys and values, None for `dtype`; see `Plain`.

    Raises:
        CacheError: no codec of this name.
    """
    if "," in name:
        return parse_layers(name, lambda part: make_codec(part, dtype, calibrate, stored=stored))
    if name not in CODECS:
        raise CacheError(f"no codec named {name!r}; there are: {', '.join(CODECS)}")
    return CODECS[name](dtype, stored, calibrate)
