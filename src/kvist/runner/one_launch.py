"""Decode steps of one sequence in one launch, and the fused step for all else: `OneLaunchStep`.

The kernel (`kernels/cuda/one_launch.cu`) reads the same weights and the same pages as the fused
kernels and leaves its logits where they would, so the two take turns freely. It is compiled beside
serving, when nobody waits for it; until then, and whatever it does not fit, the fused kernels run.
Made by `executors.py`.
"""

import logging
import threading
from collections.abc import Iterable

import torch
from torch import Tensor

from kvist.cache import Batch, KVCache
from kvist.cache.codecs.plain import Plain
from kvist.cache.paged import PagedPool
from kvist.cache.paged_view import PagedBinding
from kvist.errors import NotSupported
from kvist.kernels.cuda.build import compiled, compiled_before, find_nvcc
from kvist.kernels.cuda.one_launch import (
    ABSENT,
    LONGEST,
    MOST_LAYERS,
    SOURCE,
    SPIN_LIMIT,
    Layer,
    Library,
    Shape,
    Step,
)
from kvist.models.decoder import Decoder
from kvist.runner.fused import FusedStep, LayerWeights

log = logging.getLogger("kvist")

ARCH = "sm_90"  # the one that it was measured on
# Of this many channels or fewer, products are so short that 8 warps do them as fast as 16 and leave
# more registers to each; in longer contexts than this attention then wants the fused kernels.
SMALL, SMALL_LONGEST = 1024, 1024
# Of more channels the fused kernels stream weights as fast as memory gives them.
LARGE = 2560


def longest_of(lm: Decoder) -> int:
    """Up to which context one launch was measured to be the faster; 0 where it was not."""
    hidden = lm.config.hidden_size
    return 0 if hidden > LARGE else SMALL_LONGEST if hidden <= SMALL else LONGEST


def shape_of(lm: Decoder) -> Shape:
    """What the kernel has to be compiled for."""
    config = lm.config
    return Shape(
        warps=8 if config.hidden_size <= SMALL else 16,
        hidden=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate=config.intermediate_size,
        qk_norm=config.qk_norm,
    )


class OneLaunchStep(FusedStep):
    """A fused step whose decode steps of one sequence are one launch, as soon as it is compiled.

    Args:
        lm: a dense decoder without biases in bfloat16, of a shape that the kernel fits.
        pool: the plain bfloat16 pool that batches will be bound to; one group of layers that keep
            all their tokens.
        longest: context up to which it is taken; at most what the kernel has room for.
        wait: until it is compiled, and refuse where that fails.

    Raises:
        NotSupported: the kernel does not fit, for the reason given; use `FusedStep`.
    """

    def __init__(
        self, lm: Decoder, pool: PagedPool, *, longest: int = LONGEST, wait: bool = False
    ) -> None:
        """Note what the kernel reads, and begin to compile it."""
        super().__init__(lm)
        self.longest = min(longest, LONGEST)
        self.shape = shape_of(lm)
        reason = (
            self.shape.refusal()
            or _refused_depth(len(self.layers))
            or _refused_device(pool.device, self.shape.blocks)
            or _refused_pool(pool, self.shape)
            or _refused_weights(self)
            or _refused_build(self.shape)
        )
        if reason:
            raise NotSupported(f"no decode step in one launch: {reason}")
        self._planes = pool.pools[0].planes
        self._library: Library | None = None
        self._failure: NotSupported | None = None
        self._step = self._describe(pool)
        # A thread that the process does not wait for: what is half compiled is made anew.
        self._compiler = threading.Thread(target=self._compile, name="kvist nvcc", daemon=True)
        self._compiler.start()
        if wait:
            self.settle()
            if self._failure:
                raise self._failure

    def settle(self) -> None:
        """Wait until it is known what will compute steps from now on."""
        self._compiler.join()

    @property
    def ready(self) -> bool:
        """Whether steps go in one launch from now on."""
        return self._library is not None and self._failure is None

    @property
    def executor(self) -> str:
        """What computes decode steps of one sequence now."""
        return "one-launch" if self.ready else "fused"

    def variant(self, rows: int, context: int) -> str:
        """What computes a decode step of so many rows, each of up to so many keys."""
        one = rows == 1 and context <= self.longest and self.ready
        return "one-launch" if one else super().variant(rows, context)

    def limits(self, rows: int) -> tuple[int, ...]:
        """See `FusedStep.limits`."""
        return (self.longest,) if rows == 1 and self.ready else ()

    def raw(self, batch: Batch, cache: KVCache) -> Tensor:
        """See `FusedStep.raw`."""
        if self._takes(batch, cache):
            assert isinstance(cache, PagedBinding)
            return self._launch(batch, cache)
        return super().raw(batch, cache)

    def _takes(self, batch: Batch, cache: KVCache) -> bool:
        return (
            batch.num_tokens == batch.num_sequences == len(batch.logit_rows) == 1
            and self.variant(1, batch.kv_lens[0]) == "one-launch"
            and batch.embeddings is None
            and batch.rope_positions is None
            and isinstance(cache, PagedBinding)
            and cache.backend is None
            and cache.views[0].pool.planes is self._planes  # a pool that grew has others
        )

    def _launch(self, batch: Batch, cache: PagedBinding) -> Tensor:
        assert self._library is not None
        view, step = cache.views[0], self._step
        logits = torch.empty(
            1, self.config.vocab_size, dtype=torch.float32, device=view.block_table.device
        )
        step.token = batch.token_ids.data_ptr()
        step.position = batch.positions.data_ptr()
        step.place = view.slot_mapping.data_ptr()
        step.length = cache.kv_lens.data_ptr()
        step.table = view.block_table.data_ptr()
        step.logits = logits.data_ptr()
        self._library.launch(step, torch.cuda.current_stream(logits.device).cuda_stream)
        cache.written.update(self._planes)
        return logits

    def _compile(self) -> None:
        """In a thread of its own."""
        try:
            library = Library(compiled(SOURCE, self.shape.defines(), ARCH))
            with torch.cuda.device(self.lm.lm_head.weight.device):
                library.prepare(self.shape)
            self._library = library
        except NotSupported as error:
            log.warning("no decode step in one launch: %s; fused kernels run instead", error)
            self._failure = error

    @torch.inference_mode(False)
    def _describe(self, pool: PagedPool) -> Step:
        """All of a step that stays the same."""
        device, head, embedding = pool.device, self.lm.lm_head, self.lm.model.embed_tokens
        layers = [
            _layer(layer, self._planes[i]["key"]["x"], self._planes[i]["value"]["x"])
            for i, layer in enumerate(self.layers)
        ]
        words = self.shape.layer_words * len(layers)
        self._exchange = torch.full((words,), ABSENT, dtype=torch.int32, device=device)
        self._epoch = torch.zeros(1, dtype=torch.int32, device=device)
        return Step(
            embedding=embedding.weight.data_ptr(),
            norm=self.lm.model.norm.weight.data_ptr(),
            head=head.weight.data_ptr(),
            frequencies=self.frequencies.data_ptr(),
            exchange=self._exchange.data_ptr(),
            epoch=self._epoch.data_ptr(),
            num_layers=len(layers),
            vocab=self.config.vocab_size,
            block_size=pool.block_size,
            spin_limit=SPIN_LIMIT,
            eps=self.config.rms_norm_eps,
            rotation_scale=self.config.rope.attention_factor,
            layers=(Layer * MOST_LAYERS)(*layers),
        )


def _layer(layer: LayerWeights, keys: Tensor, values: Tensor) -> Layer:
    norms = layer.head_norms or (None, None)
    tensors = (
        *(layer.input_norm, layer.qkv, *norms, layer.o),
        *(layer.mlp_norm, layer.gate_up, layer.down, keys, values),
    )
    return Layer(*(one.data_ptr() if isinstance(one, Tensor) else None for one in tensors))


def _refused_device(device: torch.device, blocks: int) -> str | None:
    if device.type != "cuda":
        return f"it needs a GPU, not {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"it runs on compute capability 9.0, not {capability}"
    found = torch.cuda.get_device_properties(device).multi_processor_count
    return None if found >= blocks else f"{found} multiprocessors for its {blocks} blocks"


def _refused_build(shape: Shape) -> str | None:
    if find_nvcc() or compiled_before(SOURCE, shape.defines(), ARCH):
        return None
    return "there is no nvcc to compile it with; install the CUDA toolkit or set CUDA_HOME"


def _refused_depth(layers: int) -> str | None:
    return None if layers <= MOST_LAYERS else f"{layers} layers, more than {MOST_LAYERS}"


def _refused_pool(pool: PagedPool, shape: Shape) -> str | None:
    if len(pool.pools) != 1 or pool.pools[0].group.spec.window is not None:
        return "layers with windows are not its business"
    if type(pool.pools[0].codec) is not Plain:
        return f"it reads plain pages, not the codec {pool.pools[0].codec.name}"
    return _not_bfloat16(
        planes["x"] for sides in pool.pools[0].planes.values() for planes in sides.values()
    )


def _refused_weights(step: FusedStep) -> str | None:
    model = step.lm.model
    shared = [model.embed_tokens.weight, model.norm.weight, step.lm.lm_head.weight]
    for layer in step.layers:
        shared += [layer.input_norm, layer.mlp_norm, *(layer.head_norms or ())]
        for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down):
            if not isinstance(matrix, Tensor):
                return "its weights are bfloat16, not fp8"
            shared.append(matrix)
    return _not_bfloat16(shared)


def _not_bfloat16(tensors: Iterable[Tensor]) -> str | None:
    """Why the kernel cannot read one of these; copies of 16 bytes want them aligned."""
    for one in tensors:
        if one.dtype != torch.bfloat16:
            return f"it reads bfloat16, not {one.dtype}"
        if not one.is_contiguous() or one.data_ptr() % 16:
            return "it reads contiguous tensors, aligned to 16 bytes"
    return None
