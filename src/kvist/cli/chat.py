"""`kvist chat`: a conversation on the terminal. Options and wiring; `repl` is the conversation."""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any

import typer

from kvist.cli.options import (
    CacheOption,
    CodecOption,
    DeterministicOption,
    DeviceOption,
    DtypeOption,
    DummyOption,
    ExactOption,
    GreedyOption,
    MinPOption,
    ModelArgument,
    RepetitionPenaltyOption,
    SeedOption,
    SinksOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    WeightsOption,
    WindowOption,
    executor_name,
)
from kvist.errors import RequestError

CHAT = "Conversation"


def command(
    ctx: typer.Context,
    model: ModelArgument,
    system: Annotated[
        str | None,
        typer.Option(help="The system message.", show_default=False, rich_help_panel=CHAT),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Go on with a chat that /save wrote.",
            show_default=False,
            rich_help_panel=CHAT,
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Length of the conversation at most, such as 32k.",
            show_default="the model's",
            rich_help_panel=CHAT,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of an answer at most.", show_default="4096", rich_help_panel=CHAT
        ),
    ] = None,
    think: Annotated[
        bool,
        typer.Option(
            "--think/--no-think",
            help="Whether a model that can think before it answers should.",
            rich_help_panel=CHAT,
        ),
    ] = True,
    hide_thinking: Annotated[
        bool,
        typer.Option("--hide-thinking", help="Do not show the thinking.", rich_help_panel=CHAT),
    ] = False,
    greedy: GreedyOption = False,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    seed: SeedOption = None,
    cache: CacheOption = "dynamic",
    codec: CodecOption = "plain",
    window: WindowOption = None,
    sinks: SinksOption = 0,
    speculate: Annotated[
        int, typer.Option(help="Guess up to N tokens a step from what was said before.", min=0)
    ] = 0,
    attention: Annotated[str, typer.Option(help="auto, sdpa, reference …")] = "auto",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    weights: WeightsOption = "auto",
    exact: ExactOption = False,
    deterministic: DeterministicOption = False,
    dummy: DummyOption = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No figures after each answer.")
    ] = False,
) -> None:
    """Talk with a model; each turn computes only what is new.

    [bold]/help[/] lists what can be done beside talking. Ctrl-C stops an answer, Ctrl-D leaves.
    """
    if greedy and temperature:
        raise RequestError(f"--greedy and --temperature {temperature} contradict each other")
    if resume is not None and (given := _given(ctx, "codec", "cache", "window", "sinks")):
        raise RequestError(f"--resume takes the cache as it was saved; leave out {given}")

    from kvist.chat import Conversation
    from kvist.cli.repl import Repl, read_lines
    from kvist.cli.screen import PlainScreen, RichScreen, Screen
    from kvist.core.params import SamplingParams
    from kvist.core.retention import SlidingWindow
    from kvist.loading.model import load
    from kvist.reports.sizes import parse_tokens

    params = SamplingParams(
        temperature=0.0 if greedy else temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        max_tokens=max_tokens,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    retention = None if window is None else SlidingWindow(window, sinks)
    most = None if context is None else parse_tokens(context)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    with _loading(model) if interactive else nullcontext():
        executor = executor_name(exact=exact, deterministic=deterministic)
        loaded = load(model, dtype, device, executor=executor, weights=weights, dummy=dummy)
    conversation = Conversation(
        loaded,
        codec,
        cache,
        retention,
        system=system,
        context=most,
        attention=attention,
        speculate=speculate,
        template=None if think else {"enable_thinking": False},
    )
    screen: Screen
    if sys.stdout.isatty():
        screen = RichScreen(hide_thinking=hide_thinking)
    else:
        screen = PlainScreen(hide_thinking=hide_thinking)
    repl = Repl(conversation, params, screen, figures=interactive and not quiet)
    if resume is not None:
        repl.load(resume)
        if system is not None:
            conversation.set_system(system)
    if interactive:
        repl.greet()
    repl.run(read_lines(interactive))


def _given(ctx: typer.Context, *names: str) -> str:
    """Which of these options were written on the command line."""
    sources = {name: ctx.get_parameter_source(name) for name in names}
    return ", ".join(
        f"--{n}" for n, source in sources.items() if source and source.name != "DEFAULT"
    )


def _loading(model: str) -> AbstractContextManager[Any]:
    """Shows that something is being done, until it is."""
    from rich.console import Console
    from rich.markup import escape

    return Console(stderr=True).status(f"[dim]loading {escape(model)}[/]")
