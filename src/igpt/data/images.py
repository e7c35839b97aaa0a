"""Any image a camera, scanner or web page makes -> upright RGB."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISFIFO
from typing import Any

import numpy as np
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


@contextmanager
def _reasons(image: Any) -> Iterator[None]:
    """Turns whatever an image has wrong into an `InputError` with the reason."""
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
    except Exception as error:  # of any type: each of Pillow's readers has its own for malformed files
        raise InputError(f"does not decode: {str(error) or type(error).__name__}") from None


def open_image(image: Any) -> Image.Image:
    """Reads an image's header; `load` decodes it.

    Args:
        image: a path, encoded bytes, a PIL image, an array uint8 [H, W, 3] or [H, W], or the `{"bytes", "path"}`
            record of an undecoded `datasets.Image`.

    Raises:
        InputError: it is no image; the message gives the reason.
    """
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image["path"]
    if image is None:
        raise InputError("there is no image here")
    if isinstance(image, Image.Image):
        return image
    with _reasons(image):
        if isinstance(image, np.ndarray):
            return Image.fromarray(image)
        encoded = image if isinstance(image, bytes) else _content(Path(image))
        if not encoded:
            raise InputError("the file is empty (zero bytes)")
        return Image.open(io.BytesIO(encoded))


def _content(path: Path) -> bytes:
    if S_ISFIFO(path.stat().st_mode):  # it would be waited for
        raise InputError("not a regular file")
    return path.read_bytes()


def load(image: Image.Image, reduction: int = 1) -> Image.Image:
    """Decodes an opened image, a JPEG at 1/2, 1/4 or 1/8 of its size if asked for: pixels are averaged by its decoder.

    Pixel i of the result covers the pixels from reduction * i to reduction * (i + 1) of the whole image.

    Raises:
        InputError: it does not decode; the message gives the reason.
    """
    with _reasons(image):
        if reduction > 1:
            image.draft(image.mode, (image.width // reduction, image.height // reduction))
        image.load()
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, upright.

    The EXIF orientation is applied; transparency is laid over white; 16-bit grey levels are scaled to 8 bits; palette,
    grey, bilevel, CMYK, YCbCr and Lab images are converted by Pillow.

    Raises:
        InputError: pixels without a known range (floating point, or integers beyond 16 bits).
    """
    turn = orientation(image)
    if turn is not None:
        image = image.transpose(turn)
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
    return image if image.mode == "RGB" else image.convert("RGB")


def orientation(image: Image.Image) -> Image.Transpose | None:
    """What brings an image upright by its EXIF orientation; None if it is."""
    # Not Pillow's `exif_transpose`, which also writes the metadata anew, and fails where that cannot be done.
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # of many types: malformed metadata says nothing about the orientation, and the pixels are good
        return None
