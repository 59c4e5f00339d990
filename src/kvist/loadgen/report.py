"""Sums up what came of a load: latencies, throughput, and goodput at an SLO.

Latencies count from when a request was due, so what a slow server, or a slow generator, held up is
in them. Failed requests are counted, and are in no latency.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from kvist.errors import ConfigError
from kvist.loadgen.drive import Outcome

LATE = 0.01  # seconds; a generator that is later than this at its 99th percentile is too slow
UNITS = {"ms": 1e-3, "s": 1.0}
GOALS = ("ttft", "tpot", "itl", "e2e")


@dataclass(frozen=True, slots=True)
class Distribution:
    """Seconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Distribution | None":
        """None if there are no values."""
        ordered = sorted(values)
        if not ordered:
            return None
        p50, p90, p99 = (percentile(ordered, share) for share in (0.5, 0.9, 0.99))
        return cls(sum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of one answered request, in seconds from when it was due.

    Args:
        ttft: until the first piece of the answer.
        e2e: until its end.
        tpot: mean time for each token behind the first; None if there was one only.
        itl: the longest pause between two pieces; None if there was one only.
    """

    ttft: float
    e2e: float
    tpot: float | None
    itl: float | None

    @classmethod
    def of(cls, outcome: Outcome) -> "Latencies":
        """Of an outcome that is ok."""
        events, first = outcome.events, outcome.events[0]
        more = outcome.output_tokens - 1
        return cls(
            ttft=first - outcome.due,
            e2e=outcome.end - outcome.due,
            tpot=(events[-1] - first) / more if more > 0 else None,
            itl=max(pauses(events), default=None),
        )


@dataclass(frozen=True)
class Report:
    """A load in figures; times in seconds, rates a second.

    Args:
        requests: that were sent.
        answered: those that got a whole answer.
        failures: messages, and how often each was got.
        unsent: later turns that were not sent because an earlier one had failed.
        duration: from the first due time to the last end.
        offered_rate: requests that were due a second.
        input_tokens: of the answered, as the server counts.
        cached_tokens: those of them that the server had already.
        itl: pauses between pieces of answers, all of them.
        lateness: of the generator, from due to sent.
        good: answered requests that met the SLO; None without one.
    """

    requests: int
    answered: int
    failures: dict[str, int]
    unsent: int
    duration: float
    offered_rate: float
    request_rate: float
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    input_rate: float
    output_rate: float
    most_in_flight: int
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    e2e: Distribution | None
    lateness: Distribution | None
    slo: dict[str, float]
    good: int | None
    goodput: float | None

    @property
    def generator_was_late(self) -> bool:
        """Whether the machine that made the load was too slow for it."""
        return self.lateness is not None and self.lateness.p99 > LATE

    def as_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        return {**asdict(self), "generator_was_late": self.generator_was_late}


def summarize(
    outcomes: Sequence[Outcome], planned: int, slo: dict[str, float] | None = None
) -> Report:
    """The figures of a load of `planned` calls, judged by `slo` (see `parse_slo`)."""
    slo = slo or {}
    answered = [one for one in outcomes if one.ok]
    latencies = [Latencies.of(one) for one in answered]
    begin = min((one.due for one in outcomes), default=0.0)
    duration = max((one.end for one in outcomes), default=0.0) - begin
    span = max((one.due for one in outcomes), default=0.0) - begin
    good = sum(meets(one, slo) for one in latencies) if slo else None
    inputs = sum(one.prompt_tokens for one in answered)
    outputs = sum(one.output_tokens for one in answered)

    def rate(amount: float) -> float:
        return amount / duration if duration else 0.0

    return Report(
        requests=len(outcomes),
        answered=len(answered),
        failures=dict(Counter(one.error for one in outcomes if one.error).most_common()),
        unsent=planned - len(outcomes),
        duration=duration,
        offered_rate=(len(outcomes) - 1) / span if span else 0.0,
        request_rate=rate(len(answered)),
        input_tokens=inputs,
        cached_tokens=sum(one.cached_tokens for one in answered),
        output_tokens=outputs,
        input_rate=rate(inputs),
        output_rate=rate(outputs),
        most_in_flight=max((n for _, n in in_flight(outcomes)), default=0),
        ttft=Distribution.of(one.ttft for one in latencies),
        tpot=Distribution.of(one.tpot for one in latencies if one.tpot is not None),
        itl=Distribution.of(gap for one in answered for gap in pauses(one.events)),
        e2e=Distribution.of(one.e2e for one in latencies),
        lateness=Distribution.of(one.sent - one.due for one in outcomes),
        slo=slo,
        good=good,
        goodput=None if good is None else rate(good),
    )


def parse_slo(text: str) -> dict[str, float]:
    """`ttft=500ms,tpot=50ms` as seconds by name; raises ConfigError for anything else."""
    goals = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        unit = next((unit for unit in UNITS if value.endswith(unit)), "")
        try:
            limit = float(value.removesuffix(unit)) * UNITS[unit]
        except (ValueError, KeyError):
            limit = 0.0
        if name not in GOALS or not limit > 0:
            raise ConfigError(
                f"{part.strip()!r} is no goal; write for example ttft=500ms,tpot=50ms "
                f"(of {', '.join(GOALS)}; in ms or s)"
            )
        goals[name] = limit
    return goals


def meets(one: Latencies, slo: dict[str, float]) -> bool:
    """Whether a request was as quick as the SLO wants; what it does not have is quick enough."""
    return all((getattr(one, name) or 0.0) <= limit for name, limit in slo.items())


def pauses(events: Sequence[float]) -> list[float]:
    """From each event to the next."""
    return [after - before for before, after in pairwise(events)]


def in_flight(outcomes: Iterable[Outcome]) -> list[tuple[float, int]]:
    """(time, requests under way from then on), whenever that changes."""
    steps = [(one.sent, 1) for one in outcomes] + [(one.end, -1) for one in outcomes]
    counts, now = [], 0
    for at, step in sorted(steps):
        now += step
        counts.append((at, now))
    return counts


def percentile(ordered: Sequence[float], share: float) -> float:
    """Between the two nearest of some ordered values."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
