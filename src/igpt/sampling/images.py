"""Images that a model generates, as PIL images.

B images, n pixels of an image, R resolution.
"""

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from PIL import Image
from torch import Tensor

from igpt.data.images.masks import hidden_pixels
from igpt.errors import InputError
from igpt.model.images import decode_images
from igpt.model.match import palette_of
from igpt.model.transformer import ImageGPT
from igpt.sampling.jobs import SamplingSettings
from igpt.sampling.sampler import ProgressCallback, complete, sample


def sample_images(
    model: ImageGPT,
    count: int,
    *,
    classes: str | Sequence[str] = (),
    progress: ProgressCallback | None = None,
    **settings: Unpack[SamplingSettings],
) -> list[Image.Image]:
    """Generate whole images.

    Args:
        classes: names of one or several classes of a class-conditional model: `count` images of
            each, class after class. Image b of a class does not depend on the other classes.

    Raises:
        InputError: `count` is below 1, the model has no palette or no such class, or as
            `igpt.sampling.sampler.sample`.
    """
    names = (classes,) if isinstance(classes, str) else classes
    labels = torch.tensor([model.config.label_of(name) for name in names] or [-1])
    if count < 1:
        raise InputError(f"at least one sample is needed, not {count}")
    palette_of(model)
    prefix = torch.empty(len(labels) * count, 0, dtype=torch.long)
    sampled = sample(
        model,
        prefix,
        labels=labels.repeat_interleave(count),
        numbers=[*range(count)] * len(labels),
        progress=progress,
        **settings,
    )
    return [Image.fromarray(image) for image in decode_images(model, sampled)]


def complete_images(
    model: ImageGPT,
    originals: Tensor,
    keep: int | Tensor,
    completions: int,
    *,
    class_name: str | None = None,
    progress: ProgressCallback | None = None,
    **settings: Unpack[SamplingSettings],
) -> list[list[Image.Image]]:
    """Generate the pixels that are not kept, several times: the completions of each image.

    Args:
        originals: tokens [B, n].
        keep: number of rows from the top, or the known pixels, bool [n].
        class_name: of all images, for a class-conditional model.

    Raises:
        InputError: `completions` is below 1, all pixels are kept, the model has no palette or no
            such class, or as `igpt.sampling.sampler.complete`.
    """
    if completions < 1:
        raise InputError(f"at least one completion is needed, not {completions}")
    palette_of(model)
    everything = keep == model.config.resolution if isinstance(keep, int) else bool(keep.all())
    if everything:
        raise InputError("all pixels are kept, so that nothing is left to complete")
    repeated = originals.repeat_interleave(completions, 0)
    labels = None
    if class_name is not None:
        labels = torch.full((len(repeated),), model.config.label_of(class_name))
    completed = complete(model, repeated, keep, labels=labels, progress=progress, **settings)
    images = [Image.fromarray(image) for image in decode_images(model, completed)]
    return [images[first : first + completions] for first in range(0, len(images), completions)]


def kept_pixels(model: ImageGPT, keep_rows: int | None, mask: Any) -> int | Tensor:
    """Return what `complete` keeps: a number of rows, half of them by default, or pixels, bool [n].

    Args:
        mask: an image whose bright pixels are generated (see `hidden_pixels`), or None.

    Raises:
        InputError: both are given, or the mask is not a readable image or hides nothing.
    """
    if mask is not None and keep_rows is not None:
        raise InputError("give --keep-rows or --mask, not both")
    resolution = model.config.resolution
    if mask is not None:
        return torch.from_numpy(~hidden_pixels(mask, resolution).reshape(-1))
    return resolution // 2 if keep_rows is None else keep_rows
