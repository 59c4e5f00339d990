"""Three corrections of Triton 3.6's interpreter, without which kernels cannot be tested on a CPU.

It keeps bfloat16 as uint16 and converts it before it computes, except in tl.dot, which multiplies
the bits. Its scalars are arrays of one element, which numpy 2.4 no longer takes for an index. And
it rounds float32 to 8 bits without a carry, and ties away from zero.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor
_convert = interpreter._convert_float


def _as_float32(handle: Any) -> Any:
    if handle.dtype == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


def _dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
    product = np.matmul(_as_float32(a), _as_float32(b)).astype(d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source == tl.float32 and target == tl.float8e4nv:
        numbers = torch.from_numpy(np.array(data, dtype=np.float32))
        return numbers.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return _convert(data, source, target, rounding)


def correct() -> None:
    """Put them right, for the whole process."""
    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter._patch_lang_tensor = _patch_tensor_and_index
