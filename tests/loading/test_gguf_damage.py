"""Damaged GGUF files fail at once, by name, and never with anything but a kvist error."""

import contextlib
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_gguf import TinyGGUF

from kvist.errors import CheckpointError, KvistError, NotSupported
from kvist.loading.checkpoint import open_checkpoint
from kvist.loading.gguf_format import read_gguf

Edit = Callable[[bytearray], None]


def put(layout: str, offset: int, value: int) -> Edit:
    """Overwrite a number of the header: magic, u32 version, u64 tensors, u64 metadata keys."""
    return lambda content: struct.pack_into(layout, content, offset, value)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (put("<I", 0, 0x04034B50), r"not a GGUF file \(it begins with b'PK"),
        (put("<I", 4, 1), "GGUF version 1; kvist reads 2 and 3"),
        (put("<I", 4, 99), "GGUF version 99"),
        (put(">I", 4, 3), "big-endian"),
        (put("<Q", 8, 1 << 60), "claims 1,152,921,504,606,846,976 tensors"),
        (put("<Q", 16, 1 << 60), "metadata entries"),
        (put("<Q", 8, 1 << 15), "claims 32,768 tensors"),
        (put("<Q", 24, 1 << 50), "claims a text of"),
        (put("<Q", 24, 1 << 22), "truncated GGUF, metadata entry 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_header_is_explained(tiny_gguf: Path, edit: Edit, says: str) -> None:
    content = bytearray(tiny_gguf.read_bytes())
    edit(content)
    tiny_gguf.write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as caught:
        open_checkpoint(tiny_gguf)
    assert str(tiny_gguf) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 3, 4, 10, 24, 100, 700])
def test_a_gguf_cut_off_in_its_header_names_the_file(tiny_gguf: Path, kept: int) -> None:
    tiny_gguf.write_bytes(tiny_gguf.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=tiny_gguf.name):
        open_checkpoint(tiny_gguf)


def test_a_gguf_cut_off_in_its_weights_names_file_and_tensor(tiny_gguf: Path) -> None:
    content = tiny_gguf.read_bytes()
    tiny_gguf.write_bytes(content[:-1000])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: truncated GGUF, tensor 'blk\.1\."):
        open_checkpoint(tiny_gguf)


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_checkpoint(path)


def test_a_type_that_is_not_read_is_named_with_those_that_are(tmp_path: Path) -> None:
    content = header(tensors=1) + tensor_info("blk.0.ffn_up.weight", type_number=16)
    with pytest.raises(NotSupported, match=r"'blk\.0\.ffn_up\.weight' is stored as IQ2_XXS.*Q4_1"):
        read_gguf(written(tmp_path, content))


@pytest.mark.parametrize(
    ("info", "says"),
    [
        ({"type_number": 77}, "unknown type 77"),
        ({"shape": (1,) * 9}, "claims 9 dimensions"),
        ({"shape": (0, 4)}, "is empty"),
        ({"shape": (33,), "type_number": 3}, "rows of 33 are no multiple of Q4_1's 32"),
        ({"shape": (1 << 62, 1 << 62)}, "truncated GGUF"),
        ({"offset": 7}, "begins at 7"),
        ({"offset": 1 << 62}, "truncated GGUF"),
    ],
)
def test_a_senseless_tensor_description_is_explained(
    tmp_path: Path, info: dict[str, object], says: str
) -> None:
    content = header(tensors=1) + tensor_info("w", **info) + bytes(4096)
    with pytest.raises(CheckpointError, match=says):
        read_gguf(written(tmp_path, content))


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (struct.pack("<I", 13), "unknown value type 13"),
        (struct.pack("<IIQ", 9, 0, 1 << 40), "claims 1,099,511,627,776 values"),
        (struct.pack("<IIQ", 9, 8, 1 << 40), "claims 1,099,511,627,776 values"),
        (struct.pack("<IIQ", 9, 8, 2) + struct.pack("<Q", 1 << 30), "truncated GGUF"),
        (struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9, "nests arrays"),
        (struct.pack("<IQ", 8, 1) + b"\xff", "not UTF-8"),
    ],
)
def test_a_senseless_metadata_entry_is_explained(tmp_path: Path, entry: bytes, says: str) -> None:
    content = header(keys=1) + text("key") + entry + bytes(64)
    with pytest.raises(CheckpointError, match=says):
        read_gguf(written(tmp_path, content))


def test_an_absurd_count_that_fits_the_files_size_is_refused_fast(tmp_path: Path) -> None:
    path = written(tmp_path, header(keys=1) + text("k") + struct.pack("<IIQ", 9, 0, 3 << 30))
    with path.open("r+b") as file:
        file.truncate(4 << 30)  # sparse: takes no room on the disk
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="claims 3,221,225,472 values"):
        read_gguf(path)
    assert time.perf_counter() - start < 1


def test_repeated_names_are_refused(tmp_path: Path) -> None:
    entry = text("key") + struct.pack("<IB", 0, 1)
    with pytest.raises(CheckpointError, match="'key' occurs twice"):
        read_gguf(written(tmp_path, header(keys=2) + entry * 2))
    info = tensor_info("w")
    with pytest.raises(CheckpointError, match="'w' occurs twice"):
        read_gguf(written(tmp_path, header(tensors=2) + info * 2 + bytes(256)))


def test_an_alignment_that_is_no_power_of_two_is_refused(tmp_path: Path) -> None:
    content = header(keys=1) + text("general.alignment") + struct.pack("<II", 4, 48)
    with pytest.raises(CheckpointError, match=r"general\.alignment is 48"):
        read_gguf(written(tmp_path, content + bytes(256)))


def test_every_kind_of_metadata_value_is_read(tiny: TinyGGUF, tmp_path: Path) -> None:
    path = tmp_path / "kinds.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -5)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -6)
    writer.add_int32("i32", -7)
    writer.add_uint64("u64", 1 << 40)
    writer.add_int64("i64", -(1 << 40))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("flag", True)
    writer.add_string("text", "grüße 👋")
    writer.add_array("texts", ["a", "", "ü"])
    writer.add_array("numbers", [1, 2, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = {
        "u8": 200,
        "i8": -5,
        "u16": 60000,
        "i16": -6,
        "i32": -7,
        "u64": 1 << 40,
        "i64": -(1 << 40),
        "f32": 0.5,
        "f64": 0.1,
        "flag": True,
        "text": "grüße 👋",
        "texts": ["a", "", "ü"],
        "numbers": [1, 2, 3],
    }
    metadata = read_gguf(path).metadata
    assert {key: metadata[key] for key in expected} == expected


@given(seed=st.integers(0, 1 << 30))
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_random_damage_gives_a_kvist_error_or_a_readable_file(tiny_gguf: Path, seed: int) -> None:
    chance = random.Random(seed)
    content = bytearray(tiny_gguf.read_bytes())
    for _ in range(chance.randint(1, 4)):
        position = chance.randrange(2600)  # header, metadata and the table of tensors
        content[position] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
    if chance.random() < 0.2:
        del content[chance.randrange(len(content)) :]
    damaged = tiny_gguf.with_name("damaged.gguf")
    damaged.write_bytes(content)
    with contextlib.suppress(KvistError):
        checkpoint = open_checkpoint(damaged)
        for name in checkpoint.names():
            checkpoint.tensor(name)


def header(tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


def text(content: str) -> bytes:
    return struct.pack("<Q", len(content)) + content.encode()


def tensor_info(
    name: str, *, shape: tuple[int, ...] = (32,), type_number: int = 0, offset: int = 0
) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", type_number, offset)


def written(directory: Path, content: bytes) -> Path:
    path = directory / "made.gguf"
    path.write_bytes(content)
    return path
