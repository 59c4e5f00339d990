"""Pictures to the pixels that a vision encoder takes: opening safely, resizing, cutting into tiles.

The pixels are bit for bit nanoVLM's, which come from torchvision: its resize of a picture is
Pillow's `Image.resize`, its resize of a tensor torch's `interpolate(..., antialias=True)`. What
stands for a tile in a prompt is `image_prompt`'s business. Pillow is imported only when a picture
comes.
"""

import base64
import binascii
import hashlib
import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvist.errors import MissingDependency, RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "DEFAULT_LIMITS",
    "ImageInput",
    "ImageLimits",
    "Tiles",
    "Tiling",
    "data_url",
    "digest_of",
    "open_image",
    "tile_image",
]

ImageInput = Any
"""A picture: a path, a file's bytes, a data URL, or a PIL image."""

# Formats whose decoders read pixels and run nothing else.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@dataclass(frozen=True)
class ImageLimits:
    """What a picture may cost before it is looked at.

    Args:
        max_bytes: of the file.
        max_pixels: width x height, read from the header before anything is decoded.
        allow_paths: files of this machine may be named; not for requests from elsewhere.
    """

    max_bytes: int = 32 << 20
    max_pixels: int = 64 << 20
    allow_paths: bool = True


DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True)
class Tiling:
    """How pictures become square tiles.

    Args:
        tile: pixels of a tile's side.
        max_side: most pixels of the long side, a multiple of `tile`; None squeezes every picture
            into one tile, whatever its proportions.
        enlarge: small pictures too get a long side of `max_side`.
        overview: a picture of several tiles has the whole of it, shrunk to one tile, in front.
    """

    tile: int
    max_side: int | None = None
    enlarge: bool = False
    overview: bool = False


@dataclass(frozen=True, eq=False)
class Tiles:
    """A picture, cut.

    Args:
        pixels: `[n, 3, tile, tile]` float32 in [0, 1]; the overview first, if there is one, then
            row by row.
        rows, columns: of the grid.
        overview: whether the first tile is the whole picture.
    """

    pixels: Tensor
    rows: int
    columns: int
    overview: bool


def open_image(source: ImageInput, limits: ImageLimits = DEFAULT_LIMITS) -> "Image":
    """Read a picture as RGB.

    Transparency is dropped and a camera's orientation mark ignored, as in nanoVLM.

    Args:
        source: a path, a file's bytes, a data URL ("data:image/png;base64,..."), or a PIL image.
        limits: refuse what is larger.

    Raises:
        RequestError: it is none of these, too large, of an unknown kind, damaged or cut short.
        MissingDependency: Pillow is not installed.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingDependency("images need Pillow; install it: pip install pillow") from error

    if isinstance(source, Image.Image):
        _check_pixels("the image", source.size, limits)
        return _decode("the image", source)
    name, data = _read(source, limits)
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures from a limit of its own; ours are checked below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise RequestError(
            f"{name} has far more pixels than the limit of {limits.max_pixels:,}; shrink it"
        ) from error
    except UnidentifiedImageError as error:
        raise RequestError(
            f"{name} is no picture that kvist can read; it takes PNG, JPEG, WebP, GIF, BMP and TIFF"
        ) from error
    except Exception as error:  # decoders raise what they like on damaged headers
        raise RequestError(f"{name} is damaged ({_line(error)})") from error
    with opened:
        _check_pixels(name, opened.size, limits)
        return _decode(name, opened)


def data_url(source: ImageInput, limits: ImageLimits = DEFAULT_LIMITS) -> str:
    """A picture as text that needs no file beside it, once it is sure that it can be read.

    Raises:
        RequestError, MissingDependency: as `open_image`.
    """
    opened = open_image(source, limits)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return source
    if not isinstance(source, str | Path | bytes | bytearray | memoryview):
        buffer = io.BytesIO()
        opened.save(buffer, format="PNG")
        data = buffer.getvalue()
    else:
        _, data = _read(source, limits)
    return f"data:image/*;base64,{base64.b64encode(data).decode()}"


def _read(source: ImageInput, limits: ImageLimits) -> tuple[str, bytes]:
    """What to call it in a message, and the file's bytes."""
    if isinstance(source, bytes | bytearray | memoryview):
        if len(source) > limits.max_bytes:
            raise _too_many_bytes("the image", len(source), limits)
        return "the image", bytes(source)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return "the image in the data URL", _read_data_url(source, limits)
    if isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
        raise RequestError(
            f"kvist fetches nothing from the network ({_short(source)}); give the picture as a "
            "path, bytes or data URL"
        )
    if not isinstance(source, str | Path):
        raise RequestError(
            f"an image is a path, bytes, a data URL or a PIL image, not {type(source).__name__}"
        )
    if not limits.allow_paths:
        raise RequestError("pictures are taken as data URLs here, not by the name of a file")
    path = Path(source)
    try:
        path = path.expanduser()
        with path.open("rb") as file:
            # One byte over the limit tells; a pipe or a growing file cannot fool it.
            data = file.read(limits.max_bytes + 1)
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or _line(error)
        raise RequestError(f"{_short(str(path))}: {reason}") from error
    if len(data) > limits.max_bytes:
        raise _too_many_bytes(_short(str(path)), path.stat().st_size, limits)
    return _short(str(path)), data


def _read_data_url(url: str, limits: ImageLimits) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise RequestError("a data URL must read data:image/...;base64,... and then the file")
    # Four letters are three bytes, less one for each "=" at the end.
    nbytes = len(payload) * 3 // 4 - payload[-2:].count("=")
    if nbytes > limits.max_bytes:
        raise _too_many_bytes("the image in the data URL", nbytes, limits)
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"the data URL is not valid base64 ({_line(error)})") from error


def _decode(name: str, image: "Image") -> "Image":
    try:
        return image.convert("RGB")
    except Exception as error:  # a decoder's, on whatever the file holds
        raise RequestError(f"{name} is damaged or cut short ({_line(error)})") from error


def _check_pixels(name: str, size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise RequestError(f"{name} is {width} x {height} pixels; there is nothing to see")
    if width * height > limits.max_pixels:
        raise RequestError(
            f"{name} is {width} x {height} pixels, more than the limit of "
            f"{limits.max_pixels:,}; shrink it"
        )


def _too_many_bytes(name: str, nbytes: int, limits: ImageLimits) -> RequestError:
    return RequestError(f"{name} has {nbytes:,} bytes, more than the limit of {limits.max_bytes:,}")


def tile_image(image: "Image", tiling: Tiling) -> Tiles:
    """Resize a picture and cut it into tiles."""
    from PIL.Image import Resampling

    tile = tiling.tile
    if tiling.max_side is None:
        squeezed = image.resize((tile, tile), Resampling.BILINEAR)
        return Tiles(_to_tensor(squeezed)[None], 1, 1, overview=False)
    width, height = _target_size(*image.size, tiling)
    if (width, height) != image.size:
        image = image.resize((width, height), Resampling.BICUBIC)
    pixels = _to_tensor(image)
    rows, columns = height // tile, width // tile
    # [3, rows, tile, columns, tile] -> [rows, columns, 3, tile, tile]
    cut = pixels.unflatten(2, (columns, tile)).unflatten(1, (rows, tile)).permute(1, 3, 0, 2, 4)
    tiles = cut.flatten(0, 1)
    overview = tiling.overview and len(tiles) > 1
    if overview:
        whole = F.interpolate(
            pixels[None], size=(tile, tile), mode="bilinear", align_corners=False, antialias=True
        )
        tiles = torch.cat((whole, tiles))
    return Tiles(tiles.contiguous(), rows, columns, overview)


def _target_size(width: int, height: int, tiling: Tiling) -> tuple[int, int]:
    """Both sides multiples of the tile: the long one nearest above, the short one in proportion.

    Floating point in nanoVLM's own order. It makes some pictures a tile longer on the short side
    (273 x 273 becomes 48 x 64 for tiles of 16 up to 48), and another rounding would be another
    number of tokens.
    """
    assert tiling.max_side is not None
    tile, long, short = tiling.tile, max(width, height), min(width, height)
    new_long = tiling.max_side
    if not tiling.enlarge:
        new_long = min(new_long, math.ceil(long / tile) * tile)
    new_short = max(math.ceil(short * (new_long / long) / tile) * tile, tile)
    return (new_long, new_short) if width >= height else (new_short, new_long)


def _to_tensor(image: "Image") -> Tensor:
    """`[3, H, W]` float32 in [0, 1]; nothing else is normalised."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous().float().div(255)


def digest_of(pixels: Tensor) -> str:
    """A name for a tile's content: equal pixels have equal digests."""
    content = hashlib.sha256(repr((tuple(pixels.shape), str(pixels.dtype))).encode())
    content.update(pixels.contiguous().view(torch.uint8).numpy().data)
    return content.hexdigest()


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
