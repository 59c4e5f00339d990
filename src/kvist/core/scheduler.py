"""The scheduler: which sequence computes which tokens in the next step.

Continuous batching under one token budget: decodes first, then prompts in chunks, then new
requests. It decides with plain integers and is deterministic; it never sees a tensor, a text or a
byte of cache. The engine calls it from one thread.

Why it cannot deadlock. Sequences are served by rank (priority, arrival, sample). One that lacks a
block takes it from the last in rank that is not in the plan yet, else it waits and keeps what it
has. A step that would do nothing while nothing is under way gives up the last in rank. So in the
end the first in rank runs alone, and `add` refused it if it could not do that.
"""

from collections import deque
from collections.abc import Mapping
from time import monotonic

from kvist.core.admission import has_headroom, open_blocks, worth_preempting
from kvist.core.blocks import PagedBlockManager
from kvist.core.images import EncoderCache
from kvist.core.limits import SchedulerConfig, refuse_what_never_fits
from kvist.core.look import describe_block, prefix_tree
from kvist.core.plan import (
    Event,
    FailedEvent,
    FinishedEvent,
    Plan,
    PlanRow,
    PromptLogprobsEvent,
    RowOutput,
    StepOutput,
    TokensEvent,
)
from kvist.core.protocols import Clock, Drafter
from kvist.core.record import BlockDetail, Look, RequestRecord, Snapshot
from kvist.core.request import Request
from kvist.core.roster import Roster
from kvist.core.rows import Build, Entry, draft, make_row
from kvist.core.snapshot import take_snapshot
from kvist.core.state import Family, SampleState, Totals
from kvist.core.timeline import Timeline
from kvist.errors import KvistError, RequestError


def _by_start(entry: Entry) -> int:
    return entry.row.start


class ContinuousScheduler:
    """Implements `protocols.Scheduler`.

    Args:
        config: limits.
        blocks: the block manager; nobody else may change it while requests are unfinished.
        clock: seconds, for the records only; no decision depends on it.
        drafter: guesses next tokens for speculation; used only where `max_drafts` > 0.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        blocks: PagedBlockManager,
        *,
        clock: Clock = monotonic,
        drafter: Drafter | None = None,
    ) -> None:
        self.config = config
        self.blocks = blocks
        self._clock = clock
        self._chunk = config.chunk
        self._drafter = drafter if config.max_drafts > 0 else None
        self._images = EncoderCache(config.max_image_tokens, config.image_capacity)
        self._watermarks = [int(config.watermark * g.num_blocks) for g in blocks.groups]
        self._families: dict[str, Family] = {}
        self._roster = Roster(config.max_num_seqs)
        self._uncommitted: deque[tuple[Plan, list[Entry]]] = deque()
        self._deferred: list[Event] = []
        self._step = 0
        self._num_arrived = self._num_keys = 0
        self._totals = Totals()
        self._timeline = Timeline(clock)

    # -- requests come and go ----------------------------------------------------------------

    @property
    def has_unfinished(self) -> bool:
        """Whether there is anything left to do, or events that the next commit will bring."""
        return bool(self._families or self._uncommitted or self._deferred)

    @property
    def has_work(self) -> bool:
        """Whether another plan is worth making: plans under way need none."""
        return bool(self._families or self._deferred)

    @property
    def slots(self) -> Mapping[int, int]:
        """The runner slot of every running sequence, by its key in the block manager."""
        return self._roster.slots

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ContextTooLong: it could never fit, with both numbers.
            RequestError: its id is in use, or an image is too large.
        """
        if request.id in self._families:
            raise RequestError(f"request {request.id} is already running; give each its own id")
        refuse_what_never_fits(request, self.config, self.blocks)
        arrival = self._clock() if request.arrival is None else request.arrival
        family = Family(request, arrival)
        for sample in range(request.params.n):
            rank = (request.priority, self._num_arrived, sample)
            family.samples.append(SampleState(self._num_keys, rank, family, self.config.codec))
            self._num_keys += 1
        self._num_arrived += 1
        self._families[request.id] = family
        self._roster.enqueue(family.samples[0])
        self._timeline.add(family.samples[0], "arrived")

    def abort(self, request_id: str) -> list[Event]:
        """End all samples of a request now, planned or not; unknown or finished ids are ignored."""
        family = self._families.get(request_id)
        return [] if family is None else self._end_all(family, "abort")

    def finish(self, request_id: str, sample_index: int, reason: str = "stop") -> list[Event]:
        """End one sample from outside, as a stop string does; ignored if it has ended."""
        family = self._families.get(request_id)
        if family is None or family.samples[sample_index].done:
            return []
        return [self._finished(family.samples[sample_index], reason)]

    # -- one step ----------------------------------------------------------------------------

    def schedule(self) -> Plan:
        """Decide the next step; at most one earlier plan may still be uncommitted.

        Every plan is to be executed and committed in order, also one without rows: it may release
        slots and move blocks.
        """
        if len(self._uncommitted) > 1:
            raise KvistError("two plans are uncommitted; commit the older one before scheduling")
        self._step += 1
        self.blocks.step = self._step
        self._images.begin_step()
        build = Build(self._step, self.config.max_batch_tokens)
        if self._roster.waiting:
            self._yield_to_urgent()
        prefilling = []
        for state in tuple(self._roster.running):
            todo = state.todo  # those preempted on the way have no slot any more
            if todo > 1:
                prefilling.append(state)
            elif todo and state.slot is not None:
                self._plan(build, state)
        for state in prefilling:
            if state.slot is not None:
                self._plan(build, state)
        self._admit_waiting(build)
        # Attention's programs start in the order of rows: the longest first, so that none of them
        # is left alone at the end.
        entries = sorted(build.short, key=_by_start, reverse=True) + build.long
        encodes, dropped = self._images.collect()
        released, admitted = self._roster.collect()
        self._totals.computed_tokens += self.config.max_batch_tokens - build.budget
        plan = Plan(
            step=self._step,
            rows=tuple([entry.row for entry in entries]),
            released=released,
            admitted=admitted,
            groups=self.blocks.collect(self._roster.slots),
            encodes=encodes,
            dropped_images=dropped,
        )
        # What ends or is given up from here on is in the plan already: its slot goes in the next.
        for family, message in build.failures:
            self._deferred += self._end_all(family, "error", message)
        stuck = not (entries or build.failures or self._uncommitted)
        if stuck and self._roster.running:
            self._preempt(self._roster.running[-1])
        self._uncommitted.append((plan, entries))
        return plan

    def commit(self, plan: Plan, output: StepOutput) -> list[Event]:
        """Take in what came of the oldest uncommitted plan.

        Rows of sequences that have ended since are ignored; those of preempted ones still bring
        their token, though its cache is gone.
        """
        if not self._uncommitted or self._uncommitted[0][0].step != plan.step:
            raise KvistError(f"plan {plan.step} is not the oldest uncommitted plan")
        if output.step != plan.step or len(output.rows) != len(plan.rows):
            raise KvistError(
                f"output of step {output.step} with {len(output.rows)} rows does not belong to "
                f"plan {plan.step} with {len(plan.rows)}"
            )
        _, entries = self._uncommitted.popleft()
        self.blocks.settle(plan.step)
        events, self._deferred = self._deferred, []
        now = self._clock()
        for entry, out in zip(entries, output.rows, strict=True):
            if not entry.state.done:
                self._commit_row(entry, out, now, events)
        return events

    def snapshot(self) -> Snapshot:
        """The whole engine, as plain data."""
        return take_snapshot(self._step, self._clock(), self.blocks, self._roster, self._totals)

    def look(self, since: int = 0, branches: int = 0) -> Look:
        """A snapshot, the marks behind serial number `since`, and the prefix tree if asked for.

        `branches` bounds the nodes of the tree that are visited; 0 leaves it out.
        """
        began = monotonic()
        tree = prefix_tree(self.blocks.index, branches) if branches else None
        snapshot, marks = self.snapshot(), self._timeline.since(since)
        return Look(snapshot, marks, tree, monotonic() - began)

    def block(self, group: int, block: int, *, host: bool = False) -> BlockDetail:
        """What a block of a group's pool, or of its host tier, holds; raises CacheError."""
        return describe_block(self.blocks, self._roster, group, block, host=host)

    # -- planning ----------------------------------------------------------------------------

    def _plan(self, build: Build, state: SampleState) -> None:
        """A row for a running sample: a decode, or as much of a prompt as there is room for."""
        start, request = state.planned, state.request
        stop = min(state.total, start + min(build.budget, self._chunk))
        grammar, drafter = request.grammar, self._drafter
        if stop == start or (state.pending and (grammar is not None or drafter is not None)):
            return  # no budget; or the last token has to be known first
        if request.images and start < request.images[-1].stop:
            stop = self._images.claim(state.key, request.images, start, stop)
            if stop == start:
                return
        while not self.blocks.allocate(state.key, stop):
            room = self.blocks.room(state.key, stop)
            if room > start:
                stop = room
            elif not self._preempt_for(build, state):
                return
        drafts: tuple[int, ...] = ()
        mask = 0
        if stop == state.total:
            if grammar is not None:
                try:
                    mask = grammar.mask(state.sequence.output_ids)
                except Exception as error:  # foreign code: whatever it raises fails its request
                    build.failures.append((state.family, f"the grammar failed: {error!r}"))
                    return
            elif drafter is not None and state.sequence.output_ids:
                limit = min(self.config.max_drafts, build.budget - (stop - start))
                drafts = draft(state, drafter, limit)
                if drafts and not self.blocks.allocate(state.key, stop + len(drafts)):
                    drafts = ()
        row = make_row(state, stop, drafts, mask)
        state.planned = stop + len(drafts)
        state.planned_step = build.step
        if row.sample:
            state.pending += 1
            state.total += 1
        build.add(row, state)

    def _preempt_for(self, build: Build, state: SampleState) -> bool:
        """Take the blocks of the last in rank that is not in this plan, if it is behind `state`.

        False if there is none, or if waiting for the plans under way will do.
        """
        build.lacks_blocks = True
        if any(pool.num_returning for pool in self.blocks.pools):
            return False  # blocks are on their way back: wait for those
        for victim in reversed(self._roster.running):
            if victim is state:
                break
            if victim.planned_step != build.step:
                self._preempt(victim)
                return True
        return False

    def _preempt(self, state: SampleState) -> None:
        """Give up its blocks and its slot; it computes again whatever is not cached by then."""
        state.unmatched = state.computed
        state.preemptions += 1
        self._totals.preemptions += 1
        self._timeline.add(state, "preempted", stop=state.computed)
        self._give_back(state)
        self._roster.enqueue(state)

    def _yield_to_urgent(self) -> None:
        """Make way for a waiting request of strictly better priority."""
        head = self._roster.waiting[0]
        worse = worth_preempting(head, self._roster, self.blocks)
        while worse and not (self._roster.has_free_slot and self._has_headroom(head)):
            self._preempt(worse.pop())

    def _admit_waiting(self, build: Build) -> None:
        """Admit in order of rank; whoever does not fit is not overtaken."""
        roster = self._roster
        while roster.waiting and roster.has_free_slot and build.budget and not build.lacks_blocks:
            state = roster.waiting[0]
            # A preempted sample's last token may not be read yet; then it is not known either.
            if state.pending or not self._has_headroom(state) or not self._admit(state):
                return
            self._plan(build, state)

    def _has_headroom(self, state: SampleState) -> bool:
        return has_headroom(state, self._roster, self.blocks, self._watermarks)

    def _admit(self, state: SampleState) -> bool:
        """Give it a slot and what the cache has of it; False if not even that has room."""
        opening = open_blocks(state, self.blocks)
        if opening is None:
            return False
        if state.admitted_at is None:
            state.admitted_at = self._clock()
            state.misses = opening.misses
            state.cached_fork, state.cached_host = opening.fork, opening.host
            state.cached_device = opening.cached - opening.fork - opening.host
            self._totals.count_prompt(state)
        self._totals.lost_tokens += state.resume_from(opening.cached)
        self._timeline.add(state, "admitted", stop=opening.cached)
        self._roster.take_slot(state)
        return True

    # -- committing --------------------------------------------------------------------------

    def _commit_row(self, entry: Entry, out: RowOutput, now: float, events: list[Event]) -> None:
        row, state, epoch = entry
        tokens, most = out.tokens, row.num_drafts + row.sample
        fault = out.fault
        if fault is None and (not row.sample <= len(tokens) <= most):
            fault = f"the runner returned {len(tokens)} tokens for a row of at most {most}"
        if fault is None and len(out.prompt_logprobs) != len(row.prompt_targets):
            fault = f"the runner returned {len(out.prompt_logprobs)} prompt log-probabilities"
        if fault is not None:
            events += self._end_all(state.family, "error", fault)
            return
        sequence, reason = state.sequence, None
        # The cache holds the row's tokens but for the guesses that were not confirmed.
        computed = row.start + len(row.tokens)
        if state.first_token_at is None or len(row.tokens) > 1 + row.num_drafts:
            self._timeline.add(state, "computed", row.start, computed - row.num_drafts)
        if row.prompt_targets:
            self._report_prompt(row, state, out, events)
        if row.sample:
            state.pending -= 1
            computed -= most - len(tokens)
            kept = 0
            for token in tokens:
                reason = sequence.append(token)
                kept += 1
                if reason is not None:
                    break
            request_id, index = state.request.id, sequence.sample_index
            events.append(TokensEvent(request_id, index, tokens[:kept], out.logprobs[:kept]))
            self._totals.output_tokens += kept
            if state.first_token_at is None:
                state.first_token_at = now
                self._timeline.add(state, "first_token")
                self._prompt_done(state.family)
        if state.epoch == epoch:
            if row.num_drafts:
                computed = min(computed, sequence.num_tokens)
                self.blocks.truncate(state.key, computed)
                state.planned = computed
            state.computed = computed
            self.blocks.publish(state.key, computed)
        if row.num_drafts:
            state.total = sequence.num_tokens + state.pending
        if reason is not None:
            events.append(self._finished(state, reason))

    def _report_prompt(
        self, row: PlanRow, state: SampleState, out: RowOutput, events: list[Event]
    ) -> None:
        # Targets of [row.start, ...) are the tokens from row.start + 1 on; a resumed prompt may
        # begin before the first that was not reported yet.
        family = state.family
        fresh = out.prompt_logprobs[family.targets_done - row.start :]
        if fresh:
            start = family.targets_done + 1
            events.append(PromptLogprobsEvent(state.request.id, start, fresh))
            family.targets_done += len(fresh)

    def _prompt_done(self, family: Family) -> None:
        """The prompt is cached: the other samples' turn has come."""
        if not family.prompt_done:
            family.prompt_done = True
            for sample in family.samples:
                if not sample.queued and not sample.done:
                    self._roster.enqueue(sample)

    # -- ending ------------------------------------------------------------------------------

    def _finished(self, state: SampleState, reason: str) -> Event:
        record = self._end(state, reason)
        return FinishedEvent(record.request_id, record.sample_index, reason, record)

    def _end_all(self, family: Family, reason: str, message: str | None = None) -> list[Event]:
        """End every sample: with FailedEvents if there is a message."""
        events: list[Event] = []
        for state in family.samples:
            if state.done:
                continue
            if message is None:
                events.append(self._finished(state, reason))
            else:
                record = self._end(state, reason)
                events.append(FailedEvent(record.request_id, record.sample_index, message, record))
        return events

    def _end(self, state: SampleState, reason: str) -> RequestRecord:
        if state.slot is not None:
            self._give_back(state)
        elif state.queued:
            self._roster.leave_queue(state)
        state.done = True
        state.queued = False
        self._timeline.add(state, "ended", stop=state.sequence.num_tokens, reason=reason)
        self._totals.lost_tokens += state.resume_from(0)
        family = state.family
        if all(sample.done for sample in family.samples):
            del self._families[family.request.id]
        else:
            leader = None if family.prompt_done else family.next_leader()
            if leader is not None:
                self._roster.enqueue(leader)
        return state.record(reason, self._clock())

    def _give_back(self, state: SampleState) -> None:
        """All that a running sample holds: blocks, images, slot."""
        self.blocks.free(state.key)
        if state.request.images:
            self._images.release(state.key, state.request.images, state.total)
        self._roster.leave_slot(state)
        state.computed = state.planned = 0
