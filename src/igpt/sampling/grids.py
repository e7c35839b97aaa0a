"""Samples and completions as PNG grids, with their settings in a JSON file next to them.

B images, n pixels of an image, R resolution.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from igpt.data.images.grid import default_scale, image_grid, require_png, save_png
from igpt.data.images.masks import hidden_pixels
from igpt.environment import describe
from igpt.errors import InputError
from igpt.files import file_to_write, read_json, write_json
from igpt.model.images import decode_images, palette_of
from igpt.model.precision import resolve_precision
from igpt.model.transformer import ImageGPT
from igpt.sampling.sampler import ProgressCallback, SamplingSettings, complete, sample

COLUMNS = 8
UNKNOWN = 224  # grey level of pixels that were not kept
_GAP_OF_GRIDS = 2  # pixels, as `image_grid` has it
_MOST_PIXELS = 89_478_485  # of a grid; Pillow takes larger pictures for an attack on the memory


def require_target(path: Path) -> None:
    """Refuse what a drawing cannot be written to, or would destroy, before any work is done.

    Raises:
        InputError: the name does not end in .png; it, or the name of the JSON file next to it, is
            that of a folder, a FIFO or a device; or that JSON file is not about a picture.
    """
    require_png(path)
    file_to_write(path)
    settings = path.with_suffix(".json")
    file_to_write(settings)
    if settings.exists() and "command" not in read_json(settings, "description of a picture"):
        raise InputError(
            f"{settings} holds something else than a picture's settings; choose another -o"
        )


def save_samples(
    model: ImageGPT,
    path: Path,
    count: int,
    settings: SamplingSettings,
    progress: ProgressCallback | None = None,
) -> Path:
    """Write `count` samples as a PNG grid; `settings` are those of `generate`.

    Raises:
        InputError: see `require_target` and `generate`; or the samples do not fit one picture.
    """
    require_target(path)
    if count < 1:
        raise InputError(f"at least one sample is drawn, not {count}")
    palette_of(model)
    model.config.trained_as.require("has_likelihood", "sampling whole images")
    fit = COLUMNS * (_MOST_PIXELS // (COLUMNS * _cell(model) ** 2))
    if count > max(fit, 1):
        raise InputError(
            f"{count:,} samples do not fit one picture; up to {fit:,} of {model.config.resolution} px do"
        )
    used = _with_precision(model, settings)
    drawn = sample(model, torch.empty(count, 0, dtype=torch.long), **used, progress=progress)
    images = decode_images(model, drawn)
    _write(
        path, [list(images[first : first + COLUMNS]) for first in range(0, count, COLUMNS)], used
    )
    return path


def save_completions(
    model: ImageGPT,
    originals: Tensor,
    path: Path,
    keep: int | Tensor,
    completions: int,
    settings: SamplingSettings,
    progress: ProgressCallback | None = None,
) -> Path:
    """Write a PNG grid with a row for each image: the original, what was kept, and `completions` drawings.

    Args:
        originals: tokens [B, n].
        keep: rows from the top, or the known pixels, bool [n].
        settings: those of `generate`.

    Raises:
        InputError: see `require_target` and `complete`; all pixels are kept; or the drawings do not
            fit one picture.
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
    drawn = complete(
        model, originals.repeat_interleave(completions, 0), keep, **used, progress=progress
    )
    whole = decode_images(model, originals)
    side = whole.shape[1]
    known = np.repeat(np.arange(side) < keep, side) if isinstance(keep, int) else keep.numpy()
    kept = np.where(known.reshape(side, side)[..., None], whole, np.uint8(UNKNOWN))
    filled = decode_images(model, drawn).reshape(len(whole), completions, *whole.shape[1:])
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


def _with_precision(model: ImageGPT, settings: SamplingSettings) -> SamplingSettings:
    """Return the settings with the precision that "auto" means for this model's device."""
    precision = resolve_precision(settings.get("precision", "auto"), model.device)
    return {**settings, "precision": precision}


def _write(
    path: Path, rows: Sequence[Sequence[NDArray[np.uint8]]], settings: Mapping[str, Any]
) -> None:
    save_png(image_grid(rows), path)
    write_json(path.with_suffix(".json"), {**settings, "command": describe()["command"]})
