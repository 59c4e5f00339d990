"""A greedy token from the head's coarse copy is the one that all logits would have given."""

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from quantised_models import LLAMA, change_head, step_or_skip, write_gguf
from torch import Tensor

import kvist
from kvist.cache import Batch, Cache, make_cache
from kvist.loading.checkpoint import open_checkpoint
from kvist.native.executor import NativeStep
from kvist.native.library import library
from kvist.runner.greedy import all_finite, largest

ISAS = ("avx512", "amx")
VOCAB = 4099  # no whole number of groups of 16


def screened(isa: str, rows: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exact and coarse products of `[count, blocks]` with the last of `seen`, and the bounds."""
    count, columns = len(rows), seen.shape[1]
    exact, coarse, apart = (torch.full((-(-count // 16) * 16,), torch.nan) for _ in range(3))
    failed = library().kvist_test_screen(
        isa.encode(),
        ctypes.c_void_p(rows.data_ptr()),
        count,
        columns,
        len(seen),
        seen.data_ptr(),
        exact.data_ptr(),
        coarse.data_ptr(),
        apart.data_ptr(),
    )
    if failed:
        pytest.skip(f"this processor has no {isa}")
    return exact[:count], coarse[:count], apart[:count]


def quantised(values: np.ndarray) -> Tensor:
    blocks = gguf.quantize(values.astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    return torch.from_numpy(blocks)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("outliers", [0, 1, 5])
@pytest.mark.parametrize("columns", [32, 576, 2048])
def test_coarse_products_are_within_their_bounds(isa: str, outliers: int, columns: int) -> None:
    rng = np.random.default_rng(columns + outliers)
    rows = quantised(rng.standard_normal((333, columns)) * rng.exponential(size=(333, 1)))
    seen = rng.standard_normal((9, columns)).astype(np.float32)
    seen[:, :outliers] *= 100
    exact, coarse, apart = screened(isa, rows, torch.from_numpy(seen))
    assert torch.all((exact - coarse).abs() <= apart)
    # The bounds are worth having: far below what logits differ by.
    assert apart.median() < 0.5 * exact.abs().max()


@pytest.mark.parametrize("isa", ISAS)
def test_bounds_hold_for_what_was_never_seen(isa: str) -> None:
    rng = np.random.default_rng(2)
    rows = quantised(rng.standard_normal((333, 576)))
    seen = np.zeros((9, 576), np.float32)
    seen[:-1, :32] = 1
    seen[-1, 500:] = rng.standard_normal(76) * 1e3
    exact, coarse, apart = screened(isa, rows, torch.from_numpy(seen))
    assert torch.all((exact - coarse).abs() <= apart)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("worst", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_within_no_bound(isa: str, worst: float) -> None:
    rng = np.random.default_rng(3)
    rows = quantised(rng.standard_normal((40, 64)))
    seen = rng.standard_normal((3, 64)).astype(np.float32)
    seen[-1, 32:] = worst
    exact, coarse, apart = screened(isa, rows, torch.from_numpy(seen))
    assert not torch.any(~exact.isfinite() & (coarse + apart < torch.inf))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("screen") / "tiny.gguf"
    return write_gguf(where, replace(LLAMA, vocab=VOCAB), "Q8_0")


@pytest.fixture(scope="module")
def model(path: Path) -> kvist.Model:
    return kvist.load(path, executor="reference")


@pytest.fixture
def make_step(path: Path, model: kvist.Model) -> Callable[..., NativeStep]:
    def make(isa: str, **options: int) -> NativeStep:
        return step_or_skip(model.config, open_checkpoint(path), isa=isa, **options)

    return make


def next_token(step: NativeStep, cache: Cache, token: int, *, largest_only: bool) -> Tensor:
    """The logits behind a token, which the cache does not keep."""
    batch = Batch.pack([[token]], cache.lengths, largest_only=largest_only)
    return step(batch, cache.bind(batch))


@torch.inference_mode()
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2])
def test_tokens_are_those_of_all_logits(
    model: kvist.Model, make_step: Callable[..., NativeStep], isa: str, threads: int
) -> None:
    step = make_step(isa, threads=threads)
    cache = make_cache(model.specs, rows=1, max_length=100, dtype=torch.float32)
    generator = torch.Generator().manual_seed(threads)
    for token in torch.randint(0, VOCAB, (80,), generator=generator).tolist():
        found = next_token(step, cache, token, largest_only=True)
        assert found.shape == (1, VOCAB)
        assert all_finite(found)
        full = next_token(step, cache, token, largest_only=False)
        assert largest(found).tolist() == full.argmax(-1).tolist()
        assert found.isnan().all()  # nobody takes them for logits
        batch = Batch.pack([[token]], cache.lengths)
        step(batch, cache.bind(batch))
        cache.commit(batch)


@torch.inference_mode()
@pytest.mark.parametrize("isa", ["portable", "avx2", "amx"])
def test_other_steps_leave_nothing_out(
    model: kvist.Model, make_step: Callable[..., NativeStep], isa: str
) -> None:
    step = make_step(isa)
    cache = make_cache(model.specs, rows=2, max_length=8, dtype=torch.float32)
    for tokens in ([[1], [2]], [[3, 4], [5]]):
        batch = Batch.pack(tokens, cache.lengths, largest_only=True)
        assert not step(batch, cache.bind(batch)).isnan().any()
        cache.commit(batch)


@pytest.mark.parametrize("isa", ISAS)
def test_the_first_of_equal_logits_is_taken(tmp_path: Path, isa: str) -> None:
    where = write_gguf(tmp_path / "equal.gguf", replace(LLAMA, vocab=VOCAB), "Q8_0")
    change_head(where, lambda rows: rows[np.arange(VOCAB) % 7])  # only 7 kinds
    model = kvist.load(where, executor="reference")
    step = step_or_skip(model.config, open_checkpoint(where), isa=isa)
    cache = make_cache(model.specs, rows=1, max_length=4, dtype=torch.float32)
    with torch.inference_mode():
        for token in range(20):
            found = next_token(step, cache, token, largest_only=True)
            assert int(largest(found)) < 7


@torch.inference_mode()
@pytest.mark.parametrize("isa", ISAS)
def test_logits_that_are_not_finite_are_shown(
    model: kvist.Model, make_step: Callable[..., NativeStep], isa: str
) -> None:
    step = make_step(isa)
    cache = make_cache(model.specs, rows=1, max_length=4, dtype=torch.float32)
    assert all_finite(next_token(step, cache, 1, largest_only=True))
    embeddings = torch.full((1, LLAMA.hidden), torch.inf)
    batch = replace(Batch.pack([[1]], cache.lengths, largest_only=True), embeddings=embeddings)
    logits = step(batch, cache.bind(batch))
    assert not all_finite(logits)
    assert largest(logits).shape == (1,)


def test_generating_gives_the_same_tokens_with_and_without_log_probabilities(path: Path) -> None:
    model = kvist.load(path)
    params = kvist.SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    shown = replace(params, logprobs=1)
    prompt = [[1, 2, 3]]
    [plain], [full] = (kvist.generate(model, prompt, p) for p in (params, shown))
    assert plain.token_ids == full.token_ids
    llm = kvist.LLM(model)
    [paged], [with_logprobs] = (llm.generate(prompt, p) for p in (params, shown))
    assert paged.token_ids == with_logprobs.token_ids == plain.token_ids
    held = replace(params, min_tokens=5, ignore_eos=False)
    assert kvist.generate(model, prompt, held)[0].token_ids[:5] == plain.token_ids[:5]


@pytest.mark.parametrize("isa", ISAS)
def test_a_fork_is_told_at_once(make_step: Callable[..., NativeStep], isa: str) -> None:
    step = make_step(isa)
    step.packed = replace(step.packed, pid=-1)  # as if this process were a fork of that one
    batch = Batch.pack([[1]], [0], largest_only=True)
    with pytest.raises(kvist.errors.KvistError, match="fork"):
        step(batch, None)  # type: ignore[arg-type]


@torch.inference_mode()
@pytest.mark.parametrize("isa", ISAS)
def test_tokens_stay_the_same_where_screening_is_given_up(tmp_path: Path, isa: str) -> None:
    """Rows that hardly differ leave all of them in doubt."""
    shape = replace(LLAMA, vocab=800)
    where = write_gguf(tmp_path / "alike.gguf", shape, "Q8_0")

    def alike(rows: np.ndarray) -> np.ndarray:
        """The first row, but for one number."""
        first = np.repeat(rows[:1], len(rows), axis=0)
        for i in range(1, len(rows)):
            first[i, 2 + i % 32] ^= 1
        return first

    change_head(where, alike)
    model = kvist.load(where, executor="reference")
    step = step_or_skip(model.config, open_checkpoint(where), isa=isa)
    cache = make_cache(model.specs, rows=1, max_length=4, dtype=torch.float32)
    for token in range(40):
        full = next_token(step, cache, token, largest_only=False)
        found = next_token(step, cache, token, largest_only=True)
        assert largest(found).tolist() == full.argmax(-1).tolist()
