"""The palette of a source, given or fitted to some of its images, with its error and a preview."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pydantic import Field

from igpt.data.images.palette import Palette, nearest_color_error
from igpt.data.images.palette_picture import palette_picture
from igpt.data.images.transform import Enlarge, Filter, Transform
from igpt.data.sources.archives import TokenRows, token_palette
from igpt.data.sources.catalogue import SourceConfig, Split
from igpt.data.sources.readers import name_of_image
from igpt.errors import InputError

# Training pixels, selected by seed; 512 colours need no more.
_FIT_PIXELS = 2_000_000
_ERROR_PIXELS = 250_000
_NEIGHBOURS = 8  # neighbouring images that are read together
_SHOWN = 12  # images in the preview
NONE_TRANSPARENT = (
    "no pixel of these images is transparent, so that the transparent entry of the palette is not "
    "used; --transparent is for images with transparency"
)
PhaseProgress = Callable[[str, int, int], None]


class PaletteConfig(SourceConfig):
    """Settings of the palette and of the transform of images."""

    size: int = Field(
        32, ge=2, le=1024, description="model resolution in pixels; the paper has 32, 48 and 64"
    )
    colors: int = Field(
        512,
        ge=2,
        le=65535,
        description="palette size; greyscale data gets as many levels as it has",
    )
    palette: str | None = Field(
        None,
        description="use this palette (.npy, token data set, model, built-in name, Hub id) instead "
        "of fitting one",
    )
    filter: Filter = Field("area", description="filter for reducing images; area averages exactly")
    enlarge: Enlarge = Field(
        "pad", description="how to enlarge smaller images; pad mirrors their border"
    )
    full_decode: bool = Field(
        False, description="never let the JPEG decoder average pixels (slower, see the manual)"
    )
    transparent: bool = Field(
        False,
        description="reserve the last colour for transparent pixels, instead of compositing them "
        "over white; a given palette with such a colour needs no flag",
    )


def transform_of(config: PaletteConfig, *, alpha: bool, views: int = 0) -> Transform:
    """Return the transform from images to squares at the model resolution.

    Args:
        alpha: whether the palette has a transparent entry.
    """
    return Transform(config.size, views, config.filter, config.enlarge, config.full_decode, alpha)


def given_palette(source: str, train: Split, config: PaletteConfig) -> Palette | None:
    """Return the palette in the settings or next to ready tokens; None if it is to be fitted.

    Raises:
        InputError: there is no such palette, none for ready tokens, or one without the transparent
            entry that is asked for.
    """
    ready = isinstance(train.reader, TokenRows)
    name = config.palette or (token_palette(source) if ready else None)
    if ready and name is None:
        raise InputError(f"{source} holds tokens; name their palette: --palette kmeans_centers.npy")
    palette = Palette.load(name) if name else None
    if palette and config.transparent and not palette.transparent:
        raise InputError(
            f"the palette {name} has no transparent entry; leave --transparent out, or leave "
            "--palette out to fit a new palette"
        )
    return palette


def palette_notes(given: Palette | None, train: Split, config: PaletteConfig) -> list[str]:
    """Return a warning if a given palette seems to have its colours in 0..1 instead of -1..1."""
    if given is None or isinstance(train.reader, TokenRows):
        return []
    if given.opaque_centers.min() < 0 or given.opaque_centers.max() > 1:
        return []
    return [
        f"all colours of the palette {config.palette} lie in 0..1, where palettes have -1..1: if "
        "it was made for 0..1, the images come out wrong; replace each value c by 2 c - 1"
    ]


class SettledPalette(NamedTuple):
    """A palette for the images of a source.

    Attributes:
        quality: see `nearest_color_error`, on some training images; empty for ready tokens.
        picture: see `palette_picture`, of some of these images.
        bad: images among these that do not decode, with the reasons.
        read: the number of these images.
    """

    palette: Palette
    quality: dict[str, Any]
    picture: Image.Image | None
    bad: list[str]
    read: int


def settle_palette(
    source: str,
    train: Split,
    config: PaletteConfig,
    given: Palette | None,
    progress: PhaseProgress | None = None,
) -> SettledPalette:
    """Return the given palette, or one fitted to some of the training images.

    Args:
        progress: called with the name of the phase, the number of images or iterations done, and
            their number.

    Raises:
        InputError: no training image decodes, or ready tokens have another resolution.
    """
    if isinstance(train.reader, TokenRows):
        assert given is not None
        if config.size != train.reader.resolution:
            raise InputError(
                f"{source} holds tokens of {train.reader.resolution} px; "
                f"--size {train.reader.resolution}"
            )
        return SettledPalette(given, {}, None, [], 0)
    # Neighbours are read together: single images scattered over a tar or a Hub data set would
    # require reading all of it.
    groups = max(1, (_ERROR_PIXELS if given else _FIT_PIXELS) // config.size**2 // _NEIGHBOURS)
    starts = np.random.default_rng(config.seed).permutation(-(-len(train) // _NEIGHBOURS))[:groups]
    positions = (np.sort(starts)[:, None] * _NEIGHBOURS + np.arange(_NEIGHBOURS)).ravel()
    positions = positions[positions < len(train)]
    transform = transform_of(config, alpha=given.transparent if given else config.transparent)
    squares, bad = [], list[str]()
    rows = train.indices[positions].tolist()
    for done, (row, (image, _)) in enumerate(zip(rows, train.read(positions), strict=False)):
        if progress and done % _NEIGHBOURS == 0:
            progress("palette: reading images", done, len(rows))
        try:
            squares.append(transform(image))
        except InputError as error:
            bad.append(f"{name_of_image(image, row)}: {error}")
    if not squares:
        raise InputError(f"no training image of {source} decodes; the first: {bad[0]}")
    pixels = np.concatenate(squares)
    fitting = progress and partial(progress, "palette: fitting colours")
    palette = given or Palette(config.colors, seed=config.seed, transparent=config.transparent).fit(
        pixels, progress=fitting
    )
    shown = pixels[np.arange(min(_SHOWN, len(pixels))) * len(pixels) // min(_SHOWN, len(pixels))]
    picture = palette_picture(shown, palette)
    return SettledPalette(
        palette, nearest_color_error(palette, pixels), picture, bad, len(positions)
    )
