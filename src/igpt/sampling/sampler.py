"""Generation of images and of parts of images.

Autoregressive models generate in raster order, BERT models in rounds.

    for step in generate(model, tokens, known):  # yields after further rows
        ...
    images = complete(model, tokens, keep=16)  # or all at once

B batch, n pixels of an image, R resolution, V colours.
"""

import pkgutil
from collections.abc import Callable, Iterator, Sequence
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
    labels: Tensor | None = None,
    numbers: Sequence[int] | None = None,
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
        labels: classes of the images, [B] (class-conditional models only); -1 for no class, as
            without labels.
        numbers: of the images, [B]; 0 .. B - 1 by default.
        settings: see `SamplingSettings`.

    Raises:
        InputError: a setting is out of its range, `tokens` or `labels` do not fit the model,
            guidance without a class, or the model's weights are broken.
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
    if labels is None:
        labels = torch.full((batch,), -1)
    _require_classes(model, labels, used["guidance"])
    job = Job(
        tokens.to(device, torch.long).clone(),
        known.to(device).expand(batch, n),
        (labels + config.n_colors + 1).to(device),
        used["guidance"],
        image_keys(used["seed"], range(batch) if numbers is None else numbers).to(device),
        partial(choose, temperature=used["temperature"], top_k=used["top_k"], top_p=used["top_p"]),
        resolve_sampling_precision(used["precision"], device, config.trained_as.causal),
        used["rounds"],
        used["window"],
        1 if by == "pixel" else config.resolution,
    )
    sampler: Callable[[ImageGPT, Job], Iterator[PartialImages]]
    sampler = pkgutil.resolve_name(config.trained_as.sampler)
    return sampler(model, job)


def _require_classes(model: ImageGPT, labels: Tensor, guidance: float) -> None:
    """Check that the model has the classes `labels` [B], and that guidance has a class.

    Raises:
        InputError: one of them is not so.
    """
    classes = len(model.config.conditions or ())
    if not classes and (guidance != 1 or bool((labels >= 0).any())):
        raise InputError(
            "classes and guidance need a class-conditional model; "
            "`igpt pretrain --condition labels` trains one"
        )
    if bool((labels < -1).any() or (labels >= classes).any()):
        raise InputError(f"classes of this model lie in 0..{classes - 1} (-1: none)")
    if guidance != 1 and bool((labels < 0).all()):
        raise InputError("guidance needs a class; name one with --class")


def complete(
    model: ImageGPT,
    tokens: Tensor,
    keep: int | Tensor,
    *,
    labels: Tensor | None = None,
    numbers: Sequence[int] | None = None,
    progress: ProgressCallback | None = None,
    **settings: Unpack[SamplingSettings],
) -> Tensor:
    """Keep some pixels of images and generate the others, in batches: [B, n] -> [B, n].

    Args:
        keep: number of rows from the top, or the known pixels, bool [n] or [B, n].
        labels: see `generate`.
        numbers: see `generate`.
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
    if settings.get("guidance", 1) != 1:
        size = max(1, size // 2)
    numbers = range(batch) if numbers is None else numbers
    parts = []
    for first in range(0, batch, size):
        rows = slice(first, first + size)
        some = None if labels is None else labels[rows]
        steps = generate(
            model, tokens[rows], keep[rows], labels=some, numbers=numbers[rows], **settings
        )
        for step in steps:
            if progress:
                progress(first * n + int(step.known.sum()), batch * n)
        parts.append(step.tokens)
    return torch.cat(parts)


def sample(
    model: ImageGPT,
    prefix: Tensor,
    *,
    labels: Tensor | None = None,
    numbers: Sequence[int] | None = None,
    progress: ProgressCallback | None = None,
    **settings: Unpack[SamplingSettings],
) -> Tensor:
    """Sample images that begin with given pixels: prefix [B, P], P in 0 .. n -> [B, n].

    `labels` and `numbers` are those of `generate`.

    Raises:
        InputError: the model's objective has no likelihood of whole images (BERT), or as
            `generate`.
    """
    model.config.trained_as.require("has_likelihood", "sampling whole images")
    n, given = model.config.n_pixels, prefix.shape[1]
    if given > n:
        raise InputError(f"a prefix of {given} pixels is longer than an image of {n}")
    tokens = torch.nn.functional.pad(prefix.long(), (0, n - given))
    known = torch.arange(n) < given
    return complete(
        model, tokens, known, labels=labels, numbers=numbers, progress=progress, **settings
    )


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
