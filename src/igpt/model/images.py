"""Images to tokens of a model and back. B images, n pixels of an image, R resolution."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from igpt.data.images.transform import load_square
from igpt.data.tokens.dataset import TokenSplit
from igpt.errors import InputError
from igpt.files import require_regular
from igpt.model.match import palette_of
from igpt.model.transformer import ImageGPT

_LARGEST_FILE = 2 << 30  # bytes of an image


def tokens_of_files(model: ImageGPT, files: Sequence[Path]) -> Tensor:
    """Return the tokens of image files, at the model's resolution and in its palette: [B, n].

    Raises:
        InputError: a file is missing, not a regular file, or not an image; or the model has no
            palette.
    """
    palette = palette_of(model)
    for file in files:
        require_regular(file)
        if file.is_file() and (size := file.stat().st_size) > _LARGEST_FILE:
            raise InputError(
                f"{file} has {size:,} bytes; images of up to {_LARGEST_FILE:,} are read"
            )
    squares = np.stack([load_square(file, model.config.resolution) for file in files])
    return torch.from_numpy(palette.transform(squares).reshape(len(files), -1).astype(np.int64))


def tokens_of_split(split: TokenSplit, count: int) -> Tensor:
    """Return `count` images spread evenly over a split: [B, n]; see `spread_evenly`."""
    return torch.from_numpy(split.rows(spread_evenly(split, count)).astype(np.int64))


def spread_evenly(split: TokenSplit, count: int) -> NDArray[np.int64]:
    """Return the indices of `count` images spread evenly over a split: [B].

    Raises:
        InputError: the split has fewer images.
    """
    if not 1 <= count <= len(split):
        raise InputError(f"{count} images are asked for; the split {split.name!r} has {len(split)}")
    return np.arange(count) * len(split) // count


def decode_images(model: ImageGPT, tokens: Tensor) -> NDArray[np.uint8]:
    """Return tokens [B, n] as RGB images, uint8 [B, R, R, 3]."""
    side = model.config.resolution
    return palette_of(model).inverse_transform(tokens.cpu().numpy().reshape(-1, side, side))
