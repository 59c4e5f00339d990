"""Pictures of reports; matplotlib is an extra, asked for by name where it is missing."""

from pathlib import Path
from typing import Any

from kvist.errors import MissingDependency
from kvist.reports.quality import Quality


def pyplot() -> Any:
    """Matplotlib without a screen.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingDependency("a plot needs matplotlib: pip install 'kvist[plots]'") from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def plot_quality(quality: Quality, path: Path) -> None:
    """Quality against bytes: the perplexity change of each codec over its bits per value.

    Below it, where layers were measured alone, what each of them costs.
    """
    plt = pyplot()
    if quality.layers:
        figure, (axes, below) = plt.subplots(
            2, figsize=(7, 6.2), dpi=140, height_ratios=(2.2, 1), layout="constrained"
        )
        _plot_layers(quality, below)
    else:
        figure, axes = plt.subplots(figsize=(7, 4.2), dpi=140, layout="constrained")
    shown = [c for c in quality.codecs if c.codec != "plain"]
    middle = sum(c.bits_per_value for c in shown) / max(len(shown), 1)
    for codec in shown:
        change, error = 100 * codec.perplexity_change, 100 * codec.standard_error
        axes.errorbar(codec.bits_per_value, change, yerr=error, fmt="o", capsize=3, markersize=7)
        axes.annotate(
            f"{codec.codec}\n{codec.bytes_per_token:,} B/token",
            (codec.bits_per_value, change),
            xytext=(8, 6) if codec.bits_per_value <= middle else (-8, 6),
            ha="left" if codec.bits_per_value <= middle else "right",
            textcoords="offset points",
            fontsize=8,
        )
    axes.axhline(0, color="0.6", linewidth=0.8)
    plain = next((c for c in quality.codecs if c.codec == "plain"), None)
    note = "" if plain is None else f"; plain: {plain.bits_per_value:.0f} bits"
    axes.set_xlabel(f"bits per value of the cache{note}")
    axes.set_ylabel("perplexity change, %")
    tokens = shown[0].tokens if shown else 0
    axes.set_title(f"{quality.model}: cost of a compressed cache, {tokens:,} tokens", fontsize=10)
    axes.margins(x=0.15, y=0.2)
    axes.grid(alpha=0.25)
    figure.savefig(path)
    plt.close(figure)


def _plot_layers(quality: Quality, axes: Any) -> None:
    axes.bar([one.layer for one in quality.layers], [one.kl for one in quality.layers], width=0.7)
    axes.set_xlabel("layer")
    axes.set_ylabel("KL of it alone, nats")
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)
