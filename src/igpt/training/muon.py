"""Muon (Jordan et al. 2024): momentum with orthogonalized matrices.

Source: kellerjordan.github.io/posts/muon. PyTorch's own Muon always computes in bf16, which
processors without bf16 instructions emulate at a hundredth of the speed of fp32.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from igpt.model.precision import multiplies_bf16

_MOMENTUM, _EPS = 0.95, 1e-7
# The author's quintic Newton-Schulz iteration, and the number of iterations.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(Optimizer):
    """Orthogonalized Nesterov momentum, scaled like AdamW's updates (arXiv 2502.16982).

    One learning rate suits both optimizers.

    Args:
        params: matrices.
        weight_decay: decoupled weight decay.
    """

    def __init__(self, params: Iterable[Tensor], weight_decay: float) -> None:
        super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all matrices that have a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                momentum = state["momentum_buffer"].lerp_(matrix.grad, 1 - _MOMENTUM)
                has_bf16 = multiplies_bf16(matrix.device.type)
                update = orthogonalize(
                    matrix.grad.lerp(momentum, _MOMENTUM),
                    torch.bfloat16 if has_bf16 else torch.float32,
                )
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-0.2 * max(matrix.shape) ** 0.5 * group["lr"])


def orthogonalize(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a matrix with about the same singular vectors, and values between 0.5 and 1.5."""
    a, b, c = _COEFFICIENTS
    x = matrix.to(dtype)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=_EPS)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
