"""The GGUF container: header, metadata and the table of tensors, checked before it is believed.

Standard library only. It says where each tensor lies and how it is encoded; what the bytes mean is
`dequantize`'s business and what the names mean is `gguf`'s. Every count and length in the file is
held against the bytes that are left, so a damaged file fails at once and by name.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
"""

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from kvist.errors import CheckpointError, NotSupported

__all__ = ["GGUFFile", "TensorInfo", "read_gguf"]

# ggml's number of a type -> its name.
_TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip

# The types that kvist reads -> (elements in a block, bytes in a block).
BLOCKS: Mapping[str, tuple[int, int]] = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip

# Metadata value types: number -> struct format of the scalars; strings and arrays apart.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

# Far above what any model has (the largest vocabularies hold about 300,000 tokens), far below what
# would hurt: a count that fits the file's size may still be nonsense.
_MAX_ITEMS = 1 << 22
_MAX_STRING_BYTES = 1 << 24
_MAX_ARRAY_DEPTH = 2
_MAX_DIMENSIONS = 4

_LITTLE_ENDIAN_MAGIC = b"GGUF"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's place in the file; `shape` has the slowest axis first, as in torch."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the beginning of the file."""
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """What stands before the weights."""

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def read_gguf(path: Path) -> GGUFFile:
    """Read and check everything but the weights.

    Raises:
        CheckpointError: not a GGUF, damaged, truncated, or a version that is not read.
        NotSupported: a tensor is quantised in a way that kvist does not read.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size == 0:
                raise CheckpointError(f"{path}: the file is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data, size).read()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


class _Reader:
    """A cursor over the bytes: `pos` is the next unread one, `size` the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path = path
        self.data = data
        self.size = size
        self.pos = 0
        self.where = "the header"

    def fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: damaged GGUF, {reason}")

    def read(self) -> GGUFFile:
        version, num_tensors, num_keys = self._header()
        metadata: dict[str, Any] = {}
        for index in range(num_keys):
            self.where = f"metadata entry {index} of {num_keys}"
            key = self._string()
            if key in metadata:
                self.fail(f"metadata key {key!r} occurs twice")
            self.where = f"the metadata of {key!r}"
            metadata[key] = self._value(self._u32(), depth=0)
        tensors: dict[str, TensorInfo] = {}
        for index in range(num_tensors):
            self.where = f"the description of tensor {index} of {num_tensors}"
            info = self._tensor_info()
            if info.name in tensors:
                self.fail(f"tensor {info.name!r} occurs twice")
            tensors[info.name] = info
        placed = self._place(tensors, metadata.get("general.alignment", 32))
        return GGUFFile(self.path, version, metadata, placed)

    def _header(self) -> tuple[int, int, int]:
        magic = bytes(self.data[:4])
        if magic != _LITTLE_ENDIAN_MAGIC:
            if bytes(self.data[:40]).startswith(b"version https://git-lfs"):
                raise CheckpointError(
                    f"{self.path}: a git-lfs pointer, not the weights; run `git lfs pull`"
                )
            raise CheckpointError(f"{self.path}: not a GGUF file (it begins with {magic!r})")
        self.pos = 4
        version = self._u32()
        if version not in (2, 3):
            if version and version & 0xFFFF == 0:
                raise CheckpointError(f"{self.path}: a big-endian GGUF, which kvist does not read")
            raise CheckpointError(
                f"{self.path}: GGUF version {version}; kvist reads 2 and 3, so convert it again"
            )
        num_tensors, num_keys = self._u64(), self._u64()
        # The smallest entries possible: an empty name, one dimension or a one-byte value.
        self._check_count(num_keys, 8 + 4 + 1, "metadata entries")
        self._check_count(num_tensors, 8 + 4 + 4 + 8, "tensors")
        return version, num_tensors, num_keys

    def _tensor_info(self) -> TensorInfo:
        name = self._string()
        num_dims = self._u32()
        if num_dims > _MAX_DIMENSIONS:
            self.fail(f"tensor {name!r} claims {num_dims} dimensions")
        shape = tuple(reversed([self._u64() for _ in range(num_dims)]))
        if 0 in shape:
            self.fail(f"tensor {name!r} of shape {list(shape)} is empty")
        number = self._u32()
        offset = self._u64()
        type_name = _TYPE_NAMES.get(number)
        if type_name is None:
            self.fail(f"tensor {name!r} has the unknown type {number}")
        if type_name not in BLOCKS:
            raise NotSupported(
                f"{self.path}: tensor {name!r} is stored as {type_name}; kvist reads "
                f"{', '.join(BLOCKS)}, so take a file such as Q4_K_M or Q8_0"
            )
        elements, nbytes = BLOCKS[type_name]
        row = shape[-1] if shape else 1
        if row % elements:
            self.fail(f"tensor {name!r}: rows of {row} are no multiple of {type_name}'s {elements}")
        return TensorInfo(name, type_name, shape, offset, math.prod(shape) // elements * nbytes)

    def _place(self, tensors: Mapping[str, TensorInfo], alignment: Any) -> dict[str, TensorInfo]:
        """Turn offsets from the data section's start into offsets from the file's start."""
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            self.fail(f"general.alignment is {alignment!r}, not a power of two from 8 on")
        start = -(-self.pos // alignment) * alignment
        placed = {}
        for info in tensors.values():
            if info.offset % alignment:
                self.fail(f"tensor {info.name!r} begins at {info.offset}, not at a multiple of "
                          f"{alignment}")  # fmt: skip
            end = start + info.offset + info.nbytes
            if end > self.size:
                raise CheckpointError(
                    f"{self.path}: truncated GGUF, tensor {info.name!r} ends at byte {end:,} of "
                    f"{self.size:,}; fetch the file again"
                )
            placed[info.name] = TensorInfo(
                info.name, info.type, info.shape, start + info.offset, info.nbytes
            )
        return placed

    # Primitive values. Each advances `pos`; none reads past `size`.

    def _take(self, nbytes: int) -> int:
        start = self.pos
        if nbytes > self.size - start:
            raise CheckpointError(
                f"{self.path}: truncated GGUF, {self.where} needs {nbytes:,} bytes and "
                f"{self.size - start:,} are left"
            )
        self.pos = start + nbytes
        return start

    def _u32(self) -> int:
        return int(struct.unpack_from("<I", self.data, self._take(4))[0])

    def _u64(self) -> int:
        return int(struct.unpack_from("<Q", self.data, self._take(8))[0])

    def _check_count(self, count: int, min_bytes_each: int, what: str) -> None:
        left = self.size - self.pos
        if count > _MAX_ITEMS or count * min_bytes_each > left:
            self.fail(f"{self.where} claims {count:,} {what} with {left:,} bytes left")

    def _string(self) -> str:
        length = self._u64()
        if length > _MAX_STRING_BYTES:
            self.fail(f"{self.where} claims a text of {length:,} bytes")
        start = self._take(length)
        return self._decode(start, start + length)

    def _decode(self, start: int, end: int) -> str:
        try:
            return self.data[start:end].decode()
        except UnicodeDecodeError:
            self.fail(f"{self.where} holds text that is not UTF-8")

    def _strings(self, count: int) -> list[str]:
        # Vocabularies make up nearly all of the metadata, hence a loop of its own: one tokenizer
        # has 100,000 of these, and the general path would take four times as long.
        unpack: Callable[..., tuple[int]] = struct.Struct("<Q").unpack_from
        data, size, pos = self.data, self.size, self.pos
        out = []
        for _ in range(count):
            if size - pos < 8:
                self._take(8)
            (length,) = unpack(data, pos)
            start = pos + 8
            pos = start + length
            if pos > size:
                self.pos = start
                self._take(length)
            out.append(self._decode(start, pos))
            self.pos = pos
        return out

    def _value(self, kind: int, depth: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(depth + 1)
        if kind not in _SCALARS:
            self.fail(f"{self.where} has the unknown value type {kind}")
        layout = struct.Struct("<" + _SCALARS[kind])
        return layout.unpack_from(self.data, self._take(layout.size))[0]

    def _array(self, depth: int) -> list[Any]:
        if depth > _MAX_ARRAY_DEPTH:
            self.fail(f"{self.where} nests arrays more than {_MAX_ARRAY_DEPTH} deep")
        kind, count = self._u32(), self._u64()
        if kind in _SCALARS:
            each = struct.calcsize("<" + _SCALARS[kind])
            self._check_count(count, each, "values")
            start = self._take(count * each)
            return list(struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.data, start))
        self._check_count(count, 8, "values")
        if kind == _STRING:
            return self._strings(count)
        return [self._value(kind, depth) for _ in range(count)]
