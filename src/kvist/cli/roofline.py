"""`kvist roofline`: whether memory or arithmetic bounds a model's steps on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvist.cli.options import (
    CodecOption,
    DeviceOption,
    DtypeOption,
    DummyOption,
    JsonOption,
    ModelArgument,
    WeightsOption,
)

if TYPE_CHECKING:
    from kvist.reports.roofline import Roofline


def command(
    model: ModelArgument,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Decode steps that are timed.")] = 32,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Sequences that decode at a time; may be repeated.", show_default="1 and 8"
        ),
    ] = None,
    codec: CodecOption = "plain",
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw the roofline.", show_default=False)
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    weights: WeightsOption = "auto",
    dummy: DummyOption = False,
    json: JsonOption = False,
) -> None:
    """Measure what bounds prefill and decode here: bytes or operations, and how near they come.

    Counts the least that each step must read and compute, measures how fast this machine does
    either, and times the steps through the engine.
    """
    from kvist.loading.model import load
    from kvist.reports.roofline import measure
    from kvist.reports.roofline import plot as draw

    loaded = load(model, dtype, device, weights=weights, dummy=dummy)
    found = measure(loaded, codec=codec, prompt=prompt, new_tokens=tokens, batches=batch or (1, 8))
    if plot is not None:
        draw([found], plot)
    if json:
        from json import dumps

        print(dumps(found.as_json()))
    else:
        _print(found)


def _print(found: "Roofline") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, emoji=False)
    console.print(
        f"[bold]{found.model}[/]\n[dim]{found.device} · {found.bandwidth / 1e9:,.0f} GB/s · "
        f"{found.rate / 1e9:,.0f} billion {found.rate_type} operations a second · "
        f"executor {found.executor}[/]\n"
    )
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("step")
    for name in ("tokens/s", "time", "least", "bound by"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in found.points:
        least = max(point.memory_seconds, point.arithmetic_seconds)
        table.add_row(
            point.name,
            f"{point.tokens / point.seconds:,.0f}",
            f"{1e3 * point.seconds:,.2f} ms",
            f"{1e3 * least:,.2f} ms",
            f"{point.bound}, {100 * point.reached:.0f} %",
        )
    console.print(table)
    console.print()
    for point in found.points:
        console.print(point.verdict)
