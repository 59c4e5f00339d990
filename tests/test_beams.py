"""Beam search gives transformers' hypotheses."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvist
from kvist.errors import NotSupported, RequestError

transformers = pytest.importorskip("transformers")

QWEN3 = Path(__file__).parent / "fixtures" / "qwen3"


@pytest.fixture(scope="module")
def pair():
    """A tiny Qwen3, in kvist and in transformers."""
    path = QWEN3 / "dense_swa"
    reference = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    return kvist.load(path), reference.eval()


def reference_beams(reference, ids, width, count, new, ending):
    """The hypotheses that transformers finds, best first, without padding."""
    with torch.inference_mode():
        found = reference.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            num_beams=width,
            num_return_sequences=count,
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=ending,
            pad_token_id=0,
        )
    hypotheses = []
    for row in found[:, len(ids) :].tolist():
        ends = [i for i, token in enumerate(row) if token in ending]
        hypotheses.append(row[: ends[0] + 1] if ends else row)
    return hypotheses


@settings(max_examples=12, deadline=None)
@given(
    ids=st.lists(st.integers(0, 500), min_size=1, max_size=12),
    width=st.integers(2, 4),
    new=st.integers(1, 10),
    ending=st.sets(st.integers(0, 511), min_size=1, max_size=60),
)
def test_beams_are_those_of_transformers(pair, ids, width, new, ending):
    model, reference = pair
    params = kvist.SamplingParams(
        temperature=0,
        num_beams=width,
        n=width,
        max_tokens=new,
        stop_token_ids=sorted(ending),
        ignore_eos=True,
    )
    results = kvist.generate(model, [ids], params)
    expected = reference_beams(reference, ids, width, width, new, sorted(ending))
    assert [list(r.token_ids) for r in results] == expected


def test_prompts_with_and_without_beams_may_be_mixed(pair):
    model, _ = pair
    greedy = kvist.SamplingParams(temperature=0, max_tokens=6)
    beams = kvist.SamplingParams(temperature=0, max_tokens=6, num_beams=3)
    prompts = [[1, 2, 3], [4, 5], [6]]
    together = kvist.generate(model, prompts, [greedy, beams, greedy])
    alone = [
        kvist.generate(model, [p], q)[0]
        for p, q in zip(prompts, [greedy, beams, greedy], strict=True)
    ]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


@pytest.mark.parametrize(
    ("params", "error"),
    [
        ({"temperature": 0.5}, NotSupported),
        ({"temperature": 0, "stop": ["x"]}, NotSupported),
        ({"temperature": 0, "logprobs": 1}, NotSupported),
        ({"temperature": 0, "n": 3}, RequestError),
    ],
)
def test_what_beams_do_not_go_together_with_is_refused_by_name(pair, params, error):
    with pytest.raises(error, match="num_beams=2"):
        kvist.generate(pair[0], [[1]], kvist.SamplingParams(num_beams=2, max_tokens=2, **params))
