"""The native executor: a whole step of a decoder in one call of the compiled library.

A drop-in for the model's own forward, made from the same weights: it reads and writes the cache's
planes in place and gives the logits. Where weights are quantised, activations are rounded: for
matrix units to bfloat16 (and weights and attention with them), else to 8 bits, as llama.cpp does.
So logits differ a little from the model's; docs say how little. Where weights are floats, sums are
in another order and nothing else.
"""

import ctypes
import os
from array import array
from functools import cache
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from kvist.cache import Batch, KVCache
from kvist.errors import ConfigError, KvistError, NotSupported, RequestError
from kvist.models.config import DecoderConfig
from kvist.native.library import StepInput, library
from kvist.native.planes import BoundPlanes
from kvist.native.weights import PackedModel, QuantizedWeights, chosen_isa, pack_model
from kvist.runner.greedy import with_largest

__all__ = ["NativeStep", "native_step"]

_UNKNOWN = torch.full((1, 1), torch.nan)  # logits that nobody is to look at
BAD_TOKEN = 2  # what `kvist_step` returns for it
ARITHMETIC = 2  # raised by one whenever the same weights come to compute other numbers


def native_step(
    config: DecoderConfig,
    checkpoint: QuantizedWeights,
    *,
    threads: int | None = None,
    isa: str | None = None,
) -> "NativeStep":
    """A step function that runs a checkpoint's weights, as they are stored, in native code.

    Args:
        config: of the model.
        checkpoint: its weights; an embedding in blocks stays mapped.
        threads: None takes a core each, or fewer where torch was told to use fewer.
        isa: "portable", "avx2", "avx512" or "amx"; None takes what the environment's `KVIST_ISA`
            names, or else the best that this processor has.

    Raises:
        NotSupported: no library, or a model or format that it does not run.
    """
    isa = isa or chosen_isa()
    cores = physical_cores()
    if threads is None:
        threads = min(torch.get_num_threads(), len(cores))
    if not 1 <= threads <= 64:
        raise ConfigError(f"threads is {threads}; the native executor takes 1 to 64")
    # Bound to cores only if it has them all: other programs would be bound to the same ones.
    cpus = cores if threads == len(cores) > 1 else []
    return NativeStep(pack_model(config, checkpoint, threads=threads, cpus=cpus, isa=isa))


class NativeStep:
    """A `StepFunction` over packed weights; one step at a time, from any thread."""

    def __init__(self, packed: PackedModel) -> None:
        """See `native_step`."""
        self.packed = packed
        self._planes = BoundPlanes()
        self._lock = Lock()
        self._screened: bool | None = None  # whether a step may leave the logits out, once asked

    @property
    def fingerprint(self) -> str:
        """Names the weights and the arithmetic."""
        arithmetic = f"{self.packed.activations} activations, arithmetic {ARITHMETIC}"
        return f"native, {arithmetic}, {self.packed.digest}"

    def __repr__(self) -> str:
        """Instruction set and threads."""
        return f"NativeStep(isa={self.packed.isa!r}, threads={self.packed.threads})"

    def __call__(self, batch: Batch, cache: KVCache) -> Tensor:
        """`[R, vocab]` float32, `with_largest`; see `StepFunction`.

        Raises:
            NotSupported: a cache or positions that it does not read; nothing was written.
        """
        if os.getpid() != self.packed.pid:
            raise KvistError("the native executor's threads stay behind in a fork; make it anew")
        alone = batch.num_tokens == 1 and batch.logit_rows.shape[0] == 1
        return self._run(batch, cache, screened=batch.largest_only and alone and self._can_screen())

    def _run(self, batch: Batch, cache: KVCache, *, screened: bool) -> Tensor:
        packed = self.packed
        rotations = batch.positions if batch.rope_positions is None else batch.rope_positions
        if rotations.dim() != 1:
            raise NotSupported("the native executor rotates by one axis of positions only")
        bound, layers = self._planes.of(cache)
        if bound is not batch:
            raise KvistError("the cache is bound to another batch than the one given")
        rows = batch.logit_rows.contiguous()
        count, vocab = rows.shape[0], packed.config.vocab_size
        # (Each of torch's operators costs tens of microseconds here: weights have been through the
        # caches since the last one.)
        whole = _UNKNOWN if screened else torch.empty(count, packed.padded_vocab)
        logits = whole
        if screened:
            logits = whole.expand(1, vocab)
        elif vocab != packed.padded_vocab:
            logits = whole[:, :vocab]
        if not batch.num_tokens:
            return logits
        embeddings = batch.embeddings
        if embeddings is not None:
            embeddings = embeddings.float().contiguous()
        token_ids, rotations = batch.token_ids.contiguous(), rotations.contiguous()
        sequences = batch.num_sequences
        starts, lengths = _ints(sequences + 1), _ints(sequences)
        largest = array("q", bytes(8 * count))
        starts[1:] = [end for _, end in batch.query_spans]
        lengths[:] = list(batch.kv_lens)
        given = StepInput(
            batch.num_tokens,
            sequences,
            count,
            0,
            token_ids.data_ptr(),
            None if embeddings is None else embeddings.data_ptr(),
            rotations.data_ptr(),
            ctypes.addressof(starts),
            ctypes.addressof(lengths),
            rows.data_ptr(),
            ctypes.addressof(layers.inputs),
            None if screened else whole.data_ptr(),
            largest.buffer_info()[0],
        )
        with self._lock:
            failed = library().kvist_step(packed.handle, given)
        if failed == BAD_TOKEN:
            raise RequestError(f"a token id is not in the vocabulary of {vocab}")
        if failed:
            raise KvistError(f"not enough memory for a step of {batch.num_tokens} tokens")
        if screened and largest[0] < 0:  # not all are finite: whoever asks may want to know which
            return self._run(batch, cache, screened=False)
        return with_largest(logits, largest)

    def _can_screen(self) -> bool:
        if self._screened is None:
            with self._lock:
                self._screened = bool(library().kvist_model_screen(self.packed.handle))
        return self._screened


@cache
def _ints_type(count: int) -> type[ctypes.Array[ctypes.c_int32]]:
    return ctypes.c_int32 * count


def _ints(count: int) -> ctypes.Array[ctypes.c_int32]:
    """Zeros."""
    return _ints_type(count)()


def physical_cores() -> list[int]:
    """The processors that this process may run on, one of each core where two share one."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))
    allowed = sorted(os.sched_getaffinity(0))
    seen: set[str] = set()
    cores = []
    for cpu in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            core = topology.read_text().strip()
        except OSError:
            core = str(cpu)
        if core not in seen:
            seen.add(core)
            cores.append(cpu)
    return cores
