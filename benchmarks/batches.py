"""Measure the time and memory of training batches, and the effect of prefetching.

A synthetic token set is read in three ways (kept in memory; memory-mapped while rows are read;
every shard memory-mapped permanently), warm and with the page cache emptied before every batch, and
a small model is trained on it with and without prefetching. Every measurement is a process of its
own; the cases alternate, and the medians are reported.

    OMP_NUM_THREADS=1 python benchmarks/batches.py --gigabytes 4
"""

import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from common import record

from igpt.data.images.palette import Palette
from igpt.data.tokens.batches import Batches
from igpt.data.tokens.dataset import TokenDataset, TokenSplit
from igpt.data.tokens.manifest import SPLITS, write_manifest, write_shard
from igpt.training import trainer
from igpt.training.metrics import read_metrics
from igpt.training.pretrain import PretrainConfig, pretrain

COLORS, SHARD_BYTES = 512, 1 << 24


@dataclass(frozen=True)
class Settings:
    gigabytes: float = 4.0  # of tokens
    resolution: int = 32  # a power of two
    batch_size: int = 128
    seconds: float = 5.0  # of each measurement of batches
    updates: int = 60  # of each training; the first third is not counted
    repeats: int = 5
    seed: int = 0
    scratch: str = tempfile.gettempdir()  # the token set is written here, and removed


def write_tokens(folder: Path, settings: Settings) -> int:
    """Write the token set; return the number of training images."""
    generator = np.random.default_rng(settings.seed)
    tokens = generator.integers(0, COLORS, SHARD_BYTES // 2, dtype=np.uint16).reshape(
        -1, settings.resolution**2
    )
    labels = np.zeros(len(tokens), np.int32)
    count = max(1, round(settings.gigabytes * 1e9 / tokens.nbytes))
    folder.mkdir()
    shards = {
        name: [write_shard(folder, f"{name}-00000", tokens[:64], labels[:64])] for name in SPLITS
    }
    shards["train"] = [
        write_shard(folder, f"train-{number:05d}", tokens, labels) for number in range(count)
    ]
    about = {
        "palette": Palette.from_centers(generator.uniform(-1, 1, (COLORS, 3))),
        "class_names": None,
        "made": {},
    }
    write_manifest(
        folder, resolution=settings.resolution, splits=shards, source="a benchmark", **about
    )
    return count * len(tokens)


def forget(files: list[Path]) -> None:
    """Remove some files from the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def read(folder: Path, settings: Settings, way: str, cold: bool) -> dict[str, float]:
    """Return images/s, and the MB that opening and reading left resident."""
    split = TokenDataset(folder)["train"]
    files = sorted(folder.glob("train-*.tokens.npy"))
    for file in [] if cold else files:
        file.read_bytes()
    before = resident_mb()
    if way == "plain map":
        split = TokenSplit("train", [np.load(file, mmap_mode="r") for file in files], [])
    room = split.nbytes if way == "held" else 0
    batches = Batches(
        split, settings.resolution, settings.batch_size, settings.seed, held_bytes=room
    )
    batches.tokens(0)
    step, spent = 0, 0.0
    while spent < settings.seconds:
        if cold:
            forget(files)
        began = time.perf_counter()
        batches.tokens(step)
        spent += time.perf_counter() - began
        step += 1
    return {
        "images_per_second": step * settings.batch_size / spent,
        "resident_mb": resident_mb() - before,
    }


@contextmanager
def direct(make: Callable[[int], Any], device: object) -> Iterator[Callable[[int], Any]]:
    """Replace `Prefetch`: make a batch when it is requested."""
    yield make


def train(folder: Path, settings: Settings, prefetched: bool) -> dict[str, float]:
    """Return steps/s of a small BERT model with flips and shifts, whose batches take the most
    work."""
    if not prefetched:
        trainer.Prefetch = direct  # type: ignore[misc, assignment]
    shape = {"n_layer": 1, "n_embd": 32, "n_head": 1, "objective": "bert", "flip": True, "shift": 4}
    sizes = {
        "batch_size": settings.batch_size,
        "steps": settings.updates,
        "log_every": 1,
        "validation_images": 8,
    }
    rest = {"tokens": folder, "seed": settings.seed, "precision": "fp32"}
    with tempfile.TemporaryDirectory(dir=settings.scratch) as run:
        pretrain(PretrainConfig.layered(shape, sizes, rest), Path(run) / "run")
        lines = [
            line
            for line in read_metrics(Path(run) / "run" / "metrics.jsonl")
            if line["kind"] == "train"
        ]
    rates = [line["images_per_second"] for line in lines[settings.updates // 3 :]]
    return {"updates_per_second": float(np.median(rates)) / settings.batch_size}


CASES: dict[str, Any] = {
    "held, warm": (read, "held", False),
    "mapped, warm": (read, "mapped", False),
    "mapped, cold": (read, "mapped", True),
    "plain map, warm": (read, "plain map", False),
    "plain map, cold": (read, "plain map", True),
    "training, prefetched": (train, True),
    "training, not prefetched": (train, False),
}


def main(settings: Settings) -> None:
    """Measure, print a table and write JSON."""
    folder = Path(tempfile.mkdtemp(dir=settings.scratch)) / "tokens"
    try:
        images = write_tokens(folder, settings)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
            for _ in range(settings.repeats):
                for name, (measure, *how) in CASES.items():
                    found[name].append(processes.apply(measure, (folder, settings, *how)))
    finally:
        shutil.rmtree(folder.parent)
    medians = {}
    for name, runs in found.items():
        medians[name] = row = {key: float(np.median([run[key] for run in runs])) for key in runs[0]}
        print(
            f"{name:26}"
            + "".join(f"{value:14,.1f} {key.replace('_', ' ')}" for key, value in row.items())
        )
    about = {key: value for key, value in asdict(settings).items() if key != "scratch"}
    record("batches", {"settings": about, "images": images, "medians": medians, "runs": found})


if __name__ == "__main__":
    main(tyro.cli(Settings))
