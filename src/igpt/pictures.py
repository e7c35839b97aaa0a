"""Samples and completions as PNG grids, with their settings in a JSON file next to them; maps of losses.

B images, n pixels of an image, R resolution.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from igpt.data.grids import default_scale, image_grid, require_png, save_png
from igpt.data.masks import hidden_pixels
from igpt.data.palette import Palette
from igpt.data.tokens import TokenSplit
from igpt.data.views import load_square
from igpt.environment import describe
from igpt.errors import InputError
from igpt.files import atomic_file, file_to_write, read_json, require_regular, write_json
from igpt.model.generate import Drawing, Progress, complete, sample
from igpt.model.precision import settle_precision
from igpt.model.transformer import ImageGPT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 8
_DPI = 200
_SIDE = 230  # dots that a picture of a map gets, about: a whole number a pixel
_GAP, _SEAM, _TITLE, _EDGE, _BAR, _SCALE = 14, 6, 44, 24, 28, 150  # dots; the last two: the colour bar, and with words
_MOST = 200  # maps of a picture: matplotlib draws 65,536 dots in a direction
_INK, _MUTED = "#1f2328", "#59636e"
UNKNOWN = 224  # grey level of pixels that were not kept
_GAP_OF_GRIDS = 2  # pixels, as `image_grid` has it
_MOST_PIXELS = 89_478_485  # of a grid; Pillow takes larger pictures for an attack on the memory
_LARGEST_FILE = 2 << 30  # bytes of an image


def palette_of(model: ImageGPT) -> Palette:
    """The model's palette.

    Raises:
        InputError: its directory holds none.
    """
    if model.palette is None:
        raise InputError("the model's directory holds no palette; add its preprocessor_config.json")
    return model.palette


def tokens_of_files(model: ImageGPT, files: Sequence[Path]) -> Tensor:
    """Return the tokens of image files, at the model's resolution and in its palette: [B, n].

    Raises:
        InputError: a file is missing, not a regular file, or not an image; or the model has no palette.
    """
    palette = palette_of(model)
    for file in files:
        require_regular(file)
        if file.is_file() and (size := file.stat().st_size) > _LARGEST_FILE:
            raise InputError(f"{file} has {size:,} bytes; images of up to {_LARGEST_FILE:,} are read")
    squares = np.stack([load_square(file, model.config.resolution) for file in files])
    return torch.from_numpy(palette.transform(squares).reshape(len(files), -1).astype(np.int64))


def tokens_of_split(split: TokenSplit, count: int) -> Tensor:
    """`count` images spread evenly over a split: [B, n]; see `spread_evenly`."""
    return torch.from_numpy(split.rows(spread_evenly(split, count)).astype(np.int64))


def spread_evenly(split: TokenSplit, count: int) -> NDArray[np.int64]:
    """Where `count` images stand that are spread evenly over a split: [B].

    Raises:
        InputError: it has not so many.
    """
    if not 1 <= count <= len(split):
        raise InputError(f"{count} images are asked for; the split {split.name!r} has {len(split)}")
    return np.arange(count) * len(split) // count


def pictures(model: ImageGPT, tokens: Tensor) -> NDArray[np.uint8]:
    """Tokens [B, n] as RGB, uint8 [B, R, R, 3]."""
    side = model.config.resolution
    return palette_of(model).inverse_transform(tokens.cpu().numpy().reshape(-1, side, side))


def require_target(path: Path) -> None:
    """Refuse what a drawing cannot be written to, or would destroy, before any work is done.

    Raises:
        InputError: the name does not end in .png; it, or the name of the JSON file next to it, is that of a folder, a
            FIFO or a device; or that JSON file is not about a picture.
    """
    require_png(path)
    file_to_write(path)
    settings = path.with_suffix(".json")
    file_to_write(settings)
    if settings.exists() and "command" not in read_json(settings, "description of a picture"):
        raise InputError(f"{settings} holds something else than a picture's settings; choose another -o")


def draw_samples(model: ImageGPT, path: Path, count: int, settings: Drawing, progress: Progress | None = None) -> Path:
    """Write `count` samples as a PNG grid; `settings` are those of `draw`.

    Raises:
        InputError: see `require_target` and `draw`; or the samples do not fit one picture.
    """
    require_target(path)
    if count < 1:
        raise InputError(f"at least one sample is drawn, not {count}")
    palette_of(model)
    model.require("autoregressive", "drawing whole images")
    fit = COLUMNS * (_MOST_PIXELS // (COLUMNS * _cell(model) ** 2))
    if count > max(fit, 1):
        raise InputError(f"{count:,} samples do not fit one picture; up to {fit:,} of {model.config.resolution} px do")
    used = _with_precision(model, settings)
    drawn = sample(model, torch.empty(count, 0, dtype=torch.long), **used, progress=progress)
    images = pictures(model, drawn)
    _write(path, [list(images[first : first + COLUMNS]) for first in range(0, count, COLUMNS)], used)
    return path


def draw_completions(
    model: ImageGPT,
    originals: Tensor,
    path: Path,
    keep: int | Tensor,
    completions: int,
    settings: Drawing,
    progress: Progress | None = None,
) -> Path:
    """Write a PNG grid with a row for each image: the original, what was kept, and `completions` drawings.

    Args:
        originals: tokens [B, n].
        keep: rows from the top, or the known pixels, bool [n].
        settings: those of `draw`.

    Raises:
        InputError: see `require_target` and `complete`; all pixels are kept; or the drawings do not fit one picture.
    """
    require_target(path)
    if completions < 1:
        raise InputError(f"at least one completion is drawn, not {completions}")
    fit = _MOST_PIXELS // (len(originals) * _cell(model) ** 2) - 2
    if completions > max(fit, 1):
        raise InputError(
            f"{completions:,} completions of {len(originals):,} images do not fit one picture; up to {max(fit, 0):,} do"
        )
    if keep == model.config.resolution if isinstance(keep, int) else bool(keep.all()):
        raise InputError("all pixels are kept, so that nothing is left to draw")
    used = _with_precision(model, settings)
    drawn = complete(model, originals.repeat_interleave(completions, 0), keep, **used, progress=progress)
    whole = pictures(model, originals)
    side = whole.shape[1]
    known = np.repeat(np.arange(side) < keep, side) if isinstance(keep, int) else keep.numpy()
    kept = np.where(known.reshape(side, side)[..., None], whole, np.uint8(UNKNOWN))
    filled = pictures(model, drawn).reshape(len(whole), completions, *whole.shape[1:])
    rows = [[whole[index], kept[index], *filled[index]] for index in range(len(whole))]
    told = {"keep_rows": keep} if isinstance(keep, int) else {"kept_pixels": int(known.sum())}
    _write(path, rows, {**used, **told, "completions": completions})
    return path


def mask_of_file(model: ImageGPT, path: Path) -> Tensor:
    """Return the pixels that a mask keeps, bool [n]; see `hidden_pixels`.

    Raises:
        InputError: it is not a readable image, or hides nothing.
    """
    return torch.from_numpy(~hidden_pixels(path, model.config.resolution).reshape(-1))


def _cell(model: ImageGPT) -> int:
    """Return the side of a picture in a grid, with the gap next to it."""
    return model.config.resolution * default_scale(model.config.resolution) + _GAP_OF_GRIDS


def _with_precision(model: ImageGPT, settings: Drawing) -> Drawing:
    """Return the settings with the precision that "auto" means for this model's device."""
    precision = settle_precision(settings.get("precision", "auto"), model.wte.weight.device)
    return {**settings, "precision": precision}


def require_maps(path: Path, count: int) -> None:
    """Refuses maps as anything but PNG, and more than a picture can hold.

    Raises:
        InputError: the name ends otherwise, or the count is not 1 to 200.
    """
    require_png(path)
    if not 1 <= count <= _MOST:
        raise InputError(f"maps of 1 to {_MOST} images fit a picture, not of {count}")


def draw_maps(model: ImageGPT, tokens: NDArray[np.uint16], losses: NDArray[np.float64], path: Path) -> None:
    """Writes images above the losses of their pixels as PNG: tokens [B, n], losses [B, n] in nats."""
    figure = loss_maps(pictures(model, torch.from_numpy(tokens.astype(np.int64))), losses)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI)


def loss_maps(originals: NDArray[np.uint8], losses: NDArray[np.float64]) -> "Figure":
    """Images [B, R, R, 3] above maps of the losses of their pixels, [B, n] in nats, with one scale of colours.

    Each pair is headed by its mean. Colours reach to the loss that one pixel in 200 exceeds.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    count, side = len(originals), originals.shape[1]
    cell = side * max(1, round(_SIDE / side))
    columns = min(count, COLUMNS)
    bands = math.ceil(count / columns)
    pair = 2 * cell + _SEAM
    band = _TITLE + pair + _GAP
    width, height = 2 * _EDGE + columns * (cell + _GAP) + _SCALE, bands * band + 2 * _EDGE - _GAP
    figure = Figure(figsize=(width / _DPI, height / _DPI), facecolor="white")
    highest = float(np.quantile(losses, 0.995))
    scale = ScalarMappable(Normalize(0, highest), "magma")

    def axes(left: float, top: float, wide: float, high: float) -> Any:
        return figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))

    for index in range(count):
        left = _EDGE + index % columns * (cell + _GAP)
        top = _EDGE + index // columns * band + _TITLE
        upper, lower = axes(left, top, cell, cell), axes(left, top + cell + _SEAM, cell, cell)
        upper.imshow(originals[index], interpolation="nearest")
        lower.imshow(losses[index].reshape(side, side), norm=scale.norm, cmap=scale.cmap, interpolation="nearest")
        upper.set_title(f"{losses[index].mean():.3f} nats/pixel", fontsize=7.5, color=_INK, pad=3)
        upper.set_axis_off()
        lower.set_axis_off()
    place = axes(width - _SCALE - _EDGE + _GAP, _EDGE + _TITLE, _BAR, pair)
    bar = figure.colorbar(scale, cax=place, extend="max" if losses.max() > highest else "neither")
    bar.set_label("loss of a pixel, nats", fontsize=7.5, color=_INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, colors=_MUTED, length=2)
    return figure


def _write(path: Path, rows: Sequence[Sequence[NDArray[np.uint8]]], settings: Mapping[str, Any]) -> None:
    save_png(image_grid(rows), path)
    write_json(path.with_suffix(".json"), {**settings, "command": describe()["command"]})
