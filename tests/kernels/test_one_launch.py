"""A decode step in one launch: what it fits, what it falls back to, and on a GPU its logits.

The kernel runs on GPUs of compute capability 9.0 with nvcc alone; what needs neither is tested
everywhere, and what needs nvcc alone where that is.
"""

import ctypes
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from test_fused_step import tiny

from kvist.cache import Batch, make_codec
from kvist.cache.dense import DynamicCache
from kvist.cache.paged_cache import PagedCache
from kvist.core.params import SamplingParams
from kvist.core.plan import PlanRow
from kvist.engine import Engine, EngineConfig
from kvist.errors import NotSupported
from kvist.kernels.cuda import build, one_launch
from kvist.kernels.cuda.one_launch import LONGEST, Layer, Library, Shape, Step
from kvist.llm import LLM
from kvist.loading.model import Model
from kvist.models.decoder import Decoder
from kvist.models.registry import family_of
from kvist.runner.fused import FusedStep
from kvist.runner.graphs import CONTEXTS, DecodeGraphs
from kvist.runner.one_launch import OneLaunchStep, longest_of
from kvist.runner.recorder import Recorder, Recording
from kvist.runner.step import model_step
from kvist.runner.uploads import Uploads

QWEN3_06B = Shape(1024, 16, 8, 128, 3072, qk_norm=True)
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(
    not ON_HOPPER or build.find_nvcc() is None, reason="needs an H100 or H200, and nvcc"
)

# Small models that the kernel fits: 2 and 4 query heads for each of 8 key heads, with and without
# norms, a vocabulary that no tile divides.
SMALL = {
    "vocab_size": 1003,
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "num_hidden_layers": 3,
    "model_type": "qwen3",
    "tie_word_embeddings": True,
}
SMALL_MODELS = {
    "2 to 1, q/k norms, tied": SMALL,
    "4 to 1, wider": SMALL | {"num_attention_heads": 32, "hidden_size": 1024},
    "no norms, own head": SMALL | {"model_type": "llama", "tie_word_embeddings": False},
    "3 to 1": SMALL | {"num_attention_heads": 24, "intermediate_size": 1280},
}


def test_published_shapes_fit():
    for hidden, heads, intermediate in (
        (1024, 16, 3072),  # Qwen3-0.6B
        (2048, 16, 6144),  # 1.7B
        (2560, 32, 9728),  # 4B
        (3072, 24, 8192),  # Llama-3.2-3B
    ):
        assert Shape(hidden, heads, 8, 128, intermediate, qk_norm=True).refusal() is None


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (Shape(2048, 32, 8, 64, 8192, qk_norm=False), "head_dim is 64"),
        (Shape(576, 9, 3, 128, 1536, qk_norm=False), "3 key heads, not 8"),
        (Shape(5120, 64, 8, 128, 25600, qk_norm=True), "64 query heads"),
        (Shape(960, 16, 8, 128, 3072, qk_norm=True), "hidden_size 960"),
        (Shape(1024, 16, 8, 128, 3000, qk_norm=True), "intermediate_size 3000"),
    ],
)
def test_other_shapes_are_refused_with_the_number_that_does_not_fit(shape, reason):
    assert reason in str(shape.refusal())


def test_models_off_the_gpu_keep_the_fused_step(device):
    if device.type == "cuda":
        pytest.skip("there is a GPU")
    model = tiny(device, **SMALL).bfloat16()
    cache = PagedCache(model.specs, make_codec("plain", torch.bfloat16), device=device)
    with pytest.raises(NotSupported, match="one launch: it needs a GPU, not cpu"):
        OneLaunchStep(model, cache.pool)


def test_the_engine_says_what_computes_its_steps(device):
    if device.type == "cuda":
        pytest.skip("there is a GPU")
    lm = tiny(device, **SMALL)
    model = Model("small", lm, None, torch.float32, device)
    engine = Engine(model, EngineConfig(max_model_len=32, block_size=4))
    assert engine.executor == "reference"
    step = FusedStep(lm)
    engine = Engine(model, EngineConfig(max_model_len=32, block_size=4), step=step)
    assert engine.executor == "fused"
    with pytest.raises(NotSupported, match="it needs a GPU"):
        Engine(replace(model, executor="one-launch"), EngineConfig(max_model_len=32))


def unrecorded(device: torch.device, monkeypatch) -> tuple[FusedStep, DecodeGraphs, list]:
    """A step, recordings of it that hold nothing, and of each the context and the variant."""
    lm = tiny(device, **SMALL)
    step = FusedStep(lm)
    cache = PagedCache(lm.specs, make_codec("plain", torch.float32), rows=1, device=device)
    cache.pool.reserve([4], 1, 4, 8)
    last = torch.zeros(2, dtype=torch.int64, device=device)
    graphs = DecodeGraphs(step, cache.pool, Uploads(cache.pool, last), Recorder(device))
    recorded = []

    def record(bucket: int, context: int, kind: str) -> Recording:
        recorded.append((context, step.variant(bucket, context)))
        return Recording(lambda: None, torch.zeros(1))

    monkeypatch.setattr(graphs, "_record", record)
    return step, graphs, recorded


def one_row(start: int) -> list[PlanRow]:
    return [PlanRow(slot=0, tokens=(5,), start=start, sample=True)]


def test_a_recording_serves_the_variant_that_it_was_made_of(device, monkeypatch):
    step, graphs, recorded = unrecorded(device, monkeypatch)
    graphs.run(one_row(3), "greedy")
    graphs.run(one_row(3), "greedy")
    monkeypatch.setattr(step, "variant", lambda rows, context: "one-launch")
    graphs.run(one_row(3), "greedy")
    assert [variant for _, variant in recorded] == ["fused", "one-launch"]


def test_a_recording_ends_where_something_else_computes_longer_contexts(device, monkeypatch):
    step, graphs, recorded = unrecorded(device, monkeypatch)
    monkeypatch.setattr(step, "limits", lambda rows: (24,))
    for start in (3, 22, 23, 24, 30):
        graphs.run(one_row(start), "greedy")
    assert [context for context, _ in recorded] == [24, CONTEXTS[0]]


@pytest.mark.parametrize(("hidden", "longest"), [(1024, 1024), (2560, LONGEST), (4096, 0)])
def test_one_launch_is_taken_where_it_was_measured_to_be_faster(hidden, longest):
    config = SMALL | {"hidden_size": hidden}
    family = family_of(config)
    with torch.device("meta"):
        model = family.build(family.read(config))
    assert longest_of(model) == longest


def test_structures_are_laid_out_as_in_c():
    assert ctypes.sizeof(Layer) == 10 * 8
    assert ctypes.sizeof(Step) == 12 * 8 + 6 * 4 + 64 * ctypes.sizeof(Layer)
    offsets = [getattr(Step, name).offset for name, _ in Step._fields_]
    assert all(a < b for a, b in pairwise(offsets))
    assert bytes(Layer(input_norm=1, values=2))[:8] == (1).to_bytes(8, "little")


def test_a_library_is_named_by_shape_architecture_and_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    (tmp_path / "a.cu").write_text("one")
    names = [build.library_name("a.cu", QWEN3_06B.defines(), "sm_90")]
    names.append(build.library_name("a.cu", QWEN3_06B.defines(), "sm_100"))
    names.append(build.library_name("a.cu", QWEN3_06B.defines() | {"KVIST_HIDDEN": 512}, "sm_90"))
    (tmp_path / "a.cuh").write_text("included")
    names.append(build.library_name("a.cu", QWEN3_06B.defines(), "sm_90"))
    assert len(set(names)) == 4


def test_without_nvcc_a_library_compiled_before_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("KVIST_HOME", str(tmp_path))
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(NotSupported, match="no nvcc to compile"):
        build.compiled(one_launch.SOURCE, QWEN3_06B.defines(), "sm_90")
    name = build.library_name(one_launch.SOURCE, QWEN3_06B.defines(), "sm_90")
    kept = tmp_path / "kernels" / f"{name}-cuda13.0.so"
    kept.parent.mkdir()
    kept.touch()
    assert build.compiled(one_launch.SOURCE, QWEN3_06B.defines(), "sm_90") == kept


def test_a_failing_compiler_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("KVIST_HOME", str(tmp_path))
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        "case $1 in --version) echo 'release 13.0, V13.0.88';;\n"
        "*) echo 'warning: odd' >&2; echo 'error: no such thing' >&2; exit 2;; esac\n"
    )
    nvcc.chmod(0o755)
    monkeypatch.setattr(build, "find_nvcc", lambda: str(nvcc))
    with pytest.raises(NotSupported, match=r"failed \(2\): error: no such thing$"):
        build.compiled(one_launch.SOURCE, QWEN3_06B.defines(), "sm_90")
    assert not list((tmp_path / "kernels").iterdir())


@pytest.mark.skipif(build.find_nvcc() is None, reason="needs nvcc")
def test_the_library_compiles_and_speaks_this_interface(tmp_path, monkeypatch):
    monkeypatch.setenv("KVIST_HOME", str(tmp_path))
    path = build.compiled(one_launch.SOURCE, QWEN3_06B.defines(), "sm_90")
    Library(path)
    made = path.stat().st_mtime_ns
    assert build.compiled(one_launch.SOURCE, QWEN3_06B.defines(), "sm_90") == path
    assert path.stat().st_mtime_ns == made
    if not torch.cuda.is_available():
        with pytest.raises(NotSupported, match="cannot run here"):
            Library(path).prepare(QWEN3_06B)


def small(name: str, device: torch.device) -> Decoder:
    """A random model in bfloat16; activations of about 1, as trained ones have."""
    model = tiny(device, **SMALL_MODELS[name])
    for key, weight in model.named_parameters():
        with torch.no_grad():
            weight.normal_(1.0, 0.1) if "norm" in key else weight.normal_(
                0.0, weight.shape[-1] ** -0.5
            )
    return model.bfloat16()


def one_row_cache(model: Decoder, tokens: int, device: torch.device) -> PagedCache:
    codec, size = make_codec("plain", torch.bfloat16), 16
    blocks = tokens // size + 2
    cache = PagedCache(
        model.specs, codec, rows=1, block_size=size, num_blocks=blocks, device=device
    )
    cache.pool.reserve([blocks], 1, blocks, max(tokens, 8))
    cache._stale = True
    return cache


def logits_of(step, cache, prompt, following) -> torch.Tensor:
    """Logits behind the prompt's last token and each of the following ones."""
    found = []
    device = cache.pool.device if isinstance(cache, PagedCache) else cache.device
    for tokens in [prompt, *([token] for token in following)]:
        batch = Batch.pack([tokens], cache.lengths, device=device)
        found.append(step(batch, cache.bind(batch)).clone())
        cache.commit(batch)
    return torch.cat(found)


@on_hopper
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_logits_are_those_of_the_model_within_bfloat16(name, device):
    model = small(name, device)
    exact = tiny(device, **SMALL_MODELS[name])
    exact.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    following = [7, 300, 5, 1002]
    for length in (1, 14, 16, 127, 505, 1022, 2500):
        prompt = [(7 * i + 3) % 1003 for i in range(length)]
        plain = DynamicCache(exact.specs, make_codec("plain", torch.float32), device=device)
        expected = logits_of(model_step(exact), plain, prompt, following)[1:]
        room = length + len(following)
        fused = logits_of(FusedStep(model), one_row_cache(model, room, device), prompt, following)[
            1:
        ]
        cache = one_row_cache(model, room, device)
        step = OneLaunchStep(model, cache.pool, wait=True)
        assert step.variant(1, length) == "one-launch"
        ours = logits_of(step, cache, prompt, following)[1:]
        scale = expected.std()
        off, usual = (ours - expected).abs().max() / scale, (fused - expected).abs().max() / scale
        assert off < max(1.5 * usual, 0.02), (name, length, off.item(), usual.item())


@on_hopper
def test_bits_are_equal_from_run_to_run(device):
    model = small("2 to 1, q/k norms, tied", device)
    found = []
    for _ in range(3):
        cache = one_row_cache(model, 330, device)
        step = OneLaunchStep(model, cache.pool, wait=True)
        found.append(logits_of(step, cache, list(range(300)), range(20)))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@on_hopper
def test_a_cache_that_it_wrote_is_read_by_the_fused_step(device):
    model = small("4 to 1, wider", device)
    found = []
    for mixed in (False, True):
        cache = one_row_cache(model, 64, device)
        fused, step = FusedStep(model), OneLaunchStep(model, cache.pool, wait=True)
        first = logits_of(step if mixed else fused, cache, list(range(30)), range(9))
        found.append(torch.cat([first, logits_of(fused, cache, [3], [4, 5])]))
    assert (found[0] - found[1]).abs().max() < 0.05 * found[0].std()


def wait_until_compiled(engine) -> None:
    engine._step._compiler.join()


@on_hopper
@pytest.mark.parametrize("graphs", [True, False])
def test_greedy_tokens_are_those_of_the_fused_step_but_for_ties(graphs, device):
    lm = small("2 to 1, q/k norms, tied", device)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=2)
    found = []
    for executor in ("fused", "one-launch"):
        model = Model("small", lm, None, torch.bfloat16, device, executor=executor)
        llm = LLM(model, max_num_seqs=1, max_model_len=256, block_size=16, graphs=graphs)
        if executor == "one-launch":
            wait_until_compiled(llm.engine)
        found.append(llm.generate([list(range(3, 120))], params)[0])
        assert llm.engine.executor == executor
    ours, expected = found[1], found[0]
    for i, (a, b) in enumerate(zip(ours.token_ids, expected.token_ids, strict=True)):
        if a != b:
            (_, best), (_, second) = expected.logprobs[i].top
            assert best - second < 0.05, (i, best, second)
            break
