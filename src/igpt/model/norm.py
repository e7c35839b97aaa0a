"""The RMS norm of iGPT (released code), and a leaner one for training on a CPU.

B batch, T places, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NORM_EPS = 1e-5


def trains_on_cpu(x: Tensor) -> bool:
    """Whether operations run one by one on a CPU, for a backward pass to come: every pass over memory counts."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _LeanNorm(torch.autograd.Function):
    """An RMS norm that keeps only its input and a number a place, and writes the type that the next product reads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(NORM_EPS).rsqrt_()  # [B, T, 1]
        ctx.save_for_backward(x, gain, scale)
        normal: Tensor = (x * scale).mul_(gain)
        return (
            normal.to(torch.get_autocast_dtype("cpu"))
            if torch.is_autocast_enabled("cpu")
            else normal
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, gain, scale = ctx.saved_tensors
        unit = x * scale
        gain_gradient = (gradient * unit).flatten(0, -2).sum(0).to(gain.dtype)
        inner = gradient * gain
        along = (inner * unit).mean(-1, keepdim=True)
        return unit.mul_(-along).add_(inner).mul_(scale), gain_gradient


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + 1e-5) * g over the last dimension."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if trains_on_cpu(x):
            return _LeanNorm.apply(x, self.weight)  # type: ignore[no-any-return, no-untyped-call]
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
