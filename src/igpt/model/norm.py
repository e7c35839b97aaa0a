"""The RMS norm of iGPT (released code). D width."""

import torch.nn.functional as F
from torch import Tensor, nn

from igpt.model import cpu

NORM_EPS = 1e-5


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + 1e-5) * g over the last dimension."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if cpu.trains_on_cpu(x):
            return cpu.lean_norm(x, self.weight, NORM_EPS)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
