"""Metrics in Prometheus' format: what requests saw, what the engine does, what its cache holds.

Histograms are filled as requests run and steps end; gauges are read from a snapshot when somebody
asks. Names follow Prometheus' rules: base units, `_total` for what only grows.
"""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvist.core.record import RequestRecord, Snapshot
from kvist.engine import StepTimes

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SHORT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5)
TOKENS = (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)


class Metrics:
    """One server's metrics, in a registry of its own."""

    def __init__(self) -> None:
        """Everything at zero."""
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "kvist_http_requests", "Requests by path and status.", ["path", "status"],
            registry=registry,
        )  # fmt: skip
        self.finished = Counter(
            "kvist_outputs", "Outputs by how they ended.", ["reason"], registry=registry
        )
        self.prompt_tokens = Counter(
            "kvist_prompt_tokens", "Prompt tokens of finished outputs.", registry=registry
        )
        self.cached_tokens = Counter(
            "kvist_cached_prompt_tokens", "Those of them that were cached, by tier.", ["tier"],
            registry=registry,
        )  # fmt: skip
        self.ttft = Histogram(
            "kvist_time_to_first_token_seconds", "From request to first token.",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.itl = Histogram(
            "kvist_inter_token_latency_seconds", "Between tokens of one output.",
            buckets=SHORT, registry=registry,
        )  # fmt: skip
        self.e2e = Histogram(
            "kvist_request_duration_seconds", "From request to last token.",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.queue = Histogram(
            "kvist_queue_time_seconds", "Waiting to be admitted.", buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.prompt_length = Histogram(
            "kvist_request_prompt_tokens", "Prompt lengths.", buckets=TOKENS, registry=registry
        )
        self.output_length = Histogram(
            "kvist_request_output_tokens", "Output lengths.", buckets=TOKENS, registry=registry
        )
        self.steps = Histogram(
            "kvist_step_seconds", "Steps of the engine, by what they computed.", ["phase"],
            buckets=SHORT, registry=registry,
        )  # fmt: skip
        self.step_parts = Counter(
            "kvist_step_part_seconds", "Where the steps' time went.", ["part"], registry=registry
        )
        self._phases = {phase: self.steps.labels(phase) for phase in ("prefill", "decode", "mixed")}
        parts = ("schedule", "launch", "wait", "commit")
        self._parts = {part: self.step_parts.labels(part) for part in parts}

    def step(self, times: StepTimes) -> None:
        """A step has ended; called on the engine's thread."""
        self._phases[times.phase].observe(times.total)
        for part, counter in self._parts.items():
            counter.inc(getattr(times, part))

    def output(self, record: RequestRecord) -> None:
        """An output has ended."""
        self.finished.labels(record.reason).inc()
        self.prompt_tokens.inc(record.prompt_tokens)
        self.cached_tokens.labels("device").inc(record.cached_device)
        self.cached_tokens.labels("host").inc(record.cached_host)
        self.cached_tokens.labels("fork").inc(record.cached_fork)
        self.queue.observe(record.queue_time)
        self.prompt_length.observe(record.prompt_tokens)
        self.output_length.observe(record.output_tokens)

    def page(self, snapshot: Snapshot | None) -> bytes:
        """All of them as Prometheus reads them; without an engine, only what was counted here."""
        reading = CollectorRegistry()
        reading.register(_Reading([] if snapshot is None else list(_read(snapshot))))
        return generate_latest(self.registry) + generate_latest(reading)


class _Reading:
    """Metrics that are there already, as a collector."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _read(snapshot: Snapshot) -> Iterator[Metric]:
    """The engine's own figures."""

    def gauge(name: str, help: str, value: float) -> Metric:
        return GaugeMetricFamily(f"kvist_{name}", help, value=value)

    def counter(name: str, help: str, value: float) -> Metric:
        return CounterMetricFamily(f"kvist_{name}", help, value=value)

    yield gauge("requests_running", "Sequences that run.", len(snapshot.running))
    yield gauge("requests_waiting", "Sequences that wait.", len(snapshot.waiting))
    used = GaugeMetricFamily(
        "kvist_cache_blocks", "Blocks by tier, group and state.", labels=["tier", "group", "state"]
    )
    for number, group in enumerate(snapshot.groups):
        owned = sum(1 for count in group.owners if count)
        idle = sum(
            cached and not count for cached, count in zip(group.cached, group.owners, strict=True)
        )
        usable = group.num_blocks - 1  # without the null block
        used.add_metric(["device", str(number), "owned"], owned)
        used.add_metric(["device", str(number), "cached"], idle)
        used.add_metric(["device", str(number), "free"], usable - owned - idle)
        used.add_metric(["host", str(number), "used"], group.host_used)
        used.add_metric(["host", str(number), "free"], group.host_blocks - group.host_used)
    yield used
    counts = snapshot.counters
    yield gauge("prefix_hit_ratio", "Part of all prompt tokens found cached.", counts.hit_rate)
    hits = CounterMetricFamily(
        "kvist_prefix_hit_tokens", "Prompt tokens found cached, by tier.", labels=["tier"]
    )
    hits.add_metric(["device"], counts.device_hit_tokens)
    hits.add_metric(["host"], counts.host_hit_tokens)
    hits.add_metric(["fork"], counts.fork_tokens)
    yield hits
    yield counter("output_tokens", "Tokens that were sampled.", snapshot.output_tokens)
    yield counter("computed_tokens", "Tokens that went through it.", snapshot.computed_tokens)
    yield counter("prefix_queried_tokens", "Prompt tokens looked up.", counts.queried_tokens)
    yield counter("evicted_blocks", "Cached blocks that gave way.", counts.evicted_blocks)
    yield counter("saved_blocks", "Blocks saved to the host tier.", counts.saved_blocks)
    yield counter("loaded_blocks", "Blocks loaded from it.", counts.loaded_blocks)
    yield counter("preemptions", "Sequences that had to give way.", snapshot.preemptions)
    yield counter("preempted_tokens", "Tokens computed again for it.", snapshot.lost_tokens)
    yield counter("steps", "Steps of the engine.", snapshot.step)
