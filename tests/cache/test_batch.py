"""A step's tensors: what is packed where."""

import pytest
import torch

from kvist.cache import Batch

TOKENS, CACHED = [[5, 6, 7], [], [8], [9, 1]], [0, 4, 2, 10]


def test_new_tokens_go_on_behind_what_is_cached():
    batch = Batch.pack(TOKENS, CACHED)
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 9, 1]
    assert batch.positions.tolist() == [0, 1, 2, 2, 10, 11]
    assert batch.sequence_index.tolist() == [0, 0, 0, 2, 3, 3]
    assert batch.logit_rows.tolist() == [2, 3, 5]
    assert batch.kv_lens == (3, 4, 3, 12)
    assert batch.cached_lens == tuple(CACHED)


def test_one_new_token_each():
    batch = Batch.pack([[5], [6]], [3, 0])
    assert batch.token_ids.tolist() == [5, 6]
    assert batch.positions.tolist() == [3, 0]
    assert batch.sequence_index.tolist() == batch.logit_rows.tolist() == [0, 1]
    assert batch.lasts_only


@pytest.mark.parametrize(
    ("logits", "rows"), [("all", [0, 1, 2, 3, 4, 5]), ("none", []), ([4, 0], [4, 0])], ids=str
)
def test_whose_logits_are_wanted(logits, rows):
    batch = Batch.pack(TOKENS, CACHED, logits=logits)
    assert batch.logit_rows.tolist() == rows
    assert not batch.lasts_only


def test_an_empty_step():
    batch = Batch.pack([], [])
    assert batch.num_tokens == batch.num_sequences == len(batch.logit_rows) == 0


@pytest.mark.parametrize("logits", ["last", [2, 3, 5], "none"], ids=str)
def test_a_step_as_its_last_tokens_see_it(logits):
    tokens, cached = [[5, 6, 7], [8], [9, 1]], [0, 2, 10]
    batch = Batch.pack(tokens, cached, logits=logits, slots=[4, 0, 2])
    assert batch.lasts_only == (logits != "none")
    lasts = batch.last_tokens()
    assert lasts.token_ids.tolist() == [7, 8, 1]
    assert lasts.positions.tolist() == [2, 2, 11]
    assert (lasts.query_lens, lasts.kv_lens, lasts.slots) == ((1, 1, 1), (3, 3, 12), (4, 0, 2))
    assert torch.equal(lasts.sequence_index, torch.arange(3))
