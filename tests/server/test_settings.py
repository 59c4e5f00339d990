"""Settings: one name in flags, environment and file, and who counts before whom."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvist.cli.app import app
from kvist.engine import EngineConfig
from kvist.errors import ConfigError
from kvist.server.settings import Settings, engine_options, read_settings


def test_a_flag_counts_before_a_variable_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\nhost = "a"\ncodec = "int8"\nui = false\nimage_hosts = ["x.org"]\n')
    found = read_settings({"port": 3, "ui": None}, {"KVIST_PORT": "2", "KVIST_HOST": "b"}, file)
    assert (found.port, found.host, found.codec) == (3, "b", "int8")
    assert (found.ui, found.image_hosts, found.max_queue) == (False, ("x.org",), 256)


def test_values_are_read_as_what_they_are() -> None:
    environ = {
        "KVIST_CACHE_MEMORY": "1GiB", "KVIST_MAX_MODEL_LEN": "32k", "KVIST_UI": "no",
        "KVIST_REQUEST_TIMEOUT": "1.5", "KVIST_API_KEYS": "one-long-key, two-long-key",
        "KVIST_SSL_CERTFILE": "a.pem", "KVIST_MAX_TOKENS_PER_KEY": "", "KVIST_HOME": "/nowhere",
    }  # fmt: skip
    found = read_settings({}, environ)
    assert (found.cache_memory, found.max_model_len, found.ui) == (1 << 30, 32768, False)
    assert (found.request_timeout, found.api_keys) == (1.5, ("one-long-key", "two-long-key"))
    assert (found.ssl_certfile, found.max_tokens_per_key) == (Path("a.pem"), None)


@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        ({"KVIST_PORT": "many"}, "KVIST_PORT must be of type int"),
        ({"KVIST_PORT": "70000"}, "port must be in"),
        ({"KVIST_UI": "perhaps"}, "true or false"),
        ({"KVIST_POOLING": "max"}, "must be one of"),
        ({"KVIST_MAX_BODY": "0"}, "max_body must be over 0"),
        ({"KVIST_REQUEST_TIMEOUT": "-1"}, "request_timeout must be over 0"),
        ({"KVIST_IMAGE_HOSTS": "*"}, "not [*]"),
    ],
)
def test_a_wrong_value_is_named(environ: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read_settings({}, environ)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("prot = 1", "did you mean port"),
        ("port = 'a", "not valid TOML"),
        ("port = true", "must be of type int"),
        ("cors_origins = [1]", "list of texts"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=reason):
        read_settings({}, {}, file)
    with pytest.raises(ConfigError, match="No such file"):
        read_settings({}, {}, tmp_path / "none.toml")


def test_the_engine_gets_what_is_its_own() -> None:
    options = engine_options(Settings(window=32, sinks=4, codec="int8"))
    config = EngineConfig(**options)
    assert config.codec == "int8"
    assert config.retention is not None
    assert EngineConfig(**engine_options(Settings())) == EngineConfig()


def test_every_setting_is_a_flag_but_for_secrets() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    for one in fields(Settings):
        flag = f"--{one.name.replace('_', '-')}"
        assert (flag in shown) == one.metadata["flag"] or flag == "--api-keys", one.name


def test_what_is_wrong_is_said_before_the_model_is_read() -> None:
    result: Any = CliRunner().invoke(app, ["serve", "no-such-model", "--host", "0.0.0.0"])
    assert isinstance(result.exception, ConfigError)
    assert "others could reach" in str(result.exception)
