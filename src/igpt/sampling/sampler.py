"""Generation of images and of parts of images.

Autoregressive models generate in raster order, BERT models in rounds.

    for step in generate(model, tokens, known):  # yields after every row
        ...
    images = complete(model, tokens, keep=16)  # or all at once

B batch, n pixels of an image, R resolution, V colours.
"""

import math
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from igpt.errors import InputError
from igpt.model.cost import cache_bytes, count_parameters, inference_batch_size
from igpt.model.precision import TYPES, Precision, autocast, resolve_precision
from igpt.model.transformer import ImageGPT
from igpt.sampling.decoder import Decoder, require_finite

ProgressCallback = Callable[[int, int], None]  # (pixels done, pixels in all)
_CACHE = 4 * 2**30  # bytes of keys and values at a time on a CPU


class SamplingSettings(TypedDict, total=False):
    """How colours are sampled.

    Attributes:
        temperature: divides the logits; 1 by default, as in the paper. 0: the likeliest colour.
        top_k: only the k likeliest colours.
        top_p: only the likeliest colours that together reach this probability.
        seed: image b is sampled by (seed, b), independently of other images; 0 by default.
        rounds: number of steps (BERT models only); 16 by default.
        precision: of matrix products and of the cache; by default "auto", which takes bf16 where
            the processor has instructions for it.
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    rounds: int
    precision: Precision | Literal["auto"]


DEFAULTS: SamplingSettings = {
    "temperature": 1.0,
    "top_k": None,
    "top_p": None,
    "seed": 0,
    "rounds": 16,
    "precision": "auto",
}


class PartialImages(NamedTuple):
    """Images some of whose pixels are known.

    Attributes:
        tokens: [B, n]; values at unknown pixels have no meaning.
        known: bool [B, n].
    """

    tokens: Tensor
    known: Tensor


@dataclass(frozen=True)
class Job:
    """What a sampler (`Objective.sampler`) generates, and how.

    Attributes:
        tokens: [B, n].
        known: bool [B, n]; these pixels are kept.
        streams: one generator of random numbers per image.
        choose: returns colours for logits [..., V] and uniform numbers [...]; see `choose`.
        precision: of matrix products.
        rounds: number of steps of a sampler that works in rounds.
        stride: pixels between two results of a sampler that works in raster order.
    """

    tokens: Tensor
    known: Tensor
    streams: list[np.random.Generator]
    choose: Callable[[Tensor, Tensor], Tensor]
    precision: Precision
    rounds: int
    stride: int

    def uniform(self) -> Tensor:
        """Return new uniform random numbers in [0, 1): [B, n]."""
        n = self.tokens.shape[1]
        numbers = np.stack([stream.random(n) for stream in self.streams])
        return torch.from_numpy(numbers).to(self.tokens.device)


def choose(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """Sample colours by inverting their distribution: logits [..., V], uniform [...] -> [...].

    Args:
        uniform: random numbers in [0, 1).
        temperature: divides the logits; 0 takes the likeliest colour.
        top_k: only the k likeliest colours.
        top_p: only the likeliest colours that together reach this probability.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.double()
    # All are at most 0 now, so that no temperature overflows.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None:
        # By index, because equal logits might be more than k.
        likeliest = logits.topk(min(top_k, logits.shape[-1])).indices
        kept = logits.gather(-1, likeliest)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, likeliest, kept)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        probability = ordered.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= top_p  # never the likeliest colour
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    cumulative = logits.softmax(-1).cumsum(-1)
    return (cumulative <= uniform[..., None] * cumulative[..., -1:]).sum(-1)


def require_sampling_settings(**settings: Unpack[SamplingSettings]) -> SamplingSettings:
    """Check the settings of `generate`, and return them with the defaults of those not given.

    Raises:
        InputError: a setting is out of its range.
    """
    used: SamplingSettings = {**DEFAULTS, **settings}
    temperature, seed, rounds = used["temperature"], used["seed"], used["rounds"]
    top_k, top_p, precision = used["top_k"], used["top_p"], used["precision"]
    if not 0 <= seed < 2**63:
        raise InputError(f"a seed lies in 0 .. 2^63 - 1, not {seed}")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise InputError(f"the temperature is 0 (the likeliest colour) or above, not {temperature}")
    if top_k is not None and top_k < 1:
        raise InputError(f"top-k is at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top-p lies in (0, 1], not {top_p}")
    if rounds < 1:
        raise InputError(f"rounds must be at least 1, not {rounds}")
    if precision not in ("auto", *TYPES):
        raise InputError(f"the precision is auto, fp32 or bf16, not {precision!r}")
    return used


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

    The sampler is that of the model's objective: `generate_in_order` or `generate_in_rounds`.

    Args:
        tokens: [B, n]; values at unknown pixels have no influence.
        known: bool [n] or [B, n]; these pixels are kept.
        by: yield after every row or every pixel (autoregressive models only).
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
        [np.random.default_rng((used["seed"], first + image)) for image in range(batch)],
        partial(choose, temperature=used["temperature"], top_k=used["top_k"], top_p=used["top_p"]),
        resolve_precision(used["precision"], device),
        used["rounds"],
        1 if by == "pixel" else config.resolution,
    )
    sampler: Callable[[ImageGPT, Job], Iterator[PartialImages]]
    sampler = pkgutil.resolve_name(config.trained_as.sampler)
    return sampler(model, job)


@torch.inference_mode()
def generate_in_order(model: ImageGPT, job: Job) -> Iterator[PartialImages]:
    """Generate unknown pixels in raster order, each from all pixels before it.

    Known pixels after it have no influence on it.
    """
    tokens, known = job.tokens, job.known
    batch, n = tokens.shape
    uniform = job.uniform()
    unknown = torch.nonzero(~known.all(0))[:, 0].tolist()  # in at least one image
    if not unknown:
        yield PartialImages(tokens, known)
        return
    start = tokens.new_full((batch, 1), model.config.n_colors)
    sequence = torch.cat([start, tokens], dim=1)
    decoder = Decoder(model, batch, job.precision)
    decoder.prefill(sequence[:, : unknown[0]])

    def write(position: Tensor, logits: Tensor) -> None:
        """Write the colours of a pixel, position [1], into the sequence, where they are unknown."""
        sampled = job.choose(logits, uniform.index_select(1, position)[:, 0])
        kept = sequence.index_select(1, position + 1)
        colors = torch.where(known.index_select(1, position), kept, sampled[:, None])
        sequence.index_copy_(1, position + 1, colors)

    for position in range(unknown[0], unknown[-1] + 1):
        decoder.advance(sequence, write)
        if (position + 1) % job.stride == 0 or position == unknown[-1]:
            require_finite(decoder.finite)
            done = torch.arange(n, device=tokens.device) <= position
            yield PartialImages(sequence[:, 1:].clone(), known | done)


@torch.inference_mode()
def generate_in_rounds(model: ImageGPT, job: Job) -> Iterator[PartialImages]:
    """Generate unknown pixels in rounds, the most certain ones first.

    Every round samples a colour for each unknown pixel and keeps the colours of highest
    probability. The number of unknown pixels falls along a quarter of a cosine (arXiv 2202.04200,
    section 3.2).
    """
    tokens, known = job.tokens, job.known
    if known.all():
        yield PartialImages(tokens, known)
        return
    total = (~known).sum(1, keepdim=True)  # [B, 1]
    for index in range(job.rounds):
        uniform = job.uniform()
        last = index + 1 == job.rounds
        share = 0.0 if last else math.cos(math.pi / 2 * (index + 1) / job.rounds)
        with autocast(job.precision, tokens.device):
            logits = model(tokens.masked_fill(~known, 0), ~known)  # [B, n, V]
        require_finite(logits.isfinite())
        sampled = job.choose(logits, uniform)
        confidence = logits.float().log_softmax(-1).gather(-1, sampled[..., None])[..., 0]
        order = confidence.masked_fill(known, torch.inf).argsort(dim=1)  # least confident first
        ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, ranks)
        tokens = torch.where(known, tokens, sampled)
        known = known | (rank >= (total * share).long())
        yield PartialImages(tokens, known)


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


def _batch_size(model: ImageGPT, precision: Precision | Literal["auto"]) -> int:
    """Return the number of images at a time; a cache of keys and values must fit into memory."""
    config, device = model.config, model.device
    largest = inference_batch_size(config)
    if not config.trained_as.causal:
        return largest
    bf16 = resolve_precision(precision, device) == "bf16"
    number = 2 if bf16 else model.wte.weight.element_size()
    memory = _CACHE
    if device.type == "cuda":  # memory that PyTorch holds without using it is free too
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        free -= torch.cuda.memory_allocated(device) + number * count_parameters(config)
        memory = free // 2
    # The prefix is read at once, which takes more than the cache of a model with few layers.
    return max(1, min(memory // cache_bytes(config, number), 8 * largest))
