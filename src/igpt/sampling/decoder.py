"""Step-by-step decoding of an autoregressive model with a cache of keys and values.

B batch, T positions, n pixels of an image, D width, H heads, K head width, V colours.
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

_BUCKET = 64  # positions by which the cache that a captured step reads grows
_CAPTURE = threading.Lock()
Writer = Callable[[Tensor, Tensor], None]  # (position [1], logits [B, V]): writes the next token


class _Product:
    """x W' + b with fixed weights, in the layout that is fastest for a few rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: torch.dtype, rows: int) -> None:
        self.weight, self.kind = weight.to(kind), kind
        self.bias = None if bias is None else bias.to(kind)
        # Weights in oneDNN's blocked layout are read at the speed of memory; plain products of a
        # few rows are slower on some processors.
        self.packed = weight.device.type == "cpu" and kind in _packable()
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), rows)

    def __call__(self, x: Tensor) -> Tensor:
        """[B, in] -> [B, out]."""
        x = x.to(self.kind)
        if not self.packed:
            return F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


class _Step:
    """The matrix products of a block, with the norms' gains and activation's slope folded in."""

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
        """Apply the MLP to normalized x: [B, D] -> [B, D]."""
        return self.outer(F.silu(self.inner(x)))


class Decoder:
    """Compute the logits of one position after the other.

    `prefill` takes the positions that are known; each `advance` takes one more. On a GPU, steps are
    captured as CUDA graphs, so that a step needs nothing from the host. A decoder holds a second
    copy of the blocks' weights.

    Raises:
        InputError: the model's attention is not causal.
    """

    @torch.inference_mode()
    def __init__(self, model: ImageGPT, batch: int, precision: Precision = "fp32") -> None:
        model.config.trained_as.require("causal", "sampling pixel by pixel")
        config, weight, device = model.config, model.wte.weight, model.device
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
        self.position = torch.zeros(1, dtype=torch.long, device=device)  # of the next step
        self.filled = 0  # the same number on the host
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # whether all logits were
        self.warm = False
        self.captured: dict[int, torch.cuda.CUDAGraph] = {}  # by the positions that a step reads

    @torch.inference_mode()
    def prefill(self, inputs: Tensor) -> None:
        """Fill the empty cache with inputs [B, T]: the start token and T - 1 pixels, or nothing."""
        assert self.filled == 0, "only an empty cache is filled"
        self.filled = inputs.shape[1]
        self.position.fill_(self.filled)
        if self.filled:
            with autocast(self.precision, inputs.device):
                x, first = self.model.embed_inputs(inputs), None
                for block, cache in zip(self.model.h, self.caches, strict=True):
                    x, first = block(x, first, cache)

    @torch.inference_mode()
    def logits(self, inputs: Tensor, span: int) -> Tensor:
        """Return the logits at the next position, [B, V].

        Args:
            inputs: tokens that enter there, [B].
            span: positions of the cache that are read.
        """
        batch, width, heads = len(inputs), self.model.config.n_embd, self.model.config.n_head
        x, first = self.model.wte(inputs), None  # [B, D]
        if self.model.config.positions == "learned":
            x = x + self.model.wpe.weight.index_select(0, self.position)
        mask = None
        if span != self.filled + 1 or x.device.type != "cpu":
            mask = (torch.arange(span, device=x.device) <= self.position)[None, None, None]
        for step, (keys, values) in zip(self.steps, self.caches, strict=True):
            q, k, v = step.qkv(_norm(x)).view(batch, 3, heads, 1, -1).unbind(1)  # [B, H, 1, K]
            q, k, v, first = step.apply_variants(q, k, v, first, self.position)
            keys.index_copy_(2, self.position, k)
            values.index_copy_(2, self.position, v)
            read = F.scaled_dot_product_attention(
                q, keys[:, :, :span], values[:, :, :span], attn_mask=mask
            )
            x = x + step.out(read.reshape(batch, width))
            x = x + step.mlp(_norm(x))
        return self.head(_norm(x))

    @torch.inference_mode()
    def advance(self, sequence: Tensor, write: Writer) -> None:
        """Read the next token of a sequence and have `write` write the one after it.

        The sequence [B, n + 1] is the start token, then pixels. On a GPU, both arguments must be
        the same in all calls.
        """
        assert self.filled < self.model.config.n_pixels, "the images are complete"

        def step(span: int) -> None:
            logits = self.logits(sequence.index_select(1, self.position)[:, 0], span)
            self.finite &= logits.isfinite().all()
            write(self.position, logits)
            self.position += 1

        if sequence.device.type == "cpu":
            step(self.filled + 1)
        else:
            span = -(-(self.filled + 1) // _BUCKET) * _BUCKET
            span = min(span, self.model.config.n_pixels)
            if not self.warm:  # the first step is not captured: it warms up the kernels
                step(span)
                self.warm = True
            else:
                if span not in self.captured:
                    self._capture(step, span)
                self.captured[span].replay()
        self.filled += 1

    def _capture(self, step: Callable[[int], None], span: int) -> None:
        """Capture a step as a CUDA graph.

        Graphs run one after the other and leave nothing in their memory pool, so that they share
        one. Another thread may sample meanwhile, but only one may capture.
        """
        pool = next(iter(self.captured.values())).pool() if self.captured else None
        graph = torch.cuda.CUDAGraph()
        with _CAPTURE, torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step(span)
        self.captured[span] = graph


def require_finite(finite: Tensor) -> None:
    """Check that logits are finite.

    Raises:
        InputError: some contain NaN or infinity.
    """
    if not finite.all():
        raise InputError("the logits are not finite; the model's weights are broken")


def _norm(x: Tensor) -> Tensor:
    """Return the RMS norm of x, without a gain."""
    return F.rms_norm(x, x.shape[-1:], None, NORM_EPS)


@cache
def _packable() -> set[torch.dtype]:
    """Return the types whose weights oneDNN packs on this processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return set()
    halves = {torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set()
    return {torch.float32, *halves}
