"""Which numbers products are computed in: bf16 where the processor multiplies it faster, fp32 elsewhere."""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["bf16", "fp32"]


def settle_precision(precision: Precision | Literal["auto"], device: torch.device) -> Precision:
    """ "bf16" or "fp32" for "auto": bf16 where the device multiplies it faster, measured on a CPU."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(1024, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        _ = left @ right  # the first product also chooses a kernel
        times = []
        for _ in range(5):
            started = time.perf_counter()
            _ = left @ right
            times.append(time.perf_counter() - started)
        seconds[dtype] = min(times)
    return "bf16" if seconds[torch.bfloat16] < 0.8 * seconds[torch.float32] else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Runs products in bf16, or everything in fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
