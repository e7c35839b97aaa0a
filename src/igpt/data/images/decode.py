"""Decode images from cameras, scanners and the web to upright RGB, or RGBA."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from igpt.errors import InputError
from igpt.files import require_regular

# EXIF orientation -> the operation that undoes it
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# Raw modes of PNG whose levels Pillow scales to 8 bits.
_LEVEL_SCALE = {"L;2": 85, "L;4": 17}


@cache
def register_decoders() -> None:
    """Let Pillow read HEIC if the optional package pillow-heif is installed."""
    try:
        from pillow_heif import register_heif_opener  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return
    register_heif_opener()


@contextmanager
def _reasons(image: Any) -> Iterator[None]:
    """Turn any error of an image into an `InputError` with the reason."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"no such file: {image}") from None
    except IsADirectoryError:
        raise InputError(f"{image} is a folder; an image file is needed here") from None
    except UnidentifiedImageError:
        raise InputError("not an image in a known format") from None
    # Any type: each of Pillow's readers has its own errors for malformed files.
    except Exception as error:
        raise InputError(f"does not decode: {str(error) or type(error).__name__}") from None


def open_image(image: Any) -> Image.Image:
    """Read the header of an image; `load` decodes it.

    Args:
        image: a path, encoded bytes, a PIL image, an array uint8 [H, W, 3 or 4] or [H, W], or the
            `{"bytes", "path"}` record of an undecoded `datasets.Image`; an `InputError` in place of
            the bytes is raised.

    Raises:
        InputError: it is not an image; the message has the reason.
    """
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image["path"]
    if image is None:
        raise InputError("there is no image here")
    if isinstance(image, InputError):
        raise image
    if isinstance(image, Image.Image):
        return image
    register_decoders()
    with _reasons(image):
        if isinstance(image, np.ndarray):
            return Image.fromarray(image)
        encoded = image
        if not isinstance(image, bytes):
            require_regular(Path(image))
            encoded = Path(image).read_bytes()
        if not encoded:
            raise InputError("the file is empty (zero bytes)")
        opened = Image.open(io.BytesIO(encoded))
        _scale_transparent_level(opened)
        return opened


def _scale_transparent_level(image: Image.Image) -> None:
    """Scale the transparent level or colour of a PNG like the pixels that Pillow decodes.

    Pillow scales grey levels of 2 and 4 bits to 8 bits and keeps the upper byte of 16-bit colours,
    but does not convert the transparent level.
    """
    level = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    if image.format != "PNG" or level is None or not tiles:
        return
    raw_mode = tiles[0].args
    if raw_mode in _LEVEL_SCALE and isinstance(level, int):
        image.info["transparency"] = level * _LEVEL_SCALE[raw_mode]
    elif raw_mode == "RGB;16B" and isinstance(level, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in level)


def load(image: Image.Image, reduction: int = 1) -> Image.Image:
    """Decode an opened image; the decoder of a JPEG can reduce it to 1/2, 1/4 or 1/8 by averaging.

    Pixel i of the result covers the pixels from reduction * i to reduction * (i + 1) of the full
    size.

    Raises:
        InputError: it does not decode; the message has the reason.
    """
    with _reasons(image):
        if reduction > 1:
            image.draft(image.mode, (image.width // reduction, image.height // reduction))
        image.load()
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded image to 8-bit RGB, upright.

    The EXIF orientation is applied; transparent images are composited over white; 16-bit grey
    levels are scaled to 8 bits, and a transparent level becomes white; palette, grey, bilevel,
    CMYK, YCbCr and Lab images are converted by Pillow.

    Raises:
        InputError: pixels without a known range (floating point, or integers beyond 16 bits).
    """
    upright = _upright_8_bit(image)
    if upright.has_transparency_data:
        layered = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert(
            "RGB"
        )
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def to_rgba(image: Image.Image) -> Image.Image | None:
    """Convert a decoded image to 8-bit RGBA, upright; None if it has no transparency.

    Colours are not multiplied by their opacity. Otherwise as `to_rgb`.

    Raises:
        InputError: pixels without a known range (floating point, or integers beyond 16 bits).
    """
    if not image.has_transparency_data and not isinstance(image.info.get("transparency"), int):
        return None
    upright = _upright_8_bit(image)
    return upright.convert("RGBA") if upright.has_transparency_data else None


def _upright_8_bit(image: Image.Image) -> Image.Image:
    """Return an upright image of 8 bits per channel, in any mode."""
    turn = orientation(image)
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        if levels.size and (levels.min() < 0 or levels.max() > 65535):
            raise InputError("integer pixels beyond 16 bits; convert them to 8 or 16 bits first")
        grey = Image.fromarray(np.round(levels / 257).astype(np.uint8))
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            # Before levels are rounded, which gives its neighbours the same 8-bit level.
            grey.putalpha(Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8)))
        return grey
    if image.mode == "F":
        raise InputError(
            "floating-point pixels have no known range; convert them to 8 or 16 bits first"
        )
    return image


def highest_level(image: Image.Image) -> int | None:
    """Return the highest level of a decoded 16-bit grey image; None for other images."""
    if not image.mode.startswith("I") or 0 in image.size:
        return None
    return int(np.asarray(image).max())


def further_frames(image: Image.Image) -> int:
    """Return the number of frames of an image file after the first; 1 if they cannot be counted.

    Counting may move the file's position: decode the first frame before. Layers of PSD files do not
    count as frames.
    """
    if image.format == "PSD":
        return 0
    try:
        return max(0, int(getattr(image, "n_frames", 1)) - 1)
    # Any type: the frames after a good first frame may be malformed.
    except Exception:
        return int(vars(image).get("is_animated", False))


def orientation(image: Image.Image) -> Image.Transpose | None:
    """Return the operation that turns an image upright by its EXIF orientation; None if it is."""
    # Not Pillow's `exif_transpose`, which also rewrites the metadata and fails if it cannot.
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    # Any type: the pixels are good even if the metadata is malformed.
    except Exception:
        return None
