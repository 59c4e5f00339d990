"""`kvist verify`: proof, on the user's own model and machine, that the way does not matter."""

from typing import TYPE_CHECKING, Annotated

import typer

from kvist.cli.options import (
    DeterministicOption,
    DeviceOption,
    DummyOption,
    ExactOption,
    JsonOption,
    ModelArgument,
    WeightsOption,
    executor_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvist.reports.verify import Check, Cost


def command(
    model: ModelArgument,
    tokens: Annotated[int, typer.Option(min=1, help="Greedy tokens for each prompt.")] = 24,
    codec: Annotated[
        list[str] | None,
        typer.Option(
            help="A lossy codec to hold against itself; may be repeated.", show_default="all"
        ),
    ] = None,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Leave lossy codecs out: the promise alone.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the prompts and their neighbours.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 has the least noise.")] = "float32",
    device: DeviceOption = "auto",
    weights: WeightsOption = "auto",
    exact: ExactOption = False,
    deterministic: DeterministicOption = False,
    dummy: DummyOption = False,
    json: JsonOption = False,
) -> None:
    """Prove that greedy output does not depend on how it was computed.

    The readable loop is compared with every other way: layouts, chunk sizes, batches, the engine
    cold and warm, preempted, through the host tier. Exit status 1 if a lossless path diverges.
    With --deterministic all of them must give the same bits, and what that costs is shown.
    """
    from kvist.loading.model import load
    from kvist.reports.verify import cost, verify

    executor = executor_name(exact=exact, deterministic=deterministic)
    loaded = load(model, dtype, device, executor=executor, weights=weights, dummy=dummy)
    checks = verify(loaded, new_tokens=tokens, seed=seed, codecs=[] if lossless else codec)
    if json:
        from json import dumps

        done = list(checks)
        print(dumps([check.as_json() for check in done]))
    else:
        done = _table(checks)
        if deterministic:
            _print_cost(cost(loaded, new_tokens=tokens, seed=seed))
    if not all(check.passed for check in done):
        raise typer.Exit(1)


def _table(checks: "Iterator[Check]") -> "list[Check]":
    from rich.console import Console
    from rich.table import Table

    console = Console()
    done: list[Check] = []
    with console.status("comparing with the reference") as status:
        for check in checks:
            done.append(check)
            status.update(f"compared {len(done)}: {check.path}")
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("computed by", no_wrap=True)
    table.add_column("tokens", justify="right")
    table.add_column("max Δ", justify="right")
    table.add_column("ties", justify="right")
    table.add_column("verdict")
    for check in done:
        verdict = "[green]equal[/]" if check.passed else "[red]DIFFERS[/]"
        if check.divergence:
            prompt, place, wanted, found = check.divergence
            verdict += f" prompt {prompt}, token {place}: {found} instead of {wanted}"
        elif check.note:
            verdict += f" [dim]{check.note}[/]"
        table.add_row(
            check.path, str(check.tokens), f"{check.max_delta:.1e}", str(len(check.ties)), verdict
        )
    console.print(table)
    for check in done:
        for tie in check.ties:
            console.print(
                f"[dim]tie: {check.path}, prompt {tie.prompt}, token {tie.token}: "
                f"margin {tie.margin:.1e}, noise {tie.noise:.1e}[/]"
            )
    failed = sum(not check.passed for check in done)
    total = sum(check.tokens for check in done)
    if failed:
        console.print(f"[red]{failed} of {len(done)} ways differ from the reference.[/]")
    else:
        console.print(f"{len(done)} ways, {total:,} tokens: all equal to the reference.")
    return done


def _print_cost(found: "Cost") -> None:
    from rich.console import Console

    Console().print(
        f"equal bits cost {found.fixed_prefill / found.prefill:.1f} x in prefill "
        f"({found.prefill:.2f} s, {found.fixed_prefill:.2f} s) and "
        f"{found.fixed_decode / found.decode:.1f} x in decode "
        f"({found.decode:.2f} s, {found.fixed_decode:.2f} s)"
    )
