"""Masks in image files: the pixels to hide at the model resolution.

Shapes: H, W height and width of a mask, R model resolution.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from igpt.data.images.decode import load, open_image, orientation
from igpt.errors import InputError

Bools = NDArray[np.bool_]


def hidden_pixels(mask: Any, size: int) -> Bools:
    """Return the pixels that a mask hides at the model resolution, bool [R, R].

    In a mask with two levels, the brighter one is painted; in one with more, all pixels brighter
    than half. Transparent pixels count as black. A pixel is hidden if any painted pixel of the mask
    overlaps it. The mask is cropped like an image of its size
    (`igpt.data.images.transform.Transform`).

    Args:
        mask: an image; see `open_image`.

    Raises:
        InputError: it is not a readable image, its levels have no known range, or it hides nothing.
    """
    path = mask if isinstance(mask, str | Path) else "the mask"
    try:
        levels, highest = _levels(load(open_image(mask)))
    except InputError as error:
        raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    painted = _painted(levels, highest)
    if painted is None:
        raise InputError(
            f"{path}: more than two levels without a known range; convert the mask to 8 or 16 bits "
            "first"
        )
    hidden = _touched(painted, size)
    if not hidden.any():
        found = f"its levels go from {levels.min():g} to {levels.max():g} of {highest:g}"
        reason = "all bright pixels are outside the centre square" if painted.any() else found
        raise InputError(
            f"{path} hides nothing: bright pixels are hidden, dark and transparent ones are kept, "
            f"and {reason}"
        )
    return hidden


def _levels(image: Image.Image) -> tuple[NDArray[np.float64], float]:
    """Return the upright brightness times opacity of every pixel, [H, W], and that of white."""
    turn = orientation(image)
    transparent = image.info.get("transparency")
    if turn is not None:
        image = image.transpose(turn)
    if 0 in image.size:
        raise InputError("the image has no pixels")
    if image.mode == "F" or image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.float64)
        if not np.isfinite(levels).all():
            raise InputError("pixels that are not finite numbers")
        if isinstance(transparent, int):
            levels[levels == transparent] = 0
        return levels, 65535.0 if image.mode != "F" else np.nan
    if not image.has_transparency_data:
        return np.asarray(image.convert("L")).astype(np.float64), 255.0
    layered = image.convert("RGBA")
    opacity = np.asarray(layered.getchannel("A")) / 255
    return np.asarray(layered.convert("RGB").convert("L")) * opacity, 255.0


def _painted(levels: NDArray[np.float64], highest: float) -> Bools | None:
    """Return the painted pixels [H, W]; None if the range of the levels is unknown."""
    low, high = float(levels.min()), float(levels.max())
    brightest: Bools = levels == high
    if low < high and (brightest | (levels == low)).all():
        return brightest
    if np.isnan(highest) or low < 0 or high > highest:
        return None
    painted: Bools = levels > highest / 2
    return painted


def _touched(painted: Bools, size: int) -> Bools:
    """Return the pixels of the centre square that overlap painted ones: [H, W] -> [R, R]."""
    height, width = painted.shape
    side = min(height, width)
    if side <= size:  # cropped and padded, not resampled
        high, wide = min(height, size), min(width, size)
        top, left = (height - high) // 2, (width - wide) // 2
        missing = [(gap // 2, gap - gap // 2) for gap in (size - high, size - wide)]
        return np.pad(painted[top : top + high, left : left + wide], missing, mode="reflect")
    top, left = (height - side) // 2, (width - side) // 2
    square = painted[top : top + side, left : left + side]
    bounds = [(index * side // size, -(-(index + 1) * side // size)) for index in range(size)]
    rows = np.stack([square[first:end].any(axis=0) for first, end in bounds])
    return np.stack([rows[:, first:end].any(axis=1) for first, end in bounds], axis=1)
