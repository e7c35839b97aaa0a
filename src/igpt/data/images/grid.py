"""Grids of images, and PNG files.

R resolution, C channels: RGB, or RGBA.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from igpt.errors import InputError
from igpt.files import atomic_file

_BACKGROUND = (128, 128, 128)  # distinct from black and white images
_LEAST_SIDE = 64  # of an image on the screen, in pixels
_HEADING, _LETTERS = 18, 10  # pixels: the line of headings above a grid, and its letters


def default_scale(resolution: int) -> int:
    """Return the whole number by which a grid enlarges its images, to a width of at least 64."""
    return max(1, math.ceil(_LEAST_SIDE / resolution))


def image_grid(
    rows: Sequence[Sequence[NDArray[np.uint8]]],
    *,
    scale: int | None = None,
    gap: int = 2,
    headings: Mapping[int, str] | None = None,
) -> Image.Image:
    """Return a grid of images, uint8 [R, R, C], on an opaque grey background.

    Args:
        rows: images from left to right, row after row; rows may differ in length.
        scale: each pixel becomes a square of this side; None: see `default_scale`.
        gap: pixels between images and around them, not enlarged.
        headings: by the number of the column at whose left edge they begin; they are in a line of
            their own above the images.

    Raises:
        InputError: there is no image, or the images are not uint8 RGB or RGBA of one size.
    """
    images = [np.asarray(image) for row in rows for image in row]
    if not images:
        raise InputError("a grid needs at least one image")
    shape = images[0].shape
    for image in images:
        is_rgb = image.ndim == 3 and image.shape[-1] in (3, 4)
        if image.dtype != np.uint8 or not is_rgb or 0 in image.shape:
            raise InputError(
                f"images are uint8 [height, width, 3 or 4], not {image.dtype} {list(image.shape)}"
            )
        if image.shape != shape:
            raise InputError(
                f"images of a grid have one size, not {list(shape)} and {list(image.shape)}"
            )
    if scale is None:
        scale = default_scale(shape[1])
    if scale < 1 or gap < 0:
        raise InputError(f"a grid has scale >= 1 and gap >= 0, not {scale} and {gap}")
    height, width = shape[0] * scale, shape[1] * scale
    columns = max(len(row) for row in rows)
    above = _HEADING if headings else 0
    sides = (above + len(rows) * (height + gap) + gap, columns * (width + gap) + gap)
    canvas = np.full((*sides, shape[-1]), 255, dtype=np.uint8)
    canvas[..., :3] = _BACKGROUND
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = above + gap + r * (height + gap), gap + c * (width + gap)
            canvas[top : top + height, left : left + width] = (
                np.asarray(image).repeat(scale, 0).repeat(scale, 1)
            )
    grid = Image.fromarray(canvas)
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(_LETTERS)
    for column, text in (headings or {}).items():
        place = gap + column * (width + gap), (above + gap) // 2
        draw.text(place, text, fill="black", font=font, anchor="lm")
    return grid


def grid_counts(grid: Image.Image, resolution: int, *, gap: int = 2) -> list[int] | None:
    """Return the number of images in each row of an `image_grid` of default scale, or None.

    The grid may have headings.
    """
    side = resolution * default_scale(resolution)
    rows, rest_y = divmod(grid.height - gap, side + gap)
    columns, rest_x = divmod(grid.width - gap, side + gap)
    if rest_x or rest_y not in (0, _HEADING) or rows < 1 or columns < 1:
        return None
    pixels = np.asarray(grid.convert("RGB"))[rest_y + gap :, gap:].reshape(
        rows, side + gap, columns, side + gap, 3
    )
    filled = (pixels[:, :side, :, :side] != _BACKGROUND).any(axis=(1, 3, 4))
    # Short rows end with empty cells. A cell before the last image of a row is an image, even if it
    # has the background's colour.
    return [int(np.flatnonzero(row).max(initial=-1)) + 1 for row in filled]


def require_png(path: Path) -> None:
    """Raise an `InputError` if the name does not end with .png."""
    if path.suffix.lower() != ".png":
        raise InputError(f"images are written as .png, not as {path.name}")


def save_png(image: Image.Image, path: Path) -> None:
    """Write an image atomically."""
    with atomic_file(path) as temporary:
        image.save(temporary, format="PNG")
