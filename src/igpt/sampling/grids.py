"""Samples and completions as PNG grids, each with its settings in a JSON file next to it.

B images, n pixels of an image, R resolution.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from igpt.data.images.grid import default_scale, image_grid, require_png, save_png
from igpt.environment import describe
from igpt.errors import InputError
from igpt.files import atomic_folder, file_to_write, read_json, write_json
from igpt.model.images import decode_images
from igpt.model.transformer import ImageGPT
from igpt.outputs import require_writable_folder
from igpt.sampling.images import complete_images, sample_images
from igpt.sampling.jobs import SamplingSettings, resolve_sampling_precision
from igpt.sampling.sampler import ProgressCallback

COLUMNS = 8
UNKNOWN = 224  # grey level of pixels that were not kept
_GAP = 2  # pixels between the images of `image_grid`
_MOST_PIXELS = 89_478_485  # of a grid; Pillow refuses larger images as an attack on the memory


def require_target(path: Path) -> None:
    """Check, before any work is done, that a grid can be written and destroys nothing else.

    Raises:
        InputError: the name does not end in .png; it, or the name of the JSON file next to it, is
            that of a folder, a FIFO or a device; or that JSON file does not describe an image.
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
    *,
    classes: Sequence[str] = (),
    folder: Path | None = None,
) -> Path:
    """Sample `count` images and write them as a PNG grid.

    Args:
        settings: keyword arguments of `generate`.
        classes: sample `count` images of each; a class begins a new row.
        folder: to create; every image is written there too, as 00000.png in the model's
            resolution. With classes, each has a folder of its name in it.

    Raises:
        InputError: as `require_target` and `generate`; or the samples do not fit one image.
    """
    require_target(path)
    model.config.trained_as.require("has_likelihood", "sampling whole images")
    fit = COLUMNS * (_MOST_PIXELS // (COLUMNS * _cell_size(model) ** 2))
    wanted = count * max(1, len(classes))
    if wanted > max(fit, 1):
        raise InputError(
            f"{wanted:,} samples do not fit one picture; "
            f"up to {fit:,} of {model.config.resolution} px do"
        )
    used = _with_precision(model, settings)
    sampled = sample_images(model, count, classes=classes, **used, progress=progress)
    groups = [sampled[first : first + count] for first in range(0, len(sampled), count)]
    if folder:
        with atomic_folder(folder) as temporary:
            for name, group in zip(classes or ("",), groups, strict=True):
                (temporary / name).mkdir(exist_ok=True)
                for number, image in enumerate(group):
                    image.save(temporary / name / f"{number:05d}.png")
    rows = [
        [np.asarray(image) for image in group[first : first + COLUMNS]]
        for group in groups
        for first in range(0, count, COLUMNS)
    ]
    _write(path, rows, {**used, **({"classes": list(classes)} if classes else {})})
    return path


def require_new_folder(folder: Path, classes: Sequence[str]) -> None:
    """Check, before any work is done, that images can be written to a folder.

    Raises:
        InputError: it exists, it cannot be created, or a class cannot name a folder in it.
    """
    require_writable_folder(folder)
    if folder.exists():
        raise InputError(f"{folder} exists already; name a new folder for the images")
    for name in classes:
        if name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise InputError(f"the class {name!r} cannot be the name of a folder")


def save_completions(
    model: ImageGPT,
    originals: Tensor,
    path: Path,
    keep: int | Tensor,
    completions: int,
    settings: SamplingSettings,
    progress: ProgressCallback | None = None,
    *,
    class_name: str | None = None,
) -> Path:
    """Complete images and write a PNG grid.

    Each row has an original, its given pixels, and its completions, under headings.

    Args:
        originals: tokens [B, n].
        keep: number of rows from the top, or the known pixels, bool [n].
        completions: of each image.
        settings: keyword arguments of `generate`.
        class_name: see `complete_images`.

    Raises:
        InputError: as `require_target` and `complete`; all pixels are kept; or the completions do
            not fit one image.
    """
    require_target(path)
    fit = _MOST_PIXELS // (len(originals) * _cell_size(model) ** 2) - 2
    if completions > max(fit, 1):
        raise InputError(
            f"{completions:,} completions of {len(originals):,} images do not fit one picture; "
            f"up to {max(fit, 0):,} do"
        )
    side = model.config.resolution
    if isinstance(keep, int):
        known = np.repeat(np.arange(side) < keep, side)
        kept_settings = {"keep_rows": keep}
    else:
        known = keep.numpy()
        kept_settings = {"kept_pixels": int(known.sum())}
    used = _with_precision(model, settings)
    completed = complete_images(
        model, originals, keep, completions, class_name=class_name, **used, progress=progress
    )
    images = decode_images(model, originals)  # [B, R, R, C]
    unknown = np.array([UNKNOWN, UNKNOWN, UNKNOWN, 255], dtype=np.uint8)[: images.shape[-1]]
    kept = np.where(known.reshape(side, side)[..., None], images, unknown)
    rows = [
        [image, upper, *map(np.asarray, filled)]
        for image, upper, filled in zip(images, kept, completed, strict=True)
    ]
    many = "completions" if completions > 1 else "completion"
    headings = {0: "original", 1: "given pixels", 2: many}
    given = {} if class_name is None else {"classes": [class_name]}
    _write(path, rows, {**used, **given, **kept_settings, "completions": completions}, headings)
    return path


def _cell_size(model: ImageGPT) -> int:
    """Return the side of an image in a grid, with the gap next to it, in pixels."""
    return model.config.resolution * default_scale(model.config.resolution) + _GAP


def _with_precision(model: ImageGPT, settings: SamplingSettings) -> SamplingSettings:
    causal = model.config.trained_as.causal
    precision = resolve_sampling_precision(settings.get("precision", "auto"), model.device, causal)
    return {**settings, "precision": precision}


def _write(
    path: Path,
    rows: Sequence[Sequence[NDArray[np.uint8]]],
    settings: Mapping[str, Any],
    headings: Mapping[int, str] | None = None,
) -> None:
    save_png(image_grid(rows, headings=headings), path)
    write_json(path.with_suffix(".json"), {**settings, "command": describe()["command"]})
