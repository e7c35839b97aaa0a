"""Turn images into a token data set: palette, tokens and shards, in parallel and resumable.

The files are written to `OUT.partial`, which is renamed to `OUT` when it is complete:

plan.json             the settings and the palette; resuming requires the same settings
palette.png           some images, in the palette's colours too, and all of its colours
SPLIT-NNNNN.*.npy     shards: the images of one split among some thousand neighbouring rows
R-NNNNN.done.json     the record of these shards of reader R, written last
"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from igpt.data.images.palette import Palette, StoredPalette
from igpt.data.left_out import BAD, FRAMES, UNLABELLED, LeftOut, listed
from igpt.data.palette_fit import (
    NONE_TRANSPARENT,
    PaletteConfig,
    PhaseProgress,
    given_palette,
    palette_notes,
    settle_palette,
    transform_of,
)
from igpt.data.parts import PartNumber, part_path
from igpt.data.pool import running
from igpt.data.ray_pool import RayCluster
from igpt.data.sources.archives import TokenRows
from igpt.data.sources.catalogue import Split, open_source
from igpt.data.sources.readers import Reader
from igpt.data.tokenizer import Tally, Tokenizer, subset_rows
from igpt.data.tokens.cache import cache_folder, keep_copy, require_free, send
from igpt.data.tokens.dataset import TokenDataset
from igpt.data.tokens.manifest import (
    NAMES_SHOWN,
    SPLITS,
    ClassNames,
    Count,
    Shard,
    require_counts,
    require_files,
    write_manifest,
    write_shard,
)
from igpt.errors import InputError
from igpt.files import (
    Stored,
    atomic_folder,
    read_json,
    require_folder_name,
    sha256_of,
    write_json,
)
from igpt.locks import exclusive
from igpt.remote import url_of

PLAN, RECORDS, PICTURE = "plan.json", "records.json", "palette.png"
# Images of a shard, at least and at most. Within these limits, a source is cut into 32 shards, for
# as many processes.
SHARD_IMAGES = (1024, 8192)
# Bytes of tokens of a shard, at most. From 129 px on, this limit is smaller than SHARD_IMAGES[1].
SHARD_BYTES = 2**28
# Below this number of images, starting workers costs more than they gain.
MIN_IMAGES_FOR_WORKERS = 4096
_TWELVE_BITS = 4095  # the highest level of 12 bits
_MOST_WORKERS = max(64, 8 * (os.cpu_count() or 1))  # each takes about 200 MB
_MOST_PIXELS = 2**27  # of all views of an image, which are in memory together
Progress = Callable[[int, int], None]


def _with_train(images: dict[str, int]) -> dict[str, int]:
    if "train" not in images:
        raise ValueError("'train' is missing")
    return images


class _Counted(Stored):
    count: Count
    first: str


class _Levels(Stored):
    images: Count
    highest: int


class Record(Stored):
    """Schema of a shard record, `R-NNNNN.done.json`.

    Attributes:
        unlabelled: images without a label in a source with labels.
        levels_16: images of 16-bit grey levels, and the highest level.
        transparent_pixels: the number of them; only where the palette has an entry for them.
        further_frames: frames of image files after the first, and the first image with any.
    """

    images: Count
    shards: dict[str, Shard]
    skipped: list[str]
    unlabelled: _Counted | None = None
    levels_16: _Levels | None = None
    further_frames: _Counted | None = None
    transparent_pixels: Count | None = None


class _PlanConfig(Stored):
    size: int = Field(ge=1, lt=2**16)
    views: int = Field(0, ge=0)


class Plan(Stored):
    """Schema of `plan.json`.

    Attributes:
        jobs: number of shard records of each reader, in all parts together; not written by version
            0.1.0.
        part: (i, n), see `prepare_part`.
        left_out, warnings: see `made` of the data set; not written by version 0.1.0.
    """

    source: str
    config: _PlanConfig
    images: Annotated[dict[str, Count], AfterValidator(_with_train)]
    class_names: ClassNames
    shard_images: list[int]
    fingerprints: list[str]
    given_palette: str | None
    part: PartNumber
    jobs: list[Count] = Field(default_factory=list)
    palette_error: dict[str, Any]
    palette: StoredPalette
    left_out: dict[str, Any] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)


class PrepareConfig(PaletteConfig):
    """Settings of the preparation of a token data set."""

    views: int = Field(
        0,
        ge=0,
        le=1000,
        description="random crops of each training image (paper); 0: its centre square",
    )
    limit: int | None = Field(
        None, ge=1, description="use a random subset of at most this many images of each split"
    )


def record_name(reader: int, number: int) -> str:
    """Return the file name of a shard record."""
    return f"{reader}-{number:05d}.done.json"


@dataclass(frozen=True)
class _Job:
    """Neighbouring images of a reader: ascending rows [N], and the split number of each [N]."""

    reader: int
    number: int
    rows: NDArray[np.int64]
    splits: NDArray[np.uint8]

    @property
    def record(self) -> str:
        return record_name(self.reader, self.number)

    @property
    def images(self) -> dict[str, int]:
        """The number of images of each split."""
        return dict(Counter(SPLITS[split] for split in self.splits))


@dataclass(frozen=True)
class _Work:
    """Write the shards of a job. It is sent once to every worker."""

    readers: list[Reader]
    tokenizer: Tokenizer
    folder: Path

    def __call__(self, job: _Job) -> dict[str, Any]:
        tokens: dict[str, list[NDArray[np.uint16]]] = defaultdict(list)
        labels: dict[str, list[int]] = defaultdict(list)
        levels, tally = list[int](), Tally()
        transparent = self.tokenizer.palette.transparent_token
        transparent_pixels = 0
        splits = (SPLITS[split] for split in job.splits)
        reader = self.readers[job.reader]
        for image in self.tokenizer.read(reader, job.rows, tally, splits=splits):
            tokens[image.split].append(image.tokens)
            labels[image.split] += [image.label] * len(image.tokens)
            if transparent is not None:
                transparent_pixels += int((image.tokens == transparent).sum())
            if image.highest_level is not None:
                levels.append(image.highest_level)
        shards = {
            split: vars(
                write_shard(
                    self.folder,
                    f"{split}-{job.number:05d}",
                    np.concatenate(tokens[split]),
                    np.array(labels[split], dtype=np.int32),
                )
            )
            for split in tokens
        }
        record: dict[str, Any] = {
            "images": len(job.rows),
            "shards": shards,
            "skipped": tally.skipped,
        }
        if levels:
            record["levels_16"] = {"images": len(levels), "highest": max(levels)}
        if transparent is not None:
            record["transparent_pixels"] = transparent_pixels
        for key, kind in (("unlabelled", UNLABELLED), ("further_frames", FRAMES)):
            if entry := tally.left_out.entries.get(kind):
                record[key] = {"count": entry.count, "first": entry.first}
        write_json(self.folder / job.record, record)
        return record


def prepare(
    source: str,
    out: Path,
    config: PrepareConfig,
    *,
    workers: int = 1,
    cluster: RayCluster | None = None,
    progress: Progress | None = None,
    phase: PhaseProgress | None = None,
) -> TokenDataset:
    """Turn a source of images into a token data set.

    The same call resumes interrupted work. The result does not depend on `workers`.

    Args:
        source: see `open_source`.
        out: the folder to create; it must not exist. With the URL of a folder, such as
            `s3://bucket/tokens`, the data set is made in the cache and sent there.
        workers: number of processes that decode and tokenise.
        cluster: runs the jobs on its nodes, instead of `workers`.
        progress: called with (images done, images in all) while images are tokenised.
        phase: called with (title, done, in all) while a palette is made, and when tokenising
            begins.

    Raises:
        InputError: the source or `out` cannot be used, too many images do not decode, or another
            process is writing `out`.
    """
    if url := url_of(out):
        url = url.rstrip("/")
        require_free(url)
        staged = cache_folder("prepare") / hashlib.sha256(url.encode()).hexdigest()[:32]
        with exclusive(staged):
            folder, plan, records = _make_shards(
                source, staged, config, (1, 1), workers, progress, phase, cluster
            )
            write_dataset(folder, plan, list(records.values()))
            pictures = [PICTURE] if (folder / PICTURE).exists() else []
            send(folder, url, pictures, phase)
            _clear(folder)
            (folder / PLAN).unlink()
            keep_copy(folder)
        return TokenDataset(url)
    require_new(out, source)
    with exclusive(out):
        folder, plan, records = _make_shards(
            source, out, config, (1, 1), workers, progress, phase, cluster
        )
        write_dataset(folder, plan, list(records.values()))
        # The plan is removed last: if the process is killed at any point, either the same call can
        # finish the work or `out` is complete.
        _clear(folder)
        folder.rename(out)
        (out / PLAN).unlink()
    return TokenDataset(out)


def prepare_part(
    source: str,
    out: Path,
    config: PrepareConfig,
    part: tuple[int, int],
    *,
    workers: int = 1,
    progress: Progress | None = None,
    phase: PhaseProgress | None = None,
) -> Path:
    """Prepare one of n parts of a token data set, for machines that share only the source.

    Joined parts (`igpt.data.merge.merge`) are byte for byte identical to what `prepare` writes.

    Args:
        source, config, workers, progress, phase: see `prepare`; the same for all parts.
        out: the data set; the part is written next to it.
        part: (i, n), the i-th of n, from 1.

    Returns:
        The folder of the part, `OUT.i-of-n`.

    Raises:
        InputError: see `prepare`; or there is no such part.
    """
    require_new(out, source)
    out = part_path(out, part)
    require_new(out)
    with exclusive(out):
        folder, _, records = _make_shards(source, out, config, part, workers, progress, phase, None)
        write_json(folder / RECORDS, {"records": records})
        _clear(folder)
        folder.rename(out)
    return out


def _clear(folder: Path) -> None:
    for left in [*folder.glob("*.done.json"), *folder.glob(".*.tmp")]:
        left.unlink()


def _make_shards(
    source: str,
    out: Path,
    config: PrepareConfig,
    part: tuple[int, int],
    workers: int,
    progress: Progress | None,
    phase: PhaseProgress | None,
    cluster: RayCluster | None,
) -> tuple[Path, dict[str, Any], dict[str, dict[str, Any]]]:
    """Write all shards of a part; return their folder, the plan, and the ordered records."""
    require_new(out)
    if workers < 1:
        raise InputError(f"at least one worker is needed, not {workers}")
    if workers > _MOST_WORKERS:
        raise InputError(
            f"{workers} workers are too many for this computer; give at most {_MOST_WORKERS}"
        )
    if config.size**2 * config.views > _MOST_PIXELS:
        most = _MOST_PIXELS // config.size**2
        raise InputError(
            f"{config.views} views of {config.size} px need too much memory; give at most "
            f"--views {most}"
        )

    opened = open_source(source, config)
    class_names, allowance = opened.class_names, opened.allowance(config.max_bad)
    for name, count in Counter(class_names or ()).items():
        if count > 1:
            raise InputError(
                f"{source} has more than one class named {name!r}; give each class its own name"
            )
    allowance.require(source, opened.left_out)
    splits = dict(opened.splits)
    if config.limit is not None:
        for name, split in splits.items():
            subset = subset_rows(len(split), config.limit, config.seed)
            splits[name] = replace(split, indices=split.indices[subset])
    if config.views and isinstance(splits["train"].reader, TokenRows):
        raise InputError(
            f"{source} holds tokens, which cannot be cropped at random; leave --views out"
        )

    given = given_palette(source, splits["train"], config)
    readers = list({id(split.reader): split.reader for split in splits.values()}.values())
    folder = out.with_name(out.name + ".partial")
    limits = _shard_images(config)
    in_readers = Counter(job.reader for job in _jobs(readers, splits, limits, config.views))
    wanted = {
        "source": source,
        "config": config.model_dump(mode="json", exclude={"stream"}),
        "images": {name: len(rows) for name, rows in splits.items()},
        "class_names": class_names,
        "shard_images": list(limits),
        "fingerprints": [reader.fingerprint() for reader in readers],
        "given_palette": given.fingerprint if given else None,
        "part": list(part),
        "jobs": [in_readers[number] for number in range(len(readers))],
        "left_out": opened.left_out.to_json(),
        "warnings": [*opened.notes, *palette_notes(given, splits["train"], config)],
    }
    plan, palette = _plan_and_palette(folder, wanted, splits["train"], config, given, phase)

    # Jobs are listed again whenever they are needed: together their rows would fill the memory.
    def jobs() -> Iterator[_Job]:
        return islice(_jobs(readers, splits, limits, config.views), part[0] - 1, None, part[1])

    finished = _finished(folder, jobs())
    skipped = [line for record in finished.values() for line in record["skipped"]]
    total = sum(len(job.rows) for job in jobs())
    done = sum(len(job.rows) for job in jobs() if job.record in finished)
    tokenizer = Tokenizer(
        palette,
        transform_of(config, alpha=palette.transparent),
        len(class_names or ()),
        allowance,
        total,
        crops=transform_of(config, alpha=palette.transparent, views=config.views),
        seed=config.seed,
    )
    work = _Work(readers, tokenizer, folder)
    allowance.require_decoded(skipped, total)
    if phase:
        phase("tokenising", done, total)
    if cluster:
        pool = cluster.running(work)
    else:
        pool = running(work, workers if total >= MIN_IMAGES_FOR_WORKERS else 1)
    with pool as run:
        for result in run(job for job in jobs() if job.record not in finished):
            skipped += result["skipped"]
            allowance.require_decoded(skipped, total)
            done += result["images"]
            if progress:
                progress(done, total)
    return folder, plan, _all_records(folder, jobs(), config.views)


def _finished(folder: Path, jobs: Iterator[_Job]) -> dict[str, dict[str, Any]]:
    """Return the records whose shards have the recorded checksums; others are made again."""
    finished = {}
    for job in jobs:
        path = folder / job.record
        if path.exists():
            record = read_json(path, "shard record", Record)
            shards = [Shard(**shard) for shard in record["shards"].values()]
            with suppress(InputError):
                require_files(folder, shards)
                if all(
                    sha256_of(folder / file) == value
                    for shard in shards
                    for file, value in shard.sha256.items()
                ):
                    finished[job.record] = record
    return finished


def _all_records(folder: Path, jobs: Iterator[_Job], views: int) -> dict[str, dict[str, Any]]:
    """Return the records of all jobs, by name and in order.

    Raises:
        InputError: a record or one of its shards is missing, or their numbers of images are not
            those of the job.
    """
    records, missing = dict[str, dict[str, Any]](), list[str]()
    for job in jobs:
        path = folder / job.record
        if not path.exists():
            missing.append(job.record)
            continue
        record = read_json(path, "shard record", Record)
        shards = {split: Shard(**shard) for split, shard in record["shards"].items()}
        require_files(folder, list(shards.values()))
        counts = {split: shard.count for split, shard in shards.items()}
        require_counts(counts, job.images, record["skipped"], views, str(path))
        records[job.record] = record
    if missing:
        raise InputError(
            f"{len(missing)} shard records of {folder} have been removed "
            f"({listed(missing, NAMES_SHOWN)}); the same command makes them again"
        )
    return records


def require_new(out: Path, source: str | None = None) -> None:
    """Raise an `InputError` if `out` exists, has no valid name, or lies inside the source."""
    if url := url_of(out):
        raise InputError(f"{url}: parts are made and merged in a folder; give one with -o")
    if out.exists() or out.is_symlink() or not out.name:
        raise InputError(f"{out} exists already; remove it or choose another -o")
    require_folder_name(out)
    if source and Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise InputError(f"{out} is inside {source}; choose another -o")


def _shard_images(config: PrepareConfig) -> tuple[int, int]:
    """Return the smallest and the largest number of images of a shard."""
    most = min(SHARD_IMAGES[1], max(1, SHARD_BYTES // (2 * config.size**2)))
    return min(SHARD_IMAGES[0], most), most


def _jobs(
    readers: list[Reader], splits: Mapping[str, Split], limits: tuple[int, int], views: int
) -> Iterator[_Job]:
    """Yield jobs of neighbouring rows, of all splits of a reader together, reader after reader."""
    for reader, images in enumerate(readers):
        indices = {
            SPLITS.index(name): split.indices
            for name, split in splits.items()
            if split.reader is images
        }
        size = min(limits[1] // max(1, views) or 1, max(limits[0], -(-len(images) // 32)))
        for number, first in enumerate(range(0, len(images), size)):
            parts = {
                split: rows[slice(*np.searchsorted(rows, (first, first + size)))]
                for split, rows in indices.items()
            }
            rows = np.concatenate(list(parts.values()))
            split_of_row = np.repeat(
                np.array(list(parts), np.uint8), [len(part) for part in parts.values()]
            )
            order = np.argsort(rows)
            yield _Job(reader, number, rows[order], split_of_row[order])


def _plan_and_palette(
    folder: Path,
    plan: dict[str, Any],
    train: Split,
    config: PrepareConfig,
    given: Palette | None,
    phase: PhaseProgress | None,
) -> tuple[dict[str, Any], Palette]:
    """Return the plan and the palette: those of interrupted work, or new ones."""
    if folder.exists():
        return _resumed_plan(folder, plan), Palette.load(folder / PLAN)
    fitted = settle_palette(plan["source"], train, config, given, phase)
    palette, picture = fitted.palette, fitted.picture
    plan = {
        **plan,
        "palette_error": fitted.quality,
        "palette": {"centers": palette.stored_centers.tolist()},
    }
    with atomic_folder(folder) as temporary:
        write_json(temporary / PLAN, plan)
        if picture:
            picture.save(temporary / PICTURE)
    return plan, palette


def _resumed_plan(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the plan of interrupted work; raise if it differs from the wanted one."""
    if not (folder / PLAN).exists():
        raise InputError(
            f"{folder} exists and holds no unfinished work; remove it or choose another -o"
        )
    stored = read_json(folder / PLAN, "plan", Plan)
    # `max_bad` may differ, so that work stopped by bad images can be resumed with a larger one.
    config = stored["config"]
    plan = (
        {"jobs": wanted["jobs"]} | stored | {key: wanted[key] for key in ("left_out", "warnings")}
    )
    plan["config"] = config | {
        "limit": config.get("limit"),
        "transparent": config.get("transparent", False),
        "max_bad": wanted["config"]["max_bad"],
    }
    if {key: plan.get(key) for key in wanted} != wanted:
        raise InputError(
            f"{folder} holds unfinished work with other settings or images; remove it or choose "
            "another -o"
        )
    write_json(folder / PLAN, plan)
    return plan


def write_dataset(folder: Path, plan: Mapping[str, Any], records: list[dict[str, Any]]) -> None:
    """Write the manifest of a folder that holds all shards of a plan.

    Args:
        records: of the shards, in order.

    Raises:
        InputError: no training image decodes.
    """
    shards = {
        split: [Shard(**record["shards"][split]) for record in records if split in record["shards"]]
        for split in plan["images"]
    }
    skipped = [line for record in records for line in record["skipped"]]
    if not shards["train"]:
        first = f"; the first: {skipped[0]}" if skipped else ""
        raise InputError(f"no training image of {plan['source']} decodes{first}")
    write_manifest(
        folder,
        resolution=plan["config"]["size"],
        palette=Palette.from_centers(plan["palette"]["centers"]),
        class_names=plan["class_names"],
        splits=shards,
        source=plan["source"],
        made={key: plan[key] for key in ("config", "images", "palette_error")}
        | {
            "skipped": skipped,
            "left_out": with_records(plan, records).to_json(),
            "warnings": warnings_of(plan, records),
        },
    )


def with_records(plan: Mapping[str, Any], records: list[dict[str, Any]]) -> LeftOut:
    """Return everything left out: when the source was opened, and in the records."""
    left_out = LeftOut.from_json(plan.get("left_out", {}), PLAN)
    for record in records:
        if record["skipped"]:
            left_out.add(
                BAD, record["skipped"][0], count=len(record["skipped"]), possible_images=True
            )
        if unlabelled := record.get("unlabelled"):
            left_out.add(UNLABELLED, unlabelled["first"], count=unlabelled["count"])
        if frames := record.get("further_frames"):
            left_out.add(FRAMES, frames["first"], count=frames["count"])
    return left_out


def warnings_of(plan: Mapping[str, Any], records: list[dict[str, Any]]) -> list[str]:
    """Return the warnings of the plan and of the records.

    The latter are that no 16-bit image has a level above 12 bits, and that no pixel is transparent.
    """
    warnings = list(plan.get("warnings", []))
    transparent = [record.get("transparent_pixels") for record in records]
    if records and not any(transparent) and None not in transparent:
        warnings.append(NONE_TRANSPARENT)
    found = [record["levels_16"] for record in records if record.get("levels_16")]
    highest = max((levels["highest"] for levels in found), default=0)
    if found and highest <= _TWELVE_BITS:
        images = sum(levels["images"] for levels in found)
        warnings.append(
            f"all 16-bit images ({images}) use only 12 bits (highest level {highest}), so they "
            "become nearly black; multiply 12-bit levels by 16 before you save them as 16-bit "
            "images"
        )
    return warnings
