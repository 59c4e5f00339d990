"""`kvist pull`: fetch a model once, with a progress bar and a checksum."""

from typing import Annotated

import typer


def command(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A known name such as [bold]smollm2-135m[/], or a hub id.",
            show_default=False,
        ),
    ],
) -> None:
    """Fetch a model; afterwards its name is all that other commands need."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from kvist.loading.pull import pull

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bars:
        bar = bars.add_task(f"pulling {name}", total=None)
        path = pull(
            name,
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
            notify=lambda news: console.print(news, style="dim", markup=False, highlight=False),
        )
    print(path)
