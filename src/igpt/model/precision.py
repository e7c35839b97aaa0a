"""Which numbers products are computed in: bf16 where the processor multiplies it faster, fp32 elsewhere."""

import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Literal

import torch

Precision = Literal["bf16", "fp32"]
TYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


@cache
def matmul_rate(precision: Precision, device: torch.device) -> float:
    """FLOP/s of a large product as linear layers have it, measured: the best of up to five in a quarter of a second."""
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


def settle_precision(precision: Precision | Literal["auto"], device: torch.device) -> Precision:
    """ "bf16" or "fp32" for "auto": bf16 where the device multiplies it faster, measured on a CPU."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return _faster_on_a_cpu()


@cache
def _faster_on_a_cpu() -> Precision:
    device = torch.device("cpu")
    return "bf16" if matmul_rate("bf16", device) > 1.25 * matmul_rate("fp32", device) else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Runs products in bf16, or everything in fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
