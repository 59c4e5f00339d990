"""`kvist plan`: whether a model and its cache fit into a memory, before any weight is read."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvist.cli.options import (
    CacheOption,
    CodecOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    SinksOption,
    WeightsOption,
    WindowOption,
)

if TYPE_CHECKING:
    from rich.table import Table

    from kvist.reports.plan import Plan


def command(
    model: ModelArgument,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Such as 24GiB or 512MB.",
            show_default="nine tenths of what is free here",
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Length of a request, prompt and output, such as 32k.",
            show_default="the model's",
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at a time.", min=1)] = 1,
    codec: CodecOption = "plain",
    cache: CacheOption = "paged",
    window: WindowOption = None,
    sinks: SinksOption = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    weights: WeightsOption = "auto",
    json: JsonOption = False,
) -> None:
    """What a model needs and how many tokens and requests fit; reads no weights."""
    from kvist.core.retention import SlidingWindow
    from kvist.reports.plan import plan_model
    from kvist.reports.sizes import parse_bytes, parse_tokens

    made, where = plan_model(
        model,
        memory=None if memory is None else parse_bytes(memory),
        context=None if context is None else parse_tokens(context),
        concurrency=concurrency,
        codec=codec,
        layout=cache,
        retention=None if window is None else SlidingWindow(window, sinks),
        dtype=dtype,
        device=device,
        weights=weights,
    )
    if json:
        from json import dumps

        print(dumps(_as_json(model, made)))
    else:
        _print(model, made, where)


def _as_json(model: str, plan: "Plan") -> dict[str, Any]:
    from dataclasses import asdict

    from kvist.reports.fit import ACTIVATIONS

    setting = plan.setting
    return {
        "model": model,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "layout": setting.layout,
        "codec": setting.codec,
        "context": setting.context,
        "concurrency": setting.concurrency,
        "memory_bytes": plan.memory,
        "fits": plan.fits,
        "weight_bytes": plan.need.weights,
        "fp8_weight_bytes": setting.fp8_bytes,
        "packed_weights": setting.packed,
        "activation_bytes": plan.need.activations,
        "activation_formula": ACTIVATIONS,
        "cache_bytes": plan.need.cache,
        "codecs": [asdict(fit) for fit in plan.codecs],
        "advice": list(plan.advice),
    }


def _print(model: str, plan: "Plan", where: str) -> None:
    from rich.console import Console
    from rich.text import Text

    setting = plan.setting
    config, dtype = setting.config, str(setting.dtype).removeprefix("torch.")
    console = Console(highlight=False, emoji=False)
    title = Text(f"{model}\n", style="bold")
    title.append(
        f"{config.num_layers} layers, {config.num_kv_heads} key/value heads of {config.head_dim}"
        f" · {dtype} · {setting.layout} cache\n",
        style="not bold dim",
    )
    console.print(title)
    console.print(_sums(plan, where))
    console.print()
    console.print(_by_codec(plan))
    console.print()
    style = "green" if plan.fits else "red"
    console.print(Text(" ".join(plan.advice), style=style))


def _sums(plan: "Plan", where: str) -> "Table":
    from rich.table import Table

    from kvist.reports.plan import sliding_text
    from kvist.reports.sizes import bytes_text

    setting, need = plan.setting, plan.need
    parameters = f"{need.weights // setting.dtype.itemsize:,} parameters"
    if setting.packed:
        parameters = "as the file has them"
    elif setting.fp8_bytes:
        parameters = f"{bytes_text(setting.fp8_bytes)} of them in fp8"
    tokens = min(setting.chunk, setting.context)
    requests = f"{setting.concurrency:,} request{'s' * (setting.concurrency > 1)}"
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    table.add_row("weights", bytes_text(need.weights), parameters)
    table.add_row("activations", bytes_text(need.activations), f"at most, of {tokens:,} tokens")
    cache = f"{requests} of {setting.context:,} tokens, {setting.codec}"
    table.add_row("cache", bytes_text(need.cache), cache + sliding_text(setting))
    table.add_row("in all", bytes_text(need.total), "")
    table.add_row("memory", bytes_text(plan.memory), where)
    return table


def _by_codec(plan: "Plan") -> "Table":
    from rich.table import Table

    from kvist.reports.sizes import bytes_text

    setting = plan.setting
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("codec")
    names = ("bytes/token", "a request", "tokens", "requests", "longest")
    for name in names:
        table.add_column(name, justify="right")
    for fit in plan.codecs:
        table.add_row(
            fit.codec,
            f"{fit.bytes_per_token:,}",
            bytes_text(fit.request_bytes),
            f"{fit.tokens:,}",
            f"{fit.requests:,}",
            f"{fit.longest:,}",
            style="bold" if fit.codec == setting.codec else None,
        )
    return table
