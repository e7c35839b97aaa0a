"""Compare the memory estimates of `igpt plan` with measurements of real training steps.

pretended   exact, in bf16: tensors without contents, simulated ranks, a GPU's operations one by one
computed    exact, and the peak resident memory (VmHWM) of a fresh process, on this CPU
ranks       exact: two processes with DDP
compiled    what a block keeps for its backward pass when it is compiled for this CPU
gpu         the allocator's own count, eager and compiled, if there is a GPU

Tensors are counted exactly by `tests/helpers/live_tensors.py`. Each case has a process of its own.
"""

import os
import re
import socket
import sys
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from common import record, run, show

sys.path.append(str(Path(__file__).parents[1]))
from live_tensors import as_on_a_gpu, measure_update, update_twice

from igpt.model.config import ModelConfig
from igpt.model.objectives import Autoregressive
from igpt.model.precision import resolve_precision
from igpt.model.transformer import ImageGPT
from igpt.training.distributed import World, distributed_world
from igpt.training.engine import Engine
from igpt.training.memory import kept_by_block, peak_memory
from igpt.training.presets import MODELS
from igpt.training.settings import Recomputation, TrainConfig

METHODS = ("pretended", "computed", "ranks", "compiled", "gpu")
KINDS: tuple[Recomputation, ...] = ("none", "selective", "full")
SMALL = {"resolution": 20, "n_layer": 4, "n_embd": 256, "n_head": 4}
# shape, settings besides precision and checkpointing, ranks
PRETENDED: list[tuple[dict[str, Any], dict[str, Any], int]] = [
    ({"preset": "igpt-s"}, {"batch_size": 2}, 1),
    ({"preset": "igpt-s", "resolution": 64}, {"batch_size": 1}, 1),
    ({"preset": "igpt-m"}, {"batch_size": 8, "micro_batch_size": 4}, 1),
    ({"preset": "igpt-l"}, {"batch_size": 32, "shard": 8}, 8),
    ({"preset": "igpt-l-48"}, {"batch_size": 32, "micro_batch_size": 2, "shard": 4}, 8),
    ({"preset": "igpt-xl"}, {"batch_size": 64, "shard": 8}, 64),
]
COMPUTED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *(
        ({"preset": "igpt-s"}, {"batch_size": 2, "activation_checkpointing": kind})
        for kind in KINDS
    ),
    ({"preset": "igpt-s", "resolution": 64}, {"batch_size": 1}),
]
ON_A_GPU: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"preset": "igpt-s"}, {"batch_size": 64}),
    ({"preset": "igpt-s", "resolution": 64}, {"batch_size": 8}),
    ({"preset": "igpt-m"}, {"batch_size": 32, "micro_batch_size": 16}),
    ({"preset": "igpt-l"}, {"batch_size": 16, "micro_batch_size": 8}),
]


def shape_of(shape: dict[str, Any]) -> ModelConfig:
    recipe = MODELS[shape["preset"]] if "preset" in shape else {}
    known = {key: value for key, value in recipe.items() if key in ModelConfig.model_fields}
    return ModelConfig.layered(
        known, {key: value for key, value in shape.items() if key != "preset"}
    )


def settings_of(changes: dict[str, Any], device: str = "cpu") -> TrainConfig:
    return TrainConfig.layered({"precision": "bf16", "compile": "no", "device": device}, changes)


def pretended(shape: dict[str, Any], changes: dict[str, Any], ranks: int) -> dict[str, float]:
    with as_on_a_gpu():
        live = measure_update(shape_of(shape), settings_of(changes), ranks=ranks, pretend=True)
    return {"measured": live.peak}


def computed(
    shape: dict[str, Any], changes: dict[str, Any], ranks: int, exactly: bool
) -> dict[str, float]:
    def resident(what: str) -> int:
        found = re.search(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())
        assert found
        return int(found[1]) * 1024

    model, settings = shape_of(shape), settings_of(changes)
    if exactly:
        return {"measured": measure_update(model, settings, validate=False).peak}
    before = resident("VmRSS")
    for _ in update_twice(model, settings, World(0, 1, torch.device("cpu")), validate=False):
        pass
    return {"resident": resident("VmHWM"), "resident_before": before}


def ranks_of_ddp(rank: int, port: int, changes: dict[str, Any]) -> dict[str, float]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with distributed_world("cpu") as world, as_on_a_gpu():
        return {"measured": measure_update(shape_of(SMALL), settings_of(changes), world).peak}


def on_a_gpu(shape: dict[str, Any], changes: dict[str, Any]) -> dict[str, float]:
    world = World(0, 1, torch.device("cuda", 0))
    for _ in update_twice(shape_of(shape), settings_of(changes, "cuda"), world, validate=True):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    return {
        "measured": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
    }


def kept_when_compiled(recomputation: Recomputation) -> float:
    """Return bytes per token and width that a block compiled for this CPU keeps in bf16."""
    model = ModelConfig(resolution=24, n_layer=2, n_embd=256, n_head=4)
    settings = settings_of({"activation_checkpointing": recomputation, "compile": "yes"})
    engine = Engine(
        ImageGPT(model), settings, World(0, 1, torch.device("cpu")), Autoregressive().loss
    )
    x = torch.randn(4, model.n_pixels, model.n_embd, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = engine.model.h[1](engine.model.h[0](x))
    weights = {sorted_shape(parameter) for parameter in engine.parameters}
    todo: list[Any] = [y.grad_fn]
    kept: dict[int, int] = {}
    while todo:
        node = todo.pop()
        for tensor in getattr(node, "saved_tensors", ()):
            if tensor is not None and sorted_shape(tensor) not in weights:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        todo += [before for before, _ in node.next_functions if before is not None]
    return sum(kept.values()) / (model.n_layer * x.numel())


def sorted_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(sorted(tensor.shape))


def alone(function: Any, *arguments: Any) -> Any:
    """Return the result of a function in a new process."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def row(
    method: str, shape: dict[str, Any], changes: dict[str, Any], ranks: int, found: dict[str, float]
) -> dict[str, Any]:
    model, settings = shape_of(shape), settings_of(changes)
    estimate = peak_memory(model, settings, ranks)
    predicted = estimate.total
    if (
        method == "computed" and settings.precision == "fp32"
    ):  # a CPU's scaled copies of the MLPs' weights
        blocks = model.n_layer if settings.activation_checkpointing == "none" else 1
        found["scaled_weights"] = 4 * 8 * model.n_embd**2 * blocks
        predicted += found["scaled_weights"]
    made = {
        "method": method,
        "model": shape.get("preset", f"{model.n_layer} x {model.n_embd}"),
        "resolution": model.resolution,
        "ranks": ranks,
        "precision": settings.precision,
        "checkpointing": settings.activation_checkpointing,
        "compiled": settings.compile == "yes",
        **{key: changes.get(key) for key in ("batch_size", "micro_batch_size", "shard")},
        "predicted": predicted,
        "moment": estimate.moment,
        **found,
        "error": predicted / found["measured"] - 1,
    }
    print(
        f"{made['method']} {made['model']} {made['checkpointing']}: {made['error']:+.2%}",
        flush=True,
    )
    return made


def main(only: tuple[str, ...] = METHODS) -> None:
    """Compare predicted and measured memory.

    Args:
        only: kinds of measurement; results are written when all are made.
    """
    rows, kept = [], {}
    if "pretended" in only:
        for shape, changes, ranks in PRETENDED:
            for kind in KINDS:
                one = {**changes, "activation_checkpointing": kind}
                rows.append(
                    row("pretended", shape, one, ranks, alone(pretended, shape, one, ranks))
                )
    if "computed" in only:
        # If a CPU cannot multiply bf16, a step in it takes minutes.
        fast = (
            ("fp32", "bf16")
            if resolve_precision("auto", torch.device("cpu")) == "bf16"
            else ("fp32",)
        )
        for (shape, rest), precision in product(COMPUTED, fast):
            changes = {**rest, "precision": precision}
            found = {
                **alone(computed, shape, changes, 1, True),
                **alone(computed, shape, changes, 1, False),
            }
            rows.append(row("computed", shape, changes, 1, found))
    if "ranks" in only:
        for changes in ({"batch_size": 2}, {"batch_size": 4, "micro_batch_size": 1}):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            with get_context("spawn").Pool(2) as pool:
                found = pool.starmap(
                    ranks_of_ddp, [(rank, port, changes) for rank in range(2)], chunksize=1
                )[0]
            rows.append(row("ranks", SMALL, changes, 2, found))
    if "compiled" in only:
        small = ModelConfig(resolution=24, n_embd=256, n_head=4)
        for kind in KINDS:
            estimate = kept_by_block(
                small, settings_of({"activation_checkpointing": kind}), small.n_pixels
            )
            kept[kind] = {
                "predicted": estimate / (small.n_pixels * small.n_embd),
                "compiled": alone(kept_when_compiled, kind),
            }
    if "gpu" in only and torch.cuda.is_available():
        for shape, changes in ON_A_GPU:
            for kind in KINDS:
                for compiled in ("no", "yes"):
                    one = {**changes, "activation_checkpointing": kind, "compile": compiled}
                    rows.append(row("gpu", shape, one, 1, alone(on_a_gpu, shape, one)))
    head = (
        "method",
        "model",
        "resolution",
        "ranks",
        "shard",
        "precision",
        "checkpointing",
        "compiled",
    )
    cells = [
        [
            *(made[key] for key in head),
            *(_gib(made[key]) for key in ("predicted", "measured")),
            f"{made['error']:+.2%}",
        ]
        for made in rows
    ]
    show("Peak memory of a step, GiB", [*head, "predicted", "measured", "error"], cells)
    lines = [[kind, *(f"{value:.2f}" for value in kept[kind].values())] for kind in kept]
    show(
        "What a block keeps, bytes per position and unit of width in bf16",
        ["checkpointing", "predicted", "compiled"],
        lines,
    )
    if set(only) == set(METHODS):
        result = {
            "n": "one run per case: tensors are counted, not sampled",
            "unit": "bytes",
            "rows": rows,
            "kept": kept,
        }
        record("plan", result)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


if __name__ == "__main__":
    run(main)
