"""Decoding of an autoregressive model with a cache of keys and values.

B images, T positions of a pass, n pixels of an image, D width, H heads, K head width, V colours.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt.model.norm import NORM_EPS
from igpt.model.transformer import SLOPE, Block, ImageGPT
from igpt.model.variants import rope_table
from igpt.sampling.jobs import SamplingPrecision, cache_type
from igpt.sampling.products import Product, product

_PREFILL_ROWS = 2**14  # positions of all images at a time, which bounds the memory of the MLP


class _Layer:
    """The matrix products of a block, with the norms' gains and activation's slope folded in."""

    def __init__(self, block: Block, precision: SamplingPrecision) -> None:
        def folded(layer: nn.Linear, before: Tensor | float = 1.0, after: float = 1.0) -> Product:
            bias = None if layer.bias is None else layer.bias * after
            return product(layer.weight * before * after, bias, precision)

        size = math.sqrt(block.ln_1.weight.numel())  # see `_norm`
        self.apply_variants = block.attn.apply_variants
        self.qkv = folded(block.attn.c_attn, size * block.ln_1.weight)
        self.out = folded(block.attn.c_proj)
        self.inner = folded(block.mlp.c_fc, size * block.ln_2.weight, SLOPE)
        self.outer = folded(block.mlp.c_proj, 1 / SLOPE)


class Decoder:
    """Compute the logits of several positions of every image per pass.

    A pass writes the keys and values of its positions into the cache, over those of an earlier
    pass if there are any. A decoder has a second copy of the weights.

    Raises:
        InputError: the model's attention is not causal.
    """

    @torch.inference_mode()
    def __init__(self, model: ImageGPT, batch: int, precision: SamplingPrecision = "fp32") -> None:
        config, weight = model.config, model.wte.weight
        config.trained_as.require("causal", "sampling pixel by pixel")
        self.model, self.config, self.batch = model, config, batch
        self.varied = not config.variants.faithful
        self.kind = cache_type(precision, weight.dtype)
        # Keys and values; the positions of a head are next to each other, as attention reads them.
        shape = (batch, 2, config.n_head, config.n_pixels, config.n_embd // config.n_head)
        self.caches = [weight.new_zeros(shape, dtype=self.kind) for _ in range(config.n_layer)]
        self.layers = [_Layer(block, precision) for block in model.h if isinstance(block, Block)]
        # The logits decide, so that the last product is not in int8.
        head = "fp32" if precision == "int8" else precision
        self.head = product(
            model.lm_head.weight * model.ln_f.weight * math.sqrt(config.n_embd), None, head
        )
        heads = torch.arange(batch * 2 * config.n_head, device=weight.device)
        self.first_rows = (heads * config.n_pixels).view(shape[:3])[..., None]  # [B, 2, H, 1]
        self.rope: Tensor | None = None  # [n, 2, K]
        if config.positions == "rotary":
            positions = torch.arange(config.n_pixels, device=weight.device)
            self.rope = rope_table(positions, config.n_embd // config.n_head, config.resolution)

    @torch.inference_mode()
    def prefill(self, inputs: Tensor) -> None:
        """Write the keys and values of the first positions: inputs [B, T].

        Images with the same inputs share the computation.
        """
        if inputs.shape[1] == 0:
            return
        unique, images = torch.unique(inputs, dim=0, return_inverse=True)
        size = max(1, _PREFILL_ROWS // len(unique))
        for part in torch.split(torch.arange(inputs.shape[1], device=inputs.device), size):
            self._pass(unique[:, part], part.expand(len(unique), -1), int(part[-1]) + 1)
        # Every image with a number below len(unique) is overwritten from a copy.
        for cache in self.caches:
            filled = cache[:, :, :, : inputs.shape[1]]
            filled.copy_(filled[: len(unique)].clone()[images])

    @torch.inference_mode()
    def logits(self, inputs: Tensor, positions: Tensor, span: int) -> Tensor:
        """Return the logits of the pixels at some positions, [B, T, V].

        Args:
            inputs: tokens that enter there, [B, T]; at position 0 the start token, at position i
                pixel i - 1.
            positions: [B, T]; those before must be in the cache.
            span: number of positions of the cache that are read, above all positions.
        """
        x = self._pass(inputs, positions, span)
        return self.head(_norm(x)).view(inputs.shape[0], inputs.shape[1], -1)

    def _pass(self, inputs: Tensor, positions: Tensor, span: int) -> Tensor:
        """Return the last block's output, [B T, D]; B may be below the decoder's batch."""
        (batch, length), config = inputs.shape, self.config
        x: Tensor = self.model.wte(inputs)  # [B, T, D]
        if config.positions == "learned":
            x = x + self.model.wpe(positions)
        x, first = x.flatten(0, 1), None
        rope = None if self.rope is None else self.rope[positions][:, None]
        mask = None
        if x.device.type != "cpu" or batch * length > 1 or int(positions) + 1 < span:
            mask = self._mask(positions, span)
        rows = (self.first_rows[:batch] + positions[:, None, None]).flatten()
        for layer, cache in zip(self.layers, self.caches, strict=True):
            qkv = layer.qkv(_norm(x)).to(self.kind)  # [B T, 3 D]
            qkv = qkv.view(batch, length, 3, config.n_head, -1).transpose(1, 3)  # [B, H, 3, T, K]
            q, written = qkv[:, :, 0], qkv[:, :, 1:].transpose(1, 2)  # [B, 2, H, T, K]
            if self.varied:
                k, v = written.unbind(1)
                q, k, v, first = layer.apply_variants(q, k, v, first, rope)
                written = torch.stack([k, v], 1)
            cache.view(-1, cache.shape[-1]).index_copy_(0, rows, written.flatten(0, 3))
            keys, values = cache[:batch, :, :, :span].unbind(1)  # [B, H, span, K] each
            read = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            x = x + layer.out(read.transpose(1, 2).reshape(batch * length, -1))
            x = x + layer.outer(F.silu(layer.inner(_norm(x))))
        return x

    def _mask(self, positions: Tensor, span: int) -> Tensor:
        """Return 0 where a position may attend and -infinity elsewhere, [B, 1, T, span]."""
        seen = torch.arange(span, device=positions.device) <= positions[..., None]
        mask = torch.zeros(seen.shape, dtype=self.kind, device=positions.device)
        mask.masked_fill_(~seen, -torch.inf)
        return mask[:, None]


def _norm(x: Tensor) -> Tensor:
    """Return x divided by its length, [M, D]: its RMS norm without a gain, over sqrt(D).

    F.rms_norm takes several times as long for a few rows on a CPU.
    """
    return x * x.square().sum(-1, keepdim=True).add_(x.shape[-1] * NORM_EPS).rsqrt_()
