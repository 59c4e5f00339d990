"""The `kvist` command: its subcommands, and how every error becomes one line.

Commands live in files of their own and import what is heavy when they run, so `kvist --help` is
quick. Errors of kvist's own family are one line on stderr and exit status 1; `--debug` shows where
they came from.
"""

import sys
from typing import Annotated

import typer

import kvist
from kvist.cli import bench, chat, generate, info, plan, pull, quality, roofline, serve, verify
from kvist.errors import KvistError

app = typer.Typer(
    name="kvist",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate.command)
app.command("chat")(chat.command)
app.command("serve")(serve.command)
app.command("pull")(pull.command)
app.command("info")(info.command)
app.command("quality")(quality.command)
app.command("verify")(verify.command)
app.command("plan")(plan.command)
app.add_typer(bench.app, name="bench")
app.command("roofline")(roofline.command)


def _version(shown: bool) -> None:
    if shown:
        typer.echo(f"kvist {kvist.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="On an error, show where it came from.")
    ] = False,
) -> None:
    """LLM inference with the KV cache at its centre.

    Begin with [bold]kvist pull smollm2-135m[/] and
    [bold]kvist generate smollm2-135m "What is a KV cache?"[/].
    """


def main() -> None:
    """Run the command line; exit status 0, 1 (an error, one line), 2 (usage), 130 (Ctrl-C)."""
    try:
        app()
    except KvistError as error:
        if "--debug" in sys.argv:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader (`| head`) has gone; let the interpreter not complain at exit.
        sys.stderr.close()
        sys.exit(141)
