"""`kvist quality`: what each codec costs on a text, as a table, JSON and a plot."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvist.cli.options import DeviceOption, DtypeOption, DummyOption, JsonOption, ModelArgument
from kvist.errors import RequestError

if TYPE_CHECKING:
    from rich.table import Table

    from kvist.reports.quality import Quality


def command(
    model: ModelArgument,
    text: Annotated[
        list[Path],
        typer.Option(help="A text file to measure on; may be repeated.", show_default=False),
    ],
    codec: Annotated[
        list[str] | None,
        typer.Option(help="A codec; may be repeated.", show_default="all, or none with --weights"),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="Weights in fewer bits (fp8, fp8-dynamic), held against the model's own; may be "
            "repeated.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 1024,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows at most.", show_default="all")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Also measure each layer alone in this codec, and say which deserve more bits.",
            show_default=False,
        ),
    ] = None,
    needle: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Also look for pass keys hidden in texts of so many tokens; may be repeated.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write quality against bytes as a PNG.", show_default=False)
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    dummy: DummyOption = False,
    json: JsonOption = False,
) -> None:
    """Measure what each codec costs: perplexity with its error, KL, agreement, bits.

    Every window is run with the plain cache and with each codec, and the two are compared place by
    place; likewise the model's own weights and those of --weights. Use at least 16,000 tokens to
    judge either.
    """
    from dataclasses import replace

    from rich.console import Console
    from rich.progress import Progress

    from kvist.cache import CODECS
    from kvist.loading.model import load
    from kvist.reports.needle import find_needles
    from kvist.reports.quality import (
        Quality,
        advise,
        measure,
        measure_weights,
        sensitivity,
        windows_of,
    )

    loaded = load(model, dtype, device, executor="reference", dummy=dummy)
    others = [
        load(model, dtype, device, executor="reference", weights=name, dummy=dummy)
        for name in dict.fromkeys(weights or ())
    ]
    tokenizer = loaded.require_tokenizer()
    ids: list[int] = []
    for path in text:
        try:
            ids += tokenizer.encode(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RequestError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise RequestError(f"{path} is not UTF-8 text") from error
    names = list(dict.fromkeys(["plain", *(codec or (() if weights else CODECS))]))
    parts = windows_of(ids, min(window, loaded.max_length), windows)
    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("measuring", total=None)

        def show(done: int, total: int) -> None:
            bars.update(bar, completed=done, total=total)  # of the part that is under way

        found = Quality(
            model=model,
            window=len(parts[0]),
            windows=len(parts),
            codecs=tuple(measure(loaded, parts, names, show)),
            weights=tuple(measure_weights(loaded, others, parts, show)) if others else (),
        )
        if layers is not None:
            costs = sensitivity(loaded, parts[: max(1, min(4, len(parts)))], layers, show)
            found = replace(found, layers=tuple(costs), advice=tuple(advise(layers, costs)))
        if needle:
            scores = find_needles(loaded, ids, names, sorted(set(needle)), progress=show)
            found = replace(found, needles=tuple(scores))
    if dummy:
        note = (
            "random weights have no key outliers, so these figures say nothing of a trained model"
        )
        found = replace(found, advice=(*found.advice, note))
    if plot is not None:
        from kvist.reports.plots import plot_quality

        plot_quality(found, plot)
    if json:
        from json import dumps

        print(dumps(found.as_json()))
    else:
        _print(found)


def _print(found: "Quality") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("codec", "bits/value", "B/token", "perplexity", "change", "KL", "top-1"):
        table.add_column(column, justify="left" if column == "codec" else "right")
    for codec in found.codecs:
        change = f"{codec.perplexity_change:+.2%} ± {codec.standard_error:.2%}"
        table.add_row(
            codec.codec,
            f"{codec.bits_per_value:.2f}",
            f"{codec.bytes_per_token:,}",
            f"{codec.perplexity:.3f}",
            "" if codec.codec == "plain" else change,
            "" if codec.codec == "plain" else f"{codec.kl:.5f}",
            "" if codec.codec == "plain" else f"{codec.top1:.1%}",
        )
    console.print(table)
    if found.weights:
        console.print()
        console.print(_weights_table(found))
    tokens = found.codecs[0].tokens
    console.print(
        f"[dim]{tokens:,} tokens in {found.windows} windows of {found.window}; "
        "± is one standard error over windows[/]"
    )
    if tokens < 16000:
        console.print("[dim]fewer than 16,000 tokens: too few to judge by[/]")
    if found.layers:
        worst = sorted(found.layers, key=lambda one: -one.kl)[:8]
        costs = ", ".join(f"{one.layer} ({one.kl:.5f})" for one in worst)
        console.print(f"costliest layers alone, KL: {costs}")
    if found.needles:
        console.print(_needle_table(found))
        console.print("[dim]in brackets: by depth, from the text's beginning to its end[/]")
    for sentence in found.advice:
        console.print(sentence)


def _weights_table(found: "Quality") -> "Table":
    """Weights in fewer bits, each against the model's own."""
    from rich.table import Table

    from kvist.reports.sizes import bytes_text

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("weights", "size", "perplexity", "change", "KL", "top-1"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    for one in found.weights:
        table.add_row(
            one.weights,
            bytes_text(one.nbytes),
            f"{one.perplexity:.3f}",
            f"{one.perplexity_change:+.2%} ± {one.standard_error:.2%}",
            f"{one.kl:.5f}",
            f"{one.top1:.1%}",
        )
    return table


def _needle_table(found: "Quality") -> "Table":
    """Codecs down, lengths across; in a cell how many of the keys came back, over all depths."""
    from rich.table import Table

    contexts = sorted({score.context for score in found.needles})
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("pass keys found")
    for context in contexts:
        table.add_column(f"{context:,} tokens", justify="right")
    for codec in dict.fromkeys(score.codec for score in found.needles):
        cells = []
        for context in contexts:
            here = [s for s in found.needles if (s.codec, s.context) == (codec, context)]
            by_depth = " ".join(str(s.found) for s in sorted(here, key=lambda s: s.depth))
            cells.append(f"{sum(s.found for s in here)}/{sum(s.asked for s in here)} ({by_depth})")
        table.add_row(codec, *cells)
    return table
