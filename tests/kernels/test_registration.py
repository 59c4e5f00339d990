"""The kernels are registered everywhere, and cost nothing where they cannot run."""

import subprocess
import sys

import torch

import kvist.kernels
from kvist.attention import BACKENDS
from kvist.attention.kernels import supports
from kvist.cache import Batch, make_codec
from kvist.cache.dense import DynamicCache
from kvist.cache.paged import PagedPool
from kvist.cache.paged_view import PagedKV
from kvist.core.spec import AttentionSpec


def view(device: torch.device, backend: str | None, head_dim: int = 16) -> PagedKV:
    pool = PagedPool(
        [AttentionSpec(2, head_dim)],
        make_codec("plain", torch.float32),
        num_blocks=3,
        block_size=4,
        max_slots=1,
        max_blocks=2,
        max_tokens=4,
        device=device,
    )
    binding = pool.bind(Batch.pack([[1, 2]], [0], device=device), backend=backend)
    return PagedKV(binding, binding.views[0], 0)


def test_importing_attention_does_not_import_triton():
    code = "import sys, kvist.attention; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_kernels_are_asked_first():
    assert next(iter(BACKENDS)) == "triton"


def test_paged_views_are_read_and_dense_ones_are_not(device):
    assert supports(view(device, "triton"))
    cache = DynamicCache([AttentionSpec(2, 16)], make_codec("plain", torch.float32), device=device)
    states = torch.zeros(2, 2, 16, device=device)
    bound = cache.bind(Batch.pack([[1, 2]], [0], device=device), backend="triton")
    assert not supports(bound.update(states, states, 0))


def test_the_interpreter_must_be_asked_for_by_name():
    assert not supports(view(torch.device("cpu"), None))


def test_head_dims_that_are_no_power_of_two_are_left_to_others(device):
    assert not supports(view(device, "triton", head_dim=24))


def test_without_triton_nothing_is_supported(device, monkeypatch):
    monkeypatch.setattr(kvist.kernels, "has_triton", lambda: False)
    assert not supports(view(device, "triton"))
