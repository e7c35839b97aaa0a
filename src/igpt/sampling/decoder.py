"""One step at a time through an autoregressive model: preallocated keys and values, weights laid out for it.

B batch, T places, n places of an image, D width, H heads, K head width, V colours.
"""

import threading
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt.errors import InputError
from igpt.model.norm import NORM_EPS
from igpt.model.precision import TYPES, Precision, autocast
from igpt.model.transformer import SLOPE, Block, ImageGPT, LayerCache

_BUCKET = 64  # places by which a GPU's captured steps grow
_CAPTURE = threading.Lock()
Settle = Callable[
    [Tensor, Tensor], None
]  # (place [1], logits [B, V]): writes what comes at this place


class _Product:
    """x W' + b with fixed weights, in the layout that the processor likes best for a few rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: torch.dtype, rows: int) -> None:
        self.weight, self.kind = weight.to(kind), kind
        self.bias = None if bias is None else bias.to(kind)
        # oneDNN's own blocks are read at memory's speed; plain products of few rows are not on all
        # processors.
        self.packed = weight.device.type == "cpu" and kind in _packable()
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), rows)

    def __call__(self, x: Tensor) -> Tensor:
        """[B, in] -> [B, out]."""
        x = x.to(self.kind)
        if self.packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self.weight, self.bias, "none", [], ""
            )
            return y
        return F.linear(x, self.weight, self.bias)


class _Step:
    """A block's products, with the norms' gains and the activation's constants folded into them."""

    def __init__(self, block: Block, kind: torch.dtype, rows: int) -> None:
        def product(layer: nn.Linear, before: Tensor | float = 1.0, after: float = 1.0) -> _Product:
            bias = None if layer.bias is None else layer.bias * after
            return _Product(layer.weight * before * after, bias, kind, rows)

        self.apply_variants = block.attn.apply_variants
        self.qkv = product(block.attn.c_attn, block.ln_1.weight)
        self.out = product(block.attn.c_proj)
        self.inner = product(block.mlp.c_fc, block.ln_2.weight, SLOPE)
        self.outer = product(block.mlp.c_proj, 1 / SLOPE)

    def mlp(self, x: Tensor) -> Tensor:
        """The MLP of normalised x, [B, D] -> [B, D]."""
        return self.outer(F.silu(self.inner(x)))


class Decoder:
    """Logits of one place after the other.

    `prefill` takes the places that are known, then every `advance` takes one more. On a GPU the
    steps are captured as
    CUDA graphs: nothing of a step needs the host. It holds a second copy of the blocks' weights.

    Raises:
        InputError: a BERT model.
    """

    @torch.inference_mode()
    def __init__(self, model: ImageGPT, batch: int, precision: Precision = "fp32") -> None:
        model.config.trained_as.require("causal", "sampling pixel by pixel")
        config, weight = model.config, model.wte.weight
        kind = TYPES["bf16"] if precision == "bf16" else weight.dtype
        shape = (batch, config.n_head, config.n_pixels, config.n_embd // config.n_head)
        self.model, self.precision = model, precision
        self.caches: list[LayerCache] = [
            (weight.new_zeros(shape, dtype=kind), weight.new_zeros(shape, dtype=kind))
            for _ in range(config.n_layer)
        ]
        blocks = [block for block in model.h if isinstance(block, Block)]
        self.steps = [_Step(block, kind, batch) for block in blocks]
        self.head = _Product(model.lm_head.weight * model.ln_f.weight, None, kind, batch)
        self.place = torch.zeros(1, dtype=torch.long, device=weight.device)  # of the next step
        self.filled = 0  # the same, known to the host
        self.finite = torch.ones(
            (), dtype=torch.bool, device=weight.device
        )  # whether all logits were
        self.warm = False
        self.captured: dict[int, torch.cuda.CUDAGraph] = {}  # by the places that a step reads

    @torch.inference_mode()
    def prefill(self, inputs: Tensor) -> None:
        """Takes what comes before the first step: [B, T], the start token and T - 1 pixels; or nothing."""
        assert self.filled == 0, "only an empty cache is filled"
        self.filled = inputs.shape[1]
        self.place.fill_(self.filled)
        if self.filled:
            with autocast(self.precision, inputs.device):
                x, first = self.model.embed_inputs(inputs), None
                for block, cache in zip(self.model.h, self.caches, strict=True):
                    x, first = block(x, first, cache)

    @torch.inference_mode()
    def logits(self, inputs: Tensor, span: int) -> Tensor:
        """Of what comes at the next place, [B, V], where inputs [B] enter; `span` places of the cache are read."""
        batch, width, heads = len(inputs), self.model.config.n_embd, self.model.config.n_head
        x, first = self.model.wte(inputs), None  # [B, D]
        if self.model.config.positions == "learned":
            x = x + self.model.wpe.weight.index_select(0, self.place)
        exact = span == self.filled + 1 and x.device.type == "cpu"
        mask = (
            None if exact else (torch.arange(span, device=x.device) <= self.place)[None, None, None]
        )
        for step, (keys, values) in zip(self.steps, self.caches, strict=True):
            q, k, v = step.qkv(normalise(x)).view(batch, 3, heads, 1, -1).unbind(1)  # [B, H, 1, K]
            q, k, v, first = step.apply_variants(q, k, v, first, self.place)
            keys.index_copy_(2, self.place, k)
            values.index_copy_(2, self.place, v)
            read = F.scaled_dot_product_attention(
                q, keys[:, :, :span], values[:, :, :span], attn_mask=mask
            )
            x = x + step.out(read.reshape(batch, width))
            x = x + step.mlp(normalise(x))
        return self.head(normalise(x))

    @torch.inference_mode()
    def advance(self, sequence: Tensor, settle: Settle) -> None:
        """Takes the next of a sequence [B, n + 1] (the start, then pixels), and has `settle` write the one after it.

        On a GPU, `sequence` and `settle` must be the same in all calls.
        """
        assert self.filled < self.model.config.n_pixels, "an image is full"

        def step(span: int) -> None:
            logits = self.logits(sequence.index_select(1, self.place)[:, 0], span)
            self.finite &= logits.isfinite().all()
            settle(self.place, logits)
            self.place += 1

        span = self.filled + 1
        if sequence.device.type == "cuda":
            span = min(-(-span // _BUCKET) * _BUCKET, self.model.config.n_pixels)
        if (
            sequence.device.type == "cpu" or not self.warm
        ):  # a first step by itself warms the kernels up
            step(span)
            self.warm = True
        else:
            if span not in self.captured:
                self.captured[span] = torch.cuda.CUDAGraph()
                # Graphs run one after the other and leave nothing in their pool, so that they may
                # share it. Another thread may draw meanwhile, but only one may capture.
                pool = next(iter(self.captured.values())).pool() if len(self.captured) > 1 else None
                with (
                    _CAPTURE,
                    torch.cuda.graph(
                        self.captured[span], pool=pool, capture_error_mode="thread_local"
                    ),
                ):
                    step(span)
            self.captured[span].replay()
        self.filled += 1


def normalise(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, without a gain."""
    return F.rms_norm(x, x.shape[-1:], None, NORM_EPS)


def require_finite(finite: Tensor) -> None:
    """Refuses to go on by logits that are no numbers.

    Raises:
        InputError: the model's weights are broken.
    """
    if not finite.all():
        raise InputError("the logits are not finite; the model's weights are broken")


@cache
def _packable() -> set[torch.dtype]:
    """What oneDNN packs on this processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return set()
    halves = {torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set()
    return {torch.float32, *halves}
