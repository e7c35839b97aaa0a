"""Optimisers and learning-rate schedules; schedules are pure functions of the step."""

import math
from typing import Literal

import torch
from torch import nn

Schedule = Literal["cosine", "constant"]


def learning_rate(step: int, *, peak: float, warmup: int, total: int, schedule: Schedule) -> float:
    """The learning rate of update number `step` (from 0): a linear rise over `warmup` updates, then the schedule.

    "cosine" falls to 0 at `total` (paper, section 3.3); "constant" stays at `peak`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def adamw(model: nn.Module, *, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over all parameters; decay applies to matrices only (not to gains), and is 0 in the paper.

    The learning rate is set before every update.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
