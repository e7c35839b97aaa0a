"""The palette of a source, fitted to a sample of its images or given: how well it serves them, and a picture of it."""

from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from igpt.data.archives import TokenRows, token_palette
from igpt.data.grids import image_grid
from igpt.data.palette import Palette, nearest_color_error
from igpt.data.sources import SourceConfig, Split
from igpt.data.views import Enlarge, Filter, Transform
from igpt.errors import InputError

_PIXELS = {"fit": 2_000_000, "judge": 250_000}  # of the training images, drawn by seed; k = 512 needs no more
_NEIGHBOURS = 8  # images of the sample that are read together
_SHOWN = 12  # images in the picture


class PaletteConfig(SourceConfig):
    """How a palette is fitted to images."""

    size: int = Field(32, ge=2, le=1024, description="model resolution in pixels; the paper has 32, 48 and 64")
    colors: int = Field(512, ge=2, le=65535, description="palette size; greyscale data gets as many levels as it has")
    palette: str | None = Field(None, description="use this palette (.npy, token data set, model, Hub id) and fit none")
    filter: Filter = Field("area", description="what makes images smaller; area averages exactly")
    enlarge: Enlarge = Field("pad", description="what smaller images get: pad mirrors their border")
    full_decode: bool = Field(False, description="never let the JPEG decoder average pixels (slower, see the manual)")


def transform_of(config: PaletteConfig, views: int = 0) -> Transform:
    """How images are brought to squares."""
    return Transform(config.size, views, config.filter, config.enlarge, config.full_decode)


def given_palette(source: str, train: Split, config: PaletteConfig) -> Palette | None:
    """The palette that the settings name, or that lies beside ready tokens; None where one is to be fitted.

    Raises:
        InputError: there is no palette where one is said to be, or none for ready tokens.
    """
    ready = isinstance(train.reader, TokenRows)
    name = config.palette or (token_palette(source) if ready else None)
    if ready and name is None:
        raise InputError(f"{source} holds tokens; name their palette: --palette kmeans_centers.npy")
    return Palette.load(name) if name else None


def settle_palette(
    source: str, train: Split, config: PaletteConfig, given: Palette | None
) -> tuple[Palette, dict[str, Any], Image.Image | None]:
    """A given palette or one fitted to a sample of the training images, how well it serves them, and a picture of it.

    Raises:
        InputError: no training image decodes, or ready tokens have another resolution.
    """
    if isinstance(train.reader, TokenRows):
        assert given is not None
        if config.size != train.reader.resolution:
            raise InputError(f"{source} holds tokens of {train.reader.resolution} px; --size {train.reader.resolution}")
        return given, {}, None
    # Neighbours are read together: on the Hub, or in a tar, images scattered one by one would mean reading all of it.
    groups = max(1, _PIXELS["judge" if given else "fit"] // config.size**2 // _NEIGHBOURS)
    starts = np.random.default_rng(config.seed).permutation(-(-len(train) // _NEIGHBOURS))[:groups]
    positions = (np.sort(starts)[:, None] * _NEIGHBOURS + np.arange(_NEIGHBOURS)).ravel()
    transform, squares, bad = transform_of(config), [], []
    for image, _ in train.read(positions[positions < len(train)]):
        try:
            squares.append(transform(image))
        except InputError as error:
            bad.append(str(error))
    if not squares:
        raise InputError(f"no training image of {source} decodes; the first: {bad[0]}")
    pixels = np.concatenate(squares)
    palette = given or Palette(config.colors, seed=config.seed).fit(pixels)
    shown = pixels[np.arange(min(_SHOWN, len(pixels))) * len(pixels) // min(_SHOWN, len(pixels))]
    picture = image_grid([list(shown), list(palette.inverse_transform(palette.transform(shown)))])
    return palette, nearest_color_error(palette, pixels), picture
