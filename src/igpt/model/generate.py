"""Sampling and completing images: a key-value cache for autoregressive models, iterative filling for BERT's.

B batch, T places, n places of an image, V colours.
"""

import math
from collections.abc import Callable
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from igpt.errors import InputError
from igpt.model.transformer import ImageGPT, LayerCache

Progress = Callable[[int, int], None]  # (places done, places in all)


class Drawing(TypedDict, total=False):
    """How colours are drawn; see `choose` and `sample`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int


class Decoder:
    """One step at a time through an autoregressive model, with preallocated keys and values of all layers."""

    def __init__(self, model: ImageGPT, batch: int) -> None:
        model.require("autoregressive", "sampling pixel by pixel")
        config, weight = model.config, model.wte.weight
        shape = (batch, config.n_head, config.n_places, config.n_embd // config.n_head)
        self.model = model
        self.caches: list[LayerCache] = [
            (weight.new_empty(shape), weight.new_empty(shape)) for _ in range(config.n_layer)
        ]
        self.filled = 0

    def __call__(self, inputs: Tensor) -> Tensor:
        """Takes inputs [B, T] (V is the start token) at the next places; gives the logits after them: [B, T, V].

        The first call may take any T; later ones take one place.
        """
        x = self.model.embed_at(inputs, self.filled)
        for block, cache in zip(self.model.h, self.caches, strict=True):
            x = block(x, cache, self.filled)
        self.filled += inputs.shape[1]
        return self.model.lm_head(self.model.ln_f(x))  # type: ignore[no-any-return]


def choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """Draws a colour from logits [B, V]: [B]. Temperature 0 takes the likeliest.

    Args:
        top_k: only the k likeliest colours.
        top_p: only the likeliest colours that together reach this probability.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # at most 0: no temperature overflows
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        probability = ordered.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= top_p  # the likeliest colour always stays
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _check(temperature: float, top_k: int | None, top_p: float | None, seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise InputError(f"a seed lies in 0 .. 2^63 - 1, not {seed}")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise InputError(f"the temperature is 0 (the likeliest colour) or above, not {temperature}")
    if top_k is not None and top_k < 1:
        raise InputError(f"top-k is at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top-p lies in (0, 1], not {top_p}")


@torch.inference_mode()
def sample(
    model: ImageGPT,
    prefix: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Continues images pixel by pixel; by default plain sampling, as in the paper.

    Args:
        prefix: the first P pixels of each image, [B, P] with P in 0 .. n; P = 0 draws whole images.

    Returns:
        whole images, [B, n]; the prefix is kept.

    Raises:
        InputError: a BERT model, or a setting out of its range.
    """
    _check(temperature, top_k, top_p, seed)
    n = model.config.n_places
    if prefix.shape[1] > n:
        raise InputError(f"a prefix of {prefix.shape[1]} pixels is longer than an image of {n}")
    device = model.wte.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = prefix.new_empty((len(prefix), n), dtype=torch.long, device=device)
    tokens[:, : prefix.shape[1]] = prefix
    decoder = Decoder(model, len(prefix))
    start = tokens.new_full((len(prefix), 1), model.config.n_colors)
    inputs = torch.cat([start, tokens[:, : prefix.shape[1]]], dim=1)
    for place in range(prefix.shape[1], n):
        tokens[:, place] = choose(decoder(inputs)[:, -1], temperature, top_k, top_p, generator)
        inputs = tokens[:, place : place + 1]
        if progress:
            progress(place + 1 - prefix.shape[1], n - prefix.shape[1])
    return tokens


@torch.inference_mode()
def fill(
    model: ImageGPT,
    tokens: Tensor,
    known: Tensor,
    *,
    rounds: int = 16,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Fills the unknown places of images with a BERT model, the most confident ones first, over some rounds.

    In every round each open place draws a colour; those whose colour is likeliest are kept, so many that the open
    places shrink along a quarter cosine (arXiv 2202.04200, section 3.2).

    Args:
        tokens: [B, n]; what stands at unknown places does not matter.
        known: bool [n], the places to keep, the same in all images.

    Raises:
        InputError: an autoregressive model, or a setting out of its range.
    """
    model.require("bert", "filling masked places")
    _check(temperature, top_k, top_p, seed)
    if rounds < 1:
        raise InputError(f"filling takes at least one round, not {rounds}")
    device = model.wte.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = tokens.to(device, torch.long).clone()
    batch, n = tokens.shape
    unknown = (~known).to(device).expand(batch, n).clone()
    total = int((~known).sum())
    for index in range(rounds):
        keep_open = int(total * math.cos(math.pi / 2 * (index + 1) / rounds)) if index + 1 < rounds else 0
        logits = model(tokens.masked_fill(unknown, 0), unknown)  # [B, n, V]
        drawn = choose(logits.flatten(0, 1), temperature, top_k, top_p, generator).view(batch, n)
        confidence = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        order = confidence.masked_fill(~unknown, torch.inf).argsort(dim=1)  # least confident first
        tokens = torch.where(unknown, drawn, tokens)
        still = torch.zeros_like(unknown).scatter_(1, order[:, :keep_open], True)
        unknown &= still
        if progress:
            progress(total - keep_open, total)
    return tokens


def complete(
    model: ImageGPT, tokens: Tensor, keep_rows: int, *, progress: Progress | None = None, **drawing: Unpack[Drawing]
) -> Tensor:
    """Keeps the first rows of images [B, n] and lets the model draw the rest, by whichever objective it has.

    Args:
        drawing: temperature, top_k, top_p and seed of `sample` and `fill`.

    Raises:
        InputError: `keep_rows` is not in 0 .. resolution, or a setting is out of its range.
    """
    resolution = model.config.resolution
    if not 0 <= keep_rows <= resolution:
        raise InputError(f"rows to keep lie in 0..{resolution} for this model, not {keep_rows}")
    kept = keep_rows * resolution
    if model.config.objective == "autoregressive":
        return sample(model, tokens[:, :kept], progress=progress, **drawing)
    return fill(model, tokens, torch.arange(tokens.shape[1]) < kept, progress=progress, **drawing)
