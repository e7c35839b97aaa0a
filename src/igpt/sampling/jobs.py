"""What a sampler generates, and the settings of how colours are sampled.

B images, n pixels of an image, V colours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from igpt.errors import InputError, suggest
from igpt.model.precision import Precision, multiplies_bf16, resolve_precision

SamplingPrecision = Precision | Literal["int8"]


class SamplingSettings(TypedDict, total=False):
    """How colours are sampled.

    Attributes:
        temperature: divides the logits; 1 by default, as in the paper. 0: the most likely colour.
        top_k: only the k most likely colours.
        top_p: only the most likely colours that together reach this probability.
        guidance: scale of classifier-free guidance (arXiv 2207.12598; only with a class). The
            logits are u + guidance (c - u), where u are those without a class and c those given
            the class. 1 by default, which is c.
        seed: image b is sampled by (seed, b), independently of other images; 0 by default.
        rounds: number of steps (BERT models only); 16 by default.
        window: pixels that a pass computes in every image (autoregressive models only); by default
            chosen from the cost of a pass and the pixels accepted so far. Samples do not depend on
            it, except for rounding.
        precision: of matrix products and of the cache; by default "auto", which takes bf16 where
            the processor has instructions for it. "int8" stores the weights of blocks in 8 bits
            (autoregressive models on a CPU only).
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    guidance: float
    seed: int
    rounds: int
    window: int | None
    precision: SamplingPrecision | Literal["auto"]


DEFAULTS: SamplingSettings = {
    "temperature": 1.0,
    "top_k": None,
    "top_p": None,
    "guidance": 1.0,
    "seed": 0,
    "rounds": 16,
    "window": None,
    "precision": "auto",
}


def require_sampling_settings(**settings: Unpack[SamplingSettings]) -> SamplingSettings:
    """Check the settings of `generate`, and return them with the defaults of those not given.

    Raises:
        InputError: there is no such setting, or one is out of its range.
    """
    if unknown := settings.keys() - DEFAULTS.keys():
        name = min(unknown)
        raise InputError(f"no setting {name!r} of sampling; {suggest(name, DEFAULTS)}")
    used: SamplingSettings = {**DEFAULTS, **settings}
    temperature, seed, rounds = used["temperature"], used["seed"], used["rounds"]
    top_k, top_p, window = used["top_k"], used["top_p"], used["window"]
    precision, guidance = used["precision"], used["guidance"]
    if not 0 <= seed < 2**63:
        raise InputError(f"a seed lies in 0 .. 2^63 - 1, not {seed}")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise InputError(f"the temperature is 0 (the likeliest colour) or above, not {temperature}")
    if top_k is not None and top_k < 1:
        raise InputError(f"top-k is at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top-p lies in (0, 1], not {top_p}")
    if not (guidance >= 0 and math.isfinite(guidance)):
        raise InputError(f"the guidance is 1 (none) or another number from 0, not {guidance}")
    if rounds < 1:
        raise InputError(f"rounds must be at least 1, not {rounds}")
    if window is not None and window < 1:
        raise InputError(f"a pass computes at least 1 pixel of an image, not {window}")
    if precision not in ("auto", "fp32", "bf16", "int8"):
        raise InputError(f"the precision is auto, fp32, bf16 or int8, not {precision!r}")
    return used


def resolve_sampling_precision(
    precision: SamplingPrecision | Literal["auto"], device: torch.device, causal: bool
) -> SamplingPrecision:
    """Return the precision that "auto" means on a device; any other is returned unchanged.

    Raises:
        InputError: int8 on a GPU, or for a model that is not causal.
    """
    if precision != "int8":
        return resolve_precision(precision, device)
    if device.type != "cpu":
        raise InputError("the precision int8 is for a CPU; use bf16 or fp32 on this device")
    if not causal:
        raise InputError(
            "the precision int8 is for models that sample pixel by pixel; use bf16 or fp32"
        )
    return precision


def cache_type(precision: SamplingPrecision, weights: torch.dtype) -> torch.dtype:
    """Return the type of keys and values.

    With int8 it is bf16 where the processor has instructions for it: the rounding of weights and
    inputs to 8 bits weighs more.
    """
    halved = precision == "bf16" or (precision == "int8" and multiplies_bf16("cpu"))
    return torch.bfloat16 if halved else weights


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
        starts: the start tokens of the images, [B].
        guidance: see `SamplingSettings`.
        keys: of the images' noise, [B]; see `image_keys`.
        choose: returns colours for logits [..., V] and noise [..., V]; see `choose`.
        precision: of matrix products.
        rounds: number of steps of a sampler that works in rounds.
        window: pixels of each image that a sampler in raster order computes at a time, or None.
        stride: a sampler in raster order yields when all images have this many further pixels.
    """

    tokens: Tensor
    known: Tensor
    starts: Tensor
    guidance: float
    keys: Tensor
    choose: Callable[[Tensor, Tensor], Tensor]
    precision: SamplingPrecision
    rounds: int
    window: int | None
    stride: int


def require_finite(finite: Tensor) -> None:
    """Check that logits are finite.

    Raises:
        InputError: some contain NaN or infinity.
    """
    if not finite.all():
        raise InputError("the logits are not finite; the model's weights are broken")
