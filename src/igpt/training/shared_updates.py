"""AdamW for tables with a row per colour, whose updates also change the rows of near colours.

V colours, C features of a colour, D width. Not in the paper; experiments/speedrun compares it.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.optim import Optimizer

_EPS = 1e-8  # of Adam
_WIDTHS = (0.1, 0.3, 1.0)  # standard deviations of the Gaussians, for colours in -1 .. 1
_FEATURES = 64


def color_features(centers: NDArray[np.float32]) -> Tensor:
    """Return features of colours whose inner products fall with the distance: float32 [V, C].

    They are the largest principal components of a kernel, a mean of Gaussians of three widths.
    Their mean square over the colours is 1. C is 64, or V if there are fewer colours.

    Args:
        centers: [V, 3] in -1 .. 1.
    """
    colors = torch.from_numpy(centers).double()
    distance = torch.cdist(colors, colors)
    kernel = torch.stack([torch.exp(-0.5 * (distance / one) ** 2) for one in _WIDTHS]).mean(0)
    values, vectors = torch.linalg.eigh(kernel)
    features: Tensor = (vectors * values.clamp(min=0).sqrt())[:, -_FEATURES:]
    features /= features.square().sum(1).mean().sqrt()
    return features.float()


class SharedAdamW(Optimizer):
    """AdamW for W = A + S B, where S are features of the rows, and A and B the parameters.

    Only W [rows, D] is stored. A row moves by its own update, and by that of B [C, D], which the
    gradients of all rows with similar features determine.

    Args:
        tables: their first V rows are of the colours; the features of further rows are 0.
        features: [V, C].
        betas: coefficients of Adam.
        weight_decay: decoupled weight decay of W.
    """

    def __init__(
        self,
        tables: Iterable[Tensor],
        features: Tensor,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        super().__init__(tables, {"lr": 0.0, "betas": betas, "weight_decay": weight_decay})
        self.features = features

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all tables that have a gradient."""
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is None:
                    continue
                state = self.state[table]
                if not state:
                    state["step"] = torch.zeros(())
                    # Kept with the moments: on another processor, the same eigenvectors may have
                    # other signs.
                    state["features"] = self._features_of(table)
                features = state["features"]
                own, shared = table.grad, features.T @ table.grad
                if isinstance(shared, DTensor):  # a sum over the rows of every rank
                    shared = shared.redistribute(placements=[Replicate()] * shared.device_mesh.ndim)
                rate, betas = group["lr"], group["betas"]
                state["step"] += 1
                own, shared = _adam(state, "", own, betas), _adam(state, "shared_", shared, betas)
                table.mul_(1 - rate * group["weight_decay"])
                table.sub_(own + features @ shared, alpha=rate)

    def _features_of(self, table: Tensor) -> Tensor:
        """Return the features of a table's rows, sharded as it is: [rows, C]."""
        features = F.pad(self.features, (0, 0, 0, len(table) - len(self.features)))
        features = features.to(table.device, table.dtype)
        if isinstance(table, DTensor):
            return distribute_tensor(
                features, table.device_mesh, table.placements, src_data_rank=None
            )
        return features


def _adam(
    state: dict[str, Tensor], prefix: str, gradient: Tensor, betas: tuple[float, float]
) -> Tensor:
    """Return Adam's update for a learning rate of 1, and renew the moments in `state`."""
    mean, square, done = f"{prefix}exp_avg", f"{prefix}exp_avg_sq", int(state["step"])
    if mean not in state:
        state[mean], state[square] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    state[mean].lerp_(gradient, 1 - betas[0])
    state[square].lerp_(gradient.square(), 1 - betas[1])
    size = (state[square] / (1 - betas[1] ** done)).sqrt().add_(_EPS)
    return state[mean] / (1 - betas[0] ** done) / size
