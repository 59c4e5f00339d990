"""Recorded decode steps give the tokens of the plain engine, with every codec and every request."""

from dataclasses import replace

import pytest
import torch
import triton
from test_fused_step import CONFIG, SLIDING, tiny

from kvist.core.params import SamplingParams
from kvist.engine import Engine, EngineConfig
from kvist.kernels.jit import Kernel, compile_ahead
from kvist.llm import LLM
from kvist.loading.model import Model
from kvist.runner.fused import FusedStep
from kvist.runner.runner import PagedRunner
from kvist.runner.step import model_step

# The interpreter takes seconds for a step of these.
PROMPTS = [list(range(3, 3 + n)) for n in (10, 1, 5)]
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def model_of(device: torch.device, **changes: object) -> Model:
    lm = tiny(device, **{"head_dim": 64, **changes})
    return Model("tiny", lm, None, torch.float32, device)


class Recorded(Engine):
    """An engine that replays, also where there is no GPU."""

    def _open_books(self) -> None:
        super()._open_books()
        self.runner = PagedRunner(
            self.model.lm,
            self.pool,
            vocab_size=CONFIG["vocab_size"],
            step=self._step,
            record=True,
            backend="triton",
        )


def results(model: Model, params, *, recorded: bool, prompts=PROMPTS, **options):
    llm = LLM(model, block_size=4, max_num_seqs=4, max_model_len=64, attention="triton", **options)
    step = FusedStep(model.lm)
    kind = Recorded if recorded else Engine
    config = EngineConfig(**{"block_size": 4, "max_num_seqs": 4, "max_model_len": 64,
                             "attention": "triton", "graphs": False} | options)  # fmt: skip
    llm.engine = kind(model, config, step=step)
    llm._desk.engine = llm.engine
    found = llm.generate(prompts, params)
    llm.engine.check()
    return found, llm.engine.runner


@pytest.mark.parametrize(
    ("codec", "overlap"), [("plain", False), ("plain", True), ("fp8", True), ("int4", True)]
)
def test_replayed_steps_give_the_engines_tokens(codec, overlap, device):
    model = model_of(device, **SLIDING)
    expected, _ = results(model, GREEDY, recorded=False, codec=codec, overlap=False)
    ours, runner = results(model, GREEDY, recorded=True, codec=codec, overlap=overlap)
    assert [r.token_ids for r in ours] == [r.token_ids for r in expected]
    assert runner._graphs._recordings


@pytest.mark.parametrize("codec", ["plain", "fp8", "int4"])
def test_replayed_steps_with_prompts_give_the_engines_tokens(codec, device):
    model = model_of(device, **SLIDING)
    prompts = [list(range(3, 3 + n)) for n in (8, 9)]
    options = {"codec": codec, "max_batch_tokens": 4, "overlap": True, "prompts": prompts}
    expected, _ = results(model, GREEDY, recorded=False, **options)
    ours, runner = results(model, GREEDY, recorded=True, **options)
    assert [r.token_ids for r in ours] == [r.token_ids for r in expected]
    # Parts of one prompt alone, and of one beside a decode.
    assert {sequences for _, sequences, *_ in runner._prompt_graphs._recordings} == {1, 4}


def test_draws_penalties_and_log_probabilities_are_those_of_the_engine(device):
    model = model_of(device, model_type="llama")
    params = [
        SamplingParams(temperature=0.9, seed=3, max_tokens=3, ignore_eos=True),
        SamplingParams(temperature=0.7, top_k=9, top_p=0.9, seed=5, max_tokens=6, ignore_eos=True),
        SamplingParams(
            temperature=0, max_tokens=5, repetition_penalty=1.4, logprobs=3, ignore_eos=True
        ),
    ]
    expected, _ = results(model, params, recorded=False, overlap=True)
    ours, runner = results(model, params, recorded=True, overlap=True)
    for a, b in zip(ours, expected, strict=True):
        assert a.token_ids == b.token_ids
    assert {kind for _, _, kind, _ in runner._graphs._recordings} >= {"logits", "filtered"}
    pairs = zip(ours[2].logprobs, expected[2].logprobs, strict=True)
    assert all(abs(a.logprob - b.logprob) < 1e-3 for a, b in pairs)


def test_a_recorded_chunk_of_one_token_brings_the_prompts_log_probabilities(device):
    model = model_of(device, model_type="llama", num_hidden_layers=1, head_dim=16)
    # In the second step, of one size with the first, the last prompt's only chunk is one token.
    prompts = [[5], list(range(3, 8)), [9, 4, 6]]
    greedy = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    params = [replace(greedy, max_tokens=3), greedy, replace(greedy, prompt_logprobs=0)]
    options = {"max_batch_tokens": 4, "overlap": True, "prompts": prompts}
    expected, _ = results(model, params, recorded=False, **options)
    ours, _ = results(model, params, recorded=True, **options)
    assert ours[2].error is None
    assert [r.token_ids for r in ours] == [r.token_ids for r in expected]
    pairs = zip(ours[2].prompt_logprobs[1:], expected[2].prompt_logprobs[1:], strict=True)
    assert all(abs(a.logprob - b.logprob) < 1e-3 for a, b in pairs)


def test_a_row_that_is_not_finite_fails_its_own_request(device):
    model = model_of(device, model_type="llama")

    class Broken(FusedStep):
        def raw(self, batch, cache):
            logits = super().raw(batch, cache)
            if batch.num_sequences > 1:
                logits[1, 3].fill_(torch.nan)
            return logits

    engine = Recorded(
        model,
        EngineConfig(block_size=4, max_num_seqs=2, max_model_len=32, attention="triton"),
        step=Broken(model.lm),
    )
    llm = LLM(model, max_model_len=32, max_num_seqs=2)
    llm.engine = llm._desk.engine = engine
    first, second = llm.generate([[5], [6]], GREEDY)
    assert first.finish_reason == "length"
    assert second.finish_reason == "error"
    assert "NaN" in second.error


@pytest.mark.parametrize("sizes", [(1, 3), (4, 64)], ids=["little room", "usual"])
@pytest.mark.parametrize("codec", ["plain", "int4"])
def test_a_rehearsal_starts_no_kernel_and_writes_no_block_of_a_sequence(
    codec, sizes, device, monkeypatch
):
    seqs, length = sizes
    config = EngineConfig(block_size=4, max_num_seqs=seqs, max_model_len=length, codec=codec)
    model = model_of(device, **SLIDING)
    engine = Recorded(model, config, step=FusedStep(model.lm))
    started, launch = [], Kernel._launch

    def noted(kernel: Kernel, *arguments: object, **constants: object) -> None:
        started.append(kernel.function.__name__)
        launch(kernel, *arguments, **constants)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a rehearsal compiles")

    monkeypatch.setattr(Kernel, "_launch", noted)
    if device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
        monkeypatch.setattr(triton.runtime.interpreter.GridExecutor, "__call__", never)
    planes = [
        plane.view(torch.uint8)[1:]
        for pool in engine.pool.pools
        for sides in pool.planes.values()
        for side in sides.values()
        for plane in side.values()
    ]
    before = [plane.clone() for plane in planes]
    with torch.inference_mode():
        compile_ahead(engine.runner._rehearse)
    assert all(torch.equal(a, b) for a, b in zip(planes, before, strict=True))
    assert {"split_kernel", "rotary_kernel", "gemv_kernel", "place_kernel", "choose_kernel"} <= set(
        started
    )


def test_reference_steps_are_not_recorded(device):
    from kvist.runner.graphs import can_record

    model = model_of(device, model_type="llama")
    engine = Engine(model, EngineConfig(max_model_len=32), step=model_step(model.lm))
    assert not can_record(engine._step, engine.pool)
