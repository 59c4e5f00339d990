"""The runner: carries out plans on a paged pool, packed, with sampling on the device.

It knows slots and blocks, never requests or text. A step whose rows bring no guesses waits for
nothing: sampled tokens stay on the device, where the next plan's rows find them, and are read when
somebody asks the ticket for its result.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvist.cache.batch import Batch, int_tensor
from kvist.cache.paged import PagedPool
from kvist.core.plan import LAST_SAMPLED, Plan, PlanRow, RowOutput, StepOutput, TokenLogprobs
from kvist.core.protocols import Ticket
from kvist.models.decoder import CausalLM
from kvist.runner.encoder_cache import place_images
from kvist.runner.follow import Guessed, follow
from kvist.runner.fused import FusedStep
from kvist.runner.graphs import DecodeGraphs
from kvist.runner.greedy import finite_rows
from kvist.runner.prompt_graphs import PromptGraphs
from kvist.runner.recorder import Recorder
from kvist.runner.sampler import Sampler, is_simple, logprobs_later, read_later
from kvist.runner.step import StepFunction, model_step
from kvist.runner.uploads import Kind, Uploads

PROMPTS = (16, 32, 64, 128, 512)  # tokens: one for each kind of product

NOT_FINITE = (
    "the logits are NaN or infinite; the weights may be damaged, or dtype too narrow for this "
    "model: try dtype='float32'"
)


class PagedRunner:
    """Implements `core.protocols.Runner`.

    Args:
        lm: the model.
        pool: where its keys and values lie.
        vocab_size: width of the logits.
        step: a drop-in for the model's own forward.
        record: whether steps are recorded and replayed (graphs.py, prompt_graphs.py); `step` must
            allow it.
        backend: the attention kernel by name; None lets `attend` choose.
        encode: an image's pixels -> its embeddings `[tokens, hidden]`; None where the model has
            no encoder.
        mask_of: an allowed-token mask by its handle, bool `[vocab]`.
    """

    def __init__(
        self,
        lm: CausalLM,
        pool: PagedPool,
        *,
        vocab_size: int,
        step: StepFunction | None = None,
        record: bool = False,
        backend: str | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,
        mask_of: Callable[[int], Tensor] | None = None,
    ) -> None:
        """Take the pool over; nobody else may bind it from here on."""
        self.lm = lm
        self.pool = pool
        self.step = step or model_step(lm)
        self.backend = backend
        self.encode = encode
        self.mask_of = mask_of
        self.vocab_size = vocab_size
        self.sampler = Sampler(vocab_size, pool.device)
        self._ending: dict[int, frozenset[int]] = {}
        self._tops: dict[int, tuple[int | None, int | None]] = {}  # logprobs, prompt_logprobs
        self._images: dict[str, Tensor] = {}
        # The token last sampled in each slot.
        self._last = torch.zeros(pool.max_slots + 1, dtype=torch.long, device=pool.device)
        self._on_device: AbstractContextManager[Any] = nullcontext()
        if pool.device.type == "cuda":
            self._on_device = torch.cuda.device(pool.device)
        # Slots of sequences that ask for no more than temperature and filters.
        self._simple: set[int] = set()
        self._graphs, self._prompt_graphs = None, None
        if record:
            assert isinstance(self.step, FusedStep), "see can_record"
            uploads, recorder = Uploads(pool, self._last), Recorder(pool.device)
            self._graphs = DecodeGraphs(self.step, pool, uploads, recorder, backend=backend)
            self._prompt_graphs = PromptGraphs(
                self.step, pool, vocab_size, uploads, recorder, backend=backend
            )

    @torch.inference_mode()
    def prepare(self) -> None:
        """Compile what first requests will want, side by side, where steps are kernels on a GPU."""
        if not isinstance(self.step, FusedStep) or self.pool.device.type != "cuda":
            return
        from kvist.kernels.jit import compile_ahead

        with self._on_device:
            compile_ahead(self._rehearse)

    def _rehearse(self) -> None:
        """Start what first requests will, on blocks that nobody has: prompts and a decode step."""
        assert isinstance(self.step, FusedStep)
        most = min(self.pool.max_tokens, self.pool.max_blocks * self.pool.block_size)
        # Prompts, and as much as a step takes of one that goes on behind its first block.
        cached = min(self.pool.block_size, most - 1)
        for count, start in {(min(n, most), 0) for n in PROMPTS} | {(most - cached, cached)}:
            batch = Batch.pack(
                [[0] * count], [start], device=self.pool.device, slots=[self.pool.null_slot]
            )
            binding = self.pool.bind(batch, backend=self.backend)
            self.sampler.rehearse(self.step.rehearse(batch, binding).float())
        if self._graphs is not None:
            self._graphs.rehearse()

    def execute(self, plan: Plan) -> Ticket:
        """Start a step; see `core.plan` for the order in which a plan's parts count."""
        with self._on_device:  # kernels start on the current device, whatever their tensors say
            return self._execute(plan)

    @torch.inference_mode()
    def _execute(self, plan: Plan) -> Ticket:
        for slot in plan.released:
            self.sampler.release(slot)
        for new in plan.admitted:
            self.sampler.admit(new.slot, new.params, new.prompt_ids, new.output_ids)
            self._ending[new.slot] = frozenset(new.ending_ids)
            self._tops[new.slot] = (new.params.logprobs, new.params.prompt_logprobs)
            (self._simple.add if is_simple(new.params) else self._simple.discard)(new.slot)
            if self._graphs is not None:
                self._graphs.uploads.admit(new.slot, new.params, self.vocab_size)
        self.pool.apply(plan.groups, [new.slot for new in plan.admitted])
        for digest in plan.dropped_images:
            self._images.pop(digest, None)
        for image in plan.encodes:
            assert self.encode is not None, "a plan with images for a model without an encoder"
            self._images[image.digest] = self.encode(image.pixels)
        rows = plan.rows
        if not rows:
            return _Known(StepOutput(plan.step))
        out, kind, targets, samples = self._forward(rows)
        if kind != "logits":
            return TokensTicket(plan, read_later(out))
        drawn = self._sample(rows, out, samples)
        return StepTicket(plan, out, targets, samples, drawn, self._tops)

    def _forward(self, rows: Sequence[PlanRow]) -> tuple[Tensor, Kind, list[range], list[range]]:
        """Start a step: its logits, and which are each row's targets and samples (see `_batch`).

        Or, where a recording samples, a token of each row.
        """
        kind: Kind = "logits"
        simple = all(map(self._is_simple, rows))
        if self._graphs is not None:
            if simple:
                kind = self._graphs.uploads.kind_of(rows)
            if self._graphs.fits(rows):
                out, asked = self._graphs.run(rows, kind), len(rows) if kind == "logits" else 0
                return out, kind, [range(0)] * asked, [range(i, i + 1) for i in range(asked)]
        batch, targets, samples = self._batch(rows, simple=simple)
        if self._prompt_graphs is not None and self._prompt_graphs.takes(batch, kind):
            return self._prompt_graphs.run(batch, rows, kind), kind, targets, samples
        logits = self.step(batch, self.pool.bind(batch, backend=self.backend))
        return logits, "logits", targets, samples

    def _batch(
        self, rows: Sequence[PlanRow], *, simple: bool
    ) -> tuple[Batch, list[range], list[range]]:
        """The step's tensors, and which rows of logits are each row's targets and samples.

        Targets are what the prompt's log-probabilities need, and of a row that samples nothing its
        last row, to be looked at.
        """
        spans: list[int] = []  # packed rows whose logits are wanted
        targets, samples, begin = [], [], 0
        for row in rows:
            end = begin + len(row.tokens)
            first = len(spans)
            spans += range(begin, begin + len(row.prompt_targets))
            # A chunk whose last row is sound may be found by others.
            if not row.sample and len(row.prompt_targets) < len(row.tokens):
                spans.append(end - 1)
            targets.append(range(first, len(spans)))
            first = len(spans)
            spans += range(end - 1 - row.num_drafts, end) if row.sample else ()
            samples.append(range(first, len(spans)))
            begin = end
        batch = Batch.pack(
            [row.tokens for row in rows],
            [row.start for row in rows],
            device=self.pool.device,
            slots=[row.slot for row in rows],
            logits=spans,
            largest_only=simple and not any(row.uniforms or row.num_drafts for row in rows),
        )
        if any(row.tokens[0] == LAST_SAMPLED for row in rows):
            slots = int_tensor([row.slot for row in rows for _ in row.tokens], self.pool.device)
            known = torch.where(batch.token_ids < 0, self._last[slots], batch.token_ids)
            batch = replace(batch, token_ids=known)
        if any(row.images for row in rows):
            batch = replace(batch, embeddings=self._embed(batch, rows))
        return batch, targets, samples

    def _is_simple(self, row: PlanRow) -> bool:
        """Whether the row's token follows from logits, a uniform number and temperature alone."""
        return row.slot in self._simple and not (row.ban_ending or row.mask or row.prompt_targets)

    def _embed(self, batch: Batch, rows: Sequence[PlanRow]) -> Tensor:
        """The tokens' embeddings, with the slices of images in their places."""
        slices = [
            part._replace(row_offset=begin + part.row_offset)
            for row, (begin, _) in zip(rows, batch.query_spans, strict=True)
            for part in row.images
        ]
        return place_images(self.lm.embed(batch.token_ids), slices, self._images)

    def _sample(
        self, rows: Sequence[PlanRow], logits: Tensor, samples: Sequence[range]
    ) -> "_Drawn":
        """Draw the rows' tokens."""
        drawing = [(row, places) for row, places in zip(rows, samples, strict=True) if places]
        if not drawing:
            return _Drawn(list, None)
        masks = {
            i: self.mask_of(row.mask)
            for i, (row, _) in enumerate(drawing)
            if row.mask and self.mask_of is not None
        }
        slots = int_tensor([row.slot for row, _ in drawing], self.pool.device)
        if any(row.num_drafts for row, _ in drawing):
            drawn = follow(
                self.sampler, logits, [self._guessed(row, at) for row, at in drawing], masks
            )
            self._last[slots] = int_tensor([tokens[-1] for tokens in drawn], self.pool.device)
            return _Drawn(lambda: drawn, None)
        places = [at[0] for _, at in drawing]
        whole = places == list(range(len(logits)))
        tokens = self.sampler.choose(
            logits if whole else logits[int_tensor(places, logits.device)],
            [row.slot for row, _ in drawing],
            [row.uniforms[0] if row.uniforms else 0.0 for row, _ in drawing],
            [self._ending[row.slot] if row.ban_ending else frozenset() for row, _ in drawing],
            masks,
        )
        self._last[slots] = tokens
        read = read_later(tokens)
        return _Drawn(lambda: [[token] for token in read()], tokens)

    def _guessed(self, row: PlanRow, places: range) -> Guessed:
        drafts = row.tokens[len(row.tokens) - row.num_drafts :]
        return Guessed(
            row.slot, places[0], drafts, row.uniforms, self._ending[row.slot], row.ban_ending
        )


class _Drawn(NamedTuple):
    """Sampled tokens: a function that reads those of each row, and where one a row they are."""

    read: Callable[[], list[list[int]]]
    tokens: Tensor | None


class _Known:
    """A step that had nothing to compute."""

    def __init__(self, output: StepOutput) -> None:
        """Its output is known."""
        self._output = output

    def result(self) -> StepOutput:
        """See `Ticket`."""
        return self._output


class TokensTicket:
    """A step whose rows have a token each, -1 where logits were not finite."""

    def __init__(self, plan: Plan, read: Callable[[], list[int]]) -> None:
        """`read` waits for the tokens."""
        self._plan, self._read = plan, read
        self._output: StepOutput | None = None

    def result(self) -> StepOutput:
        """See `Ticket`."""
        if self._output is None:
            rows = [
                RowOutput((token,) if row.sample else ())
                if token >= 0
                else RowOutput(fault=NOT_FINITE)
                for row, token in zip(self._plan.rows, self._read(), strict=True)
            ]
            self._output = StepOutput(self._plan.step, tuple(rows))
        return self._output


class StepTicket:
    """A step under way; `result` waits for it alone, not for what was started after it."""

    def __init__(
        self,
        plan: Plan,
        logits: Tensor,
        targets: list[range],
        samples: list[range],
        drawn: _Drawn,
        tops: dict[int, tuple[int | None, int | None]],
    ) -> None:
        """Queue the copies of all that the output needs: the next step may overwrite the logits."""
        self._plan, self._targets, self._samples, self._drawn = plan, targets, samples, drawn
        self._finite: Callable[[], list[bool]] = list
        if len(logits):
            self._finite = read_later(finite_rows(logits))
        # A later plan may give a slot to another sequence before this one is read.
        asked = [tops[row.slot] for row in plan.rows]
        self._logprobs = _later(logits, samples, self._chosen(asked), [top for top, _ in asked])
        self._prompt_logprobs = _later(
            logits,
            targets,
            [
                int_tensor(row.prompt_targets, logits.device) if row.prompt_targets else None
                for row in plan.rows
            ],
            [top for _, top in asked],
        )
        self._output: StepOutput | None = None

    def _chosen(self, asked: Sequence[tuple[int | None, int | None]]) -> list[Tensor | None]:
        """Each row's sampled tokens, where log-probabilities are asked for."""
        tokens, count = self._drawn.tokens, 0
        found: list[Tensor | None] = []
        known = None
        for places, (top, _) in zip(self._samples, asked, strict=True):
            if not places or top is None:
                found.append(None)
            elif tokens is not None:
                found.append(tokens[count : count + 1])
            else:  # guesses were followed, so the tokens have been read
                known = known or self._drawn.read()
                found.append(torch.tensor(known[count]))
            count += bool(places)
        return found

    def result(self) -> StepOutput:
        """What came of the step; a row whose logits are not finite has a fault instead."""
        if self._output is None:
            self._output = StepOutput(self._plan.step, tuple(self._rows()))
        return self._output

    def _rows(self) -> list[RowOutput]:
        finite, drawn = self._finite(), iter(self._drawn.read())
        outputs = []
        for i, (targets, samples) in enumerate(zip(self._targets, self._samples, strict=True)):
            tokens = next(drawn) if samples else []
            if not all(finite[place] for place in (*targets, *samples)):
                outputs.append(RowOutput(fault=NOT_FINITE))
                continue
            outputs.append(RowOutput(tuple(tokens), self._logprobs(i), self._prompt_logprobs(i)))
        return outputs


def _later(
    logits: Tensor,
    places: Sequence[range],
    tokens: Sequence[Tensor | None],
    tops: Sequence[int | None],
) -> Callable[[int], tuple[TokenLogprobs, ...]]:
    """Queue the log-probabilities of some rows' tokens; the function returned reads a row's."""
    asked: list[Tensor] = []
    spans: dict[int, range] = {}  # a row's part of what is read
    rows: list[int] = []
    wanted: list[int] = []
    for row, (at, ids, top) in enumerate(zip(places, tokens, tops, strict=True)):
        if at and ids is not None and top is not None:
            spans[row] = range(len(rows), len(rows) + len(ids))
            rows += range(at.start, at.start + len(ids))
            wanted += [top] * len(ids)
            asked.append(ids)
    if not asked:
        return lambda row: ()
    chosen = torch.cat([ids.to(logits.device) for ids in asked])
    read_all = cache(logprobs_later(logits, chosen, wanted, int_tensor(rows, logits.device)))

    def read(row: int) -> tuple[TokenLogprobs, ...]:
        found = read_all() if row in spans else []
        return tuple(
            TokenLogprobs(found[i].logprob, found[i].top, found[i].rank) for i in spans.get(row, ())
        )

    return read
