"""Any image a camera, scanner or web page makes -> an RGB square at the model resolution."""

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from igpt.errors import InputError

_UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(image: Any) -> Image.Image:
    """Opens and fully decodes an image.

    Args:
        image: a path, encoded bytes, a PIL image, or the `{"bytes", "path"}` record of an undecoded `datasets.Image`.

    Raises:
        InputError: it does not decode; the message gives the reason.
    """
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image["path"]
    if image is None:
        raise InputError("there is no image here")
    try:
        opened = image if isinstance(image, Image.Image) else _open(image)
        opened.load()
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"no such file: {image}") from None
    except IsADirectoryError:
        raise InputError(f"{image} is a folder; an image file is needed here") from None
    except UnidentifiedImageError:
        raise InputError("not an image in a known format") from None
    except Exception as error:  # of any type: each of Pillow's readers has its own for malformed files
        raise InputError(f"does not decode: {str(error) or type(error).__name__}") from None
    return opened


def _open(image: bytes | str | Path) -> Image.Image:
    encoded = image if isinstance(image, bytes) else Path(image).read_bytes()
    if not encoded:
        raise InputError("the file is empty (zero bytes)")
    return Image.open(io.BytesIO(encoded))


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, upright.

    The EXIF orientation is applied; transparency is laid over white; 16-bit grey levels are scaled to 8 bits; palette,
    grey, bilevel, CMYK, YCbCr and Lab images are converted by Pillow.

    Raises:
        InputError: pixels without a known range (floating point, or integers beyond 16 bits).
    """
    image = _upright(image)
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        if levels.size and (levels.min() < 0 or levels.max() > 65535):
            raise InputError("integer pixels beyond 16 bits; convert them to 8 or 16 bits first")
        return Image.fromarray(np.round(levels / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise InputError("floating-point pixels have no known range; convert them to 8 or 16 bits first")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # of many types: malformed metadata says nothing about the orientation, and the pixels are good
        return image
    # Not Pillow's `exif_transpose`, which also writes the metadata anew, and fails where that cannot be done.
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def to_square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Upright RGB, centre-cropped to a square and resized to `size` x `size` pixels: uint8 [size, size, 3].

    Exact area averages (rounded half up) make smaller, bicubic interpolation makes larger; an image that already has
    the size passes untouched. The paper crops the centre for evaluation and names no filter (section 3.1).

    Raises:
        InputError: pixels without a known range (see `to_rgb`), or no pixels at all.
    """
    rgb = to_rgb(image)
    side = min(rgb.size)
    if side == 0:
        raise InputError("the image has no pixels")
    if rgb.width != rgb.height:  # cropped before it is resized: interpolation reaches beyond a box within an image
        left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
        rgb = rgb.crop((left, top, left + side, top + side))
    if side < size:
        return np.asarray(rgb.resize((size, size), Image.Resampling.BICUBIC))
    factor, rest = divmod(side, size)
    if rest == 0 and factor & (factor - 1) == 0:  # the common case, in which Pillow is fast and rounds right
        return np.asarray(rgb.reduce(factor))
    return _area_average(np.asarray(rgb), size)


def _area_average(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    # In integers, so that every machine rounds alike. Pillow's box filter takes whole pixels only: at a factor of 1.5
    # it averages two and one by turns.
    side = len(pixels)
    down = _stretches(pixels.reshape(side, -1), size).reshape(size, side, 3)
    across = _stretches(down.transpose(1, 0, 2).reshape(side, -1), size).reshape(size, size, 3)
    averages: NDArray[np.uint8] = ((2 * across + side**2) // (2 * side**2)).astype(np.uint8)
    return averages.transpose(1, 0, 2)


def _stretches(rows: NDArray[np.uint8] | NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Sums over `size` equal stretches of the rows [M, ...], times `size`; a row may belong to two, by parts."""
    whole, part = np.divmod(np.arange(size + 1) * len(rows), size)
    # Up to 257 8-bit values fit 16 bits, which numpy adds much faster.
    narrow = rows.dtype == np.uint8 and len(rows) <= 256 * size
    sums = [rows[first:last].sum(axis=0, dtype=np.uint16 if narrow else np.int64) for first, last in pairwise(whole)]
    begun = part[:, None] * rows[np.minimum(whole, len(rows) - 1)]
    return size * np.stack(sums).astype(np.int64) + np.diff(begun, axis=0)


def load_square(path: str | Path, size: int) -> NDArray[np.uint8]:
    """`to_square` of an image file; errors name the file."""
    try:
        return to_square(decode(path), size)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
