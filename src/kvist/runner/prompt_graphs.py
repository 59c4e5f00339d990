"""Steps with prompts as CUDA graphs: parts of prompts, alone or beside decodes, in one launch.

Such a step is some 300 launches, which take the host longer than a GPU computes a few hundred
tokens. A recording is of a number of tokens and of sequences, however the tokens are divided among
them: kernels find that on the device, in what `PagedPool.bind` fills. Recorded when met for the
second time. Larger steps keep a GPU busy for longer than their launches take. Made by the runner.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from kvist.attention.kernels import MOST_PROMPTS
from kvist.cache import Batch
from kvist.cache.paged import PagedPool
from kvist.core.plan import PlanRow
from kvist.runner.fused import FusedStep
from kvist.runner.graphs import CONTEXTS
from kvist.runner.recorder import Recorder, Recording
from kvist.runner.uploads import Kind, Uploads

# Steps are padded to the next of these; at some, products have the shape of whole tiles.
TOKENS = (32, 64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)
# Attention splits contexts by the number of sequences, from 32, 64 and 96 on in another way.
SEQUENCES = (1, 8, 31, 63, 95, 128, 160, 192, 224, 256, 320, 384, 448, 512)

MOST_RECORDINGS = 256  # those used longest ago are given up

_Key = tuple[int, int, int, Kind]  # tokens, sequences, context, sampling


class PromptGraphs:
    """Recordings of one step function on one pool, for steps of which some rows are prompts.

    Args:
        step: waits for nothing, and reads lengths, tables and places from the pool.
        pool: whose buffers the recordings read.
        vocab_size: width of the logits.
        uploads: what the host says of a step's rows.
        recorder: what records.
        backend: attention by name.
    """

    def __init__(
        self,
        step: FusedStep,
        pool: PagedPool,
        vocab_size: int,
        uploads: Uploads,
        recorder: Recorder,
        *,
        backend: str | None = None,
    ) -> None:
        """Record nothing yet."""
        self.step, self.pool, self.backend = step, pool, backend
        self.uploads, self._vocab_size, self._recorder = uploads, vocab_size, recorder
        self.most_tokens = min(TOKENS[-1], pool.max_tokens)
        self._met: set[_Key] = set()
        self._recordings: OrderedDict[_Key, Recording] = OrderedDict()
        device = pool.device
        self._ids = torch.zeros(self.most_tokens, dtype=torch.int64, device=device)
        self._positions = torch.zeros_like(self._ids)
        self._logit_rows = torch.zeros(pool.max_slots, dtype=torch.int64, device=device)
        self._logits: Tensor | None = None

    def takes(self, batch: Batch, kind: Kind) -> bool:
        """Whether this step is to be replayed; not where it is the first of its size."""
        prompts = batch.num_sequences - batch.query_lens.count(1)
        if not (
            0 < prompts <= MOST_PROMPTS
            and batch.num_sequences <= SEQUENCES[-1]
            and batch.num_tokens <= self.most_tokens
            and batch.lasts_only
            and batch.embeddings is None
            and batch.rope_positions is None
        ):
            return False
        key = self._key(batch, kind)
        known = key in self._met
        self._met.add(key)
        return known

    def run(self, batch: Batch, rows: Sequence[PlanRow], kind: Kind) -> Tensor:
        """Start a step that `takes` said yes to.

        Returns:
            `[B]` int64, a token behind each sequence's last one, -1 where logits were not finite;
            or for "logits" those, `[B, vocab]` float32. The next step writes over them.
        """
        count, key = batch.num_tokens, self._key(batch, kind)
        tokens, sequences, _, _ = key
        binding = self.pool.bind(batch, backend=self.backend)
        self._ids[:count] = batch.token_ids
        self._positions[:count] = batch.positions
        self._logit_rows[: batch.num_sequences] = batch.logit_rows
        # Behind the last sequence there are no queries, and what pads the tokens goes nowhere.
        self._logit_rows[batch.num_sequences : sequences] = 0
        self.uploads.send(rows, sequences)
        for view in binding.views:
            view.tables.buffers(0, tokens)[1][count:] = 0
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._recordings[key] = self._record(*key)
            if len(self._recordings) > MOST_RECORDINGS:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        recording.replay()
        return recording.out[: batch.num_sequences]

    def _key(self, batch: Batch, kind: Kind) -> _Key:
        tokens = next(n for n in TOKENS if n >= batch.num_tokens)
        sequences = next(n for n in SEQUENCES if n >= batch.num_sequences)
        longest = max(batch.kv_lens)
        context = next((n for n in CONTEXTS if n >= longest), 1 << longest.bit_length())
        return min(tokens, self.most_tokens), min(sequences, self.pool.max_slots), context, kind

    def _record(self, tokens: int, sequences: int, context: int, kind: Kind) -> Recording:
        # Kernels have room for any division of the tokens; this is none that a step would have.
        batch = Batch(
            token_ids=self._ids[:tokens],
            positions=self._positions[:tokens],
            query_lens=(tokens,) + (0,) * (sequences - 1),
            kv_lens=(context,) * sequences,
            logit_rows=self._logit_rows[:sequences],
            slots=(self.pool.null_slot,) * sequences,
            lasts_only=True,
        )

        def run() -> Tensor:
            # Bound anew: what kernels list once a step is part of the recording.
            binding = self.pool.bind_unfilled(batch, backend=self.backend)
            out = self.uploads.sample(self.step.raw(batch, binding), kind)
            return self._keep(out) if kind == "logits" else out

        return self._recorder.record(run)

    def _keep(self, logits: Tensor) -> Tensor:
        """Where all recordings leave their logits, so that each does not keep its own."""
        if self._logits is None:
            shape = self.pool.max_slots, self._vocab_size
            self._logits = torch.zeros(shape, device=self.pool.device)
        return self._logits[: len(logits)].copy_(logits)
