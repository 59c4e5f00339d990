"""The compiled library, bound by ctypes: where it lies, its structures and functions, its absence.

Nothing here computes, and nothing here knows a model; `weights` and `executor` call it. The library
is compiled when kvist is installed, and kvist does without it where there was no compiler.
"""

import ctypes
import os
from functools import cache
from pathlib import Path

from kvist.errors import ConfigError, NotSupported

__all__ = ["LayerInput", "PlaneInput", "Shape", "StepInput", "library", "missing"]

LIBRARY = Path(__file__).with_name("_kvist.so")
INTERFACE = 5  # kvist_interface() of the library that these declarations are of

_pointer = ctypes.c_void_p
_int = ctypes.c_int32
_long = ctypes.c_int64


class Shape(ctypes.Structure):
    """`kvist::Shape`: the sizes of a decoder."""

    _fields_ = (
        ("layers", _int),
        ("hidden", _int),
        ("intermediate", _int),
        ("heads", _int),
        ("kv_heads", _int),
        ("head_dim", _int),
        ("vocab", _int),
        ("qk_norm", _int),
        ("norm_eps", ctypes.c_float),
        ("rotation_scale", ctypes.c_float),
    )


class PlaneInput(ctypes.Structure):
    """`kvist::PlaneInput`: one side of one layer's cache, by address."""

    _fields_ = (
        ("x", _pointer),
        ("scale", _pointer),
        ("zero", _pointer),
        ("centre", _pointer),
        ("strides", _long * 3),
        ("scale_strides", _long * 3),
        ("element", _int),
        ("group", _int),
    )


class LayerInput(ctypes.Structure):
    """`kvist::LayerInput`: one layer's cache and where its tokens lie."""

    _fields_ = (
        ("key", PlaneInput),
        ("value", PlaneInput),
        ("table", _pointer),
        ("table_width", _long),
        ("block_size", _int),
        ("window", _int),
        ("sinks", _int),
        ("ring", _int),
    )


class StepInput(ctypes.Structure):
    """`kvist::StepInput`: one step's tokens and the cache, by address."""

    _fields_ = (
        ("tokens", _int),
        ("sequences", _int),
        ("logit_count", _int),
        ("unused", _int),
        ("token_ids", _pointer),
        ("embeddings", _pointer),
        ("rotations", _pointer),
        ("query_starts", _pointer),
        ("kv_lens", _pointer),
        ("logit_rows", _pointer),
        ("layers", _pointer),
        ("logits", _pointer),
        ("largest", _pointer),
    )


_FUNCTIONS: dict[str, tuple[object, tuple[object, ...]]] = {
    "kvist_interface": (_int, ()),
    "kvist_best_isa": (ctypes.c_char_p, ()),
    "kvist_model_new": (_pointer, (ctypes.POINTER(Shape), ctypes.c_char_p, _int, _pointer, _int)),
    "kvist_model_free": (None, (_pointer,)),
    "kvist_model_isa": (ctypes.c_char_p, (_pointer,)),
    "kvist_model_lay_out": (_int, (_pointer, _pointer, _int)),
    "kvist_model_pack": (None, (_pointer, _int, _int, _int, _pointer, _int)),
    "kvist_model_vector": (None, (_pointer, _int, _int, _pointer, _int)),
    "kvist_model_embedding": (None, (_pointer, _int, _pointer)),
    "kvist_model_screen": (_int, (_pointer,)),
    "kvist_step": (_int, (_pointer, ctypes.POINTER(StepInput))),
    "kvist_forget_pages": (None, (_pointer, _long)),
    "kvist_argmax": (_long, (_pointer, _long)),
    "kvist_test_pool": (None, (_int, _int, _pointer)),
    "kvist_test_screen": (_int, (ctypes.c_char_p, _pointer, *(_int,) * 3, *(_pointer,) * 4)),
    "kvist_test_linear": (_int, (ctypes.c_char_p, _int, _pointer, *(_int,) * 3, *(_pointer,) * 2)),
}


@cache
def missing() -> str | None:
    """Why the compiled library cannot be used here, in one line; None where it can."""
    if os.environ.get("KVIST_NATIVE") == "0":
        return "KVIST_NATIVE=0 turns the compiled library off"
    if not LIBRARY.exists():
        return (
            f"no {LIBRARY.name} beside {LIBRARY.parent}: kvist was installed where there was no "
            "C++ compiler; install one (g++ or clang++) and install kvist again"
        )
    try:
        found = ctypes.CDLL(str(LIBRARY)).kvist_interface()
    except (OSError, AttributeError) as error:
        return f"{LIBRARY} cannot be loaded ({error}); install kvist again"
    if found != INTERFACE:
        return f"{LIBRARY} has interface {found}, not {INTERFACE}; install kvist again"
    return None


@cache
def library() -> ctypes.CDLL:
    """The library, its functions declared.

    Raises:
        NotSupported: it is not there, or not of this version.
    """
    if reason := missing():
        raise NotSupported(reason)
    loaded = ctypes.CDLL(str(LIBRARY))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def isa_bytes(isa: str | None) -> bytes:
    """An instruction set's name for the library; None lets it choose the best one here."""
    if isa not in (None, "portable", "avx2", "avx512", "amx"):
        raise ConfigError(f"no instruction set {isa!r}; there are: portable, avx2, avx512, amx")
    return (isa or "").encode()
