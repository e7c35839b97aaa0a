"""Measurements of train.py: rounds of contenders, peak rate of matrix products, peak memory.

D width, n positions.
"""

import gc
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_contenders import ENTRIES, Job, Made, Precision

from igpt.model.config import ModelConfig
from igpt.model.cost import count_parameters
from igpt.model.objectives import pixel_losses
from igpt.model.transformer import ImageGPT
from igpt.training import engine
from igpt.training.distributed import World, distributed_world
from igpt.training.settings import Recomputation

TYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # nats/pixel, of the loss at the start
TURN_SECONDS = 0.5  # at least


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison.

    Attributes:
        shapes: of small, igpt-s, igpt-l; without it small and igpt-s on a CPU, igpt-s and igpt-l on
            a GPU.
        contenders: by name (`--contenders all` names all); without it those that make sense on the
            machine.
        rounds: rounds of each, or fewer if time is short.
        minutes: roughly, for everything; without it 13 on a CPU, 9 on a GPU.
        layers: of the model, to try things out.
        batch_size: of all; without it the shape's, or less if a step would take too long.
        micro_batch_size: of all; without it what should fit.
        activation_checkpointing: igpt's.
        keep_freed: let glibc keep freed memory, for all contenders.
        memory: also measure the peak memory of each, in a process of its own (on a GPU it is
            always printed).
        result: name of the file in results/; without it "train" or "train-GPU".
    """

    shapes: tuple[str, ...] = ()
    contenders: tuple[str, ...] = ()
    rounds: int = 5
    minutes: float | None = None
    layers: int | None = None
    batch_size: int | None = None
    micro_batch_size: int | None = None
    activation_checkpointing: Recomputation = "none"
    keep_freed: bool = True
    memory: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    result: str | None = None


@dataclass
class Contender:
    """A model that trains, and its measurements."""

    name: str
    job: Job
    made: Made | None = None
    updates: int = 1  # of a round
    last: float = 0.0  # seconds of the last round
    spent: float = 0.0  # seconds of the rounds after the first
    first_counts: bool = (
        False  # the first step is the measurement, because it is too slow to be repeated
    )
    rates: dict[int, float] = field(default_factory=dict)  # tokens/s, by round
    found: dict[str, Any] = field(default_factory=dict)
    skipped: str | None = None

    def due(self, allowed: float) -> bool:
        """Return whether another round fits into the time limit."""
        return not self.skipped and not self.first_counts and self.spent + self.last <= allowed


class Bench:
    """Measure on one device."""

    def __init__(self, world: World) -> None:
        self.world, self.gpu = world, world.device.type == "cuda"

    def seconds(self, call: Callable[[], object], times: int = 1) -> float:
        """Return the mean wall seconds of consecutive calls, device included."""
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            call()
        self.wait()
        return (time.perf_counter() - start) / times

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def ceiling(self, config: ModelConfig, rows: int, precision: Precision) -> float:
        """Return FLOP/s of the fastest matrix product of the layers, forward and backward."""
        best, width = 0.0, config.n_embd
        for inner, outer in ((width, 3 * width), (width, 4 * width), (4 * width, width)):
            sizes = ((rows, inner), (outer, inner), (rows, outer))
            x, w, g = (
                torch.randn(size, device=self.world.device).to(TYPES[precision]) for size in sizes
            )
            calls = (
                lambda x=x, w=w: F.linear(x, w),
                lambda g=g, w=w: g @ w,
                lambda x=x, g=g: g.t() @ x,
            )
            for call in calls:
                call()
                took = self.seconds(call)
                if took < 0.1:  # several, and the best of several
                    took = min(took, *(self.seconds(call, 1 + int(0.02 / took)) for _ in range(3)))
                best = max(best, 2 * rows * inner * outer / took)
        return best

    def ceiling_rows(self, config: ModelConfig, tokens: int, precision: Precision) -> int:
        """Return the tokens to measure peak FLOP/s with, few enough to repeat every product."""
        rows = min(tokens, 1 << 15)
        weight = torch.ones(
            4 * config.n_embd, config.n_embd, dtype=TYPES[precision], device=self.world.device
        )
        while rows > 512:
            inputs = torch.ones(
                rows, config.n_embd, dtype=TYPES[precision], device=self.world.device
            )
            if self.seconds(lambda inputs=inputs: F.linear(inputs, weight)) < 0.15:
                break
            rows //= 2
        return rows

    def turn(
        self,
        contender: Contender,
        number: int,
        tokens: Tensor,
        reference: float,
        budget: float,
        keep: bool,
    ) -> None:
        """Time steps of a contender, which is created if necessary, and kept if `keep`."""
        start = time.perf_counter()
        tokens = tokens[: contender.job.batch_size]
        while not contender.skipped and number not in contender.rates:
            try:
                if contender.made is None:
                    self.prepare(contender, tokens, reference, budget)
                else:
                    update = contender.made.update
                    contender.last = self.seconds(
                        lambda update=update: update(tokens), contender.updates
                    )
                    contender.rates[number] = tokens.numel() / contender.last
            # a contender that cannot run here is skipped, and the others continue
            except Exception as error:
                full = (
                    isinstance(error, torch.OutOfMemoryError) and contender.job.micro_batch_size > 1
                )
                if not full:
                    contender.skipped = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                    traceback.print_exc(limit=-3)
            else:
                continue
            self.release(
                [contender], forget=not keep
            )  # here the error's frames, and their objects, are gone
            if full:
                contender.job = replace(
                    contender.job, micro_batch_size=contender.job.micro_batch_size // 2
                )
        if self.gpu:
            contender.found["peak_bytes"] = torch.cuda.max_memory_allocated()
        if not keep or contender.first_counts:
            self.release([contender], forget=not keep)
        took = time.perf_counter() - start
        contender.last = contender.last * contender.updates if keep else took
        contender.spent += contender.last if number else 0.0
        line = contender.skipped or f"{contender.rates[number]:,.0f} tokens/s ({took:.0f} s)"
        print(f"round {number + 1}, {contender.name}: {line}", file=sys.stderr, flush=True)

    def prepare(
        self, contender: Contender, tokens: Tensor, reference: float, budget: float
    ) -> None:
        """Create a contender, check that it does the same work as the others, and warm it up."""
        entry = ENTRIES[contender.name]
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        made = entry.make(contender.job, self.world)
        losses: list[Tensor] = []
        took = self.seconds(lambda: losses.append(made.update(tokens)))
        off = float(losses[0]) - reference
        if "loss_off" not in contender.found:  # later it has the same result
            parameters = count_parameters(contender.job.config)
            same = made.parameters == parameters and abs(off) <= TOLERANCE[entry.precision]
            work = {
                "same_work": same,
                "parameters": made.parameters,
                "zero_biases": made.zero_biases,
            }
            contender.found |= {
                **work,
                "loss": float(losses[0]),
                "loss_off": off,
                "first_update_seconds": took,
            }
            if not same:
                print(
                    f"{contender.name} DOES OTHER WORK: {work}, loss off by {off}", file=sys.stderr
                )
        if took > budget / 3 and not entry.compiled and not contender.rates:
            contender.first_counts = True
            contender.rates[0] = tokens.numel() / took
        elif entry.compiled or took < budget / 10:
            for _ in range(
                2 if entry.compiled else 1
            ):  # the second still compiles, or has page faults
                took = self.seconds(lambda: made.update(tokens))
        contender.updates = max(1, round(TURN_SECONDS / took))
        contender.made = made

    def release(self, contenders: Sequence[Contender], forget: bool = True) -> None:
        """Free the memory of contenders, and with `forget` also their compiled code."""
        for contender in contenders:
            contender.made = None
        if forget:
            torch._dynamo.reset()
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        if self.gpu:
            return torch.cuda.mem_get_info()[0]
        return _kilobytes("/proc/meminfo", "MemAvailable") * 1024

    def references(self, config: ModelConfig, directory: Path, tokens: Tensor) -> list[float]:
        """Write the model that all start from; return its loss on each image, nats/pixel, in
        fp32."""
        torch.manual_seed(0)
        model = ImageGPT(config)
        nn.init.normal_(
            model.lm_head.weight, std=0.02
        )  # with zeros the loss would not depend on the rest
        model.save_pretrained(directory)
        model.to(self.world.device).eval()
        losses = []
        with torch.inference_mode():
            for image in tokens.split(1) if config.n_pixels > 256 else tokens.split(64):
                losses += pixel_losses(model(image), image).mean(dim=1).tolist()
        return losses


def _kilobytes(file: str, key: str) -> int:
    found = re.search(rf"^{key}:\s*(\d+) kB", Path(file).read_text(), re.MULTILINE)
    assert found, f"{file} has {key}"
    return int(found[1])


def peak_growth(name: str, job: Job, settings: Settings) -> int:
    """Return the growth of the peak resident set of a new process due to a contender."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(_peak_growth, name, job, settings).result()


def _peak_growth(name: str, job: Job, settings: Settings) -> int:
    set_allocator(settings)
    with distributed_world(settings.device) as world:
        before = _kilobytes("/proc/self/status", "VmRSS")
        made = ENTRIES[name].make(job, world)
        shape = (job.batch_size, job.config.n_pixels)
        for _ in range(2):  # AdamW's moments are allocated in the first
            made.update(torch.randint(job.config.n_colors, shape))
    return (_kilobytes("/proc/self/status", "VmHWM") - before) * 1024


def set_allocator(settings: Settings) -> None:
    if settings.keep_freed:
        engine.keep_freed_memory()
    else:
        engine.keep_freed_memory = lambda: None  # which Engine would call
