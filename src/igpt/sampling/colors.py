"""How colours are sampled: the most likely colour after Gumbel noise is added to the logits.

The noise is a function of the seed and of the numbers of image, pixel and colour. An image is
therefore determined by the model and the seed, whatever else is computed in the same batch, and in
whatever order. B images, T pixels, V colours.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

# Constants of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
# generators"), as signed integers.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def image_keys(seed: int, images: Iterable[int]) -> Tensor:
    """Return a key of 64 random bits for each image, by the seed and the image's number: [B]."""
    keys = [np.random.SeedSequence((seed, image)).generate_state(1, np.uint64) for image in images]
    return torch.from_numpy(np.concatenate(keys).view(np.int64))


def gumbel_noise(keys: Tensor, pixels: Tensor, n_colors: int) -> Tensor:
    """Return noise of the standard Gumbel distribution: keys [B], pixels [B, T] -> [B, T, V].

    It has 2^23 values in float32, from -2.8 to 16.6.

    Args:
        pixels: their numbers; values above n - 1 give noise that is independent of all pixels'.
    """
    colors = torch.arange(n_colors, device=keys.device)
    counter = pixels[..., None] * n_colors + colors
    bits = _mix(keys[:, None, None] + (counter + 1) * _INCREMENT)
    uniform = (_shift(bits, 41).float() + 0.5) * 2.0**-23  # in (0, 1), exact in float32
    return uniform.log_().neg_().log_().neg_()


def _mix(z: Tensor) -> Tensor:
    """Return the output of SplitMix64 for its states z."""
    z = (z ^ _shift(z, 30)) * _FACTORS[0]
    z = (z ^ _shift(z, 27)) * _FACTORS[1]
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift to the right as unsigned integers."""
    return z.bitwise_right_shift(bits).bitwise_and(2 ** (64 - bits) - 1)


def guided(given: Tensor, without: Tensor, guidance: float) -> Tensor:
    """Return logits with classifier-free guidance, at least in float32 (arXiv 2207.12598).

    Args:
        given: logits given the class.
        without: logits of the same pixels without a class.
        guidance: 0 takes those without a class, 1 those given it, more goes beyond.
    """
    kind = torch.promote_types(given.dtype, torch.float32)
    return torch.lerp(without.to(kind), given.to(kind), guidance)


def choose(
    logits: Tensor, noise: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """Sample colours: logits [..., V], Gumbel noise [..., V] -> [...].

    The argmax of logits plus Gumbel noise has the distribution softmax(logits) (arXiv 1411.0030).

    Args:
        temperature: divides the logits; 0 takes the most likely colour.
        top_k: only the k most likely colours.
        top_p: only the most likely colours that together reach this probability.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
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
    return (logits + noise).argmax(-1)
