"""Images to tokens of a model and back.

B images, n pixels of an image, R resolution, C channels: RGB, or RGBA.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from igpt.data.images.transform import Transform, load_square
from igpt.data.left_out import LeftOut
from igpt.data.sources.file_kinds import ending_of
from igpt.data.sources.folders import list_folder
from igpt.data.tokens.dataset import TokenSplit
from igpt.errors import InputError
from igpt.files import require_regular
from igpt.model.match import palette_of
from igpt.model.transformer import ImageGPT

_LARGEST_FILE = 2 << 30  # bytes of an image


def files_of(paths: Sequence[Path]) -> tuple[list[Path], LeftOut]:
    """Return image files: folders are replaced by the images in them, at any depth, in order.

    The second value has the other files of the folders.

    Raises:
        InputError: a folder cannot be read or has no images.
    """
    files, left_out = list[Path](), LeftOut()
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        found = list_folder(path)
        if not len(found.images):
            raise InputError(f"there are no images in the folder {path}")
        files += [path / name for name in found.images.to_pylist()]
        left_out.update(found.left_out)
        packed = [name for names in found.packed.values() for name in names]
        for name in packed:
            left_out.add(f"files {ending_of(name)}", name, possible_images=True)
        for name in (*found.metadata, *found.annotations):
            left_out.add("descriptions of images", name)
    return files, left_out


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
    side, alpha = model.config.resolution, palette.transparent
    squares = np.stack([load_square(file, side, alpha=alpha) for file in files])
    return torch.from_numpy(palette.transform(squares).reshape(len(files), -1).astype(np.int64))


def tokens_of_images(model: ImageGPT, images: Iterable[Any]) -> Tensor:
    """Return the tokens of images, at the model's resolution and in its palette: [B, n].

    Args:
        images: an array uint8 [B, H, W, C], or [B, H, W] of grey images; or PIL images, arrays or
            paths of any sizes. Of each, the centre square is used.

    Raises:
        InputError: an item is not an image (its index is named), there is none, or the model has no
            palette.
    """
    if isinstance(images, str | Path) or not isinstance(images, Iterable):
        raise InputError(f"a list or an array of images is needed, not {type(images).__name__}")
    if isinstance(images, np.ndarray) and images.dtype.kind not in "OU":
        _require_pixels(images)
    palette = palette_of(model)
    transform = Transform(model.config.resolution, alpha=palette.transparent)
    tokens = []
    for index, image in enumerate(images):
        try:
            tokens.append(palette.transform(transform(image)).reshape(-1))
        except InputError as error:
            raise InputError(f"image {index}: {error}") from None
    if not tokens:
        raise InputError("there are no images here")
    return torch.from_numpy(np.stack(tokens).astype(np.int64))


def _require_pixels(images: NDArray[Any]) -> None:
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise InputError(
            f"an array of images is uint8 [N, H, W, 3] or [N, H, W], not {images.dtype} "
            f"{list(images.shape)}"
        )
    if images.ndim == 3 and images.shape[-1] in (3, 4):
        raise InputError(
            f"{list(images.shape)} looks like one coloured image; an array of images is [N, H, W, "
            "3]"
        )


def split_of_images(model: ImageGPT, images: Iterable[Any]) -> TokenSplit:
    """Return the tokens of images as a split without labels; see `tokens_of_images`."""
    tokens = tokens_of_images(model, images).numpy().astype(np.uint16)
    return TokenSplit("images", [tokens], [np.full(len(tokens), -1, dtype=np.int32)])


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
    """Return tokens [B, n] as images, uint8 [B, R, R, C]; RGBA with a transparent entry."""
    side = model.config.resolution
    return palette_of(model).inverse_transform(tokens.cpu().numpy().reshape(-1, side, side))
