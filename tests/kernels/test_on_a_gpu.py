"""On a GPU in bfloat16: how far logits are from float32, and that no way there changes a token."""

import pytest
import torch
from test_fused_step import in_fp8, paged, tiny

import kvist
from kvist.cache import Batch, make_codec
from kvist.cache.dense import DynamicCache
from kvist.loading.model import Model
from kvist.models.decoder import Decoder
from kvist.runner.fused import FusedStep
from kvist.runner.recorder import Recorder
from kvist.runner.step import model_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPE = {
    "model_type": "qwen3",
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
TOLERANCE = 0.03
"""Norm of what bfloat16 changes over that of float32's logits, after 8 layers."""


def model_of(device: torch.device, weights: str = "auto") -> Decoder:
    model = tiny(device, **SHAPE)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.data.normal_(0.0, weight.shape[-1] ** -0.5)
    return in_fp8(model.bfloat16(), weights)


def logits_of(step, cache, lengths, device) -> torch.Tensor:
    """Of a prefill of some prompts and of three tokens more for each."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for count in (lengths, *[[1] * len(lengths)] * 3):
        new = [torch.randint(0, 2048, (n,), generator=generator).tolist() for n in count]
        batch = Batch.pack(new, cache.lengths, device=device)
        found.append(step(batch, cache.bind(batch)).float().clone())
        cache.commit(batch)
    return torch.cat(found)


@pytest.mark.parametrize("lengths", [[70], [37, 4, 11], [80] * 3], ids=["one", "three", "many"])
@pytest.mark.parametrize("weights", ["auto", "fp8"])
def test_logits_are_within_the_tolerance_of_float32(weights, lengths, device):
    model, rows = model_of(device, weights), len(lengths)
    fused = FusedStep(model)
    cache = paged(model, rows, device, torch.bfloat16)
    ours = logits_of(fused, cache, lengths, device)
    whole = tiny(device, **SHAPE)
    numbers = dict(whole.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding) or "norm" in name:
            matrix = getattr(module, "matrix", None)
            weight = module.weight.float() if matrix is None else matrix.dequantize(torch.float32)
            numbers[name].weight.data.copy_(weight)
    dense = DynamicCache(model.specs, make_codec("plain", torch.float32), rows=rows, device=device)
    expected = logits_of(model_step(whole), dense, lengths, device)
    assert (ours - expected).norm() < TOLERANCE * expected.norm()


@pytest.mark.parametrize("weights", ["auto", "fp8", "fp8-dynamic"])
def test_overlap_and_recordings_change_no_token(weights, device):
    model = Model("tiny", model_of(device, weights), None, torch.bfloat16, device)
    prompts = [list(range(3, 3 + n)) for n in (10, 1, 65, 33)]
    params = [
        kvist.SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
        kvist.SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=16, ignore_eos=True),
        kvist.SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=3),
        kvist.SamplingParams(temperature=1.0, seed=2, max_tokens=9, ignore_eos=True),
    ]
    found = []
    for overlap in (True, False):
        for graphs in (True, False):
            llm = kvist.LLM(model, max_model_len=256, overlap=overlap, graphs=graphs,
                            prefix_cache=False, cache_memory=1 << 26)  # fmt: skip
            found.append([r.token_ids for r in llm.generate(prompts, params)])
    assert found == [found[0]] * 4


def test_recordings_share_the_memory_of_what_they_compute_on_the_way(device):
    recorder, reserved = Recorder(device), []

    def run() -> torch.Tensor:
        return torch.ones(1 << 24, device=device).max()

    for _ in range(3):
        recording = recorder.record(run)
        recording.replay()
        assert recording.out.item() == 1
        reserved.append(torch.cuda.memory_reserved(device))
    assert len(set(reserved)) == 1


def test_a_recording_takes_the_room_of_what_is_kept_for_later(device):
    recorder, room = Recorder(device), 1 << 28
    torch.cuda.empty_cache()
    kept = torch.empty(3 * room, dtype=torch.uint8, device=device)
    total = torch.cuda.get_device_properties(device).total_memory
    # Room for what runs before it is recorded, and not for the recording beside it.
    limit = torch.cuda.memory_reserved(device) + room + (1 << 26)
    del kept
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        recording = recorder.record(lambda: torch.ones(room // 4, device=device).max())
        recording.replay()
        assert recording.out.item() == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
