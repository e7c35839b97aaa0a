"""Images above maps of the losses of their pixels, as PNG.

B images, n pixels of an image, R resolution.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

_COLUMNS = 8
_DPI = 200
_SIDE = 230  # dots that a picture of a map gets, about: a whole number a pixel
_GAP, _SEAM, _TITLE, _EDGE, _BAR, _SCALE = (
    14,
    6,
    44,
    24,
    28,
    150,
)  # dots; the last two: the colour bar, and with words
_MOST = 200  # maps of a picture: matplotlib draws 65,536 dots in a direction
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
    model: ImageGPT, tokens: NDArray[np.uint16], losses: NDArray[np.float64], path: Path
) -> None:
    """Write a PNG of images with their loss maps: tokens [B, n], losses [B, n] in nats."""
    figure = loss_maps(decode_images(model, torch.from_numpy(tokens.astype(np.int64))), losses)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI)


def loss_maps(originals: NDArray[np.uint8], losses: NDArray[np.float64]) -> "Figure":
    """Plot images [B, R, R, 3] with maps of the losses of their pixels, [B, n] in nats.

    Each pair is headed by its mean. Colours reach to the loss that one pixel in 200 exceeds.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    count, side = len(originals), originals.shape[1]
    cell = side * max(1, round(_SIDE / side))
    columns = min(count, _COLUMNS)
    bands = math.ceil(count / columns)
    pair = 2 * cell + _SEAM
    band = _TITLE + pair + _GAP
    width, height = 2 * _EDGE + columns * (cell + _GAP) + _SCALE, bands * band + 2 * _EDGE - _GAP
    figure = Figure(figsize=(width / _DPI, height / _DPI), facecolor="white")
    highest = float(np.quantile(losses, 0.995))
    scale = ScalarMappable(Normalize(0, highest), "magma")

    def axes(left: float, top: float, wide: float, high: float) -> Any:
        return figure.add_axes(
            (left / width, 1 - (top + high) / height, wide / width, high / height)
        )

    for index in range(count):
        left = _EDGE + index % columns * (cell + _GAP)
        top = _EDGE + index // columns * band + _TITLE
        upper, lower = axes(left, top, cell, cell), axes(left, top + cell + _SEAM, cell, cell)
        upper.imshow(originals[index], interpolation="nearest")
        lower.imshow(
            losses[index].reshape(side, side),
            norm=scale.norm,
            cmap=scale.cmap,
            interpolation="nearest",
        )
        upper.set_title(f"{losses[index].mean():.3f} nats/pixel", fontsize=7.5, color=_INK, pad=3)
        upper.set_axis_off()
        lower.set_axis_off()
    bar_axes = axes(width - _SCALE - _EDGE + _GAP, _EDGE + _TITLE, _BAR, pair)
    bar = figure.colorbar(
        scale, cax=bar_axes, extend="max" if losses.max() > highest else "neither"
    )
    bar.set_label("loss of a pixel, nats", fontsize=7.5, color=_INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, colors=_MUTED, length=2)
    return figure
