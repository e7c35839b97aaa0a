"""Masks: the painted pixels of an image file, and the model's pixels that they overlap."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from igpt.data.images.masks import hidden_pixels
from igpt.data.images.transform import Transform
from igpt.errors import InputError

STROKE = np.zeros((8, 8), bool)
STROKE[2:4, 1:6] = True


def save(path: Path, array: Any, mode: str | None = None, **options: Any) -> Path:
    image = Image.fromarray(np.asarray(array))
    image = image.convert(mode) if mode else image
    image.save(path, **options)
    return path


def levels(dark: object, bright: object, dtype: Any = np.uint8) -> np.ndarray:
    """Return the stroke in one level on a background of another; levels may be colours."""
    return np.where(
        STROKE.reshape(8, 8, *[1] * np.ndim(dark)), np.array(bright, dtype), np.array(dark, dtype)
    )


@pytest.mark.parametrize(
    ("array", "ending"),
    [
        (levels(0, 255), "png"),
        (levels(0, 1), "png"),
        (levels(1, 2), "png"),
        (levels(200, 255), "png"),
        (levels(0, 1, np.uint16), "png"),
        (levels(0, 65535, np.uint16), "png"),
        (levels(0, 1, np.int32), "tiff"),
        (levels(-1, 1, np.int32), "tiff"),
        (levels(0, 1, np.float32), "tiff"),
        (levels((0, 0, 0), (255, 0, 0)), "png"),
        (levels((0, 0, 0), (128, 0, 0)), "png"),
        (levels((0, 0, 0, 0), (255, 255, 255, 255)), "png"),
        (levels((255, 255, 255, 0), (255, 255, 255, 255)), "png"),
        (levels((9, 9, 9, 0), (255, 255, 255, 128)), "png"),
        (levels((0, 0, 0, 0), (1, 1, 1, 255)), "png"),
        (levels((0, 0, 0, 255), (255, 255, 255, 255)), "png"),
        (levels((255, 0), (255, 255)), "png"),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else f"{value.dtype}-{value[0, 0]}-{value[2, 2]}"
    ),
)
def test_of_two_levels_the_brighter_one_is_painted(
    array: np.ndarray, ending: str, tmp_path: Path
) -> None:
    path = save(tmp_path / f"mask.{ending}", array)
    np.testing.assert_array_equal(hidden_pixels(path, 8), STROKE)


def test_bilevel_and_palette_pictures(tmp_path: Path) -> None:
    np.testing.assert_array_equal(
        hidden_pixels(save(tmp_path / "1.png", levels(0, 255), "1"), 8), STROKE
    )
    image = Image.fromarray(levels(0, 1)).convert("P")
    for colours in ([0, 0, 0, 255, 255, 255], [0, 0, 0, 128, 0, 0], [255, 255, 255, 0, 0, 0]):
        image.putdata(levels(0, 1).reshape(-1).tolist())
        image.putpalette(colours)
        image.save(tmp_path / "p.png")
        expected = STROKE if colours[0] == 0 else ~STROKE
        np.testing.assert_array_equal(hidden_pixels(tmp_path / "p.png", 8), expected)
    image.save(
        tmp_path / "t.png", transparency=0
    )  # white becomes transparent: nothing bright remains
    with pytest.raises(InputError, match="hides nothing"):
        hidden_pixels(tmp_path / "t.png", 8)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_transparent_grey_level_is_not_painted(dtype: Any, tmp_path: Path) -> None:
    highest = np.iinfo(dtype).max
    path = save(
        tmp_path / "mask.png", levels(highest, highest - 1, dtype), transparency=int(highest)
    )
    np.testing.assert_array_equal(hidden_pixels(path, 8), STROKE)


def test_of_many_levels_those_brighter_than_half_are_painted(tmp_path: Path) -> None:
    ramp = np.arange(64).reshape(8, 8) * 4
    np.testing.assert_array_equal(
        hidden_pixels(save(tmp_path / "a.png", ramp.astype(np.uint8)), 8), ramp >= 128
    )
    wide = (ramp * 257).astype(np.uint16)
    np.testing.assert_array_equal(hidden_pixels(save(tmp_path / "b.png", wide), 8), ramp >= 128)
    rgba = np.full((8, 8, 4), 255, np.uint8)
    rgba[..., 3] = ramp
    np.testing.assert_array_equal(hidden_pixels(save(tmp_path / "c.png", rgba), 8), ramp >= 128)


@pytest.mark.parametrize(
    "shape", [(800, 800), (80, 123), (13, 9), (37, 100), (9, 9), (12, 8), (8, 8), (5, 8), (3, 3)]
)
def test_any_painted_part_hides_the_pixels_that_it_overlaps(
    shape: tuple[int, int], tmp_path: Path
) -> None:
    """Compare with a count for each pixel, whose cells are half-open intervals of real numbers."""
    size = 8
    painted = np.random.default_rng(sum(shape)).random(shape) < 20 / (shape[0] * shape[1])
    painted[shape[0] // 2, shape[1] // 2] = True
    side = min(shape)
    expected = np.zeros((size, size), bool)
    if side > size:
        top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
        for y, x in np.argwhere(painted) - (top, left):
            for row in range(size):
                for column in range(size):
                    down = row * side < (y + 1) * size and y * size < (row + 1) * side
                    across = column * side < (x + 1) * size and x * size < (column + 1) * side
                    expected[row, column] |= bool(down and across)
    else:
        expected = Transform(size)(painted.astype(np.uint8) * 255)[0, ..., 0] > 0
    path = save(tmp_path / "mask.png", painted.astype(np.uint8) * 255)
    np.testing.assert_array_equal(hidden_pixels(path, size), expected)


@pytest.mark.parametrize(
    "shape", [(24, 40), (40, 24), (17, 16), (20, 13), (13, 30), (4, 9), (9, 4), (6, 7)]
)
def test_a_mask_is_cropped_like_its_image(shape: tuple[int, int], tmp_path: Path) -> None:
    """Use masks in which no pixel is too small to be seen in the average."""
    random = np.random.default_rng(1).random(shape) < 0.2
    mask = random.astype(np.uint8) * 255
    path = save(tmp_path / "mask.png", mask)
    np.testing.assert_array_equal(hidden_pixels(path, 8), Transform(8)(path)[0, ..., 0] > 0)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "mask.png", STROKE.astype(np.uint8) * 255, exif=exif)
    np.testing.assert_array_equal(hidden_pixels(tmp_path / "mask.png", 8), np.rot90(STROKE, -1))


def test_a_mask_may_hide_everything(tmp_path: Path) -> None:
    assert hidden_pixels(save(tmp_path / "mask.png", np.full((9, 9), 255, np.uint8)), 8).all()


def test_masks_that_hide_nothing_or_are_malformed_are_refused_in_one_line(tmp_path: Path) -> None:
    outside = np.zeros((8, 30), np.uint8)
    outside[:, 0] = 255
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "empty.png").touch()
    for path, words in (
        (
            save(tmp_path / "black.png", np.zeros((8, 8), np.uint8)),
            "its levels go from 0 to 0 of 255",
        ),
        (
            save(tmp_path / "dark.png", np.full((8, 8), 1, np.uint8)),
            "its levels go from 1 to 1 of 255",
        ),
        (
            save(tmp_path / "labels.png", np.arange(64, dtype=np.uint8).reshape(8, 8)),
            "go from 0 to 63 of 255",
        ),
        (
            save(tmp_path / "clear.png", np.zeros((8, 8, 4), np.uint8)),
            "its levels go from 0 to 0 of 255",
        ),
        (
            save(tmp_path / "outside.png", outside),
            "all bright pixels are outside the centre square",
        ),
        (
            save(tmp_path / "f.tiff", np.arange(64, dtype=np.float32).reshape(8, 8)),
            "without a known range",
        ),
        (
            save(tmp_path / "i.tiff", np.arange(64, dtype=np.int32).reshape(8, 8) - 3),
            "without a known range",
        ),
        (save(tmp_path / "n.tiff", np.full((8, 8), np.nan, np.float32)), "not finite"),
        (tmp_path / "fifo.png", "is a FIFO"),
        (Path("/dev/zero"), "is a device"),
        (tmp_path / "empty.png", "the file is empty"),
        (tmp_path / "none.png", "no such file"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(InputError) as caught:
            hidden_pixels(path, 8)
        assert str(path) in str(caught.value)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
