"""Precision of matrix products: bf16 where the processor has instructions for it, or fp32."""

import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Literal

import torch

Precision = Literal["bf16", "fp32"]
TYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}

# CPU capabilities that multiply bf16: AMX tiles, AVX-512, and ARM's instructions (names of
# `torch.cpu.get_capabilities`). Without them oneDNN emulates bf16, much more slowly than fp32.
_BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")


@cache
def matmul_rate(precision: Precision, device: torch.device) -> float:
    """Return the FLOP/s of a large matrix product: the best of up to five in a quarter of a second.

    MFU in metrics.jsonl is relative to it; no decision depends on it.
    """
    rows, inner, columns = (8192, 8192, 8192) if device.type == "cuda" else (1024, 512, 1024)
    left = torch.ones(rows, inner, dtype=TYPES[precision], device=device)
    right = torch.ones(columns, inner, dtype=TYPES[precision], device=device).t()
    seconds: list[float] = []
    while len(seconds) < 6 and sum(seconds) < 0.25:  # the first one also chooses a kernel
        started = time.perf_counter()
        _ = left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * rows * inner * columns / min(seconds)


def resolve_precision(precision: Precision | Literal["auto"], device: torch.device) -> Precision:
    """Return the precision that "auto" means on a device; any other is returned unchanged.

    It depends on the processor's capabilities alone, so that it is the same at every start.
    """
    if precision != "auto":
        return precision
    return "bf16" if multiplies_bf16(device.type) else "fp32"


@cache
def multiplies_bf16(device_type: str) -> bool:
    """Return whether a type of device has instructions for bf16 products."""
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False  # PyTorch's own bf16 products use no such instructions
    return has_bf16_instructions() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_bf16_instructions() -> bool:
    """Return whether the CPU has instructions that multiply bf16."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in _BF16_INSTRUCTIONS)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which matrix products run in bf16, or everything in fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
