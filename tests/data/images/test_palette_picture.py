"""Pictures of a palette show its images and all of its colours."""

import numpy as np
import pytest

from igpt.data.images.grid import image_grid
from igpt.data.images.palette import Palette
from igpt.data.images.palette_picture import palette_picture, palette_swatch


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (17, 17), (32, 32), (33, 32), (512, 32), (5000, 100)]
)
def test_the_swatch_shows_every_colour_once_in_token_order(count, columns):
    centers = np.random.default_rng(0).uniform(-1, 1, (count, 3))
    palette = Palette.from_centers(centers)
    swatch = np.asarray(palette_swatch(palette))
    labels = swatch[:18].any(axis=2).any(axis=0)
    left = 42 if count > 32 else 0
    assert labels[left:].any()
    assert swatch[18:, :left].any() == (left > 0)
    side = (swatch.shape[1] - left) // columns
    cells = swatch[18::side, left::side].reshape(-1, 4)
    assert (cells[:count, :3] == palette.colors).all()
    assert (cells[:count, 3] == 255).all()
    assert (cells[count:, 3] == 0).all()


def test_the_picture_has_the_images_their_versions_and_the_colours():
    random = np.random.default_rng(0)
    palette = Palette.from_centers(random.uniform(-1, 1, (40, 3)))
    images = random.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    picture = palette_picture(images, palette).convert("RGB")
    quantized = palette.inverse_transform(palette.transform(images))
    grid = np.asarray(image_grid([list(images), list(quantized)]))
    pixels = np.asarray(picture)
    assert (pixels[22 : 22 + len(grid), : grid.shape[1]] == grid).all()
    colors = {tuple(color) for color in palette.colors.tolist()}
    below = {tuple(color) for color in pixels[44 + len(grid) :].reshape(-1, 3).tolist()}
    assert colors <= below
