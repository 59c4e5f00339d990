"""A load as a picture: how long requests took when, and how much was under way."""

from collections.abc import Sequence
from pathlib import Path

from kvist.loadgen.drive import Outcome
from kvist.loadgen.report import Latencies, Report, in_flight, pauses
from kvist.reports.plots import pyplot


def plot_load(outcomes: Sequence[Outcome], report: Report, title: str, path: Path) -> None:
    """Latencies over time, their distributions, and requests under way, as one PNG.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    plt = pyplot()
    figure, (over_time, spread, load) = plt.subplots(1, 3, figsize=(13, 3.9), dpi=130)
    answered = [one for one in outcomes if one.ok]
    latencies = [Latencies.of(one) for one in answered]
    due = [one.due for one in answered]
    over_time.plot(due, [one.ttft for one in latencies], ".", label="first token")
    over_time.plot(due, [one.e2e for one in latencies], ".", alpha=0.4, label="whole answer")
    failed = [one for one in outcomes if not one.ok]
    if failed:
        times = [one.end - one.due for one in failed]
        over_time.plot([one.due for one in failed], times, "x", color="crimson", label="failed")
    if "ttft" in report.slo:
        over_time.axhline(report.slo["ttft"], color="0.4", linewidth=0.8, linestyle="--")
    over_time.set(xlabel="due, s", ylabel="seconds from when it was due", yscale="log")
    over_time.legend(fontsize=8)
    series = {
        "first token": [one.ttft for one in latencies],
        "between tokens": [gap for one in answered for gap in pauses(one.events)],
        "whole answer": [one.e2e for one in latencies],
    }
    for label, values in series.items():
        ordered = sorted(value for value in values if value > 0)
        shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
        spread.plot(ordered, shares, label=label)
    spread.set(xlabel="seconds", ylabel="share of all", xscale="log", ylim=(0, 1.02))
    spread.legend(fontsize=8)
    counts = in_flight(outcomes)
    load.step([at for at, _ in counts], [n for _, n in counts], where="post", linewidth=1)
    load.set(xlabel="s", ylabel="requests under way", ylim=(0, None))
    for axes in (over_time, spread, load):
        axes.grid(alpha=0.25)
    figure.suptitle(
        f"{title}: {report.offered_rate:.3g} requests/s offered, "
        f"{report.request_rate:.3g} answered, {report.output_rate:,.0f} tokens/s",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
