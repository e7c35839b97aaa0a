"""What a model is trained to do. Each objective returns a summed loss and the count of images it sums over.

Losses are per image in nats (nats/pixel for the generative ones), so that sums of micro-batches and
ranks, divided by the sum of their counts, weigh every image alike.
B batch, n places, V colours, C classes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from igpt.model.transformer import ImageGPT

Summed = tuple[Tensor, int]


def pixel_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy at every place, in float32 (float64 stays): logits [B, n, V], tokens [B, n] -> nats [B, n]."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)


def autoregressive(model: ImageGPT, tokens: Tensor) -> Summed:
    """Next-pixel prediction: the mean over all n places of an image (paper, eq. 2)."""
    return pixel_losses(model(tokens), tokens).mean(dim=1).sum(), len(tokens)


def bert(model: ImageGPT, tokens: Tensor, mask: Tensor) -> Summed:
    """Masked prediction: the mean over the masked places of an image (paper, eq. 3); mask [B, n] is True there."""
    losses = pixel_losses(model(tokens, mask), tokens) * mask
    return (losses.sum(dim=1) / mask.sum(dim=1)).sum(), len(tokens)


def sample_masks(
    shape: tuple[int, int], probability: float, generator: np.random.Generator
) -> NDArray[np.bool_]:
    """Masks [B, n]: each place with the given probability (0.15 in the paper), and at least one place an image."""
    mask = generator.random(shape) < probability
    mask[np.arange(shape[0]), generator.integers(0, shape[1], shape[0])] |= ~mask.any(axis=1)
    return mask


def masks_of_rows(
    rows: NDArray[np.int64], places: int, probability: float, seed: tuple[int, ...]
) -> NDArray[np.bool_]:
    """Masks [B, n] of some images by their rows [B]: the same for an image whichever others are with it."""
    masks = [
        sample_masks((1, places), probability, np.random.default_rng((*seed, row)))
        for row in rows.tolist()
    ]
    return np.concatenate(masks)


def classification(
    model: ImageGPT,
    tokens: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    generation_weight: float = 1.0,
) -> Summed:
    """Fine-tuning: class cross-entropy plus the weighted generative loss (paper, section 2.3).

    The class head reads the mean over places of the final norm's output. Labels are [B] in 0 ..
    C-1. A BERT model may be fine-tuned on masked images, mask [B, n] as in `bert`; unmasked ones
    have no generative loss.
    """
    hidden = model.hidden(tokens, mask)  # [B, n, D]
    loss = F.cross_entropy(model.score(hidden.mean(dim=1)).float(), labels, reduction="sum")
    if generation_weight and (mask is not None or model.config.objective == "autoregressive"):
        losses = pixel_losses(model.lm_head(hidden), tokens)
        generative = (
            losses.mean(dim=1) if mask is None else (losses * mask).sum(dim=1) / mask.sum(dim=1)
        )
        loss = loss + generation_weight * generative.sum()
    return loss, len(tokens)
