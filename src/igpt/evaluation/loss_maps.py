"""Images above maps of the losses of their pixels, as PNG.

B images, n pixels of an image, R resolution.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from igpt.data.images.grid import require_png
from igpt.errors import InputError
from igpt.files import atomic_file
from igpt.model.images import decode_images
from igpt.model.transformer import ImageGPT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS, _DPI = 8, 200
_SIDE = 230  # approximate dots of an image, a whole number per pixel
# Dots: between pairs, above a pair for its loss, below it for its name, around the figure, and of
# the colour bar without and with its labels.
_GAP, _TITLE, _NAME, _EDGE, _BAR, _SCALE = 14, 44, 36, 24, 28, 150
_LONGEST = 20  # letters of a name that fit under an image
_MOST = 200  # maps in a picture: matplotlib draws 65,536 dots in a direction
_INK, _MUTED = "#1f2328", "#59636e"


def require_maps(path: Path, count: int) -> None:
    """Refuse maps as anything but PNG, and more than a picture can hold.

    Raises:
        InputError: the name ends otherwise, or the count is not 1 to 200.
    """
    require_png(path)
    if not 1 <= count <= _MOST:
        raise InputError(f"maps of 1 to {_MOST} images fit a picture, not of {count}")


def draw_maps(
    model: ImageGPT,
    tokens: NDArray[np.uint16],
    losses: NDArray[np.float64],
    names: Sequence[str],
    path: Path,
) -> None:
    """Write a PNG of images with their loss maps: tokens [B, n], losses [B, n] in nats, names."""
    originals = decode_images(model, torch.from_numpy(tokens.astype(np.int64)))
    figure = loss_maps(originals, losses, names)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI)


def loss_maps(
    originals: NDArray[np.uint8], losses: NDArray[np.float64], names: Sequence[str]
) -> "Figure":
    """Plot images [B, R, R, 3] with maps of the losses of their pixels, [B, n] in nats.

    Each pair has its mean loss above it and its name below it; of a long name, the end is shown.
    Colours reach to the loss that one pixel in 200 exceeds.
    """
    from matplotlib.figure import Figure
    from mpl_toolkits.axes_grid1 import ImageGrid

    count, side = len(originals), originals.shape[1]
    dots = max(1, round(_SIDE / side))  # of a pixel
    columns = min(count, _COLUMNS)
    rows = math.ceil(count / columns)
    seam = 6 / dots  # between an image and its map, in pixels
    grid_width = columns * (side * dots + _GAP) + _BAR
    between = _GAP + _TITLE + _NAME
    grid_height = rows * ((2 * side + seam) * dots + between) - between
    width = grid_width + _SCALE + 2 * _EDGE - _BAR
    height = grid_height + _TITLE + _NAME + 2 * _EDGE
    figure = Figure(figsize=(width / _DPI, height / _DPI), facecolor="white")
    grid = ImageGrid(
        figure,
        (_EDGE / width, (_EDGE + _NAME) / height, grid_width / width, grid_height / height),
        (rows, columns),
        axes_pad=(_GAP / _DPI, between / _DPI),
        cbar_mode="single",
        cbar_pad=_GAP / _DPI,
        cbar_size=_BAR / _DPI,
    )
    highest = float(np.quantile(losses, 0.995))
    for axes in grid:
        axes.set_axis_off()
    for axes, original, nats, name in zip(grid, originals, losses, names, strict=False):
        axes.imshow(original, extent=(0, side, side + seam, 2 * side + seam))
        image = axes.imshow(
            nats.reshape(side, side), "magma", vmin=0, vmax=highest, extent=(0, side, 0, side)
        )
        axes.set(xlim=(0, side), ylim=(0, 2 * side + seam))
        axes.set_title(f"{nats.mean():.3f} nats/pixel", fontsize=7.5, color=_INK, pad=3)
        end = name if len(name) <= _LONGEST else f"\N{HORIZONTAL ELLIPSIS}{name[1 - _LONGEST :]}"
        axes.text(
            side / 2,
            -4 / dots,
            end,
            ha="center",
            va="top",
            fontsize=7,
            color=_MUTED,
            parse_math=False,
        )
    extend = "max" if losses.max() > highest else "neither"
    bar = figure.colorbar(image, cax=grid.cbar_axes[0], extend=extend, extendfrac=0.05 / rows)
    bar.set_label("loss of a pixel, nats", fontsize=7.5, color=_INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, colors=_MUTED, length=2)
    return figure
