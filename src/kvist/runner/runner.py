"""The runner: carries out plans on a paged pool, packed, with sampling on the device.

It knows slots and blocks, never requests or text. A step whose rows bring no guesses waits for
nothing: sampled tokens stay on the device, where the next plan's rows find them, and are read when
somebody asks the ticket for its result.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvist.cache.batch import Batch, int_tensor
from kvist.cache.paged import PagedPool
from kvist.core.plan import LAST_SAMPLED, Plan, PlanRow, RowOutput, StepOutput, TokenLogprobs
from kvist.core.results import TokenLogprob
from kvist.models.decoder import CausalLM
from kvist.runner.encoder_cache import place_images
from kvist.runner.follow import Guessed, follow
from kvist.runner.sampler import Sampler, logprobs_of
from kvist.runner.step import StepFunction, model_step

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
        self.sampler = Sampler(vocab_size, pool.device)
        self._ending: dict[int, frozenset[int]] = {}
        self._tops: dict[int, tuple[int | None, int | None]] = {}  # logprobs, prompt_logprobs
        self._images: dict[str, Tensor] = {}
        # The token last sampled in each slot.
        self._last = torch.zeros(pool.max_slots + 1, dtype=torch.long, device=pool.device)

    @torch.inference_mode()
    def execute(self, plan: Plan) -> "StepTicket":
        """Start a step; see `core.plan` for the order in which a plan's parts count."""
        for slot in plan.released:
            self.sampler.release(slot)
        for new in plan.admitted:
            self.sampler.admit(new.slot, new.params, new.prompt_ids, new.output_ids)
            self._ending[new.slot] = frozenset(new.ending_ids)
            self._tops[new.slot] = (new.params.logprobs, new.params.prompt_logprobs)
        self.pool.apply(plan.groups, [new.slot for new in plan.admitted])
        for digest in plan.dropped_images:
            self._images.pop(digest, None)
        for image in plan.encodes:
            assert self.encode is not None, "a plan with images for a model without an encoder"
            self._images[image.digest] = self.encode(image.pixels)
        if not plan.rows:
            return StepTicket(plan, None, [], [], list, self._tops)
        batch, targets, samples = self._batch(plan.rows)
        logits = self.step(batch, self.pool.bind(batch, backend=self.backend))
        return StepTicket(
            plan, logits, targets, samples, self._sample(plan.rows, logits, samples), self._tops
        )

    def _batch(self, rows: Sequence[PlanRow]) -> tuple[Batch, list[range], list[range]]:
        """The step's tensors, and which rows of logits are each row's targets and samples."""
        spans: list[int] = []  # packed rows whose logits are wanted
        targets, samples, begin = [], [], 0
        for row in rows:
            end = begin + len(row.tokens)
            first = len(spans)
            spans += range(begin, begin + len(row.prompt_targets))
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
        )
        if any(row.tokens[0] == LAST_SAMPLED for row in rows):
            slots = int_tensor([row.slot for row in rows for _ in row.tokens], self.pool.device)
            known = torch.where(batch.token_ids < 0, self._last[slots], batch.token_ids)
            batch = replace(batch, token_ids=known)
        if any(row.images for row in rows):
            batch = replace(batch, embeddings=self._embed(batch, rows))
        return batch, targets, samples

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
    ) -> Callable[[], list[list[int]]]:
        """Draw the rows' tokens; the function returned reads them."""
        drawing = [(row, places) for row, places in zip(rows, samples, strict=True) if places]
        if not drawing:
            return list
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
            return lambda: drawn
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
        return lambda: [[token] for token in tokens.tolist()]

    def _guessed(self, row: PlanRow, places: range) -> Guessed:
        drafts = row.tokens[len(row.tokens) - row.num_drafts :]
        return Guessed(
            row.slot, places[0], drafts, row.uniforms, self._ending[row.slot], row.ban_ending
        )


class StepTicket:
    """A step under way; `result` waits for it, once."""

    def __init__(
        self,
        plan: Plan,
        logits: Tensor | None,
        targets: list[range],
        samples: list[range],
        read: Callable[[], list[list[int]]],
        tops: dict[int, tuple[int | None, int | None]],
    ) -> None:
        """Made by `PagedRunner.execute` alone."""
        self._plan, self._logits, self._read = plan, logits, read
        self._targets, self._samples = targets, samples
        # A later plan may give a slot to another sequence before this one is read.
        self._tops = [tops[row.slot] for row in plan.rows]
        self._finite = None if logits is None or not len(logits) else logits.amax(-1).isfinite()
        self._output: StepOutput | None = None

    def result(self) -> StepOutput:
        """What came of the step; a row whose logits are not finite has a fault instead."""
        if self._output is None:
            self._output = StepOutput(self._plan.step, tuple(self._rows()))
            self._logits = None
        return self._output

    @torch.inference_mode()
    def _rows(self) -> list[RowOutput]:
        finite = [] if self._finite is None else self._finite.tolist()
        drawn, outputs = iter(self._read()), []
        for row, targets, samples, (top, prompt_top) in zip(
            self._plan.rows, self._targets, self._samples, self._tops, strict=True
        ):
            tokens = next(drawn) if samples else []
            if not all(finite[i] for i in (*targets, *samples)):
                outputs.append(RowOutput(fault=NOT_FINITE))
                continue
            outputs.append(
                RowOutput(
                    tuple(tokens),
                    self._logprobs(samples[: len(tokens)], tokens, top),
                    self._logprobs(targets, row.prompt_targets, prompt_top),
                )
            )
        return outputs

    def _logprobs(
        self, places: range, tokens: Sequence[int], top: int | None
    ) -> tuple[TokenLogprobs, ...]:
        if top is None or not places or self._logits is None:
            return ()
        rows = self._logits[places.start : places.stop]
        found: list[TokenLogprob] = logprobs_of(rows, tokens, [top] * len(tokens))
        return tuple(TokenLogprobs(one.logprob, one.top) for one in found)
