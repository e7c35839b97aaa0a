"""Measure the cost of spinning threads: alone, and next to two busy processes.

OpenMP's threads spin while they wait. If another process uses their core, each of the many waits of
a step takes until the scheduler switches, milliseconds later. Each run is a process of its own; the
settings alternate.
"""

import json
import os
import statistics
import subprocess
import sys

from common import record, run, show

SETTINGS: dict[str, dict[str, str]] = {
    "spinning (default)": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin 1,000": {"GOMP_SPINCOUNT": "1000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
SHAPES = {  # layers, width, heads, resolution, batch
    "tiny, 8 px": (4, 64, 2, 8, 32),
    "digits, 8 px": (6, 128, 4, 8, 32),
    "photos, 16 px": (6, 128, 4, 16, 16),
    "8 x 192, 16 px": (8, 192, 6, 16, 16),
}
STEP = """
import json, sys, time
import torch
from igpt.allocator import keep_freed_memory
from igpt.model.config import ModelConfig
from igpt.model.objectives import Autoregressive
from igpt.model.transformer import ImageGPT

keep_freed_memory()
layers, width, heads, resolution, batch = json.loads(sys.argv[1])
seconds = float(sys.argv[2])
torch.manual_seed(0)
shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "resolution": resolution}
model = ImageGPT(ModelConfig(**shape, n_colors=128))
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
tokens = torch.randint(0, 128, (batch, resolution**2))
taken = []
end = time.perf_counter() + seconds
while time.perf_counter() < end or len(taken) < 4:
    began = time.perf_counter()
    total, count = Autoregressive().loss(model, tokens)
    (total / count).backward()
    optimizer.step()
    optimizer.zero_grad()
    taken.append(time.perf_counter() - began)
print(json.dumps(sorted(taken[2:])[len(taken[2:]) // 2]))
"""
BUSY = "while True: pass"


def step_seconds(shape: tuple[int, ...], setting: dict[str, str], seconds: float) -> float:
    """Return the median time of a step in a process of its own."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))
    }
    command = [sys.executable, "-c", STEP, json.dumps(shape), str(seconds)]
    done = subprocess.run(
        command, env={**kept, **setting}, capture_output=True, text=True, check=True
    )
    return float(json.loads(done.stdout))


def main(rounds: int = 3, seconds: float = 2.0, shapes: tuple[str, ...] = tuple(SHAPES)) -> None:
    """Time training steps in fp32 with several ways of waiting.

    Args:
        rounds: processes for each setting, in turns.
        seconds: of steps in each process.
        shapes: names of those to time.
    """
    found: dict[tuple[str, str, str], list[float]] = {}
    for load in ("alone", "next to two busy processes"):
        busy = [
            subprocess.Popen([sys.executable, "-c", BUSY])
            for _ in range(0 if load == "alone" else 2)
        ]
        try:
            for shape in shapes:
                for _ in range(rounds):
                    for name, setting in SETTINGS.items():
                        taken = step_seconds(SHAPES[shape], setting, seconds)
                        found.setdefault((shape, load, name), []).append(taken)
        finally:
            for process in busy:
                process.kill()
    rows = [
        {
            "shape": shape,
            "load": load,
            "setting": name,
            "milliseconds": round(1000 * statistics.median(taken), 2),
        }
        for (shape, load, name), taken in found.items()
    ]
    for row in rows:
        default = next(
            other["milliseconds"]
            for other in rows
            if (other["shape"], other["load"], other["setting"])
            == (row["shape"], row["load"], "spinning (default)")
        )
        row["default_over_this"] = round(float(default) / float(row["milliseconds"]), 3)
    show(
        "Median milliseconds of a step",
        list(rows[0]),
        [[str(value) for value in row.values()] for row in rows],
    )
    record("waiting", {"n": rounds, "seconds": seconds, "unit": "ms a step", "rows": rows})


if __name__ == "__main__":
    run(main)
