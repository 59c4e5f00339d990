"""`kvist serve`: the HTTP server. Its options are the fields of `server.settings.Settings`."""

import inspect
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from kvist.cli.options import ModelArgument, executor_name
from kvist.errors import MissingDependency
from kvist.reports.sizes import bytes_text
from kvist.server.settings import PREFIX, Settings, engine_options, read_settings


def command(model: str, config: Path | None = None, **flags: Any) -> None:
    """Serve OpenAI's API, and a page that shows the cache at work.

    Every option may also be an environment variable ([bold]KVIST_PORT[/]) or a line of a TOML file
    ([bold]port = 8000[/]). A flag counts before a variable, a variable before the file.
    """
    settings = read_settings(flags, file=config)
    try:
        from kvist.server.app import create_app
        from kvist.server.run import serve
    except ImportError as error:
        raise MissingDependency(
            f"the server needs {error.name}; install it: pip install 'kvist[server]'"
        ) from error
    from kvist.async_engine import AsyncLLM
    from kvist.loading.model import load
    from kvist.server.logs import configure
    from kvist.server.tenants import KeyRing

    KeyRing.from_settings(settings)  # what is wrong with keys is said before the model is read
    configure(settings)
    executor = executor_name(exact=settings.exact, deterministic=settings.deterministic)
    loaded = load(
        model,
        settings.dtype,
        settings.device,
        executor=executor,
        weights=settings.weights,
        dummy=settings.dummy,
    )
    engine = AsyncLLM(loaded, **engine_options(settings))
    sys.exit(serve(create_app(engine, settings), settings))


def _option(name: str, hint: Any, metadata: Any, default: Any) -> inspect.Parameter:
    """A setting as an option that knows whether it was given."""
    flag = f"--{name.replace('_', '-')}"
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not NoneType]
    kind: Any = kinds[0]
    flags = [flag]
    shown: Any = default
    if get_origin(hint) is tuple:
        kind, shown = str, ",".join(default)
    elif kind is bool:
        flags = [f"{flag}/--no-{flag[2:]}"]
        shown = flag[2:] if default else f"no-{flag[2:]}"
    elif metadata["size"] == "bytes":
        kind, shown = str, bytes_text(default) if default else default
    elif metadata["size"] or isinstance(kind, str):  # a Literal's choices are texts
        kind = str
    option = typer.Option(
        *flags,
        help=metadata["help"],
        rich_help_panel=metadata["group"],
        show_default=str(shown) if shown not in (None, "") else False,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _with_options() -> inspect.Signature:
    """The command's own signature, with an option for each setting."""
    hints = get_type_hints(Settings)
    config = typer.Option(
        help="A TOML file of settings.", envvar=f"{PREFIX}CONFIG", show_default=False
    )
    parameters = [
        inspect.Parameter(
            "model", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=ModelArgument
        ),
        inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[Path | None, config],
        ),
    ]
    for one in fields(Settings):
        if one.metadata["flag"]:
            assert one.default is not MISSING
            parameters.append(_option(one.name, hints[one.name], one.metadata, one.default))
    return inspect.Signature(parameters)


# typer reads the signature and the annotations of what it is given.
command.__signature__ = _with_options()  # type: ignore[attr-defined]
command.__annotations__ = {
    parameter.name: parameter.annotation
    for parameter in command.__signature__.parameters.values()  # type: ignore[attr-defined]
}
