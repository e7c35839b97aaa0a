"""Features for probes: every layer's normalised activations, averaged over all places, in one pass.

N images, n places, L layers, D width.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from igpt.data.tokens import TokenDataset, TokenSplit
from igpt.errors import InputError
from igpt.model.precision import Precision, autocast
from igpt.model.transformer import ImageGPT

Progress = Callable[[int, int], None]  # (images done, images in all)


@torch.inference_mode()
def extract(
    model: ImageGPT,
    split: TokenSplit,
    *,
    precision: Precision = "fp32",
    batch_size: int = 64,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Mean-pooled n^l of all layers (paper, section 2.3): float32 [L + 1, N, D].

    Entry l is the normalised input of block l's attention, the last one the final norm's output. Nothing is masked,
    for BERT models neither. `precision` is that of the products; norms, residuals and means are fp32 always.
    """
    model.eval()
    device, config = model.wte.weight.device, model.config
    pooled = np.empty((config.n_layer + 1, len(split), config.n_embd), dtype=np.float32)
    for first in range(0, len(split), batch_size):
        rows = np.arange(first, min(first + batch_size, len(split)))
        tokens = torch.from_numpy(split.rows(rows).astype(np.int64)).to(device)
        with autocast(precision, device):
            for layer, activations in enumerate(model.features(tokens)):
                pooled[layer, rows] = activations.float().mean(dim=1).cpu().numpy()
        if progress:
            progress(int(rows[-1]) + 1, len(split))
    return pooled


def require_match(model: ImageGPT, data: TokenDataset) -> None:
    """Refuses tokens that a model was not made for.

    Raises:
        InputError: the resolutions or the palettes differ; both are named.
    """
    if data.resolution != model.config.resolution:
        raise InputError(
            f"the model sees {model.config.resolution} px, {data.path} has {data.resolution} px; prepare the images "
            f"with --size {model.config.resolution}"
        )
    if model.palette is None:
        raise InputError("the model's directory holds no palette; add its preprocessor_config.json")
    model.palette.require_same(data.palette, "the model", str(data.path))
