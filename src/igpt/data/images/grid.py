"""Pictures in rows, as one picture.

R resolution.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from igpt.errors import InputError
from igpt.files import atomic_file

_BACKGROUND = (128, 128, 128)  # neither black nor white pictures melt into it
_PICTURE_SIDE = 64  # pixels on the screen that a picture gets at least


def default_scale(resolution: int) -> int:
    """How many screen pixels a grid gives each pixel's side: a picture is at least 64 wide."""
    return max(1, math.ceil(_PICTURE_SIDE / resolution))


def image_grid(
    rows: Sequence[Sequence[NDArray[np.uint8]]], *, scale: int | None = None, gap: int = 2
) -> Image.Image:
    """Rows of pictures, uint8 [R, R, 3], on a grey ground; each pixel becomes a square of `scale` pixels.

    Args:
        rows: pictures from left to right, row after row; rows may differ in length.
        scale: None enlarges until a picture is at least 64 pixels wide.
        gap: pixels between pictures and around them, not enlarged.

    Raises:
        InputError: no picture, or pictures that are not uint8 RGB of one size.
    """
    pictures = [np.asarray(picture) for row in rows for picture in row]
    if not pictures:
        raise InputError("a grid needs at least one picture")
    shape = pictures[0].shape
    for picture in pictures:
        if (
            picture.dtype != np.uint8
            or picture.ndim != 3
            or picture.shape[-1] != 3
            or 0 in picture.shape
        ):
            raise InputError(
                f"pictures are uint8 [height, width, 3], not {picture.dtype} {list(picture.shape)}"
            )
        if picture.shape != shape:
            raise InputError(
                f"pictures of a grid have one size, not {list(shape)} and {list(picture.shape)}"
            )
    if scale is None:
        scale = default_scale(shape[1])
    if scale < 1 or gap < 0:
        raise InputError(f"a grid has scale >= 1 and gap >= 0, not {scale} and {gap}")
    height, width = shape[0] * scale, shape[1] * scale
    columns = max(len(row) for row in rows)
    canvas = np.empty(
        (len(rows) * (height + gap) + gap, columns * (width + gap) + gap, 3), dtype=np.uint8
    )
    canvas[:] = _BACKGROUND
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            top, left = gap + r * (height + gap), gap + c * (width + gap)
            canvas[top : top + height, left : left + width] = (
                np.asarray(picture).repeat(scale, 0).repeat(scale, 1)
            )
    return Image.fromarray(canvas)


def grid_counts(grid: Image.Image, resolution: int, *, gap: int = 2) -> list[int] | None:
    """How many pictures stand in each row of a grid of `image_grid` with its default scale; None if it is not one."""
    side = resolution * default_scale(resolution)
    rows, rest_y = divmod(grid.height - gap, side + gap)
    columns, rest_x = divmod(grid.width - gap, side + gap)
    if rest_x or rest_y or rows < 1 or columns < 1:
        return None
    pixels = np.asarray(grid.convert("RGB"))[gap:, gap:].reshape(
        rows, side + gap, columns, side + gap, 3
    )
    filled = (pixels[:, :side, :, :side] != _BACKGROUND).any(axis=(1, 3, 4))
    # Short rows end in cells of bare ground; a cell followed by a picture is a picture, whatever
    # its colour.
    return [int(np.flatnonzero(row).max(initial=-1)) + 1 for row in filled]


def require_png(path: Path) -> None:
    """Refuses to write a picture as anything but PNG.

    Raises:
        InputError: the name ends otherwise.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"pictures are written as .png, not as {path.name}")


def save_png(picture: Image.Image, path: Path) -> None:
    """Writes a picture, atomically."""
    with atomic_file(path) as temporary:
        picture.save(temporary, format="PNG")
