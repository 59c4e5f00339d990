"""What an operator may choose, in one place: each field is a flag, a variable and a line of TOML.

`Settings` is plain data that imports nothing heavy, so that the command line can be built from it;
`read_settings` puts together what flags, environment and file say. Nothing here is looked at by the
engine: `EngineConfig` has its own fields, which `engine_options` picks out.
"""

# ruff: noqa: RUF009 - `_setting` makes dataclass fields

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kvist.errors import ConfigError, RequestError

PREFIX = "KVIST_"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def _setting(
    default: Any, help: str, group: str = "Server", *, flag: bool = True, size: str = ""
) -> Any:
    """A field with its line of help; `flag=False` keeps a secret out of the process list."""
    return field(
        default=default, metadata={"help": help, "group": group, "flag": flag, "size": size}
    )


ENGINE, LIMITS, ACCESS, LOGS = "Engine", "Limits", "Access", "Logs"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server runs; every field is documented by its own help."""

    host: str = _setting("127.0.0.1", "Address to listen on.")
    port: int = _setting(8000, "Port to listen on; 0 takes a free one.")
    served_model_name: tuple[str, ...] = _setting(
        (), "What clients may call the model; by default its own name."
    )
    ui: bool = _setting(True, "The page at / that shows the cache at work.")
    embeddings: bool = _setting(False, "Offer /v1/embeddings.")
    pooling: Literal["last", "mean"] = _setting("last", "How hidden states become an embedding.")
    root_path: str = _setting("", "Where a reverse proxy mounts the server.")
    ssl_certfile: Path | None = _setting(None, "Certificate, for TLS.")
    ssl_keyfile: Path | None = _setting(None, "Its key.")
    ssl_keyfile_password: str | None = _setting(None, "The key's password.", flag=False)
    ssl_ca_certs: Path | None = _setting(None, "Ask clients for certificates signed by these.")

    api_keys: tuple[str, ...] = _setting((), "Keys, comma-separated.", ACCESS, flag=False)
    api_keys_file: Path | None = _setting(
        None, "Keys, one a line, each with a name before it if you like.", ACCESS
    )
    auth: bool = _setting(True, "Refuse to listen beyond loopback without keys.", ACCESS)
    share_prefixes: bool = _setting(
        False, "Let keys share cached prefixes, which tells each what others asked.", ACCESS
    )
    allowed_hosts: tuple[str, ...] = _setting(
        (), "On loopback without keys: names to be asked by, beside localhost.", ACCESS
    )
    cors_origins: tuple[str, ...] = _setting((), "Web origins that may call the API.", ACCESS)
    image_hosts: tuple[str, ...] = _setting(
        (), "Hosts that images are fetched from; none, but data URLs, by default.", ACCESS
    )

    max_queue: int = _setting(256, "Requests that may wait; more get 429.", LIMITS)
    max_requests_per_key: int | None = _setting(None, "Requests in flight per key.", LIMITS)
    max_tokens_per_key: int | None = _setting(
        None, "Tokens in flight per key, prompts and the most they may give.", LIMITS
    )
    default_max_tokens: int = _setting(4096, "New tokens of a chat that names none.", LIMITS)
    max_samples: int = _setting(64, "Outputs of one request: prompts times n.", LIMITS)
    max_body: int = _setting(16 << 20, "Size of a request's body.", LIMITS, size="bytes")
    max_images: int = _setting(16, "Images in one request.", LIMITS)
    max_image_bytes: int = _setting(12 << 20, "Size of an image's file.", LIMITS, size="bytes")
    max_image_pixels: int = _setting(32 << 20, "Width times height of an image.", LIMITS)
    request_timeout: float = _setting(600.0, "Seconds that a request may take.", LIMITS)
    drain_timeout: float = _setting(
        120.0, "Seconds for what runs to finish once told to stop.", LIMITS
    )

    dtype: str = _setting("auto", "float32, bfloat16, float16; auto: float32 on a CPU.", ENGINE)
    device: str = _setting("auto", "cpu, cuda, cuda:1; auto: the first GPU.", ENGINE)
    weights: str = _setting("auto", "auto, fp8 or fp8-dynamic: projections in 8 bits.", ENGINE)
    dummy: bool = _setting(False, "Random weights from config.json alone.", ENGINE)
    exact: bool = _setting(False, "The model's own forward; no native code.", ENGINE)
    deterministic: bool = _setting(False, "The same bits in any batch; slower.", ENGINE)
    codec: str = _setting("plain", "How the cache is written.", ENGINE)
    window: int | None = _setting(None, "Keep only the last N tokens of each layer.", ENGINE)
    sinks: int = _setting(0, "With a window: keep the first N tokens too.", ENGINE)
    block_size: int = _setting(16, "Tokens of a block, the unit of sharing.", ENGINE)
    max_num_seqs: int = _setting(64, "Sequences that run at a time.", ENGINE)
    max_batch_tokens: int = _setting(2048, "New tokens of a step.", ENGINE)
    max_model_len: int | None = _setting(None, "Longest prompt plus output.", ENGINE, size="tokens")
    cache_memory: int | None = _setting(None, "For the cache.", ENGINE, size="bytes")
    host_cache: int = _setting(0, "Host memory for blocks that fall out.", ENGINE, size="bytes")
    prefix_cache: bool = _setting(True, "Find computed blocks again.", ENGINE)
    speculate: int = _setting(0, "Guess up to N tokens a step from the text so far.", ENGINE)
    attention: str = _setting("auto", "Attention's kernel.", ENGINE)

    log_level: Literal["debug", "info", "warning", "error"] = _setting("info", "How much.", LOGS)
    log_format: Literal["json", "text"] = _setting("json", "How it is written.", LOGS)

    def __post_init__(self) -> None:
        """Refuse what could never serve.

        Raises:
            ConfigError: naming the setting and its value.
        """
        for name in ("default_max_tokens", "max_samples", "max_body", "request_timeout"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be over 0, not {getattr(self, name)}")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be in 0..65535, not {self.port}")
        if self.max_queue < 0:
            raise ConfigError(f"max_queue must be >= 0, not {self.max_queue}")
        if "*" in self.image_hosts:
            raise ConfigError("image_hosts takes the names of hosts, not *")

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK or self.host.startswith("127.")


def engine_options(settings: Settings) -> dict[str, Any]:
    """The arguments of `AsyncLLM`, the model's own aside."""
    from kvist.core.retention import SlidingWindow

    window = settings.window
    retention = None if window is None else SlidingWindow(window, settings.sinks)
    return {name: getattr(settings, name) for name in _OF_THE_ENGINE} | {"retention": retention}


_OF_THE_ENGINE = (
    "codec",
    "block_size",
    "max_num_seqs",
    "max_batch_tokens",
    "max_model_len",
    "cache_memory",
    "host_cache",
    "prefix_cache",
    "speculate",
    "attention",
)


def read_settings(
    flags: Mapping[str, Any],
    environ: Mapping[str, str] = os.environ,
    file: Path | None = None,
) -> Settings:
    """Put the settings together: a flag counts before a variable, a variable before the file.

    Args:
        flags: by name; None is a flag that was not given.
        environ: `KVIST_PORT=80` is the setting `port`; lists are comma-separated.
        file: TOML with the same names.

    Raises:
        ConfigError: an unknown name in the file, or a value that does not fit.
    """
    given: dict[str, tuple[str, Any]] = {}
    if file is not None:
        given |= {name: (f"{file}: {name}", value) for name, value in _read_toml(file).items()}
    for one in fields(Settings):
        variable = PREFIX + one.name.upper()
        if variable in environ:
            given[one.name] = (variable, environ[variable])
        if flags.get(one.name) is not None:
            given[one.name] = (f"--{one.name.replace('_', '-')}", flags[one.name])
    hints = get_type_hints(Settings)
    sizes = {one.name: one.metadata["size"] for one in fields(Settings)}
    return Settings(
        **{
            name: _converted(value, hints[name], where, sizes[name])
            for name, (where, value) in given.items()
        }
    )


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from error
    known = {one.name for one in fields(Settings)}
    if unknown := sorted(content.keys() - known):
        from difflib import get_close_matches

        close = get_close_matches(unknown[0], known, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{file}: there is no setting {unknown[0]}{hint}")
    return content


def _converted(value: Any, hint: Any, where: str, size: str) -> Any:
    """A value as the field's type; text, as it comes from the environment, is parsed."""
    options = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    if value in (None, "") and NoneType in options:
        return None
    kind = next(option for option in options if option is not NoneType)
    if get_origin(kind) is tuple:
        texts: Any = value.split(",") if isinstance(value, str) else value
        if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"{where} must be a list of texts, not {value!r}")
        return tuple(text.strip() for text in texts if text.strip())
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(f"{where} must be one of {get_args(kind)}, not {value!r}")
        return value
    if kind is bool:
        if isinstance(value, bool):
            return value
        words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if str(value).lower() not in words:
            raise ConfigError(f"{where} must be true or false, not {value!r}")
        return words[str(value).lower()]
    if size and isinstance(value, str):
        from kvist.reports.sizes import parse_bytes, parse_tokens

        try:
            return 0 if value == "0" else (parse_bytes if size == "bytes" else parse_tokens)(value)
        except RequestError as error:
            raise ConfigError(f"{where}: {error}") from error
    try:
        if kind in (int, float) and isinstance(value, bool):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} must be of type {kind.__name__}, not {value!r}") from error
