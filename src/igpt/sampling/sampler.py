"""Generate images and parts of them: place by place by autoregressive models, in rounds of filling by BERT models.

    for step in generate(model, tokens, known):  # row by row, as it comes
        ...
    images = complete(model, tokens, keep=16)  # or all at once

B batch, T places, n places of an image, R resolution, V colours.
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

ProgressCallback = Callable[[int, int], None]  # (places done, places in all)
_CACHE = 4 * 2**30  # bytes of keys and values at a time on a CPU


class SamplingSettings(TypedDict, total=False):
    """How colours are drawn; see `generate`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    rounds: int
    precision: Precision | Literal["auto"]


class PartialImages(NamedTuple):
    """Images in the making.

    Attributes:
        tokens: [B, n]; what stands at places that are not known does not matter.
        known: bool [B, n].
    """

    tokens: Tensor
    known: Tensor


@dataclass(frozen=True)
class Job:
    """What a sampler generates, and how.

    Attributes:
        tokens: [B, n]; values at unknown pixels do not matter.
        known: bool [B, n].
        streams: random numbers of every image, which depend on nothing else in the batch.
        choose: colours from logits [..., V] and uniform numbers [...]; see `choose`.
        precision: of products.
        rounds: in how many steps to fill, for a sampler that works in rounds.
        stride: pixels between two results, for a sampler that works in raster order.
    """

    tokens: Tensor
    known: Tensor
    streams: list[np.random.Generator]
    choose: Callable[[Tensor, Tensor], Tensor]
    precision: Precision
    rounds: int
    stride: int


def choose(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """The colours that numbers from [0, 1) choose: logits [..., V], uniform [...] -> [...].

    The number is looked up in the cumulated probabilities. Temperature 0 takes the likeliest
    colour.

    Args:
        top_k: only the k likeliest colours.
        top_p: only the likeliest colours that together reach this probability.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.double()
    logits = (
        logits - logits.amax(-1, keepdim=True)
    ) / temperature  # at most 0: no temperature overflows
    if top_k is not None:
        likeliest = logits.topk(min(top_k, logits.shape[-1])).indices  # of equal ones, not all
        logits = torch.full_like(logits, -torch.inf).scatter(
            -1, likeliest, logits.gather(-1, likeliest)
        )
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        probability = ordered.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= top_p  # the likeliest colour always stays
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    reached = logits.softmax(-1).cumsum(-1)
    return (reached <= uniform[..., None] * reached[..., -1:]).sum(-1)


def require_sampling_settings(
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    rounds: int = 16,
    precision: Precision | Literal["auto"] = "auto",
) -> None:
    """Refuse settings of `generate` that are out of their range.

    Raises:
        InputError: names the setting and its range.
    """
    if not 0 <= seed < 2**63:
        raise InputError(f"a seed lies in 0 .. 2^63 - 1, not {seed}")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise InputError(f"the temperature is 0 (the likeliest colour) or above, not {temperature}")
    if top_k is not None and top_k < 1:
        raise InputError(f"top-k is at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top-p lies in (0, 1], not {top_p}")
    if rounds < 1:
        raise InputError(f"filling takes at least one round, not {rounds}")
    if precision not in ("auto", *TYPES):
        raise InputError(f"the precision is auto, fp32 or bf16, not {precision!r}")


def generate(
    model: ImageGPT,
    tokens: Tensor,
    known: Tensor,
    *,
    by: Literal["row", "pixel"] = "row",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    rounds: int = 16,
    precision: Precision | Literal["auto"] = "auto",
    first: int = 0,
) -> Iterator[PartialImages]:
    """Draws the places of images that are not known, and yields the images as they become.

    An autoregressive model goes on from what is known in raster order: a place sees all before it,
        known or drawn, and
    none after it. A BERT model sees all that is known, and settles the places that it is surest of
    first. Closing the iterator ends the work. All images are drawn in one batch.

    Args:
        tokens: [B, n]; what stands at unknown places does not matter.
        known: bool [n] or [B, n]; these places stay as they are.
        by: of an autoregressive model, whether every row or every pixel is worth a step. A BERT
            model's are its rounds.
        temperature: see `choose`; by default plain sampling, as in the paper.
        top_k: see `choose`.
        top_p: see `choose`.
        seed: image b draws by (seed, first + b), whatever else is in the batch.
        rounds: in how many steps a BERT model fills.
        precision: of products and of the cache; "auto" takes bf16 where the processor has it.
        first: number of the first image.

    Raises:
        InputError: a setting out of its range, tokens of another size, or broken weights.
    """
    require_sampling_settings(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        rounds=rounds,
        precision=precision,
    )
    batch, n = tokens.shape
    if n != model.config.n_pixels:
        raise InputError(f"images of {n} pixels do not fit a model of {model.config.n_pixels}")
    given = tokens[known.to(tokens.device).expand(batch, n)]
    if given.numel() and (int(given.min()) < 0 or int(given.max()) >= model.config.n_colors):
        raise InputError(
            f"tokens of this model lie in 0..{model.config.n_colors - 1}, not {int(given.min())}..{int(given.max())}"
        )
    device = model.device
    tokens, known = tokens.to(device, torch.long).clone(), known.to(device).expand(batch, n)
    streams = [np.random.default_rng((seed, first + image)) for image in range(batch)]
    job = Job(
        tokens,
        known,
        streams,
        partial(choose, temperature=temperature, top_k=top_k, top_p=top_p),
        resolve_precision(precision, device),
        rounds,
        1 if by == "pixel" else model.config.resolution,
    )
    sampler: Callable[[ImageGPT, Job], Iterator[PartialImages]]
    sampler = pkgutil.resolve_name(model.config.trained_as.sampler)
    return sampler(model, job)


@torch.inference_mode()
def generate_in_order(model: ImageGPT, job: Job) -> Iterator[PartialImages]:
    """Generate the unknown pixels in raster order, each from all pixels before it.

    Known pixels after it have no influence.
    """
    tokens, known, stride = job.tokens, job.known, job.stride
    batch, n = tokens.shape
    uniform = torch.from_numpy(np.stack([stream.random(n) for stream in job.streams])).to(
        tokens.device
    )
    open_places = torch.nonzero(~known.all(0))[:, 0].tolist()
    if not open_places:
        yield PartialImages(tokens, known)
        return
    sequence = torch.cat(
        [tokens.new_full((batch, 1), model.config.n_colors), tokens], dim=1
    )  # the start, then pixels
    decoder = Decoder(model, batch, job.precision)
    decoder.prefill(sequence[:, : open_places[0]])

    def settle(place: Tensor, logits: Tensor) -> None:
        """Writes the colours of a place, [1], behind those before it."""
        drawn = job.choose(logits, uniform.index_select(1, place)[:, 0])
        kept = sequence.index_select(1, place + 1)
        sequence.index_copy_(
            1, place + 1, torch.where(known.index_select(1, place), kept, drawn[:, None])
        )

    for place in range(open_places[0], open_places[-1] + 1):
        decoder.advance(sequence, settle)
        if (place + 1) % stride == 0 or place == open_places[-1]:
            require_finite(decoder.finite)
            done = torch.arange(n, device=tokens.device) <= place
            yield PartialImages(sequence[:, 1:].clone(), known | done)


@torch.inference_mode()
def generate_in_rounds(model: ImageGPT, job: Job) -> Iterator[PartialImages]:
    """Generate the unknown pixels in rounds, the most certain ones first (arXiv 2202.04200, section 3.2).

    Every round samples a colour for each open pixel and keeps the likeliest ones. The number of open
    pixels falls as a quarter of a cosine.
    """
    tokens, known, rounds = job.tokens, job.known, job.rounds
    n = tokens.shape[1]
    if known.all():
        yield PartialImages(tokens, known)
        return
    total = (~known).sum(1, keepdim=True)  # [B, 1]
    for index in range(rounds):
        uniform = torch.from_numpy(np.stack([stream.random(n) for stream in job.streams])).to(
            tokens.device
        )
        share = math.cos(math.pi / 2 * (index + 1) / rounds) if index + 1 < rounds else 0.0
        with autocast(job.precision, tokens.device):
            logits = model(tokens.masked_fill(~known, 0), ~known)  # [B, n, V]
        require_finite(logits.isfinite())
        drawn = job.choose(logits, uniform)
        confidence = logits.float().log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        order = confidence.masked_fill(known, torch.inf).argsort(dim=1)  # least confident first
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(n, device=order.device).expand_as(order)
        )
        tokens = torch.where(known, tokens, drawn)
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
    """Keeps rows or places of images and lets the model draw the rest, by whichever objective it has: [B, n].

    Args:
        tokens: [B, n].
        keep: how many rows from the top; or the known places, bool [n] or [B, n].
        progress: is told how many places are done.
        settings: keyword arguments of `generate`.

    Raises:
        InputError: `keep` is not in 0 .. resolution, or see `generate`.
    """
    batch, n = tokens.shape
    resolution = model.config.resolution
    if isinstance(keep, int):
        if not 0 <= keep <= resolution:
            raise InputError(f"rows to keep lie in 0..{resolution} for this model, not {keep}")
        keep = torch.arange(n) < keep * resolution
    keep = keep.expand(batch, n)
    size = _at_once(model, settings.get("precision", "auto"))
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
    """Continues images from their first P pixels, [B, P] with P in 0 .. n; P = 0 draws whole images: [B, n].

    Raises:
        InputError: a BERT model, which draws nothing from nothing; or see `generate`.
    """
    model.config.trained_as.require("has_likelihood", "sampling whole images")
    n, given = model.config.n_pixels, prefix.shape[1]
    if given > n:
        raise InputError(f"a prefix of {given} pixels is longer than an image of {n}")
    tokens = torch.cat(
        [
            prefix.long(),
            torch.zeros(len(prefix), n - given, dtype=torch.long, device=prefix.device),
        ],
        1,
    )
    return complete(model, tokens, torch.arange(n) < given, progress=progress, **settings)


def _at_once(model: ImageGPT, precision: Precision | Literal["auto"]) -> int:
    """How many images are drawn at a time: of an autoregressive model, as many as have room for keys and values."""
    config, weight = model.config, model.wte.weight
    device, most = weight.device, inference_batch_size(config)
    if not config.trained_as.causal:
        return most
    number = 2 if resolve_precision(precision, device) == "bf16" else weight.element_size()
    room = _CACHE
    if device.type == "cuda":  # what PyTorch holds without using it is free too
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        room = (free - torch.cuda.memory_allocated(device) - number * count_parameters(config)) // 2
    # What lies before the first step is read at once, which takes more than the cache of a model
    # with few layers.
    return max(1, min(room // cache_bytes(config, number), 8 * most))
