"""`kvist info`: what a model is and what its cache costs, before any weight is read."""

from typing import Any

from kvist.cli.options import CodecOption, JsonOption, ModelArgument


def command(model: ModelArgument, codec: CodecOption = "plain", json: JsonOption = False) -> None:
    """Architecture, parameters, and cache bytes per token; reads no weights."""
    from kvist.reports.info import describe

    facts = describe(model, codec)
    if json:
        from json import dumps

        print(dumps(facts))
        return
    _print(facts)


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(overflow="fold")
    for key, value in facts.items():
        shown = (
            f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        )
        # As text, since a path may look like markup.
        table.add_row(Text(key.replace("_", " "), style="dim"), Text(shown))
    Console().print(table)
