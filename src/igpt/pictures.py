"""Samples and completions as PNG grids, with the settings they were drawn with in a JSON beside them.

B images, n places, R resolution.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from igpt.data.grids import image_grid, require_png, save_png
from igpt.data.palette import Palette
from igpt.data.tokens import TokenSplit
from igpt.data.views import load_square
from igpt.environment import describe
from igpt.errors import InputError
from igpt.files import write_json
from igpt.model.generate import Drawing, Progress, complete, sample
from igpt.model.transformer import ImageGPT

COLUMNS = 8
_UNKNOWN = 224  # grey level of pixels that were not kept


def palette_of(model: ImageGPT) -> Palette:
    """The model's palette.

    Raises:
        InputError: its directory holds none.
    """
    if model.palette is None:
        raise InputError("the model's directory holds no palette; add its preprocessor_config.json")
    return model.palette


def tokens_of_files(model: ImageGPT, files: Sequence[Path]) -> Tensor:
    """Images from files, at the model's resolution and in its palette: [B, n]."""
    squares = np.stack([load_square(file, model.config.resolution) for file in files])
    return torch.from_numpy(palette_of(model).transform(squares).reshape(len(files), -1).astype(np.int64))


def tokens_of_split(split: TokenSplit, count: int) -> Tensor:
    """`count` images spread evenly over a split: [B, n].

    Raises:
        InputError: it has not so many.
    """
    if not 1 <= count <= len(split):
        raise InputError(f"{count} images are asked for; the split {split.name!r} has {len(split)}")
    return torch.from_numpy(split.rows(np.arange(count) * len(split) // count).astype(np.int64))


def pictures(model: ImageGPT, tokens: Tensor) -> NDArray[np.uint8]:
    """Tokens [B, n] as RGB, uint8 [B, R, R, 3]."""
    side = model.config.resolution
    return palette_of(model).inverse_transform(tokens.cpu().numpy().reshape(-1, side, side))


def draw_samples(model: ImageGPT, path: Path, count: int, settings: Drawing, progress: Progress | None = None) -> Path:
    """Writes `count` samples as a PNG grid; `settings` are those of `sample`."""
    require_png(path)
    if count < 1:
        raise InputError(f"at least one sample is drawn, not {count}")
    palette_of(model)
    if model.config.objective == "autoregressive":
        drawn = sample(model, torch.empty(count, 0, dtype=torch.long), **settings, progress=progress)
    else:
        drawn = complete(model, torch.zeros(count, model.config.n_places, dtype=torch.long), 0, **settings)
    images = pictures(model, drawn)
    _write(path, [list(images[first : first + COLUMNS]) for first in range(0, count, COLUMNS)], settings)
    return path


def draw_completions(
    model: ImageGPT,
    originals: Tensor,
    path: Path,
    keep_rows: int,
    completions: int,
    settings: Drawing,
    progress: Progress | None = None,
) -> Path:
    """Writes a PNG grid, a row an image: the original, the rows that were kept, and `completions` drawings.

    Args:
        originals: tokens [B, n].
        settings: those of `sample`.
    """
    require_png(path)
    if completions < 1:
        raise InputError(f"at least one completion is drawn, not {completions}")
    drawn = complete(model, originals.repeat_interleave(completions, 0), keep_rows, **settings, progress=progress)
    whole = pictures(model, originals)
    kept = whole.copy()
    kept[:, keep_rows:] = _UNKNOWN
    filled = pictures(model, drawn).reshape(len(whole), completions, *whole.shape[1:])
    rows = [[whole[index], kept[index], *filled[index]] for index in range(len(whole))]
    _write(path, rows, {**settings, "keep_rows": keep_rows, "completions": completions})
    return path


def _write(path: Path, rows: Sequence[Sequence[NDArray[np.uint8]]], settings: Mapping[str, Any]) -> None:
    save_png(image_grid(rows), path)
    write_json(path.with_suffix(".json"), {**settings, "command": describe()["command"]})
