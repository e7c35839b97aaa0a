"""Recipes of the race, and the model and the optimizer that carry out what is not a part of igpt.

B images, T positions, R resolution, D width, H heads, K head width, V colours, L layers.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from igpt.config import Config
from igpt.data.images.palette import Palette
from igpt.model import transformer
from igpt.model.config import ModelConfig
from igpt.model.transformer import ImageGPT
from igpt.training.muon import Muon, orthogonalize
from igpt.training.optimizer import COLOR_TABLES
from igpt.training.shared_updates import SharedAdamW, color_features

# Rows and columns from a pixel to one of its neighbours, which come before it in raster order.
OFFSETS = {"up": (-1, 0), "up-left": (-1, -1), "up-right": (-1, 1)}
Neighbor = Literal["up", "up-left", "up-right"]


class Recipe(Config):
    """How a model is trained. The defaults are the paper's recipe for a small model."""

    n_layer: int = 6
    n_embd: int = 192
    n_head: int = 3
    seed: int = 0
    images: int = Field(30_720, description="length of the schedule")
    validate_every: int = Field(7_680, description="images between validations")
    validation_images: int = 1_024
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    batch: int = 16
    batches: tuple[tuple[int, int], ...] = Field((), description="(from this image on, batch)")
    flip: bool = False
    optimizer: Literal["adamw", "muon"] = "adamw"
    rate: float = Field(3e-3, description="peak learning rate")
    warmup: float = Field(0.05, description="share of the images")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    cooldown: float = Field(0.5, description="last share of a constant rate that falls to 0")
    weight_decay: float = Field(0.0, description="of Muon's matrices")
    cautious: bool = Field(False, description="decay only what the step also makes smaller")
    momentum_warmup: int = Field(0, description="steps in which Muon's momentum rises from 0.85")
    positions: Literal["learned", "rotary"] = "learned"
    value_residual: bool = False
    from_palette: bool = Field(False, description="embeddings from the palette's RGB values")
    head_from_palette: float = Field(0.0, description="standard deviation / 0.02 of such a head")
    neighbors: tuple[Neighbor, ...] = Field((), description="further pixels that are embedded")
    share_color_updates: bool = Field(False, description="near colours share updates")
    scalars: bool = Field(False, description="each block's input mixes with the first block's")
    value_embeddings: int = Field(0, description="first and last blocks with embeddings in values")
    softcap: float = Field(0.0, description="logits are this times tanh(logits / this)")
    local: tuple[int, ...] = Field((), description="blocks that attend to three rows only")

    def rate_at(self, seen: int, batch: int) -> float:
        """Return the learning rate of the step after `seen` images.

        For a constant batch it is igpt's `learning_rate`.
        """
        warmup = self.warmup * self.images
        if seen < warmup:
            return self.rate * (seen + batch) / warmup
        done = (seen - warmup) / (self.images - warmup)
        if self.schedule == "constant":
            return self.rate * min(1.0, (1 - done) / self.cooldown)
        linear = self.schedule == "linear"
        return self.rate * (1 - done if linear else 0.5 * (1 + math.cos(math.pi * done)))

    def batch_at(self, seen: int) -> int:
        """Return the images of the step after `seen` images."""
        return next((size for start, size in reversed(self.batches) if seen >= start), self.batch)


class RaceModel(ImageGPT):
    """An ImageGPT with the additions of a recipe."""

    def __init__(self, recipe: Recipe, palette: Palette, resolution: int) -> None:
        config = ModelConfig(
            resolution=resolution,
            n_colors=len(palette),
            **recipe.model_dump(include={"n_layer", "n_embd", "n_head"}),
            positions=recipe.positions,
            value_residual=recipe.value_residual,
        )
        super().__init__(config, palette, recipe.from_palette)
        self.recipe = recipe
        width, rows = config.n_embd, config.n_colors + 1
        colors = torch.tensor(palette.centers_)
        colors = colors / colors.square().sum(1).mean().sqrt()

        def table() -> nn.Embedding:
            made = nn.Embedding(rows, width)
            nn.init.normal_(made.weight, std=0.02)
            return made

        self.neighbors = nn.ModuleDict({name: table() for name in recipe.neighbors})
        self.value_tables = nn.ModuleList(table() for _ in range(recipe.value_embeddings))
        with torch.no_grad():
            if recipe.from_palette:
                for made in self.neighbors.values():
                    made.weight[:-1] = colors @ torch.empty(3, width).normal_(std=0.02)
            if std := 0.02 * recipe.head_from_palette:
                self.lm_head.weight.copy_(colors @ torch.empty(3, width).normal_(std=std))
        if recipe.scalars:
            self.scalars = nn.Parameter(torch.tensor([[1.0, 0.0]]).repeat(config.n_layer, 1))
        for number, block in enumerate(self.h):
            block.attn = RaceAttention(block.attn, number in recipe.local)

    def embed(
        self, tokens: Tensor, mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return the input of the first block: tokens [B, T] -> [B, T, D]."""
        x, config = super().embed(tokens, mask, labels), self.config
        places = torch.arange(tokens.shape[1])
        for name, table in self.neighbors.items():
            down, right = OFFSETS[name]
            source, column = places + down * config.resolution + right, places % config.resolution
            exists = (source >= 0) & (column + right >= 0) & (column + right < config.resolution)
            x = x + table(torch.where(exists, tokens[:, source.clamp(0)], config.n_colors))
        return x

    def hidden(
        self, tokens: Tensor, mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return the final norm's output: tokens [B, T] -> [B, T, D]."""
        x, first, tables = self.embed(tokens, mask, labels), None, self.value_tables
        start, after_first = x, len(self.h) - len(tables)
        for number, block in enumerate(self.h):
            if self.recipe.scalars:
                x = self.scalars[number, 0] * x + self.scalars[number, 1] * start
            if number < len(tables) or number >= after_first:
                table = tables[number if number < len(tables) else number - after_first]
                block.attn.added_values = table(inputs_of(tokens, self.config.n_colors))
            x, first = block(x, first)
        return self.ln_f(x)  # type: ignore[no-any-return]

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return the logits: tokens [B, T] -> [B, T, V]."""
        logits = super().forward(tokens, mask, labels)
        if cap := self.recipe.softcap:
            logits = cap * torch.tanh(logits.float() / cap)
        return logits


class RaceAttention(nn.Module):
    """Attention with values from embeddings, and among three rows.

    Args:
        attention: whose weights it has.
        local: attend only to this row and the two above it.
    """

    def __init__(self, attention: transformer.Attention, local: bool) -> None:
        super().__init__()
        self.local = local
        self.added_values: Tensor | None = None
        self.n_head, self.config = attention.n_head, attention.config
        self._modules.update(attention._modules)
        self._parameters.update(attention._parameters)
        self._variants = attention.apply_variants

    def forward(self, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[B, T, D] -> [B, T, D], and the first layer's values for the next layer."""
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_head, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, T, K] each
        if self.added_values is not None:
            v = v + self.added_values.unflatten(-1, (self.n_head, -1)).transpose(1, 2).to(v.dtype)
        q, k, v, first = self._variants(q, k, v, first)
        if self.local:
            y = attend_to_three_rows(q, k, v, self.config.resolution)
        else:
            y = transformer.attention(q, k, v, causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2)), first


def attend_to_three_rows(q: Tensor, k: Tensor, v: Tensor, side: int) -> Tensor:
    """Return causal attention to the pixels of this row and of the two above: [B, H, T, K]."""
    q, k, v = (one.unflatten(2, (-1, side)) for one in (q, k, v))  # [B, H, R, R, K]

    def with_rows_above(x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 0, 0, 2, 0))
        return torch.cat([padded[:, :, :-2], padded[:, :, 1:-1], x], dim=3)  # [B, H, R, 3 R, K]

    k, v = with_rows_above(k), with_rows_above(v)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B, H, R, R, 3 R]
    mask = torch.zeros(q.shape[2], side, 3 * side, dtype=scores.dtype)
    mask[:, :, 2 * side :] = mask.new_full((side, side), -torch.inf).triu_(1)
    mask[0, :, : 2 * side] = -torch.inf
    mask[1, :, :side] = -torch.inf
    with torch.autocast("cpu", enabled=False):
        return (scores.add_(mask).softmax(-1) @ v).flatten(2, 3)


def inputs_of(tokens: Tensor, start: int) -> Tensor:
    """Return the start token and all tokens except the last: [B, T] -> [B, T]."""
    return F.pad(tokens[:, :-1], (1, 0), value=start)


class RaceMuon(Muon):
    """Muon with a recipe's momentum and decay."""

    def __init__(self, matrices: list[nn.Parameter], recipe: Recipe) -> None:
        super().__init__(matrices, recipe.weight_decay)
        self.recipe, self.steps = recipe, 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all matrices."""
        recipe, group = self.recipe, self.param_groups[0]
        risen = min(1.0, self.steps / recipe.momentum_warmup) if recipe.momentum_warmup else 1.0
        momentum, rate = 0.85 + 0.1 * risen, group["lr"]
        self.steps += 1
        kind = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        for matrix in group["params"]:
            state = self.state[matrix]
            if not state:
                state["mean"] = torch.zeros_like(matrix)
            mean = state["mean"].lerp_(matrix.grad, 1 - momentum)
            update = orthogonalize(matrix.grad.lerp(mean, momentum), kind).to(matrix.dtype)
            shrink = rate * recipe.weight_decay
            if recipe.cautious:
                matrix.sub_(shrink * matrix * (matrix * update > 0))
            else:
                matrix.mul_(1 - shrink)
            matrix.add_(update, alpha=-0.2 * max(matrix.shape) ** 0.5 * rate)


def optimizers_of(model: RaceModel) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a recipe."""
    recipe, betas = model.recipe, (0.9, 0.95)
    matrices: list[nn.Parameter] = []
    tables: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if recipe.optimizer == "muon" and name.startswith("h.") and parameter.ndim == 2:
            matrices.append(parameter)
        elif recipe.share_color_updates and name in COLOR_TABLES:
            tables.append(parameter)
        else:
            others.append(parameter)
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=0.0, betas=betas, weight_decay=0.0, fused=True)
    ]
    if matrices:
        made.append(RaceMuon(matrices, recipe))
    if tables:
        assert model.palette is not None
        made.append(SharedAdamW(tables, color_features(model.palette.centers_), betas, 0.0))
    return made
