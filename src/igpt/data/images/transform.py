"""Crop and resize images to the model resolution: the centre square, or the paper's random crops.

Shapes: V views of an image, R model resolution, C channels: RGB, or RGBA.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from igpt.data.images.decode import (
    further_frames,
    highest_level,
    load,
    open_image,
    orientation,
    to_rgb,
    to_rgba,
)
from igpt.errors import InputError

Filter = Literal["area", "nearest", "bilinear", "bicubic", "lanczos"]
Enlarge = Literal["pad", "nearest", "bilinear", "bicubic", "lanczos"]

_SHORTER_SIDE, _CROP = (256, 384), 224  # paper, section 3.1
# A JPEG is decoded at reduced size only if at least this many pixels per model pixel remain in each
# direction. With 3, the PSNR against squares averaged from all pixels is 48 dB or more at 32, 48
# and 64 pixels (a sixteenth of the palette's own squared error), and 44 dB at other sizes.
_MARGIN = 3
_FEW_ROWS = 8  # of an interval, up to which gathered rows are added faster than slices


class Box(NamedTuple):
    """A square within an upright image, in pixels."""

    left: int
    top: int
    side: int


class Squares(NamedTuple):
    """The squares of an image.

    Attributes:
        pixels: uint8 [V, R, R, C].
        highest_level: of 16-bit grey levels; None for other images.
        further_frames: frames of the file after the first, which are not used.
    """

    pixels: NDArray[np.uint8]
    highest_level: int | None
    further_frames: int


@dataclass(frozen=True)
class Transform:
    """Turn images into upright RGB squares at the model resolution.

    Images whose shorter side is at or below the resolution are not resampled: they are cropped at
    their centre and, where they are smaller, padded with a mirrored border (or enlarged, see
    `enlarge`). They have a single view.

    Args:
        size: R, the model resolution in pixels.
        views: number of random crops: the shorter side is resized to a random size in [256, 384],
            and a random square of 224 is cropped and resized to the resolution, in one resampling
            (paper, section 3.1). 0 takes the centre square, as the paper's evaluation does.
        filter: for reducing squares. "area" averages exactly the pixels below each pixel of the
            result, in integers, rounded half up; the others are Pillow's. The paper names none.
        enlarge: for images below the resolution: "pad" adds a mirrored border, the others resize.
        full_decode: always decode JPEGs at full size; otherwise the filter "area" lets their
            decoder average blocks of pixels.
        alpha: return RGBA instead of compositing transparent pixels over white. Colours are
            averaged with their opacity as weights, so that invisible ones do not count.
    """

    size: int
    views: int = 0
    filter: Filter = "area"
    enlarge: Enlarge = "pad"
    full_decode: bool = False
    alpha: bool = False

    def __call__(self, image: Any, seed: tuple[int, ...] = ()) -> NDArray[np.uint8]:
        """Return the squares of an image, uint8 [V, R, R, C].

        V is 1 without `views`, and for images at or below the resolution.

        Args:
            image: see `open_image`.
            seed: of the random crops: the same image and seed give the same crops.

        Raises:
            InputError: the image does not decode, or its pixels have no known range.
        """
        return self.squares_of(image, seed).pixels

    def squares_of(self, image: Any, seed: tuple[int, ...] = ()) -> Squares:
        """Return the squares of an image with its levels and frames; see `__call__`."""
        opened = open_image(image)
        pixels = self._pixels(image, opened, seed)
        level = highest_level(opened)
        # Last, because it moves the file's position. The caller's own image is left unchanged.
        frames = 0 if opened is image else further_frames(opened)
        return Squares(pixels, level, frames)

    def centre(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Return the part of an upright image that is used without `views`.

        It is the centre square, or what remains of it in images that are smaller than the model's
        and are padded.

        Args:
            width, height: of the image, in pixels.

        Returns:
            Its left, top, right and bottom edge.
        """
        across = down = min(width, height)
        if across < self.size and self.enlarge == "pad":
            across, down = min(width, self.size), min(height, self.size)
        left, top = (width - across) // 2, (height - down) // 2
        return left, top, left + across, top + down

    def _pixels(self, image: Any, opened: Image.Image, seed: tuple[int, ...]) -> NDArray[np.uint8]:
        # The caller's own image is not reduced: it may be decoded already, or used again.
        reducible = (
            opened is not image
            and opened.format == "JPEG"
            and self.filter == "area"
            and not self.full_decode
        )
        if not reducible:
            # First, because decoding changes the size and the orientation of TIFF and ICO.
            load(opened)
        width, height = opened.size
        turn = orientation(opened)
        if turn is not None and turn not in _HALF_TURNS:
            width, height = height, width
        if min(width, height) == 0:
            raise InputError("the image has no pixels")
        if min(width, height) <= self.size:
            return self._with_alpha(self._small(self._converted(load(opened))))[None]
        boxes = self._boxes(width, height, seed)
        reduction = self._reduction(opened, turn is not None) if reducible else 1
        upright = self._converted(load(opened, reduction))
        squares = np.stack([self._square(upright, box, reduction) for box in boxes])
        return self._with_alpha(squares)

    def _converted(self, image: Image.Image) -> Image.Image:
        """Return an upright image; RGBA only if it has transparency, and this is wanted."""
        return (to_rgba(image) if self.alpha else None) or to_rgb(image)

    def _with_alpha(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return pixels [..., C] with an opaque alpha channel, if one is wanted and missing."""
        if not self.alpha or pixels.shape[-1] == 4:
            return pixels
        return np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], axis=-1)

    def _boxes(self, width: int, height: int, seed: tuple[int, ...]) -> list[Box]:
        shorter = min(width, height)
        if not self.views:
            left, top, *_ = self.centre(width, height)
            return [Box(left, top, shorter)]
        generator = np.random.default_rng(seed)
        boxes = []
        for _ in range(self.views):
            scaled = int(generator.integers(_SHORTER_SIDE[0], _SHORTER_SIDE[1] + 1))
            side = max(self.size, round(shorter * _CROP / scaled))
            left, top = generator.integers(0, (width - side + 1, height - side + 1))
            boxes.append(Box(int(left), int(top), side))
        return boxes

    def _reduction(self, opened: Image.Image, turned: bool) -> int:
        side = min(opened.size)
        if self.views:
            # The smallest possible crop, so that a view does not depend on the other views.
            side = side * _CROP // _SHORTER_SIDE[1]
        for reduction in (8, 4, 2):
            # In a turned image, an incomplete last block would come first.
            whole = opened.width % reduction == opened.height % reduction == 0
            if side >= _MARGIN * self.size * reduction and (whole or not turned):
                return reduction
        return 1

    def _square(self, image: Image.Image, box: Box, reduction: int) -> NDArray[np.uint8]:
        left, top, side = box
        edges = (left, top, left + side, top + side)
        if self.filter != "area":
            # Cropped before it is resized, because interpolation would reach beyond the box.
            # Pillow weights the colours of RGBA with their opacity too.
            return np.asarray(
                image.crop(edges).resize((self.size, self.size), _PILLOW[self.filter])
            )
        factor, rest = divmod(side, self.size)
        if image.mode == "RGB" and reduction == 1 and rest == 0 and factor & (factor - 1) == 0:
            # The common case: Pillow is fast and rounds correctly.
            return np.asarray(image.reduce(factor, edges))
        return _area_average(image, box, self.size, reduction)

    def _small(self, image: Image.Image) -> NDArray[np.uint8]:
        part = image.crop(self.centre(*image.size))
        if self.enlarge != "pad" and min(image.size) < self.size:
            return np.asarray(part.resize((self.size, self.size), _PILLOW[self.enlarge]))
        missing = [self.size - have for have in (part.height, part.width)]
        return np.pad(
            np.asarray(part),
            [*((gap // 2, gap - gap // 2) for gap in missing), (0, 0)],
            mode="reflect",
        )


_HALF_TURNS = (
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
)
_PILLOW = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def _area_average(image: Image.Image, box: Box, size: int, reduction: int) -> NDArray[np.uint8]:
    """Return the means over the size x size equal cells of a box: uint8 [size, size, C].

    The box is given in pixels of the full-size image; `image` is reduced by `reduction` in each
    direction. Colours of RGBA are weighted with their opacity; those of invisible cells are 0.
    """
    # In integers, so that all machines round alike. Pillow's box filter takes whole pixels only: at
    # a factor of 1.5 it averages two pixels and one alternately.
    left, top, side = box
    # Cropped first: the conversion to an array takes several times as long as the crop.
    edges = (left // reduction, top // reduction)
    ends = (-(-(left + side) // reduction), -(-(top + side) // reduction))
    pixels = np.asarray(image.crop((*edges, *ends)))
    if image.mode == "RGB":
        return _quotients(_area_sums(pixels, box, size, size * reduction), side**2)
    opacity = pixels[..., 3:].astype(np.int64)
    weighted = np.concatenate([pixels[..., :3] * opacity, opacity], axis=-1)
    sums = _area_sums(weighted, box, size, size * reduction)
    colors, total = sums[..., :3], sums[..., 3:]
    return np.concatenate(
        [_quotients(colors, np.maximum(total, 1)), _quotients(total, side**2)], axis=-1
    )


def _quotients(sums: NDArray[Any], divisor: Any) -> NDArray[np.uint8]:
    """Return sums divided by a divisor, rounded half up."""
    quotients: NDArray[np.uint8] = ((2 * sums + divisor) // (2 * divisor)).astype(np.uint8)
    return quotients


def _area_sums(pixels: NDArray[Any], box: Box, size: int, unit: int) -> NDArray[Any]:
    """Return the sums over the cells of a box, [size, size, C], of pixels that enclose it."""
    (left, top, side), channels = box, pixels.shape[-1]
    small = pixels.dtype == np.uint8 and 512 * side**2 < 2**31
    wide = np.int32 if small else np.int64
    rows = pixels.reshape(len(pixels), -1)
    down = _interval_sums(rows, top * size % unit, side, size, unit, wide)
    across = np.ascontiguousarray(down.reshape(size, -1, channels).transpose(1, 0, 2))
    sums = _interval_sums(
        across.reshape(len(across), -1), left * size % unit, side, size, unit, wide
    )
    return sums.reshape(size, size, channels).transpose(1, 0, 2)


def _interval_sums(
    rows: NDArray[Any],
    first: int,
    length: int,
    size: int,
    unit: int,
    wide: type[np.signedinteger[Any]],
) -> NDArray[Any]:
    """Return the sums over `size` consecutive intervals of the rows [M, W], as [size, W].

    Every interval has the length `length`, and the first begins at `first`. A row has the length
    `unit` and may belong to two intervals in part; it is weighted with the length in the interval.
    """
    whole, part = np.divmod(first + np.arange(size + 1) * length, unit)
    # Up to 257 8-bit values fit 16 bits, which numpy adds much faster.
    narrow = np.uint16 if rows.dtype == np.uint8 and length <= 255 * unit else wide
    starts, counts = whole[:-1], np.diff(whole)
    if 1 <= (fewest := int(counts.min())) <= _FEW_ROWS:  # a few additions for all intervals
        sums = rows[starts].astype(narrow)
        for row in range(1, fewest):
            sums += rows[starts + row]
        longer = np.flatnonzero(counts > fewest)  # by one row
        sums[longer] += rows[starts[longer] + fewest]
    else:
        sums = np.empty((size, rows.shape[1]), narrow)
        for index, (start, end) in enumerate(pairwise(whole.tolist())):
            np.add.reduce(rows[start:end], axis=0, dtype=narrow, out=sums[index])
    begun = part[:, None].astype(wide) * rows[np.minimum(whole, len(rows) - 1)]
    total: NDArray[Any] = np.multiply(sums, unit, dtype=wide)
    total += begun[1:]
    total -= begun[:-1]
    return total


def load_square(path: str | Path, size: int, *, alpha: bool = False) -> NDArray[np.uint8]:
    """Return the centre square of an image file, uint8 [size, size, C]; errors name the file.

    Args:
        alpha: return RGBA; see `Transform`.
    """
    try:
        squares = Transform(size, alpha=alpha)(path)
    except InputError as error:
        raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    return squares.reshape(size, size, -1)
