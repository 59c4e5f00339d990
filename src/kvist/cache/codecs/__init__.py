"""Codecs: how a token's keys and values are written.

`plain` writes them as they are; the others in few bits, at a measured cost (`kvist quality`). A
codec knows nothing of where planes lie or which tokens stay. A new one is a file of its own and a
line in `CODECS` (docs/recipes/codec.md); the contract suite then tests it on every layout.
"""

from kvist.cache.codecs.calibration import Calibration, calibrate
from kvist.cache.codecs.layered import Layered
from kvist.cache.codecs.plain import Plain
from kvist.cache.codecs.quantized import Coder, Quantized
from kvist.cache.codecs.registry import CODECS, make_codec

__all__ = [
    "CODECS",
    "Calibration",
    "Coder",
    "Layered",
    "Plain",
    "Quantized",
    "calibrate",
    "make_codec",
]
