"""From a checkpoint into a module: all weights or none, tied ones once, the right types."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvist.errors import CheckpointError, NotSupported
from kvist.loading.checkpoint import load_into, random_weights


class TinyModel(nn.Module):
    """The parts that matter: a norm, a bias, buffers of both kinds, a head that may be tied."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(8, 4)
        self.proj = nn.Linear(4, 6, bias=True)
        self.input_layernorm = nn.LayerNorm(4, bias=False)
        self.lm_head = nn.Linear(4, 8, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("inv_freq", torch.ones(2), persistent=False)


class MemoryCheckpoint:
    """A checkpoint out of a dict, which counts what is read from it."""

    def __init__(self, tensors: Mapping[str, Tensor], config: dict[str, Any] | None = None) -> None:
        self.path = Path("somewhere")
        self.config = config or {}
        self.generation_config: dict[str, Any] = {}
        self.tokenizer_json = None
        self.tokenizer_config: dict[str, Any] = {}
        self.chat_template = None
        self.gguf_metadata = None
        self.tensors = dict(tensors)
        self.reads: list[str] = []

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def tensor(
        self,
        name: str,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        self.reads.append(name)
        return self.tensors[name].to(device=device, dtype=dtype, copy=True)


def meta_model(*, tied: bool = True) -> TinyModel:
    with torch.device("meta"):
        return TinyModel(tied=tied)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed_tokens.weight": torch.randn(8, 4, generator=generator),
        "proj.weight": torch.randn(6, 4, generator=generator),
        "proj.bias": torch.randn(6, generator=generator),
        "input_layernorm.weight": torch.randn(4, generator=generator),
        "steps": torch.tensor([3, 4]),
    }


def load(model: nn.Module, tensors: Mapping[str, Tensor], **options: Any) -> MemoryCheckpoint:
    checkpoint = MemoryCheckpoint(tensors)
    load_into(model, checkpoint, **({"dtype": torch.float32, "device": "cpu"} | options))
    return checkpoint


def test_every_weight_arrives_and_tied_ones_are_read_once(tensors: dict[str, Tensor]) -> None:
    model = meta_model()
    checkpoint = load(model, tensors)
    for name, expected in tensors.items():
        assert torch.equal(model.state_dict()[name], expected), name
    assert model.lm_head.weight is model.embed_tokens.weight
    assert sorted(checkpoint.reads) == sorted(tensors)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_floats_take_the_dtype_and_other_buffers_keep_theirs(tensors: dict[str, Tensor]) -> None:
    model = meta_model()
    load(model, tensors, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.steps.dtype == torch.int64


def test_a_non_persistent_buffer_is_left_to_the_model(tensors: dict[str, Tensor]) -> None:
    model = TinyModel()
    load(model, tensors)
    assert torch.equal(model.inv_freq, torch.ones(2))


def test_tied_weights_may_be_stored_under_either_name(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors.pop("embed_tokens.weight")
    model = meta_model()
    load(model, tensors)
    assert torch.equal(model.embed_tokens.weight, tensors["lm_head.weight"])


def test_tied_weights_may_be_stored_twice_if_they_are_equal(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["embed_tokens.weight"].clone()
    load(meta_model(), tensors)
    tensors["lm_head.weight"][0, 0] += 1
    with pytest.raises(CheckpointError, match=r"ties .* but they differ"):
        load(meta_model(), tensors)


def test_an_untied_head_needs_its_own_weights(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match=r"1 missing \(lm_head\.weight\)"):
        load(meta_model(tied=False), tensors)


def test_everything_that_does_not_fit_is_in_one_error_before_any_read(
    tensors: dict[str, Tensor],
) -> None:
    del tensors["proj.bias"]
    tensors["proj.weight"] = torch.zeros(4, 6)
    tensors |= {f"layers.{i}.weight": torch.zeros(1) for i in range(5)}
    checkpoint = MemoryCheckpoint(tensors)
    model = meta_model()
    with pytest.raises(CheckpointError) as caught:
        load_into(model, checkpoint, dtype=torch.float32, device="cpu")
    message = str(caught.value)
    assert "1 missing (proj.bias)" in message
    assert "5 not part of the model (layers.0.weight, layers.1.weight, layers.2.weight, …)" in (
        message
    )
    assert "1 of another shape (proj.weight is [4, 6] instead of [6, 4])" in message
    assert checkpoint.reads == []
    assert all(parameter.is_meta for parameter in model.parameters())


def test_extra_tensors_can_be_ignored(tensors: dict[str, Tensor]) -> None:
    tensors["layers.0.rotary_emb.inv_freq"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="rotary_emb"):
        load(meta_model(), tensors)
    load(meta_model(), tensors, ignore=lambda name: name.endswith("inv_freq"))


def test_weights_quantised_by_another_library_are_refused(tensors: dict[str, Tensor]) -> None:
    checkpoint = MemoryCheckpoint(tensors, {"quantization_config": {"quant_method": "awq"}})
    with pytest.raises(NotSupported, match="quantised with 'awq'"):
        load_into(meta_model(), checkpoint, dtype=torch.float32, device="cpu")


def test_random_weights_depend_on_seed_and_name_alone() -> None:
    model, again, other = meta_model(), meta_model(), meta_model(tied=False)
    random_weights(model, dtype=torch.float32, device="cpu", seed=1)
    random_weights(again, dtype=torch.float32, device="cpu", seed=1)
    random_weights(other, dtype=torch.float32, device="cpu", seed=2)
    assert torch.equal(model.proj.weight, again.proj.weight)
    assert not torch.equal(model.proj.weight, other.proj.weight)
    assert not torch.equal(other.embed_tokens.weight, other.lm_head.weight)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert 0.01 < model.embed_tokens.weight.std() < 0.03


def test_random_norms_are_one_and_biases_zero() -> None:
    model = meta_model()
    random_weights(model, dtype=torch.float16, device="cpu")
    assert torch.equal(model.input_layernorm.weight, torch.ones(4, dtype=torch.float16))
    assert torch.equal(model.proj.bias, torch.zeros(6, dtype=torch.float16))
    assert torch.equal(model.steps, torch.zeros(2, dtype=torch.int64))


def test_random_weights_in_another_dtype_are_the_same_rounded() -> None:
    model = meta_model()
    random_weights(model, dtype=torch.float32, device="cpu")
    exact = copy.deepcopy(model.proj.weight)
    random_weights(model, dtype=torch.bfloat16, device="cpu")
    assert torch.equal(model.proj.weight, exact.to(torch.bfloat16))
