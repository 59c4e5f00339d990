"""Allowed-token masks: a request with a grammar says only what that allows, its neighbours all."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from mixes import assert_idle, poisoned, run
from test_llm import GREEDY, PROMPTS
from torch import Tensor

import kvist
from kvist import SamplingParams
from kvist.engine import Engine, EngineConfig
from kvist.serving import Job, make_jobs
from tiny_models import tiny, whole_logits

VOCAB = 61


def mask_of(handle: int) -> Tensor:
    """Handle h allows the tokens that leave h - 1 when divided by 3."""
    return torch.arange(VOCAB) % 3 == handle - 1


class InTurns:
    """Tokens of the three kinds in turns, but every fourth is free; may break down."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at

    def mask(self, output_ids: Sequence[int]) -> int:
        if len(output_ids) == self.fails_at:
            raise ValueError("no token is allowed")
        return 0 if len(output_ids) % 4 == 3 else 1 + len(output_ids) % 3


def masked_greedy(prompt: Sequence[int], count: int) -> tuple[int, ...]:
    output: list[int] = []
    for _ in range(count):
        logits = whole_logits(tiny(), [*prompt, *output])[-1]
        if handle := InTurns().mask(output):
            logits = logits.masked_fill(~mask_of(handle), -torch.inf)
        output.append(int(logits.argmax()))
    return tuple(output)


def jobs_with(grammars: Sequence[InTurns | None], params: SamplingParams = GREEDY) -> list[Job]:
    jobs = make_jobs(tiny(), PROMPTS[: len(grammars)], params, lambda i: f"g{i}")
    return [
        Job(replace(job.request, grammar=grammar), job.samples)
        for job, grammar in zip(jobs, grammars, strict=True)
    ]


def engine(**options: Any) -> Engine:
    sizes = {"block_size": 4, "max_batch_tokens": 16, "cache_memory": 1 << 17}
    return poisoned(Engine(tiny(), EngineConfig(**(sizes | options)), mask_of=mask_of))


@pytest.mark.parametrize("options", [{}, {"overlap": True}, {"speculate": 3}], ids=str)
def test_a_grammar_holds_for_its_own_request(options: dict[str, Any]) -> None:
    made = engine(**options)
    results = run(made, jobs_with([None, InTurns(), InTurns(), None]))
    free = kvist.generate(tiny(), PROMPTS[:4], GREEDY)
    for i, [result] in enumerate(results):
        expected = free[i].token_ids if i in (0, 3) else masked_greedy(PROMPTS[i], 12)
        assert result.token_ids == expected
    assert_idle(made)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_grammar_that_breaks_down_fails_its_own_request(overlap: bool) -> None:
    made = engine(overlap=overlap)
    results = run(made, jobs_with([None, InTurns(fails_at=3), None]))
    free = kvist.generate(tiny(), PROMPTS[:3], GREEDY)
    [broken] = results[1]
    assert broken.finish_reason == "error"
    assert "no token is allowed" in (broken.error or "")
    assert broken.token_ids == masked_greedy(PROMPTS[1], 3)
    assert [r.token_ids for [r] in (results[0], results[2])] == [
        free[0].token_ids,
        free[2].token_ids,
    ]
    assert_idle(made)


def test_sampling_stays_within_the_mask() -> None:
    params = SamplingParams(temperature=1.5, seed=4, max_tokens=30, ignore_eos=True)
    [[result]] = run(engine(), jobs_with([InTurns()], params))
    said = result.token_ids
    assert len(said) == 30
    for i, token in enumerate(said):
        handle = InTurns().mask(said[:i])
        assert not handle or mask_of(handle)[token]
