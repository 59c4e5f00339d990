"""The library of `one_launch.cu`, bound by ctypes: shapes that it fits, its structures, its calls.

Addresses in, an error code out; nothing of torch crosses the border, and nothing here knows a
model. Called by `kvist.runner.one_launch`.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

from kvist.errors import KvistError, NotSupported

SOURCE = "one_launch.cu"
ABSENT = -1  # all bits set: no number that is computed
INTERFACE = 1  # kvist_one_launch_interface() of the library that these declarations are of
# Polls of memory, each about a microsecond, until a block that waits gives up: seconds, not hours.
SPIN_LIMIT = 1 << 22
MOST_LAYERS = 64
LONGEST = 8192  # positions

_pointer = ctypes.c_void_p


class Layer(ctypes.Structure):
    """`kvist::Layer`: one layer's weights and cache planes, by address."""

    _fields_ = tuple(
        (name, _pointer)
        for name in (
            "input_norm",
            "qkv",
            "q_norm",
            "k_norm",
            "out",
            "mlp_norm",
            "gate_up",
            "down",
            "keys",
            "values",
        )
    )


class Step(ctypes.Structure):
    """`kvist::Step`: a step's weights, inputs and outputs, by address on the GPU."""

    _fields_ = (
        *(
            (name, _pointer)
            for name in (
                "embedding",
                "norm",
                "head",
                "token",
                "position",
                "place",
                "length",
                "table",
                "frequencies",
                "logits",
                "exchange",
                "epoch",
            )
        ),
        ("num_layers", ctypes.c_int32),
        ("vocab", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("spin_limit", ctypes.c_uint32),
        ("eps", ctypes.c_float),
        ("rotation_scale", ctypes.c_float),
        ("layers", Layer * MOST_LAYERS),
    )


@dataclass(frozen=True)
class Shape:
    """What the kernel is compiled for, and how its blocks are arranged.

    Args:
        hidden: channels of the residual stream.
        heads: query heads.
        kv_heads: key heads, of `head_dim` channels each; each has a team of blocks.
        intermediate: of the MLP.
        qk_norm: whether q and k are normalised per head.
        members: blocks of a team, one on each multiprocessor.
        warps: of a block that compute.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    qk_norm: bool
    members: int = 16
    warps: int = 16

    @property
    def blocks(self) -> int:
        """Of the grid, all there at once, each on a multiprocessor of its own."""
        return self.kv_heads * self.members

    def refusal(self) -> str | None:
        """Why the kernel does not fit this shape, in one line; None where it does."""
        blocks, share = self.blocks, 32 * max(self.members, self.warps)
        if self.head_dim != 128:
            return f"head_dim is {self.head_dim}, not 128"
        if self.kv_heads != 8:
            return f"{self.kv_heads} key heads, not 8"
        if self.heads % self.kv_heads or self.heads > 4 * self.kv_heads:
            return f"{self.heads} query heads, not 8, 16, 24 or 32"
        if self.hidden % share:
            return f"hidden_size {self.hidden} is not a multiple of {share}"
        if self.intermediate % blocks:
            return f"intermediate_size {self.intermediate} is not a multiple of {blocks}"
        return None

    def defines(self) -> dict[str, int]:
        """The shape as macros."""
        return {f"KVIST_{name.upper()}": int(value) for name, value in vars(self).items()}

    @property
    def layer_words(self) -> int:
        """Words that blocks exchange in a layer, for this step and the next; ABSENT at first."""
        team_q = self.heads // self.kv_heads * self.head_dim
        team = 2 * self.hidden + team_q + 2 * self.head_dim + team_q // 16 * self.members * 12
        return 2 * (self.kv_heads * team + 2 * self.hidden + self.intermediate)


class Library:
    """A compiled library.

    Args:
        path: of the file.

    Raises:
        NotSupported: it cannot be loaded, or is of another version.
    """

    def __init__(self, path: Path) -> None:
        """Load it; the GPU is not touched."""
        try:
            self._library = ctypes.CDLL(str(path))
            for function, (result, arguments) in _FUNCTIONS.items():
                found = getattr(self._library, function)
                found.restype, found.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise NotSupported(f"{path} cannot be loaded ({error}); remove it") from error
        ours = INTERFACE, ctypes.sizeof(Step), ctypes.sizeof(Layer)
        theirs = tuple(
            getattr(self._library, f"kvist_one_launch_{what}")()
            for what in ("interface", "step_bytes", "layer_bytes")
        )
        if ours != theirs:
            raise NotSupported(f"{path} has the interface {theirs}, not {ours}; remove it")

    def prepare(self, shape: Shape) -> None:
        """Make the kernel ready on the current device.

        Raises:
            NotSupported: the device does not hold all blocks at once, or the library is of another
                shape.
        """
        words = self._library.kvist_one_launch_layer_words()
        if words != shape.layer_words:
            raise NotSupported(f"{words} words a layer, not {shape.layer_words}")
        if error := self._library.kvist_one_launch_prepare():
            raise NotSupported(f"the kernel cannot run here: {self._error(error)}")

    def launch(self, step: Step, stream: int) -> None:
        """Start a step on a stream, by its handle.

        Raises:
            KvistError: CUDA refused.
        """
        error = self._library.kvist_one_launch(ctypes.byref(step), stream)
        if error:
            raise KvistError(f"a decode step could not be launched: {self._error(error)}")

    def _error(self, code: int) -> str:
        text: bytes = self._library.kvist_one_launch_error(code)
        return text.decode()


_FUNCTIONS: dict[str, tuple[object, tuple[object, ...]]] = {
    "kvist_one_launch_interface": (ctypes.c_int32, ()),
    "kvist_one_launch_step_bytes": (ctypes.c_int32, ()),
    "kvist_one_launch_layer_bytes": (ctypes.c_int32, ()),
    "kvist_one_launch_layer_words": (ctypes.c_int32, ()),
    "kvist_one_launch_prepare": (ctypes.c_int32, ()),
    "kvist_one_launch": (ctypes.c_int32, (ctypes.POINTER(Step), _pointer)),
    "kvist_one_launch_error": (ctypes.c_char_p, (ctypes.c_int32,)),
}
