"""Optimisers and learning-rate schedules; schedules are pure functions of the step."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from igpt.training.muon import Muon

OptimizerName = Literal["adamw", "muon"]
Schedule = Literal["cosine", "linear", "constant"]


def learning_rate(step: int, *, peak: float, warmup: int, total: int, schedule: Schedule) -> float:
    """The learning rate of update number `step` (from 0): a linear rise over `warmup` updates, then the schedule.

    "cosine" falls to 0 at `total` (paper, section 3.3), and so does "linear"; "constant" stays at
    `peak`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, total - warmup)
    return peak * (1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizers(
    model: nn.Module, name: OptimizerName, *, betas: tuple[float, float], weight_decay: float
) -> list[Optimizer]:
    """The optimisers that share a model's parameters out among them; the learning rate is set before every update.

    "adamw" is AdamW over all. "muon" orthogonalises the updates of the blocks' matrices and leaves
    the rest to AdamW. Decay applies to matrices only (not to gains), and is 0 in the paper.
    """
    named = [
        (path, parameter) for path, parameter in model.named_parameters() if parameter.requires_grad
    ]
    hidden = [
        parameter
        for path, parameter in named
        if name == "muon" and path.startswith("h.") and parameter.ndim == 2
    ]
    orthogonalised = {id(parameter) for parameter in hidden}
    rest = [parameter for _, parameter in named if id(parameter) not in orthogonalised]
    groups = [
        {
            "params": [parameter for parameter in rest if parameter.ndim >= 2],
            "weight_decay": weight_decay,
        },
        {"params": [parameter for parameter in rest if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[Optimizer] = [torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)]
    if hidden:
        optimizers.append(Muon(hidden, weight_decay))
    return optimizers


def step(optimizers: Sequence[Optimizer], rate: float, skip: Tensor) -> None:
    """One update at a learning rate, and zero gradients after it; no update where `skip` (on the device) is 1, not 0.

    AdamW's fused kernel looks at `skip` itself, as it does for gradient scalers, so that nobody
    waits for the device.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.found_inf = skip  # type: ignore[attr-defined]
            optimizer.step()
        elif not skip:  # Muon has no such kernel: the host must ask
            optimizer.step()
        optimizer.zero_grad()
