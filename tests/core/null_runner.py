"""A runner without a model: it knows what every place of every block must hold, and checks it.

A place holds a fingerprint of all that a token's keys and values depend on: the tokens up to it,
the images, the tenant. When a row "attends", every place that it may look at must hold exactly its
own sequence's fingerprint, so any block that is shared, reused, moved or freed wrongly is caught at
the first token that would have read it. Tokens are a function of the fingerprints too: whatever the
scheduler does, each request's output must equal `expected_output`.
"""

from dataclasses import dataclass, field
from zlib import crc32

from kvist.core.plan import (
    LAST_SAMPLED,
    NULL_BLOCK,
    Admission,
    Plan,
    PlanRow,
    RowOutput,
    StepOutput,
    TokenLogprobs,
)
from kvist.core.request import Request
from kvist.core.rng import uniform
from kvist.core.sequence import Sequence
from kvist.core.spec import AttentionSpec

VOCAB = 7
EOS = 6


def fingerprints(request: Request, tokens: list[int]) -> list[int]:
    """One number per position: all that its keys and values depend on."""
    state = _mark(request.cache_salt, request.adapter)
    result = []
    for position, token in enumerate(tokens):
        image = next((s for s in request.images if s.start <= position < s.stop), None)
        seen = (image.digest, position - image.start) if image else token
        state = _mark(state, seen)
        result.append(state)
    return result


def _mark(*values: object) -> int:
    return crc32(repr(values).encode())


def next_token(fingerprint: int, draw: float, banned: frozenset[int], mask: int) -> int:
    """The "model" with its "sampler": any function will do that depends on everything."""
    token = (fingerprint + int(draw * 1000) + mask) % VOCAB
    while token in banned:
        token = (token + 1) % VOCAB
    return token


def expected_output(request: Request, sample: int) -> list[int]:
    """What one sample of a request must give, however scheduled; less if its grammar fails."""
    sequence = Sequence(request.prompt_ids, request.params, request.eos_token_ids, sample)
    reason = None
    while reason is None:
        tokens = [*sequence.prompt_ids, *sequence.output_ids]
        draw = 0.0 if request.params.greedy else sequence.uniform()
        try:
            mask = request.grammar.mask(sequence.output_ids) if request.grammar else 0
        except (ValueError, KeyError):
            break
        last = fingerprints(request, tokens)[-1]
        reason = sequence.append(next_token(last, draw, sequence.banned_ids(), mask))
    return sequence.output_ids


@dataclass
class Slot:
    """A running sequence as the runner knows it."""

    admission: Admission
    tokens: list[int]
    tables: list[dict[int, int]]
    last_sampled: int | None = None
    broken: bool = False  # it had a fault; what it computes from now on means nothing


@dataclass(frozen=True)
class Done:
    """A step that was over at once."""

    output: StepOutput

    def result(self) -> StepOutput:
        """What came of it."""
        return self.output


@dataclass
class NullRunner:
    """Executes plans, and asserts that they make sense."""

    specs: list[AttentionSpec]
    block_size: int
    requests: dict[str, Request] = field(default_factory=dict)
    faulty: set[str] = field(default_factory=set)
    slots: dict[int, Slot] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    last_step: int = 0

    def __post_init__(self) -> None:
        # (group, block, place) -> fingerprint; host blocks hold lists of them.
        self.places: dict[tuple[int, int, int], int] = {}
        self.host: dict[tuple[int, int], list[int | None]] = {}
        # step -> blocks that it saves, host blocks that it loads: not to be touched until committed
        self.reading: dict[int, set[tuple[str, int, int]]] = {}

    def committed(self, plan: Plan) -> None:
        """The scheduler has taken in this plan's output."""
        del self.reading[plan.step]

    def execute(self, plan: Plan) -> Done:
        """One step: move blocks, write all rows, check all rows, sample."""
        assert plan.step == self.last_step + 1, "plans are executed in order"
        self.last_step = plan.step
        for slot in plan.released:
            del self.slots[slot]
        for admission in plan.admitted:
            assert admission.slot not in self.slots, "a slot was given away twice"
            tokens = [*admission.prompt_ids, *admission.output_ids]
            self.slots[admission.slot] = Slot(admission, tokens, [{} for _ in self.specs])
        self._move_blocks(plan)
        for digest in plan.dropped_images:
            del self.images[digest]
        for encode in plan.encodes:
            assert encode.digest not in self.images, "an image was encoded twice"
            self.images[encode.digest] = encode.length
        lengths = [len(row.tokens) for row in plan.rows]
        assert lengths[: lengths.count(1)] == [1] * lengths.count(1), (
            "rows of one token stand first"
        )
        written: set[tuple[int, int, int]] = set()
        prepared = [self._write(row, written) for row in plan.rows]
        rows = [self._attend(row, *p) for row, p in zip(plan.rows, prepared, strict=True)]
        return Done(StepOutput(plan.step, tuple(rows)))

    def _move_blocks(self, plan: Plan) -> None:
        saved = {("pool", g, m.block) for g, c in enumerate(plan.groups) for m in c.saves}
        loaded = {("host", g, m.host_block) for g, c in enumerate(plan.groups) for m in c.loads}
        self.reading[plan.step] = saved | loaded
        for g, changes in enumerate(plan.groups):
            for block, host_block in changes.saves:
                self._not_being_read("host", g, host_block)
                self.host[g, host_block] = self._read(g, block)
            for block, host_block in changes.loads:
                self._fill(g, block, self.host[g, host_block])
            for source, destination in changes.copies:
                self._fill(g, destination, self._read(g, source))
            for slot, first, blocks in changes.tables:
                for i, block in enumerate(blocks):
                    self.slots[slot].tables[g][first + i] = block

    def _not_being_read(self, where: str, group: int, block: int) -> None:
        for step, blocks in self.reading.items():
            assert (where, group, block) not in blocks, f"{where} block {block} is read in {step}"

    def _read(self, group: int, block: int) -> list[int | None]:
        assert block != NULL_BLOCK
        return [self.places.get((group, block, i)) for i in range(self.block_size)]

    def _fill(self, group: int, block: int, content: list[int | None]) -> None:
        assert block != NULL_BLOCK
        self._not_being_read("pool", group, block)
        for i, fingerprint in enumerate(content):
            if fingerprint is None:
                self.places.pop((group, block, i), None)
            else:
                self.places[group, block, i] = fingerprint

    def _write(
        self, row: PlanRow, written: set[tuple[int, int, int]]
    ) -> tuple[list[int], list[int]]:
        """Write the row's fingerprints; return its sequence's tokens and all fingerprints."""
        slot = self.slots[row.slot]
        request = self.requests[slot.admission.request_id]
        if slot.broken:
            self._write_nonsense(row, slot)
            return [], []
        new = [slot.last_sampled if t == LAST_SAMPLED else t for t in row.tokens]
        assert None not in new, "the slot has not sampled anything yet"
        known = slot.tokens[row.start : row.start + len(new) - row.num_drafts]
        assert len(slot.tokens) >= row.start, "the row starts behind the sequence's end"
        assert known == new[: len(known)], "the row feeds tokens that are not the sequence's"
        tokens = slot.tokens[: row.start] + [int(t) for t in new if t is not None]
        marks = fingerprints(request, tokens)
        for position in range(row.start, len(tokens)):
            index, place = divmod(position, self.block_size)
            for g in range(len(self.specs)):
                block = slot.tables[g].get(index, NULL_BLOCK)
                assert block != NULL_BLOCK, f"position {position} has no block to write to"
                assert (g, block, place) not in written, "two rows write the same place"
                self._not_being_read("pool", g, block)
                written.add((g, block, place))
                self.places[g, block, place] = marks[position]
        covered = {
            row.start + image.row_offset + i
            for image in row.images
            for i in range(image.length)
            if self.images[image.digest] > image.offset + i
        }
        wanted = {p for s in request.images for p in range(s.start, s.stop)}
        assert covered == wanted & set(range(row.start, len(tokens))), "image embeddings missing"
        return tokens, marks

    def _write_nonsense(self, row: PlanRow, slot: Slot) -> None:
        for position in range(row.start, row.start + len(row.tokens)):
            index, place = divmod(position, self.block_size)
            for g in range(len(self.specs)):
                self.places[g, slot.tables[g][index], place] = -1

    def _attend(self, row: PlanRow, tokens: list[int], marks: list[int]) -> RowOutput:
        slot = self.slots[row.slot]
        request = self.requests[slot.admission.request_id]
        if slot.broken:
            return RowOutput(fault="an earlier fault")
        for g, spec in enumerate(self.specs):
            seen = set()
            for query in range(row.start, len(tokens)):
                low = 0 if spec.window is None else max(0, query - spec.window + 1)
                seen |= {*range(min(spec.sinks, query + 1)), *range(low, query + 1)}
            for position in seen:
                index, place = divmod(position, self.block_size)
                block = slot.tables[g].get(index, NULL_BLOCK)
                held = self.places.get((g, block, place)) if block else None
                assert held == marks[position], (
                    f"group {g}: position {position} of {request.id} should be in block {block}, "
                    f"place {place}, but that holds something else"
                )
        if request.id in self.faulty:
            slot.broken = True
            return RowOutput(fault="NaN logits")
        reports = tuple(TokenLogprobs(float(target)) for target in row.prompt_targets)
        for i, target in enumerate(row.prompt_targets):
            assert request.prompt_ids[row.start + 1 + i] == target
        if not row.sample:
            return RowOutput(prompt_logprobs=reports)
        sampled = self._sample(row, tokens, marks, request)
        return RowOutput(sampled, tuple(TokenLogprobs(float(t)) for t in sampled), reports)

    def _sample(
        self, row: PlanRow, tokens: list[int], marks: list[int], request: Request
    ) -> tuple[int, ...]:
        slot = self.slots[row.slot]
        ending = frozenset(slot.admission.ending_ids)
        accepted: list[int] = []
        first = len(tokens) - row.num_drafts - 1  # the last token that is not a guess
        for i in range(1 + row.num_drafts):
            draw = row.uniforms[i] if row.uniforms else 0.0
            if row.uniforms:
                output = first + 1 + i - len(request.prompt_ids)
                params, sample = request.params, slot.admission.sample_index
                assert draw == uniform(params.seed, sample, output)
            banned = ending if i < row.ban_ending else frozenset()
            token = next_token(marks[first + i], draw, banned, row.mask)
            accepted.append(token)
            if i < row.num_drafts and token != tokens[first + 1 + i]:
                break
        slot.tokens = tokens[: first + 1] + accepted
        slot.last_sampled = accepted[-1]
        return tuple(accepted)
