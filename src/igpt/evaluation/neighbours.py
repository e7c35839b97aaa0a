"""Classification by the nearest neighbours of features.

N images of known classes, M images to classify, D features, C classes, k neighbours.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from igpt.errors import InputError
from igpt.evaluation.features import Rows, read_blocks

_TEMPERATURE = 0.07
_ROWS = 4096  # per block


def require_neighbours(k: int, count: int, purpose: str) -> None:
    """Refuse more neighbours than there are images of known classes.

    Raises:
        InputError: both numbers are named.
    """
    if count < k:
        raise InputError(
            f"{purpose} needs at least {k} training images for {k} nearest neighbours; there are "
            f"{count}"
        )


def classify_by_neighbours(
    known: Rows,
    labels: NDArray[np.int64],
    features: Rows,
    k: int,
    *,
    device: torch.device | None = None,
) -> NDArray[np.int64]:
    """Return the classes of images by a weighted vote of their nearest neighbours: [M].

    The neighbours are the k images of known classes with the highest cosine similarity. Each votes
    for its class with the weight exp(similarity / 0.07) (Wu et al. 2018, arXiv 1805.01978, section
    3.4). If the sums of two classes are equal, the lower class number wins.

    All similarities are computed, in float64 and in blocks: memory does not depend on N and M,
    except for the features themselves.

    Args:
        known: features of the images of known classes, [N, D].
        labels: their classes 0 .. C - 1, [N].
        features: of the images to classify, [M, D].
        k: at most N.
        device: where to compute similarities (default: the CPU).

    Raises:
        InputError: features that are not finite.
    """
    assert 1 <= k <= len(labels)
    target_device = device or torch.device("cpu")
    classes, count = torch.from_numpy(labels), int(labels.max()) + 1
    found = []
    for block in read_blocks(features, target_device, _ROWS):
        similarities, rows = _nearest(known, _unit_length(block), k)
        # On a GPU, sums of several threads would depend on their order.
        weights = (similarities.cpu() / _TEMPERATURE).exp()
        votes = torch.zeros(len(block), count, dtype=torch.float64)
        votes.scatter_add_(1, classes[rows.cpu()], weights)
        found.append(votes.argmax(dim=1))
    return torch.cat(found).numpy()


def _nearest(known: Rows, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k highest similarities and their rows: unit vectors [B, D] -> [B, k] each."""
    best = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    done = 0
    for block in read_blocks(known, queries.device, _ROWS):
        similarities = queries @ _unit_length(block).t()
        nearest, columns = similarities.topk(min(k, len(block)), dim=1)
        best, rows = torch.cat([best, nearest], dim=1), torch.cat([rows, columns + done], dim=1)
        best, kept = best.topk(min(k, best.shape[1]), dim=1)
        rows = rows.gather(1, kept)
        done += len(block)
    return best, rows


def _unit_length(features: Tensor) -> Tensor:
    """Divide rows by their lengths, in float64: averaged features are almost parallel."""
    if not bool(features.isfinite().all()):
        raise InputError("features are not finite; the model's weights are broken")
    return F.normalize(features.double(), dim=1)
