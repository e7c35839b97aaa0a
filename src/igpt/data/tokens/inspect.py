"""The contents of a token data set, a check of its files, and a sheet of its images.

k colours, C classes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from igpt.data.images.grid import image_grid
from igpt.data.left_out import left_out_of
from igpt.data.tokens.dataset import TokenDataset
from igpt.data.tokens.manifest import MANIFEST

_ROWS, _COLUMNS = 10, 12  # of images in a sheet
_NAME_LENGTH = 24  # letters shown of a class name
_AT_ONCE = 2**24  # tokens in memory


def inspect(
    data: TokenDataset, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Read every shard: checksums, images per split and class, and the training pixels per colour.

    Args:
        progress: called with (images read, images in all).

    Raises:
        InputError: shards have changed since they were written, or have invalid values; the message
            has the names of the files.
    """
    data.verify()
    left_out = left_out_of(data.manifest["made"], str(data.path / MANIFEST))
    colors, classes = len(data.palette), len(data.class_names or ())
    total, done = sum(len(data[split]) for split in data), 0
    at_once = max(1, _AT_ONCE // data.resolution**2)
    shares = np.zeros(colors, dtype=np.int64)
    splits = {}
    for split in data:
        rows = data[split]
        counts = np.bincount(rows.labels + 1, minlength=classes + 1)
        for first in range(0, len(rows), at_once):
            tokens = rows.rows(np.arange(first, min(first + at_once, len(rows))))
            if split == "train":
                shares += np.bincount(tokens.ravel(), minlength=colors)
            done += len(tokens)
            if progress:
                progress(done, total)
        splits[split] = {
            "images": len(rows),
            "unlabelled": int(counts[0]),
            "per_class": dict(zip(data.class_names or (), counts[1:].tolist(), strict=True)),
        }
    shards = [shard for split in data.manifest["splits"].values() for shard in split["shards"]]
    return {
        "path": str(data.path),
        "source": data.manifest["source"],
        "resolution": data.resolution,
        "colors": colors,
        "transparent_token": data.palette.transparent_token,
        "fingerprint": data.palette.fingerprint,
        "shards": len(shards),
        "bytes": sum(size for shard in shards for size in shard["bytes"].values()),
        "splits": splits,
        "color_share": (shares / max(1, shares.sum())).round(6).tolist(),
        "left_out": left_out.to_json(),
        "made": {"config": {}, "palette_error": {}, "skipped": []} | data.manifest["made"],
    }


def sheet(data: TokenDataset) -> Image.Image:
    """Return a grid of training images: a row for each class with its name, or mixed rows."""
    train, names = data["train"], data.class_names
    rows: list[tuple[str, Any]]
    if names and (train.labels >= 0).any():
        present = np.unique(train.labels[train.labels >= 0])
        shown = present[np.unique(np.arange(_ROWS) * len(present) // _ROWS)]
        rows = [
            (names[number], np.flatnonzero(train.labels == number)[:_COLUMNS]) for number in shown
        ]
    else:
        spread = np.unique(np.arange(_ROWS * _COLUMNS) * len(train) // (_ROWS * _COLUMNS))
        rows = [("", spread[first : first + _COLUMNS]) for first in range(0, len(spread), _COLUMNS)]
    side = data.resolution
    images = [
        list(data.palette.inverse_transform(train.rows(chosen).reshape(-1, side, side)))
        for _, chosen in rows
    ]
    grid = image_grid(images)
    if not any(name for name, _ in rows):
        return grid
    font = ImageFont.load_default(14)
    rows = [
        (name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 3]}...", chosen)
        for name, chosen in rows
    ]
    margin = 12 + max(int(font.getlength(name)) for name, _ in rows)
    canvas = Image.new(grid.mode, (grid.width + margin, grid.height), "white")
    canvas.paste(grid, (margin, 0))
    pen, height = ImageDraw.Draw(canvas), grid.height / len(rows)
    for number, (name, _) in enumerate(rows):
        pen.text((margin - 8, (number + 0.5) * height), name, fill="black", font=font, anchor="rm")
    return canvas
