"""Functions for all benchmarks: real images, alternating contenders, tables, and results with the
way they were made."""

import io
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tyro
from numpy.typing import NDArray
from PIL import Image

from igpt.environment import describe
from igpt.errors import InputError
from igpt.files import write_json

CIFAR10 = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
RESULTS = Path(__file__).with_name("results")


def run(main: Callable[..., None]) -> None:
    """Run `main` with the flags of the command line; a user's mistake ends in one line and exit
    code 2."""
    try:
        tyro.cli(main)
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def cifar10(folder: Path, split: str, count: int, seed: int) -> NDArray[np.uint8]:
    """Return images of CIFAR-10's "train" or "test" split, sampled by `seed` without replacement:
    uint8 [count, 32, 32, 3].

    Raises:
        InputError: the Parquet files are not below `folder`, or hold too few images.
    """
    files = sorted(folder.rglob(f"{split}-*.parquet"))
    if not files:
        raise InputError(
            f"no {split}-*.parquet of CIFAR-10 below {folder}; give its folder with --data"
        )
    column = pq.read_table(files, columns=["img"]).column("img")
    if count > len(column):
        raise InputError(f"the {split} split has {len(column)} images, not {count}; ask for fewer")
    rows = np.random.default_rng(seed).choice(len(column), count, replace=False)
    encoded = [record["bytes"] for record in column.take(rows).to_pylist()]
    return np.stack([np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in encoded])


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median wall seconds of each call; contenders alternate, so that variations of the
    machine's speed affect all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table, its first column to the left and numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    print(f"\n{title}\n")
    for first, *rest in cells:
        numbers = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *numbers]))


def record(name: str, result: dict[str, Any]) -> None:
    """Write results/NAME.json: the result, and the machine, command and commit that it was made
    with."""
    path = RESULTS / f"{name}.json"
    environment = {**describe(), "omp_num_threads": os.environ.get("OMP_NUM_THREADS")}
    write_json(path, {**result, "environment": environment})
    print(f"\nwritten to {path}")
