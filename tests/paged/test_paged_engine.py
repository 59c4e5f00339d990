"""The scheduler, its block manager and the paged pool together give each request's own tokens.

The runner here is the smallest that executes plans: greedy, on the host, without images.
"""

import random
from collections import deque

import pytest
import torch
from paged_models import VOCAB, forward, poison

from kvist.cache import Batch, make_codec
from kvist.cache.dense import DynamicCache
from kvist.cache.paged import PagedPool
from kvist.core.blocks import PagedBlockManager
from kvist.core.limits import SchedulerConfig
from kvist.core.params import ResolvedParams
from kvist.core.plan import LAST_SAMPLED, RowOutput, StepOutput, TokensEvent
from kvist.core.request import Request
from kvist.core.scheduler import ContinuousScheduler
from kvist.core.tables import CacheGroup

BLOCK = 4
SLOTS = 4


class GreedyRunner:
    """Executes plans; a block whose bytes are not this sequence's own gives NaN or other tokens."""

    def __init__(self, model, num_blocks, host_blocks):
        self.model = model
        self.pool = PagedPool(
            model.specs,
            make_codec("plain", torch.float32),
            num_blocks=num_blocks,
            host_blocks=host_blocks,
            block_size=BLOCK,
            max_slots=SLOTS,
            max_blocks=16,
            max_tokens=16,
        )
        for blocks in self.pool.pools:
            poison(blocks)
        self.last = [0] * SLOTS

    def execute(self, plan):
        self.pool.apply(plan.groups, admitted=[a.slot for a in plan.admitted])
        tokens = [
            [self.last[row.slot] if t == LAST_SAMPLED else t for t in row.tokens]
            for row in plan.rows
        ]
        if not tokens:
            return StepOutput(plan.step)
        starts, slots = [row.start for row in plan.rows], [row.slot for row in plan.rows]
        batch = Batch.pack(tokens, starts, slots=slots, logits="all")
        bound = self.pool.bind(batch)
        hidden = self.model.forward(self.model.embed(batch.token_ids), batch.positions, bound)
        logits = self.model.logits(hidden)
        assert not logits.isnan().any()
        picked = [part.tolist() for part in logits.argmax(-1).split(batch.query_lens)]
        return StepOutput(plan.step, tuple(map(self._sample, plan.rows, picked)))

    def _sample(self, row, picked):
        if not row.sample:
            return RowOutput()
        accepted = picked[-1 - row.num_drafts :]
        drafts = row.tokens[len(row.tokens) - row.num_drafts :]
        right = next((i for i, d in enumerate(drafts) if d != accepted[i]), row.num_drafts)
        self.last[row.slot] = accepted[right]
        return RowOutput(tuple(accepted[: right + 1]))


def greedy(model, prompt, count):
    cache, tokens = DynamicCache(model.specs, make_codec("plain", torch.float32)), list(prompt)
    new = tokens
    for _ in range(count):
        new = [int(forward(model, cache, [new])[0][-1].argmax())]
        tokens = tokens + new
    return tokens[len(prompt) :]


def random_requests(rng, count):
    stems = [[rng.randrange(VOCAB) for _ in range(rng.randint(0, 20))] for _ in range(3)]
    for i in range(count):
        prompt = rng.choice(stems) + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))]
        params = ResolvedParams(
            temperature=0.0, max_tokens=rng.randint(1, 12), n=rng.choice([1, 1, 2])
        )
        yield Request(id=f"r{i}", prompt_ids=tuple(prompt), params=params)


def repeat_last(prompt_ids, output_ids, limit):
    """A drafter that is often wrong and, on a tiny model that repeats itself, sometimes right."""
    return [(list(prompt_ids) + list(output_ids))[-1]] * limit


@pytest.mark.parametrize("drafter", [None, repeat_last])
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_every_request_gets_its_own_greedy_tokens(mixed, seed, ahead, drafter):
    rng = random.Random(seed)
    num_blocks, host_blocks = rng.choice([(18, 0), (18, 12), (26, 6)])
    runner = GreedyRunner(mixed, num_blocks, host_blocks)
    manager = PagedBlockManager(
        [CacheGroup(g.spec, num_blocks, host_blocks) for g in runner.pool.groups], BLOCK, slack=3
    )
    config = SchedulerConfig(
        max_num_seqs=SLOTS, max_batch_tokens=16, max_model_len=64, max_drafts=2 if drafter else 0
    )
    scheduler = ContinuousScheduler(config, manager, drafter=drafter)
    requests = list(random_requests(rng, 10))
    for request in requests:
        scheduler.add(request)
    outputs, under_way = {}, deque()
    for _ in range(2000):
        if not scheduler.has_unfinished:
            break
        plan = scheduler.schedule()
        under_way.append((plan, runner.execute(plan)))
        while len(under_way) > ahead or (under_way and not plan.rows):
            for event in scheduler.commit(*under_way.popleft()):
                if isinstance(event, TokensEvent):
                    key = event.request_id, event.sample_index
                    outputs.setdefault(key, []).extend(event.tokens)
    assert not scheduler.has_unfinished
    expected = {
        (request.id, sample): greedy(mixed, request.prompt_ids, request.params.max_tokens)
        for request in requests
        for sample in range(request.params.n)
    }
    assert outputs == expected
