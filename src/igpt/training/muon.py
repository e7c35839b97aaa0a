"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum whose matrices are orthogonalised.

PyTorch has the same, always in bf16, which processors without it emulate at a hundredth of the
speed of fp32.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from igpt.model.precision import multiplies_bf16

_MOMENTUM, _EPS = 0.95, 1e-7
_COEFFICIENTS = (
    3.4445,
    -4.7750,
    2.0315,
)  # of the quintic iteration, and five of them, as its author has it
_STEPS = 5


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised, in steps of AdamW's size (arXiv 2502.16982), so that one rate serves both.

    Args:
        params: matrices.
        weight_decay: decoupled.
    """

    def __init__(self, params: Iterable[Tensor], weight_decay: float) -> None:
        super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all matrices that have a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                momentum = state["momentum_buffer"].lerp_(matrix.grad, 1 - _MOMENTUM)
                update = orthogonalise(
                    matrix.grad.lerp(momentum, _MOMENTUM), _type_of_products(matrix.device.type)
                )
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-0.2 * max(matrix.shape) ** 0.5 * group["lr"])


def orthogonalise(matrix: Tensor, kind: torch.dtype) -> Tensor:
    """A matrix with about the same singular vectors and values between 0.5 and 1.5, computed in `kind`."""
    a, b, c = _COEFFICIENTS
    x = matrix.to(kind)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=_EPS)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _type_of_products(device_type: str) -> torch.dtype:
    """Return bf16, or fp32 where the processor has no instructions for bf16."""
    return torch.bfloat16 if multiplies_bf16(device_type) else torch.float32
