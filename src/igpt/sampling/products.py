"""Products with fixed weights, for few rows at a time.

M rows, I input and O output features.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt.errors import InputError
from igpt.sampling.jobs import SamplingPrecision

Product = Callable[[Tensor], Tensor]  # [M, I] -> [M, O]
# Measured on CPUs with AVX-512 and AMX (docs/LOG.md).
_ROWS = 8  # for which oneDNN lays out weights; good for 1 to 64 rows
_FEWEST = 4  # rows that oneDNN multiplies in int8 without a delay
# From this number of weights on, oneDNN's products in fp32 are faster than plain ones.
_LARGE = 2**18
# Instructions that add products of 8-bit integers in 32 bits (names of `get_capabilities`).
_DOT_PRODUCTS = ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "dotprod")


def product(weight: Tensor, bias: Tensor | None, precision: SamplingPrecision) -> Product:
    """Return the function x W' + b: weight [O, I], bias [O].

    Raises:
        InputError: int8 where oneDNN has no such product.
    """
    if precision == "int8":
        return _int8(weight, bias)
    kind = torch.bfloat16 if precision == "bf16" else weight.dtype
    weight, bias = weight.to(kind), None if bias is None else bias.to(kind)
    if weight.device.type != "cpu":
        return lambda x: F.linear(x.to(kind), weight, bias)
    if kind in _packable() and (kind == torch.bfloat16 or weight.numel() >= _LARGE):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
        multiply = torch.ops.mkldnn._linear_pointwise
        return lambda x: multiply(x.to(kind), packed, bias, "none", [], "")
    transposed = weight.t().contiguous()  # faster for a few rows
    if bias is None:
        return lambda x: torch.mm(x.to(kind), transposed)
    return lambda x: torch.addmm(bias, x.to(kind), transposed)


def _int8(weight: Tensor, bias: Tensor | None) -> Product:
    """Return a product of 8-bit integers: one scale per output feature, and one per row of x.

    Sums of integers are exact, so that a row's result does not depend on the other rows.
    """
    scale = _scale(weight, 127 if _sums_in_32_bits() else 63)  # [O, 1]
    scales, zeros = scale[:, 0].float(), torch.zeros(len(scale), dtype=torch.int32)

    def int8(x: Tensor) -> Tensor:
        rows, x = len(x), x.to(torch.promote_types(x.dtype, torch.float32))
        if rows < _FEWEST:
            x = F.pad(x, (0, 0, 0, _FEWEST - rows))
        row_scale = _scale(x, 127)  # [M, 1]
        # Without a sign and with a zero point of 128: the form that has kernels on all processors.
        whole = (x / row_scale).round_().add_(128).to(torch.uint8)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            whole, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        y = y.to(x.dtype).mul_(row_scale)[:rows]
        return y if bias is None else y.add_(bias)

    try:
        packed = torch.ops.onednn.qlinear_prepack(
            (weight / scale).round().to(torch.int8), [_ROWS, weight.shape[1]]
        )
        int8(weight.new_zeros(1, weight.shape[1]))  # fails now, if at all, not in the first pass
    except (AttributeError, RuntimeError):
        raise InputError(
            "the precision int8 needs a build of PyTorch with oneDNN; use bf16 or fp32"
        ) from None
    return int8


def _scale(x: Tensor, limit: int) -> Tensor:
    """Return the scale with which the largest number of every row is `limit`: [M, I] -> [M, 1]."""
    return x.abs().amax(-1, keepdim=True).clamp_(min=1e-30).div_(limit)


@cache
def _sums_in_32_bits() -> bool:
    """Return whether the processor adds products of 8-bit integers in 32 bits.

    Others add two products in 16 bits, which overflow unless the weights have 7 bits.
    """
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in _DOT_PRODUCTS)


@cache
def _packable() -> set[torch.dtype]:
    """Return the types whose weights oneDNN lays out in blocks on this processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return set()
    halves = {torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set()
    return {torch.float32, *halves}
