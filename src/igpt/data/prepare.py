"""Images -> a token data set: palette, tokens, shards; in parallel, and continued where it was interrupted."""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread, current_thread, main_thread
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from igpt.config import Config
from igpt.data.images import decode, to_square
from igpt.data.palette import Palette, nearest_color_error
from igpt.data.sources import Source, open_source
from igpt.data.tokens import Shard, TokenDataset, write_manifest, write_shard
from igpt.errors import InputError
from igpt.files import atomic_folder, read_json, write_json

PLAN = "plan.json"
SHARD_IMAGES = 8192
PALETTE_PIXELS = 2_000_000  # of the training images, drawn by seed; k = 512 needs no more
ALONE_BELOW = 4096  # images; starting workers costs more than they gain
_AT_ONCE = 256  # images held as pixels


class PrepareConfig(Config):
    """How images become tokens."""

    size: int = Field(32, ge=2, le=1024, description="model resolution in pixels; the paper has 32, 48 and 64")
    colors: int = Field(512, ge=2, le=65535, description="palette size; greyscale data gets as many levels as it has")
    palette: Path | None = Field(None, description="use this palette (.npy, token data set, model) and fit none")
    image_column: str | None = Field(None, description="column of images; found by type when there is one")
    label_column: str | None = Field(None, description="column of classes; found by type; 'none' ignores labels")
    held_out: float = Field(0.1, gt=0, lt=0.5, description="share split off for a missing validation or test split")
    seed: int = Field(0, ge=0, lt=2**63, description="of the palette and of the splits")
    on_error: Literal["stop", "skip"] = Field("stop", description="what an image that does not decode does")


@dataclass(frozen=True)
class _Job:
    split: str
    number: int
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"


@dataclass(frozen=True)
class _Work:
    """All that a worker needs for any shard."""

    splits: dict[str, Source]
    palette: Palette
    config: PrepareConfig
    folder: Path

    def __call__(self, job: _Job) -> dict[str, Any]:
        source = self.splits[job.split]
        tokens, kept, skipped = [], [], []
        for first in range(job.first, job.last, _AT_ONCE):
            positions = np.arange(first, min(first + _AT_ONCE, job.last))
            squares, decoded, lines = _decode_squares(source, positions, self.config)
            tokens.append(self.palette.transform(squares).reshape(len(squares), self.config.size**2))
            kept.append(decoded)
            skipped += [f"{job.split} {line}" for line in lines]
        shard = write_shard(self.folder, job.name, np.concatenate(tokens), source.labels[np.concatenate(kept)])
        result = {"shard": vars(shard), "skipped": skipped}
        write_json(self.folder / f"{job.name}.done.json", result)
        return result


def prepare(
    source: str,
    out: Path,
    config: PrepareConfig,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> TokenDataset:
    """Turns a source of images into a token data set.

    Shards are written under `OUT.partial`, which becomes `out` when all are there; interrupted work is continued by
    the same call. The result does not depend on `workers`.

    Args:
        source: see `open_source`.
        out: the folder to make; it must not exist.
        workers: processes that decode and tokenise.
        progress: called with (images done, images in all).

    Raises:
        InputError: what the source, an image (`on_error="stop"`) or `out` has wrong.
    """
    if out.exists():
        raise InputError(f"{out} exists already; remove it or choose another -o")
    if workers < 1:
        raise InputError(f"at least one worker is needed, not {workers}")
    splits, class_names = open_source(
        source,
        image_column=config.image_column,
        label_column=config.label_column,
        held_out=config.held_out,
        seed=config.seed,
    )
    folder = out.with_name(out.name + ".partial")
    made: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "images": {name: len(rows) for name, rows in splits.items()},
    }
    palette, quality = _settle_palette(folder, source, splits["train"], config, made)
    work = _Work(splits, palette, config, folder)
    total = sum(map(len, splits.values()))
    jobs = [
        _Job(name, number, first, min(first + SHARD_IMAGES, len(rows)))
        for name, rows in splits.items()
        for number, first in enumerate(range(0, len(rows), SHARD_IMAGES))
    ]
    waiting = [job for job in jobs if not (folder / f"{job.name}.done.json").exists()]
    done = total - sum(job.last - job.first for job in waiting)
    with _runner(work, workers if total >= ALONE_BELOW else 1) as run:
        for job, _ in zip(waiting, run(waiting), strict=True):
            done += job.last - job.first
            if progress:
                progress(done, total)
    results = {job: read_json(folder / f"{job.name}.done.json", "shard record") for job in jobs}
    skipped = [line for result in results.values() for line in result["skipped"]]
    made |= {"skipped": skipped, "palette_error": quality}
    shards = {
        name: [Shard(**result["shard"]) for job, result in results.items() if job.split == name] for name in splits
    }
    if not sum(shard.count for shard in shards["train"]):
        raise InputError(f"no training image of {source} decodes; the first: {skipped[0]}")
    write_manifest(
        folder,
        resolution=config.size,
        palette=palette,
        class_names=class_names,
        splits=shards,
        source=source,
        made=made,
    )
    # The plan goes last: wherever a kill falls, the same call finishes the work or `out` is complete.
    for left in [*folder.glob("*.done.json"), *folder.glob(".*.tmp")]:
        left.unlink()
    folder.rename(out)
    (out / PLAN).unlink()
    return TokenDataset(out)


def _settle_palette(
    folder: Path, source: str, train: Source, config: PrepareConfig, made: dict[str, Any]
) -> tuple[Palette, dict[str, Any]]:
    """The palette of this data set: an interrupted preparation's, a given one, or one fitted to training pixels."""
    if folder.exists():
        return _continue_plan(folder, {"source": source, **made})
    given = Palette.load(config.palette) if config.palette else None
    count = min(len(train), max(1, PALETTE_PIXELS // config.size**2))
    chosen = np.sort(np.random.default_rng(config.seed).permutation(len(train))[:count])
    squares, _, skipped = _decode_squares(train, chosen, config)
    if not len(squares):
        raise InputError(f"no training image of {source} decodes; the first: {skipped[0]}")
    palette = given or Palette(config.colors, seed=config.seed).fit(squares)
    quality = nearest_color_error(palette, squares)
    centers = palette.centers_.tolist()
    with atomic_folder(folder) as temporary:
        plan = {"source": source, **made, "palette_error": quality, "palette": {"centers": centers}}
        write_json(temporary / PLAN, plan)
    return palette, quality


def _continue_plan(folder: Path, wanted: dict[str, Any]) -> tuple[Palette, dict[str, Any]]:
    if not (folder / PLAN).exists():
        raise InputError(f"{folder} exists and holds no unfinished work; remove it or choose another -o")
    plan = read_json(folder / PLAN, "plan")
    begun = {key: plan[key] for key in wanted}
    # Work that an image stopped may go on with such images skipped: all that is done so far had none.
    if begun["config"]["on_error"] == "stop":
        begun["config"] |= {"on_error": wanted["config"]["on_error"]}
    if begun != wanted:
        raise InputError(f"{folder} holds unfinished work with other settings; remove it or choose another -o")
    write_json(folder / PLAN, plan | begun)
    return Palette.load(folder / PLAN), plan["palette_error"]


def _decode_squares(
    source: Source, positions: NDArray[np.int64], config: PrepareConfig
) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[str]]:
    """RGB squares uint8 [M, size, size, 3] of the images that decode, their positions, and a line for each other."""
    squares, kept, skipped = [], [], []
    for position, image in zip(positions, source.images(positions), strict=True):
        try:
            squares.append(to_square(decode(image), config.size))
            kept.append(position)
        except InputError as error:
            message = f"{source.name_of(position)}: {error}"
            if config.on_error == "stop":
                raise InputError(f"image {message} (--on-error skip lists such images and goes on)") from None
            skipped.append(message)
    shape = (len(squares), config.size, config.size, 3)
    return np.array(squares, dtype=np.uint8).reshape(shape), np.array(kept, dtype=np.int64), skipped


_worker_work: _Work | None = None  # of a worker process: sent once, not with every shard


def _start_worker(work: _Work) -> None:
    global _worker_work
    _worker_work = work
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Otherwise the workers of a killed parent wait for their next shard for ever.
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_in_worker(job: _Job) -> dict[str, Any]:
    assert _worker_work is not None
    return _worker_work(job)


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started in here ignore SIGINT, from their first import on."""
    if current_thread() is not main_thread():  # only it may set signals
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _runner(work: _Work, workers: int) -> Iterator[Callable[[list[_Job]], Iterator[dict[str, Any]]]]:
    """How shards are run: in this process, or in a pool of spawned ones (results in order either way)."""
    if workers == 1:
        yield lambda jobs: map(work, jobs)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(work,))

    def run(jobs: list[_Job]) -> Iterator[dict[str, Any]]:
        with _deaf_to_ctrl_c():  # workers begin here; Ctrl-C ends this process, and it ends them
            return pool.map(_run_in_worker, jobs)

    try:
        yield run
    except BrokenProcessPool:
        raise InputError(
            "a worker was killed, most often for want of memory; the same command with fewer workers goes on from here"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
