"""The contenders of train.py: igpt's engine, transformers' ImageGPT, and a plain loop.

All start from one model directory and predict all n positions of an image from the previous ones,
with AdamW, the same settings, and gradients clipped to norm 1. B batch, n positions, D width, H
heads, K head width, V colours, L layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt.model.config import ModelConfig
from igpt.model.objectives import Autoregressive
from igpt.model.transformer import ImageGPT
from igpt.training.distributed import World
from igpt.training.engine import Engine
from igpt.training.settings import Recomputation, TrainConfig

Precision = Literal["fp32", "bf16"]
LEARNING_RATE, BETAS = 1e-4, (0.9, 0.95)


@dataclass(frozen=True)
class Job:
    """A shape, a batch and a micro-batch to train."""

    directory: Path  # of the model it starts from
    config: ModelConfig
    precision: Precision
    batch_size: int
    micro_batch_size: int
    recomputation: Recomputation = "none"  # igpt's activation checkpointing


@dataclass(frozen=True)
class Made:
    """A contender, ready to train."""

    update: Callable[[Tensor], Tensor]  # tokens [B, n] -> mean loss before the step, nats/pixel
    parameters: int
    zero_biases: int = 0  # which the model has in addition


class PlainAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, places, width = x.shape
        heads = (
            part.view(batch, places, self.n_head, -1).transpose(1, 2)
            for part in self.c_attn(x).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(*heads, is_causal=True)  # [B, H, n, K]
        return self.c_proj(y.transpose(1, 2).reshape(batch, places, width))


class PlainMLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x))


class PlainBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = nn.RMSNorm(config.n_embd, eps=1e-5)
        self.attn = PlainAttention(config)
        self.ln_2 = nn.RMSNorm(config.n_embd, eps=1e-5)
        self.mlp = PlainMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class PlainModel(nn.Module):
    """The textbook transformer: inputs [B, n] -> logits [B, n, V]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.n_colors + 1, config.n_embd)
        self.wpe = nn.Embedding(config.n_pixels, config.n_embd)
        self.h = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.RMSNorm(config.n_embd, eps=1e-5)
        self.lm_head = nn.Linear(config.n_embd, config.n_colors, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.wte(inputs) + self.wpe(torch.arange(inputs.shape[1], device=inputs.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class PlainLoop:
    """A plain loop for any model with logits: autocast, accumulation, clipping, AdamW."""

    def __init__(
        self, model: nn.Module, logits: Callable[[Tensor], Tensor], job: Job, device: torch.device
    ) -> None:
        self.model, self.logits, self.job, self.device = model, logits, job, device
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0, fused=True
        )

    def update(self, tokens: Tensor) -> Tensor:
        total = torch.zeros((), device=self.device)
        for part in tokens.split(self.job.micro_batch_size):
            inputs = torch.cat(
                [part.new_full((len(part), 1), self.job.config.n_colors), part[:, :-1]], dim=1
            )
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=self.job.precision == "bf16"
            ):
                logits = self.logits(inputs)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), part.flatten()) * (
                len(part) / len(tokens)
            )
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def igpt(job: Job, world: World, compiled: bool) -> Made:
    model = ImageGPT.from_pretrained(job.directory)
    settings: dict[str, Any] = {
        "batch_size": job.batch_size,
        "micro_batch_size": job.micro_batch_size,
        "precision": job.precision,
        "compile": "yes" if compiled else "no",
        "activation_checkpointing": job.recomputation,
        "betas": BETAS,
    }
    engine = Engine(model, TrainConfig(**settings), world, Autoregressive().loss)
    return Made(lambda tokens: engine.update((tokens,), LEARNING_RATE)[0], count(model))


def transformers(job: Job, world: World, compiled: bool) -> Made:
    """Return transformers' ImageGPT with its own attention, and dropout 0 by its config.json."""
    from transformers import ImageGPTForCausalImageModeling
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = (
        ImageGPTForCausalImageModeling.from_pretrained(job.directory, dtype=torch.float32)
        .to(world.device)
        .train()
    )
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith(".bias")]
    assert not any(bias.any() for bias in biases), "the biases are zero at the start"
    dropouts = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert not any(dropouts), "there is no dropout"
    loop = PlainLoop(
        model, lambda inputs: model(input_ids=inputs, use_cache=False).logits, job, world.device
    )
    zeros = sum(bias.numel() for bias in biases)
    return Made(loop.update, count(model) - zeros, zeros)


def plain(job: Job, world: World, compiled: bool) -> Made:
    with torch.device("meta"):
        model = PlainModel(job.config)
    model.load_state_dict(ImageGPT.from_pretrained(job.directory).state_dict(), assign=True)
    model.to(world.device).train()
    logits = torch.compile(model) if compiled else model
    return Made(PlainLoop(model, logits, job, world.device).update, count(model))


@dataclass(frozen=True)
class Entry:
    """A contender by name."""

    make: Callable[[Job, World], Made]
    family: str
    precision: Precision
    compiled: bool = False


def _entries() -> dict[str, Entry]:
    entries = {}
    for family in (igpt, transformers, plain):
        for precision in ("fp32", "bf16"):
            for compiled in (False, True):
                name = f"{family.__name__}-{precision}{'-compiled' * compiled}"
                make = partial(family, compiled=compiled)
                if family is not transformers or not compiled:
                    entries[name] = Entry(make, family.__name__, precision, compiled)
    return entries


ENTRIES = _entries()


def activation_bytes(config: ModelConfig, entry: Entry) -> float:
    """Return a rough upper bound of what an image leaves for the backward pass."""
    tensors = 24 * config.n_pixels * config.n_embd * config.n_layer
    logits = 4 * config.n_pixels * config.n_colors
    scores = (
        3 * config.n_head * config.n_pixels**2 * config.n_layer * (entry.family == "transformers")
    )
    return (4.0 if entry.precision == "fp32" else 2.5) * (tensors + scores) + 4.0 * logits
