"""How likely images are under a model, in nats/pixel.

N images, n places.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from igpt.data.tokens import TokenSplit
from igpt.model.objectives import place_losses
from igpt.model.transformer import ImageGPT

Progress = Callable[[int, int], None]  # (images done, images in all)


@torch.inference_mode()
def score(
    model: ImageGPT, split: TokenSplit, *, batch_size: int = 64, progress: Progress | None = None
) -> NDArray[np.float64]:
    """Negative log-likelihood of every image, mean over its places: nats/pixel, float64 [N].

    Raises:
        InputError: a BERT model, which has no likelihood of whole images.
    """
    model.require("autoregressive", "a likelihood")
    split.require_images("a likelihood")
    model.eval()
    losses = np.empty(len(split))
    for first in range(0, len(split), batch_size):
        rows = np.arange(first, min(first + batch_size, len(split)))
        tokens = torch.from_numpy(split.rows(rows).astype(np.int64)).to(model.wte.weight.device)
        losses[rows] = place_losses(model(tokens), tokens).double().mean(dim=1).cpu().numpy()
        if progress:
            progress(int(rows[-1]) + 1, len(split))
    return losses


def summary(losses: NDArray[np.float64]) -> dict[str, Any]:
    """Mean nats/pixel, its standard error over images (None for one image), and bits/pixel."""
    error = None if len(losses) < 2 else float(losses.std(ddof=1) / np.sqrt(len(losses)))
    mean = float(losses.mean())
    return {"images": len(losses), "nats_per_pixel": mean, "standard_error": error, "bits_per_pixel": mean / np.log(2)}
