"""The step in one launch, run on a CPU: its own source over emulated instructions (`emulated/`).

Every thread of a small grid runs, in an order that a seed shuffles, and the logits must be those of
the model. It shows that the blocks agree on who computes, sends and waits for what; not that a
GPU's memory behaves, for which test_one_launch.py is there.
"""

import shutil
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_fused_step import tiny
from test_one_launch import logits_of, one_row_cache

from kvist.cache import Batch, make_codec
from kvist.cache.dense import DynamicCache
from kvist.kernels.cuda import build
from kvist.kernels.cuda.one_launch import SOURCE, Shape
from kvist.models.decoder import Decoder
from kvist.runner import one_launch
from kvist.runner.one_launch import OneLaunchStep
from kvist.runner.step import model_step

COMPILER = shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(
    COMPILER is None or torch.cuda.is_available(), reason="needs a C++ compiler, and no GPU"
)

# As in a published model, with fewer key heads, blocks of each and warps.
CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 203,
    "hidden_size": 256,
    "intermediate_size": 192,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_hidden_layers": 2,
    "tie_word_embeddings": True,
}
# And lengths of prompts.
CONFIGS = {
    "2 to 1, q/k norms, tied": (CONFIG, (1, 15, 150)),
    "4 to 1, own head, wide MLP": (
        CONFIG
        | {"num_attention_heads": 16, "tie_word_embeddings": False, "intermediate_size": 4352},
        (40,),
    ),
    "3 to 1, no norms, wide": (
        CONFIG | {"model_type": "llama", "num_attention_heads": 12, "hidden_size": 1280},
        (20,),
    ),
}


class Small(Shape):
    """A shape that is run whatever it is."""

    def refusal(self) -> None:
        """Take it."""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Shape], Path]:
    """The library of a shape, whose launches run here."""
    return cache(lambda shape: compiled_for_cpu(shape, tmp_path_factory.mktemp("emulated")))


def compiled_for_cpu(shape: Shape, folder: Path) -> Path:
    """Compile the kernel over emulated instructions."""
    for source in [*build.SOURCES.glob("*.cu"), *build.SOURCES.glob("*.cuh")]:
        text = source.read_text().replace(
            "extern __shared__ unsigned char memory[];", "unsigned char *memory = shared_memory();"
        )
        (folder / source.name).write_text(text)
    shutil.copy(Path(__file__).parent / "emulated" / "ptx.cuh", folder)
    library = folder / "one_launch.so"
    macros = [f"-D{name}={value}" for name, value in shape.defines().items()]
    flags = ["-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-w", "-shared", "-fPIC", "-x", "c++"]
    done = subprocess.run(
        [str(COMPILER), *flags, *macros, "-o", str(library), str(folder / SOURCE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[:2000]
    return library


def rounded_model(config: dict[str, object]) -> tuple[Decoder, Decoder]:
    """A random model in float32, and in bfloat16, with the same weights."""
    exact = tiny(torch.device("cpu"), **config)
    for key, weight in exact.named_parameters():
        with torch.no_grad():
            weight.normal_(0.0, weight.shape[-1] ** -0.5)
            weight.add_(1.0) if "norm" in key else None
            weight.copy_(weight.bfloat16())
    model = tiny(torch.device("cpu"), **config)
    model.load_state_dict(exact.state_dict())
    return exact, model.bfloat16()


def emulate(
    model: Decoder, libraries: Callable[[Shape], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Have this model's steps in one launch run here, each in an order of its own."""
    shape = Small(**{**vars(one_launch.shape_of(model)), "members": 8, "warps": 8})
    library = libraries(shape)
    orders = iter(range(100))
    monkeypatch.setattr(one_launch, "SPIN_LIMIT", 5_000)
    monkeypatch.setattr(one_launch, "shape_of", lambda lm: shape)
    monkeypatch.setattr(one_launch, "compiled", lambda *_: library)
    monkeypatch.setattr(one_launch, "_refused_device", lambda *_: None)
    monkeypatch.setattr(one_launch, "_refused_build", lambda _: None)
    monkeypatch.setattr(one_launch.torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(
        one_launch.torch.cuda,
        "current_stream",
        lambda _: SimpleNamespace(cuda_stream=next(orders)),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_emulated_steps_give_the_models_logits(name, libraries, monkeypatch):
    device = torch.device("cpu")
    config, lengths = CONFIGS[name]
    exact, model = rounded_model(config)
    emulate(model, libraries, monkeypatch)
    for length in lengths:
        prompt = [(7 * i + 3) % 203 for i in range(length)]
        following = [7, 100][: 1 + (length < 20)]
        plain = DynamicCache(exact.specs, make_codec("plain", torch.float32), device=device)
        expected = logits_of(model_step(exact), plain, prompt, following)[1:]
        pages = one_row_cache(model, length + len(following), device)
        step = OneLaunchStep(model, pages.pool, wait=True)
        steps = iter([model_step(model), *[step] * len(following)])
        ours = logits_of(lambda *a, s=steps: next(s)(*a), pages, prompt, following)[1:]
        assert step.ready
        assert (ours - expected).abs().max() < 0.03 * expected.std(), (name, length)


def test_an_emulated_row_that_only_pads_writes_nothing_and_ends(libraries, monkeypatch):
    _, model = rounded_model(CONFIG)
    emulate(model, libraries, monkeypatch)
    pages = one_row_cache(model, 8, torch.device("cpu"))
    step = OneLaunchStep(model, pages.pool, wait=True)
    batch = Batch.pack([[0]], [0])
    binding = pages.bind(batch)
    binding.kv_lens.zero_()
    before = pages.pool.pools[0].planes[0]["key"]["x"].clone()
    assert step(batch, binding).isfinite().all()
    assert pages.pool.pools[0].planes[0]["key"]["x"].equal(before)
