"""The transformer of iGPT: GPT-2 with RMS norms and without biases.

Chen et al. 2020, section 2.2, and the released code. B batch, T positions, D width, H heads, K head
width, V colours, L layers, R resolution; an image is a sequence of n = R^2 pixels in raster order.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt.data.images.palette import Palette
from igpt.errors import InputError
from igpt.model import cpu
from igpt.model.config import ModelConfig
from igpt.model.directory import ModelDirectory, read_directory, write_directory
from igpt.model.norm import RMSNorm
from igpt.model.variants import apply_rope_2d, rope_table

if TYPE_CHECKING:
    from PIL.Image import Image

SLOPE = 1.702  # of the sigmoid in the activation


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Return softmax(q k' / sqrt(K)) v, each [B, H, T, K]."""
    if cpu.prefers_plain_attention(q):
        return cpu.plain_attention(q, k, v, causal)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


class Attention(nn.Module):
    """Multi-head self-attention of one layer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.n_head = config, config.n_head
        self.causal = config.trained_as.causal
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        if config.value_residual and layer > 0:
            self.mix = nn.Parameter(torch.empty(2))  # weights of this layer's and the first's v

    def forward(self, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[B, T, D] -> [B, T, D], and the first layer's values for the next layer.

        Args:
            first: see `apply_variants`.
        """
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_head, -1))  # [B, T, 3, H, K]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, T, K] each
        q, k, v, first = self.apply_variants(q, k, v, first)
        y = attention(q, k, v, self.causal).transpose(1, 2).flatten(2)  # [B, T, D]
        return self.c_proj(y), first

    def apply_variants(
        self, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, rope: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Apply RoPE and value residual, if the model has them; [B, H, T, K] each.

        Args:
            first: the first layer's values. None in the first layer, and without value residual.
            rope: `rope_table` of the T positions; of 0 .. T-1 by default.

        Returns:
            queries, keys, values, and the first layer's values.
        """
        config = self.config
        if config.positions == "rotary":
            if rope is None:
                positions = torch.arange(q.shape[-2], device=q.device)
                rope = rope_table(positions, q.shape[-1], config.resolution)
            q, k = apply_rope_2d(q, rope), apply_rope_2d(k, rope)
        if config.value_residual:  # Zhou et al. 2024, arXiv 2410.17897
            if first is None:
                return q, k, v, v
            v = self.mix[0] * v + self.mix[1] * first
        return q, k, v, first


class MLP(nn.Module):
    """Two linear layers, 4 D wide in between, with the activation x * sigmoid(1.702 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if cpu.trains_on_cpu(x):
            return cpu.folded_mlp(x, self.c_fc, self.c_proj, SLOPE)
        # x sigmoid(s x) = silu(s x) / s, whose backward pass needs less memory.
        return self.c_proj(F.silu(SLOPE * self.c_fc(x)) / SLOPE)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm block: x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(config.n_embd)
        self.attn = Attention(config, layer)
        self.ln_2 = RMSNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, first: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """[B, T, D] -> [B, T, D], and the first layer's values (see `Attention.apply_variants`)."""
        attended, first = self.attn(self.ln_1(x), first)
        x = x + attended
        del attended  # frees its memory before the MLP
        return x + self.mlp(self.ln_2(x)), first


class ImageGPT(nn.Module):
    """A transformer over the pixels of an image.

    Args:
        config: shape and objective.
        palette: the colours that the tokens index; it is saved with the model.
        from_palette: initialize colour embeddings from the palette's RGB values.

    A new model has the paper's initial weights, sampled from torch's global generator. A model on
    the meta device has none until `init_weights` is called for each of its `top_modules`.
    """

    def __init__(
        self, config: ModelConfig, palette: Palette | None = None, from_palette: bool = False
    ) -> None:
        super().__init__()
        if palette is not None and len(palette) != config.n_colors:
            raise InputError(f"the palette has {len(palette)} colours, the model {config.n_colors}")
        self.config = config
        self.palette = palette
        self.from_palette = from_palette
        with torch.device("meta"):  # skips PyTorch's own initialization
            # The row after the colours is the start token, those after it are of the classes.
            self.wte = nn.Embedding(config.n_inputs, config.n_embd)
            if config.positions == "learned":
                self.wpe = nn.Embedding(config.n_pixels, config.n_embd)
            self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
            self.ln_f = RMSNorm(config.n_embd)
            self.lm_head = nn.Linear(config.n_embd, config.n_colors, bias=False)
            if config.class_names is not None:
                self.score = nn.Linear(config.n_embd, len(config.class_names), bias=False)
        device = torch.get_default_device()
        if device.type != "meta":
            for name, _ in self.top_modules():
                self.init_weights(name, device)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.wte.weight.device

    def top_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the blocks, then the other modules, with their names."""
        yield from ((f"h.{number}", block) for number, block in enumerate(self.h))
        yield from (
            (name, module) for name, module in self.named_children() if module is not self.h
        )

    @torch.no_grad()
    def init_weights(self, name: str, device: torch.device) -> None:
        """Initialize one of the `top_modules` of a model on the meta device (released code).

        ==================  ============================  =======================================
        parameter           initial value                 note
        ==================  ============================  =======================================
        wte                 normal, std 0.02              see `from_palette` for the alternative
        wpe                 normal, std 0.01
        attn.c_attn         normal, std 1/sqrt(D)
        attn.c_proj         normal, std 1/sqrt(D L)       residual branches sum to unit variance
        mlp.c_fc            normal, std 0.02
        mlp.c_proj          normal, std 0.02
        ln_1, ln_2, ln_f    1
        attn.mix            0.5                           of a value residual
        lm_head, score      0                             so are biases
        ==================  ============================  =======================================

        Values are sampled on the CPU, module by module: they are the same on every device and
        however the model is sharded.
        """
        width, layers = self.config.n_embd, self.config.n_layer
        deviations = {
            "wte.weight": 0.02,
            "wpe.weight": 0.01,
            "attn.c_attn.weight": width**-0.5,
            "attn.c_proj.weight": (width * layers) ** -0.5,
            "mlp.c_fc.weight": 0.02,
            "mlp.c_proj.weight": 0.02,
        }
        module = self.get_submodule(name).to_empty(device=device)
        for inner, parameter in module.named_parameters():
            path = f"{name}.{inner}"
            std = next((value for end, value in deviations.items() if path.endswith(end)), None)
            if std is not None:
                parameter.copy_(torch.empty(parameter.shape, device="cpu").normal_(std=std))
            elif ".ln_" in f".{path}":
                parameter.fill_(1.0)
            else:
                parameter.fill_(0.5 if path.endswith("attn.mix") else 0.0)
        if name == "wte" and self.from_palette:
            assert self.palette is not None, "embeddings from the palette need a palette"
            # [V, 3], in -1 .. 1; a transparent entry has no colour, and stays random.
            colors = torch.tensor(self.palette.opaque_centers, dtype=torch.float32, device="cpu")
            projection = torch.empty(3, width, device="cpu").normal_(std=deviations["wte.weight"])
            # Dividing by the colours' root mean square gives the usual standard deviation.
            size = colors.square().sum(1).mean().sqrt().clamp(min=1e-6)
            self.wte.weight[: len(colors)].copy_(colors / size @ projection)

    def embed(
        self, tokens: Tensor, mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return the input of the first block: tokens [B, T] -> [B, T, D]."""
        x = self.config.trained_as.embed(self, tokens, mask)
        if labels is not None:
            start = self.wte(self.config.n_colors + 1 + labels[:, None])  # [B, 1, D]
            x = torch.cat([start, x[:, 1:]], dim=1)
        return x + self.wpe.weight[: x.shape[1]] if self.config.positions == "learned" else x

    def hidden(
        self, tokens: Tensor, mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return the final norm's output: tokens [B, T] -> [B, T, D]."""
        x, first = self.embed(tokens, mask, labels), None
        for block in self.h:
            x, first = block(x, first)
        return self.ln_f(x)  # type: ignore[no-any-return]

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return the logits of the colour of every pixel: tokens [B, T], T <= n -> [B, T, V].

        An autoregressive model predicts pixel i from the pixels before i; it shifts its input
        itself. A BERT model predicts the pixels where `mask` [B, T] is True from the others. A
        class-conditional model begins with the start tokens of the classes `labels` [B], and for -1
        with that of no class, as without labels.
        """
        return self.lm_head(self.hidden(tokens, mask, labels))  # type: ignore[no-any-return]

    def features(self, tokens: Tensor, mask: Tensor | None = None) -> Iterator[Tensor]:
        """Yield the normalized activations n^l of all layers: tokens [B, T] -> (L + 1) x [B, T, D].

        n^l is the normalized input of block l's attention; the last one is the final norm's output
        (paper, section 2.3).
        """
        x, first = self.embed(tokens, mask), None
        for block in self.h:
            assert isinstance(block, Block)
            yield block.ln_1(x)
            x, first = block(x, first)
        yield self.ln_f(x)

    def sample(self, count: int = 16, **settings: Any) -> list[Image]:
        """Return generated images as PIL images of R x R pixels.

        Args:
            settings: see `igpt.sampling.jobs.SamplingSettings`, such as `temperature=0.9`.

        Raises:
            InputError: see `igpt.sampling.images.sample_images`.
        """
        # This module is imported by all samplers, and knows none of them.
        sampler = pkgutil.resolve_name("igpt.sampling.images:sample_images")
        images: list[Image] = sampler(self, count, **settings)
        return images

    def save_pretrained(self, path: str | Path, tensors: dict[str, Tensor] | None = None) -> None:
        """Write a model directory (see directory.py), atomically.

        Args:
            tensors: all weights on the CPU, if this model is sharded.
        """
        if tensors is None:
            tensors = {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
        write_directory(Path(path), ModelDirectory(self.config, tensors, self.palette))

    @classmethod
    def from_pretrained(cls, name: str | Path, *, dtype: torch.dtype = torch.float32) -> Self:
        """Read a model directory that igpt or transformers wrote, or a model of the Hub.

        Args:
            name: run directory, model directory, name of a built-in model ("photos-16"), or Hub id.
            dtype: of all parameters, torch.float32 or torch.float64. Stored values must be exact in
                it.

        Raises:
            InputError: it is missing, damaged or not an ImageGPT, or its weights cannot be
                converted exactly.
        """
        directory = read_directory(name, dtype)
        with torch.device("meta"):
            model = cls(directory.config, directory.palette)
        model.load_state_dict(directory.tensors, assign=True)
        return model.eval()
