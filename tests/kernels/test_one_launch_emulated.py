"""The step in one launch, run on a CPU: its own source over emulated instructions (`emulated/`).

Every thread of a small grid runs, in an order that a seed shuffles, and the logits must be those of
the model. It shows that the blocks agree on who computes, sends and waits for what; not that a
GPU's memory behaves, for which test_one_launch.py is there.
"""

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_fused_step import tiny
from test_one_launch import logits_of, one_row_cache

from kvist.cache import make_codec
from kvist.cache.dense import DynamicCache
from kvist.kernels.cuda import build
from kvist.kernels.cuda.one_launch import SOURCE, Shape
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
    "4 to 1, own head": (
        CONFIG | {"num_attention_heads": 16, "tie_word_embeddings": False},
        (150,),
    ),
    "3 to 1, no norms, wide": (
        CONFIG | {"model_type": "llama", "num_attention_heads": 12, "hidden_size": 1280},
        (20,),
    ),
    "1 to 1, wide MLP": (CONFIG | {"num_attention_heads": 4, "intermediate_size": 4352}, (20,)),
}


class Small(Shape):
    """A shape that is run whatever it is."""

    def refusal(self) -> None:
        """Take it."""


def compiled_for_cpu(shape: Shape, folder: Path) -> Path:
    """The library of this shape, whose launches run here."""
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


@pytest.mark.parametrize("name", CONFIGS)
def test_emulated_steps_give_the_models_logits(name, tmp_path, monkeypatch):
    device = torch.device("cpu")
    config, lengths = CONFIGS[name]
    exact = tiny(device, **config)
    for key, weight in exact.named_parameters():
        with torch.no_grad():
            weight.normal_(0.0, weight.shape[-1] ** -0.5)
            weight.add_(1.0) if "norm" in key else None
            weight.copy_(weight.bfloat16())
    model = tiny(device, **config)
    model.load_state_dict(exact.state_dict())
    model = model.bfloat16()

    real = one_launch.shape_of(model)
    shape = Small(**{**vars(real), "members": 8, "warps": 8})
    library = compiled_for_cpu(shape, tmp_path)
    seeds = iter(range(100))
    monkeypatch.setattr(one_launch, "SPIN_LIMIT", 5_000)
    monkeypatch.setattr(one_launch, "shape_of", lambda lm: shape)
    monkeypatch.setattr(one_launch, "compiled", lambda *_: library)
    monkeypatch.setattr(one_launch, "_refused_device", lambda _: None)
    monkeypatch.setattr(one_launch, "_refused_build", lambda _: None)
    monkeypatch.setattr(one_launch.torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(
        one_launch.torch.cuda,
        "current_stream",
        lambda _: SimpleNamespace(cuda_stream=next(seeds)),
    )
    for length in lengths:
        prompt = [(7 * i + 3) % 203 for i in range(length)]
        following = [7, 100][: 1 + (length < 20)]
        plain = DynamicCache(exact.specs, make_codec("plain", torch.float32), device=device)
        expected = logits_of(model_step(exact), plain, prompt, following)[1:]
        cache = one_row_cache(model, length + len(following), device)
        step = OneLaunchStep(model, cache.pool, wait=True)
        fill = model_step(model)
        steps = iter([fill, *[step] * len(following)])
        ours = logits_of(lambda *a, s=steps: next(s)(*a), cache, prompt, following)[1:]
        assert step.ready
        assert (ours - expected).abs().max() < 0.03 * expected.std(), (name, length)
