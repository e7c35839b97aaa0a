"""Optimizers and learning-rate schedules; schedules are pure functions of the step."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from igpt.training.muon import Muon
from igpt.training.shared_updates import SharedAdamW

OptimizerName = Literal["adamw", "muon"]
Schedule = Literal["cosine", "linear", "constant"]
COLOR_TABLES = ("wte.weight", "lm_head.weight")  # their first rows are of the colours


def learning_rate(step: int, *, peak: float, warmup: int, total: int, schedule: Schedule) -> float:
    """Return the learning rate of a step (from 0): linear warm-up, then the schedule.

    "cosine" (paper, section 3.3) and "linear" fall to 0 at step `total`; "constant" stays at
    `peak`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, total - warmup)
    return peak * (1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizers(
    model: nn.Module,
    name: OptimizerName,
    *,
    betas: tuple[float, float],
    weight_decay: float,
    color_features: Tensor | None = None,
) -> list[Optimizer]:
    """Return the optimizers of a model, which partition its trainable parameters.

    "adamw" is AdamW for all. "muon" is Muon for the matrices of the blocks and AdamW for the rest.
    Weight decay applies to matrices only, not to gains and biases.

    Args:
        color_features: [V, C]; if given, colour embeddings and output matrix get `SharedAdamW`.
    """
    hidden, matrices, vectors, of_colors = [], [], [], []
    for path, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif name == "muon" and path.startswith("h.") and parameter.ndim == 2:
            hidden.append(parameter)
        elif color_features is not None and path in COLOR_TABLES:
            of_colors.append(parameter)
        else:
            matrices.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # Checkpoints of several optimizers cannot have a group without parameters.
    groups = [group for group in groups if group["params"]]
    optimizers: list[Optimizer] = [torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)]
    if hidden:
        optimizers.append(Muon(hidden, weight_decay))
    if of_colors:
        assert color_features is not None
        optimizers.append(SharedAdamW(of_colors, color_features, betas, weight_decay))
    return optimizers


def step(optimizers: Sequence[Optimizer], rate: float, skip: Tensor) -> None:
    """Perform one optimizer step, unless `skip` (0 or 1, on the device) is 1; then zero gradients.

    AdamW's fused kernel reads `skip` itself, as it does for gradient scalers, so the host does not
    wait for the device. Muon and SharedAdamW have no such kernel, and the host waits.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.found_inf = skip  # type: ignore[attr-defined]
            optimizer.step()
        elif not skip:
            optimizer.step()
        optimizer.zero_grad()
