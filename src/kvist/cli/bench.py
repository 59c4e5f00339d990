"""`kvist bench serve`: load on a server that speaks OpenAI's API, in an open loop."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvist.cli.options import JsonOption

if TYPE_CHECKING:
    from kvist.loadgen.drive import Outcome
    from kvist.loadgen.report import Distribution, Report
    from kvist.loadgen.workload import Call

app = typer.Typer(no_args_is_help=True, help="Measure a server under load.")

WORKLOAD = "Workload"
TRACE = "Replay a trace instead"
REPORT = "Report"


@app.callback()
def group() -> None:
    """Measure a server under load."""


@app.command("serve")
def command(
    url: Annotated[str, typer.Option(help="The server, such as http://127.0.0.1:8000.")],
    model: Annotated[
        str | None, typer.Option(help="Its name there.", show_default="the first listed")
    ] = None,
    api: Annotated[
        Literal["chat", "completions"], typer.Option(help="Which of the two endpoints.")
    ] = "chat",
    api_key: Annotated[
        str | None,
        typer.Option(envvar="KVIST_API_KEY", help="If it wants one.", show_default=False),
    ] = None,
    rate: Annotated[float, typer.Option(help="Requests a second.", rich_help_panel=WORKLOAD)] = 1.0,
    requests: Annotated[
        int, typer.Option(min=1, help="How many, first turns only.", rich_help_panel=WORKLOAD)
    ] = 60,
    arrivals: Annotated[
        Literal["poisson", "constant"],
        typer.Option(help="At random, or evenly.", rich_help_panel=WORKLOAD),
    ] = "poisson",
    input_tokens: Annotated[
        str,
        typer.Option(metavar="N|N-M", help="Of each turn, about.", rich_help_panel=WORKLOAD),
    ] = "256",
    output_tokens: Annotated[
        str,
        typer.Option(metavar="N|N-M", help="Of each answer, at most.", rich_help_panel=WORKLOAD),
    ] = "64",
    prefix_tokens: Annotated[
        int,
        typer.Option(
            min=0, help="Of a system message that conversations share.", rich_help_panel=WORKLOAD
        ),
    ] = 0,
    prefixes: Annotated[
        int,
        typer.Option(min=1, help="Different such messages.", rich_help_panel=WORKLOAD),
    ] = 1,
    turns: Annotated[
        int, typer.Option(min=1, help="Of each conversation.", rich_help_panel=WORKLOAD)
    ] = 1,
    think_time: Annotated[
        float,
        typer.Option(
            min=0, help="Seconds from one turn's due time to the next.", rich_help_panel=WORKLOAD
        ),
    ] = 5.0,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos",
            help="Ask for answers of full length (kvist, vLLM and SGLang understand it).",
            rich_help_panel=WORKLOAD,
        ),
    ] = False,
    seed: Annotated[int, typer.Option(rich_help_panel=WORKLOAD)] = 0,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="In Mooncake's format (JSON lines) or Azure's (CSV).",
            show_default=False,
            rich_help_panel=TRACE,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="Its first requests only.", show_default="all", rich_help_panel=TRACE
        ),
    ] = None,
    speed: Annotated[
        float, typer.Option(help="How many times as fast.", rich_help_panel=TRACE)
    ] = 1.0,
    scale: Annotated[
        float,
        typer.Option(help="Shortens or lengthens prompts and answers.", rich_help_panel=TRACE),
    ] = 1.0,
    warmup: Annotated[
        int, typer.Option(min=0, help="Requests before, one by one, that do not count.")
    ] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds until a request has failed.")] = 600.0,
    slo: Annotated[
        str | None,
        typer.Option(
            metavar="GOALS",
            help="For goodput, such as ttft=500ms,tpot=50ms; of ttft, tpot, itl, e2e.",
            show_default=False,
            rich_help_panel=REPORT,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the report and every request as JSON.",
            show_default=False,
            rich_help_panel=REPORT,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Write latencies and load as a PNG.", show_default=False, rich_help_panel=REPORT
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Send requests when they are due, whatever the server does, and report what came back.

    Open loop: all due times are fixed before the first request, latency counts from them, and how
    late this generator itself was is reported.
    """
    import asyncio

    from kvist.loadgen.drive import Target
    from kvist.loadgen.report import parse_slo, summarize
    from kvist.loadgen.traces import read_trace, replay
    from kvist.loadgen.workload import Lengths, Synthetic, synthesize

    goals = {} if slo is None else parse_slo(slo)
    if trace is not None:
        calls = replay(read_trace(trace, limit), speed=speed, scale=scale, seed=seed)
    else:
        calls = synthesize(
            Synthetic(
                requests=requests,
                rate=rate,
                arrivals=arrivals,
                input_tokens=Lengths.parse(input_tokens),
                output_tokens=Lengths.parse(output_tokens),
                prefix_tokens=prefix_tokens,
                prefixes=prefixes,
                turns=turns,
                think_time=think_time,
                seed=seed,
            )
        )
    target = Target(model or "", api, ignore_eos, timeout)
    name, outcomes = asyncio.run(_load(url, api_key, target, calls, warmup, quiet=json))
    report = summarize(outcomes, len(calls), goals)
    if out is not None:
        _write(out, url, name, report, outcomes)
    if plot is not None:
        from kvist.loadgen.plot import plot_load

        plot_load(outcomes, report, name, plot)
    if json:
        from json import dumps

        print(dumps({"url": url, "model": name, **report.as_json()}))
    else:
        _print(name, report)
    if not report.answered:
        raise typer.Exit(1)


async def _load(
    url: str,
    api_key: str | None,
    target: Any,
    calls: "list[Call]",
    warmup: int,
    *,
    quiet: bool,
) -> "tuple[str, list[Outcome]]":
    """Warm up, then send everything; returns the model's name and what came of the calls."""
    from dataclasses import replace

    from rich.console import Console

    from kvist.errors import KvistError
    from kvist.loadgen.client import Client, HttpError
    from kvist.loadgen.drive import drive, find_model

    client = Client(url, api_key)
    try:
        try:
            target = replace(target, model=target.model or await find_model(client))
        except HttpError as error:
            raise KvistError(f"{url}: {error}") from error
        for call in calls[:warmup]:
            [first] = await drive(client, target, [replace(call, at=0.0)])
            if not first.ok:
                raise KvistError(f"{url}: the first request failed: {first.error}")
        if not quiet:
            Console(stderr=True).print(
                f"{len(calls):,} requests over {calls[-1].at - calls[0].at:,.0f} s", style="dim"
            )
        return target.model, await drive(client, target, calls)
    finally:
        client.close()


def _write(path: Path, url: str, model: str, report: "Report", outcomes: "list[Outcome]") -> None:
    from dataclasses import asdict
    from json import dumps

    requests = [asdict(one) for one in outcomes]
    told = {"url": url, "model": model, "report": report.as_json(), "requests": requests}
    path.write_text(dumps(told) + "\n", encoding="utf-8")


def _print(model: str, report: "Report") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, emoji=False)
    console.print(Text(model, style="bold"))
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(justify="right", no_wrap=True)
    facts.add_column(style="dim")
    failed = report.requests - report.answered
    facts.add_row("requests", f"{report.requests:,}", f"in {report.duration:,.1f} s")
    facts.add_row("answered", f"{report.answered:,}", f"{report.request_rate:.3g} a second")
    if failed:
        facts.add_row("failed", f"{failed:,}", "", style="red")
    if report.unsent:
        facts.add_row("not sent", f"{report.unsent:,}", "turns behind one that failed")
    facts.add_row("offered", f"{report.offered_rate:.3g}", "requests a second")
    facts.add_row("under way", f"{report.most_in_flight:,}", "at most")
    cached = ""
    if report.input_tokens:
        cached = f", {100 * report.cached_tokens / report.input_tokens:.1f} % cached"
    facts.add_row("input", f"{report.input_tokens:,}", f"{report.input_rate:,.0f} tokens/s{cached}")
    facts.add_row("output", f"{report.output_tokens:,}", f"{report.output_rate:,.0f} tokens/s")
    if report.goodput is not None:
        goals = ", ".join(f"{name} <= {_seconds(limit)}" for name, limit in report.slo.items())
        share = 100 * (report.good or 0) / report.requests
        facts.add_row("goodput", f"{report.goodput:.3g}", f"a second, {share:.1f} % within {goals}")
    console.print(facts)
    console.print()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("latency")
    for name in ("mean", "p50", "p90", "p99", "max"):
        table.add_column(name, justify="right")
    rows: dict[str, Distribution | None] = {
        "first token (TTFT)": report.ttft,
        "per token (TPOT)": report.tpot,
        "between tokens (ITL)": report.itl,
        "whole answer (E2E)": report.e2e,
        "generator's lateness": report.lateness,
    }
    for name, values in rows.items():
        if values is not None:
            five = (values.mean, values.p50, values.p90, values.p99, values.max)
            table.add_row(name, *map(_seconds, five), style="dim" if "late" in name else None)
    console.print(table)
    for message, count in report.failures.items():
        console.print(Text(f"{count:,} x {message}", style="red"))
    if report.generator_was_late:
        console.print(
            Text(
                "This machine was too slow to send on time: the figures speak of it, too. "
                "Lower the rate, or run the generator elsewhere.",
                style="yellow",
            )
        )


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"
