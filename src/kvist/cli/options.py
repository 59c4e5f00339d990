"""Options that several commands share, so that they read alike everywhere."""

from typing import Annotated

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A directory in the hub's format, a GGUF file, a hub id, or a pulled name "
        "such as [bold]smollm2-135m[/].",
        show_default=False,
    ),
]
DtypeOption = Annotated[
    str, typer.Option(help="float32, bfloat16, float16; auto: float32 on a CPU.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto: the first GPU.")]
WeightsOption = Annotated[
    str,
    typer.Option(
        help="auto: as the checkpoint has them; fp8: rounded to 8 bits while they are read; "
        "fp8-dynamic: activations too, where many tokens are computed at once."
    ),
]
ExactOption = Annotated[
    bool,
    typer.Option(
        "--exact",
        help="The model's own forward, quantised weights as the file says to the bit: no native "
        "code with rounded activations.",
    ),
]
DeterministicOption = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="The same bits for a token in any batch and chunk; slower.",
    ),
]
DummyOption = Annotated[
    bool, typer.Option("--dummy", help="Random weights from config.json alone.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One machine-readable JSON object.")]
CacheOption = Annotated[
    str,
    typer.Option(
        "--cache", metavar="LAYOUT", help="Where tokens lie: dynamic, static, ring, paged."
    ),
]
CodecOption = Annotated[
    str,
    typer.Option(
        "--codec",
        metavar="CODEC",
        help="How they are written: plain, fp8, int8, k8v4, int4; int4,0-1=int8 for some layers.",
    ),
]
WindowOption = Annotated[
    int | None,
    typer.Option(help="Keep only the last N tokens of each layer.", min=1, show_default=False),
]
SinksOption = Annotated[
    int, typer.Option(help="With --window: keep the first N tokens too.", min=0)
]

# How tokens are chosen.
SAMPLING = "Sampling"
GreedyOption = Annotated[
    bool, typer.Option("--greedy", help="Always the likeliest token.", rich_help_panel=SAMPLING)
]
TemperatureOption = Annotated[
    float | None, typer.Option(show_default="the model's", rich_help_panel=SAMPLING)
]
TopKOption = Annotated[
    int | None, typer.Option(show_default="the model's", rich_help_panel=SAMPLING)
]
TopPOption = Annotated[
    float | None, typer.Option(show_default="the model's", rich_help_panel=SAMPLING)
]
MinPOption = Annotated[
    float | None, typer.Option(show_default="the model's", rich_help_panel=SAMPLING)
]
RepetitionPenaltyOption = Annotated[
    float | None, typer.Option(show_default="the model's", rich_help_panel=SAMPLING)
]
SeedOption = Annotated[
    int | None, typer.Option(show_default="a fresh one", rich_help_panel=SAMPLING)
]


def executor_name(*, exact: bool, deterministic: bool = False) -> str:
    """What `kvist.load` is asked for; equal bits are exact, too."""
    if deterministic:
        return "deterministic"
    return "reference" if exact else "auto"
