"""Any image a camera, scanner or web page makes -> an RGB square at the model resolution."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from igpt.errors import InputError


def decode(image: Any) -> Image.Image:
    """Opens and fully decodes an image.

    Args:
        image: a path, encoded bytes, a PIL image, or the `{"bytes", "path"}` record of an undecoded `datasets.Image`.

    Raises:
        InputError: it does not decode; the message gives the reason.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image["path"]
    if image is None:
        raise InputError("there is no image here")
    try:
        opened = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        opened.load()
    except FileNotFoundError:
        raise InputError(f"no such file: {image}") from None
    except IsADirectoryError:
        raise InputError(f"{image} is a folder; an image file is needed here") from None
    except UnidentifiedImageError:
        raise InputError("not an image in a known format") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"does not decode: {error}") from None
    return opened


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, upright.

    The EXIF orientation is applied; transparency is laid over white; 16-bit grey levels are scaled to 8 bits; palette,
    grey, bilevel, CMYK, YCbCr and Lab images are converted by Pillow.

    Raises:
        InputError: pixels without a known range (floating point, or integers beyond 16 bits).
    """
    image = ImageOps.exif_transpose(image)
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


def to_square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Upright RGB, centre-cropped to a square and resized to `size` x `size` pixels: uint8 [size, size, 3].

    Area averaging (Pillow's box filter) makes smaller, bicubic interpolation makes larger; an image that already has
    the size passes untouched. The paper crops the centre for evaluation and names no filter (section 3.1).
    """
    rgb = to_rgb(image)
    side = min(rgb.size)
    left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
    box = (left, top, left + side, top + side)
    if side == size:
        return np.asarray(rgb.crop(box))
    kernel = Image.Resampling.BOX if side > size else Image.Resampling.BICUBIC
    return np.asarray(rgb.resize((size, size), kernel, box=box))


def load_square(path: str | Path, size: int) -> NDArray[np.uint8]:
    """`to_square` of an image file; errors name the file."""
    try:
        return to_square(decode(path), size)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
