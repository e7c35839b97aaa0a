"""Operations for training on a CPU, where every pass over memory costs time.

They compute the same as the plain ones in norm.py and transformer.py; docs/LOG.md has the times. B
batch, T positions, D width, H heads, K head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_SHORT = 256  # positions up to which plain attention trains faster in bf16 than the fused kernel


def trains_on_cpu(x: Tensor) -> bool:
    """Return whether operations run eagerly on a CPU with a backward pass to come."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _LeanNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()  # [B, T, 1]
        ctx.save_for_backward(x, gain, scale)
        normal: Tensor = (x * scale).mul_(gain)
        if torch.is_autocast_enabled("cpu"):
            return normal.to(torch.get_autocast_dtype("cpu"))
        return normal

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain, scale = ctx.saved_tensors
        unit = x * scale
        gain_gradient = (gradient * unit).flatten(0, -2).sum(0).to(gain.dtype)
        inner = gradient * gain
        along = (inner * unit).mean(-1, keepdim=True)
        return unit.mul_(-along).add_(inner).mul_(scale), gain_gradient, None


def lean_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Return the RMS norm of x [B, T, D], in the type that the next matrix product reads.

    For the backward pass it keeps only its input and one number per position.
    """
    return _LeanNorm.apply(x, gain, eps)  # type: ignore[no-any-return, no-untyped-call]


class _LeanRotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(gradient, cos, -sin), None, None


def lean_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `rotate(x, cos, sin)`; the backward pass rotates the gradient back."""
    return _LeanRotation.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of numbers: [..., T, K], cos and sin [T, K]; see `apply_rope_2d`."""
    swapped = x.reshape(*x.shape[:-1], 2, 2, -1).flip(-2).flatten(-3)
    return torch.addcmul(x * cos, swapped, sin)


def prefers_plain_attention(q: Tensor) -> bool:
    """Return whether to avoid the fused kernel, whose backward pass is slow in short bf16."""
    on_cpu = q.device.type == "cpu" and q.requires_grad
    return on_cpu and q.dtype == torch.bfloat16 and q.shape[-2] <= _SHORT


def plain_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Return softmax(q k' / sqrt(K)) v by plain matrix products, each [B, H, T, K]."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B, H, T, T]
    if causal:
        # Adding takes a tenth of the time of `masked_fill`, and has no backward pass.
        future = torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype, device=q.device)
        scores = scores.add_(future.triu_(1))
    with torch.autocast(q.device.type, enabled=False):  # which would copy the scores to float32
        weighted: Tensor = scores.softmax(-1) @ v
    return weighted


def folded_mlp(x: Tensor, c_fc: nn.Linear, c_proj: nn.Linear, slope: float) -> Tensor:
    """Return the MLP with the activation's slope folded into the weights: fewer numbers."""
    bias = None if c_fc.bias is None else slope * c_fc.bias
    inner = F.linear(x, slope * c_fc.weight, bias)
    return F.linear(F.silu(inner), c_proj.weight / slope, c_proj.bias)
