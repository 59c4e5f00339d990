"""Pictures: the pixels are nanoVLM's bit for bit, and what cannot be read is refused in a line."""

import base64
import contextlib
import io
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from vlm_cases import CHELSEA, case

from kvist.errors import RequestError
from kvist.loading.images import (
    DEFAULT_LIMITS,
    ImageLimits,
    Tiling,
    digest_of,
    open_image,
    tile_image,
)

TILING = Tiling(tile=32, max_side=64, overview=True)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def picture() -> Image.Image:
    return Image.effect_noise((50, 40), 60).convert("RGB")


@pytest.mark.parametrize("name", ["vlm_tied", "vlm_untied"])
def test_tiles_are_bit_equal_to_nanovlms(name: str) -> None:
    tiles = tile_image(open_image(CHELSEA), case(name).loaded.processor.tiling)
    assert torch.equal(tiles.pixels, case(name).ref["vlm.one_image.pixels.0"])


@given(width=st.integers(1, 300), height=st.integers(1, 300), enlarge=st.booleans())
def test_tiles_cover_the_picture_in_rows(width: int, height: int, enlarge: bool) -> None:
    tiling = Tiling(tile=16, max_side=48, enlarge=enlarge, overview=True)
    tiles = tile_image(Image.new("RGB", (width, height)), tiling)
    several = tiles.rows * tiles.columns > 1
    assert tiles.pixels.shape == (tiles.rows * tiles.columns + several, 3, 16, 16)
    assert tiles.overview == several
    long, short = tiles.columns, tiles.rows
    if height > width:
        long, short = short, long
    assert long == (3 if enlarge else min(3, -(-max(width, height) // 16)))
    assert 1 <= short <= long + 1  # see test_nanovlms_rounding_is_kept


def test_nanovlms_rounding_is_kept() -> None:
    tiles = tile_image(Image.new("RGB", (273, 273)), Tiling(tile=16, max_side=48))
    assert (tiles.rows, tiles.columns) == (4, 3)


def test_tiles_are_cut_where_they_stand() -> None:
    image = Image.new("RGB", (64, 32))
    image.paste((255, 0, 0), (32, 0, 64, 32))
    tiles = tile_image(image, replace(TILING, overview=False))
    assert (tiles.rows, tiles.columns) == (1, 2)
    assert tiles.pixels[:, 0].amin(dim=(1, 2)).tolist() == [0.0, 1.0]


def test_without_tiles_every_picture_is_squeezed_into_one(picture: Image.Image) -> None:
    tiles = tile_image(picture, Tiling(tile=32))
    assert tiles.pixels.shape == (1, 3, 32, 32)
    squeezed = picture.resize((32, 32), Image.Resampling.BILINEAR)
    expected = torch.tensor(list(squeezed.tobytes())).view(32, 32, 3).permute(2, 0, 1) / 255
    assert torch.equal(tiles.pixels[0], expected)


def test_every_kind_of_source_gives_the_same_picture(tmp_path: Path, picture: Image.Image) -> None:
    data, path = png(picture), tmp_path / "picture.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (path, str(path), data, bytearray(data), url, picture):
        assert open_image(source).tobytes() == picture.tobytes()


def test_modes_other_than_rgb_are_converted(picture: Image.Image) -> None:
    for mode in ("L", "P", "RGBA", "1", "CMYK"):
        assert open_image(picture.convert(mode)).mode == "RGB"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "no picture that kvist can read"),
        (b"%PDF-1.4 something", "no picture that kvist can read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no picture"),
        ("data:image/png;base64,!!!", "not valid base64"),
        ("data:image/png,rawbytes", "must read data:image"),
        ("https://example.com/cat.png", "fetches nothing from the network"),
        ("/nowhere/cat.png", "/nowhere/cat.png: No such file"),
        ("a\0b", "null"),
        (42, "not int"),
        (None, "not NoneType"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(source: object, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        open_image(source)
    assert "\n" not in str(caught.value)


def test_a_directory_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="Is a directory"):
        open_image(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated_pictures_are_refused(kind: str, picture: Image.Image) -> None:
    file = io.BytesIO()
    picture.save(file, kind)
    whole = file.getvalue()
    assert open_image(whole).size == picture.size
    with pytest.raises(RequestError, match=r"damaged|no picture"):
        open_image(whole[: len(whole) // 2])


@given(st.integers(0, 2**16), st.binary(min_size=1, max_size=8))
def test_damaged_pictures_are_read_or_refused_and_nothing_else(place: int, noise: bytes) -> None:
    whole = bytearray(png(Image.linear_gradient("L").resize((20, 20))))
    start = place % len(whole)
    whole[start : start + len(noise)] = noise
    with contextlib.suppress(RequestError):
        assert open_image(bytes(whole)).mode == "RGB"


def bomb(width: int, height: int) -> bytes:
    """A few bytes of PNG that claim to be huge."""
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    chunks = b""
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b"")):
        crc = zlib.crc32(kind + body)
        chunks += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_decompression_bombs_are_refused_before_decoding(side: int) -> None:
    with pytest.raises(RequestError, match=r"pixels.*limit of 67,108,864; shrink it"):
        open_image(bomb(side, side))


def test_limits_hold_for_every_source(tmp_path: Path, picture: Image.Image) -> None:
    data, path = png(picture), tmp_path / "picture.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    small = ImageLimits(max_bytes=len(data) - 1)
    for source in (path, data, url):
        with pytest.raises(RequestError, match=rf"{len(data):,} bytes, more than the limit"):
            open_image(source, small)
        assert open_image(source, ImageLimits(max_bytes=len(data))).size == picture.size
    few = ImageLimits(max_pixels=50 * 40 - 1)
    for source in (path, data, url, picture):
        with pytest.raises(RequestError, match="50 x 40 pixels"):
            open_image(source, few)


def test_paths_can_be_forbidden(tmp_path: Path, picture: Image.Image) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(png(picture))
    distant = replace(DEFAULT_LIMITS, allow_paths=False)
    for source in (path, str(path)):
        with pytest.raises(RequestError, match="data URLs here"):
            open_image(source, distant)
    assert open_image(path.read_bytes(), distant).size == picture.size


def test_a_digest_names_content_and_shape() -> None:
    x = torch.rand(3, 4, 4)
    assert digest_of(x) == digest_of(x.clone())
    assert digest_of(x) == digest_of(x.transpose(1, 2).contiguous().transpose(1, 2))
    assert digest_of(x) != digest_of(x.view(3, 2, 8))
    changed = x.clone()
    changed[0, 0, 0] += 1e-6
    assert digest_of(x) != digest_of(changed)
