"""Generation of images and of parts of images.

Autoregressive models generate in raster order, BERT models in rounds.

    for step in generate(model, tokens, known):  # yields after further rows
        ...
    images = complete(model, tokens, keep=16)  # or all at once

B batch, n pixels of an image, R resolution, V colours.
"""

import pkgutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, Unpack

import torch
from torch import Tensor

from igpt.errors import InputError
from igpt.model.cost import cache_bytes, count_parameters, inference_batch_size
from igpt.model.transformer import ImageGPT
from igpt.sampling.colors import choose, image_keys
from igpt.sampling.jobs import (
    Job,
    PartialImages,
    SamplingPrecision,
    SamplingSettings,
    cache_type,
    require_sampling_settings,
    resolve_sampling_precision,
)

ProgressCallback = Callable[[int, int], None]  # (pixels done, pixels in all)
_CACHE = 4 * 2**30  # bytes of keys and values at a time on a CPU


def generate(
    model: ImageGPT,
    tokens: Tensor,
    known: Tensor,
    *,
    by: Literal["row", "pixel"] = "row",
    first: int = 0,
    **settings: Unpack[SamplingSettings],
) -> Iterator[PartialImages]:
    """Generate the unknown pixels of images, all in one batch, and yield the images step by step.

    The sampler is that of the model's objective: `raster.generate_in_order` or
    `rounds.generate_in_rounds`.

    Args:
        tokens: [B, n]; values at unknown pixels have no influence.
        known: bool [n] or [B, n]; these pixels are kept.
        by: yield after passes that complete a further row, or pixel, of all images (autoregressive
            models only); some images may be further.
        first: number of the first image.
        settings: see `SamplingSettings`.

    Raises:
        InputError: a setting is out of its range, `tokens` do not fit the model, or the model's
            weights are broken.
    """
    used = require_sampling_settings(**settings)
    batch, n = tokens.shape
    config, device = model.config, model.device
    if n != config.n_pixels:
        raise InputError(f"images of {n} pixels do not fit a model of {config.n_pixels}")
    given = tokens[known.to(tokens.device).expand(batch, n)]
    if given.numel() and (int(given.min()) < 0 or int(given.max()) >= config.n_colors):
        raise InputError(
            f"tokens of this model lie in 0..{config.n_colors - 1}, "
            f"not {int(given.min())}..{int(given.max())}"
        )
    job = Job(
        tokens.to(device, torch.long).clone(),
        known.to(device).expand(batch, n),
        image_keys(used["seed"], range(first, first + batch)).to(device),
        partial(choose, temperature=used["temperature"], top_k=used["top_k"], top_p=used["top_p"]),
        resolve_sampling_precision(used["precision"], device, config.trained_as.causal),
        used["rounds"],
        used["window"],
        1 if by == "pixel" else config.resolution,
    )
    sampler: Callable[[ImageGPT, Job], Iterator[PartialImages]]
    sampler = pkgutil.resolve_name(config.trained_as.sampler)
    return sampler(model, job)


def complete(
    model: ImageGPT,
    tokens: Tensor,
    keep: int | Tensor,
    *,
    progress: ProgressCallback | None = None,
    **settings: Unpack[SamplingSettings],
) -> Tensor:
    """Keep some pixels of images and generate the others, in batches: [B, n] -> [B, n].

    Args:
        keep: number of rows from the top, or the known pixels, bool [n] or [B, n].
        progress: called with the number of pixels done and in all.
        settings: keyword arguments of `generate`.

    Raises:
        InputError: `keep` is not in 0 .. R, or as `generate`.
    """
    batch, n = tokens.shape
    resolution = model.config.resolution
    if isinstance(keep, int):
        if not 0 <= keep <= resolution:
            raise InputError(f"rows to keep lie in 0..{resolution} for this model, not {keep}")
        keep = torch.arange(n) < keep * resolution
    keep = keep.expand(batch, n)
    size = _batch_size(model, settings.get("precision", "auto"))
    parts = []
    for first in range(0, batch, size):
        rows = slice(first, first + size)
        for step in generate(model, tokens[rows], keep[rows], first=first, **settings):
            if progress:
                progress(first * n + int(step.known.sum()), batch * n)
        parts.append(step.tokens)
    return torch.cat(parts)


def sample(
    model: ImageGPT,
    prefix: Tensor,
    *,
    progress: ProgressCallback | None = None,
    **settings: Unpack[SamplingSettings],
) -> Tensor:
    """Sample images that begin with given pixels: prefix [B, P], P in 0 .. n -> [B, n].

    Raises:
        InputError: the model's objective has no likelihood of whole images (BERT), or as
            `generate`.
    """
    model.config.trained_as.require("has_likelihood", "sampling whole images")
    n, given = model.config.n_pixels, prefix.shape[1]
    if given > n:
        raise InputError(f"a prefix of {given} pixels is longer than an image of {n}")
    tokens = torch.nn.functional.pad(prefix.long(), (0, n - given))
    return complete(model, tokens, torch.arange(n) < given, progress=progress, **settings)


def _batch_size(model: ImageGPT, precision: SamplingPrecision | Literal["auto"]) -> int:
    """Return the number of images at a time; a cache of keys and values must fit into memory."""
    config, device = model.config, model.device
    largest = inference_batch_size(config)
    if not config.trained_as.causal:
        return largest
    used = resolve_sampling_precision(precision, device, causal=True)
    number = cache_type(used, model.wte.weight.dtype).itemsize
    memory = _CACHE
    if device.type == "cuda":  # memory that PyTorch holds without using it is free too
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        free -= torch.cuda.memory_allocated(device) + number * count_parameters(config)
        memory = free // 2
    # The prefix is read at once, which takes more than the cache of a model with few layers.
    return max(1, min(memory // cache_bytes(config, number), 8 * largest))
