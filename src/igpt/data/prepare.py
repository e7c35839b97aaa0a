"""Images -> a token data set: palette, tokens, shards; in parallel, and continued where it was interrupted.

Work goes on in a folder of its own (`OUT.partial`), which gets its name when all is there:

plan.json             what is done, with which palette; whoever continues must want the same
palette.png           originals, and below them what the palette makes of them
SPLIT-NNNNN.*.npy     shards: the images of one split among some thousand neighbours of the source
R-NNNNN.done.json     their record, written last
"""

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
from igpt.data.left_out import BAD, FRAMES, UNLABELLED, Allowance, LeftOut
from igpt.data.palette_fit import (
    PaletteConfig,
    given_palette,
    palette_notes,
    settle_palette,
    transform_of,
)
from igpt.data.pool import running
from igpt.data.sources.archives import TokenRows
from igpt.data.sources.catalogue import Split, open_source
from igpt.data.sources.readers import Reader, name_of_image
from igpt.data.tokens.dataset import (
    SPLITS,
    ClassNames,
    Count,
    Shard,
    TokenDataset,
    listed,
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

PLAN, RECORDS, PICTURE = "plan.json", "records.json", "palette.png"
SHARD_IMAGES = (
    1024,
    8192,
)  # at least, at most: between them a source is cut into 32 shards, for as many processes
SHARD_BYTES = 2**28  # of tokens, at most; it lowers the number of images from 129 px on
_TWELVE_BITS = 4095  # the highest level
ALONE_BELOW = 4096  # images; starting workers costs more than they gain
MOST_PARTS = 65536
_MOST_WORKERS = max(64, 8 * (os.cpu_count() or 1))  # each takes about 200 MB
_MOST_PIXELS = 2**27  # of all views of an image, which are in memory together
Progress = Callable[[int, int], None]


def _numbered(part: list[int]) -> list[int]:
    if not 1 <= part[0] <= part[1] <= MOST_PARTS:
        raise ValueError(f"[i, n] is needed, with i from 1 to n and n at most {MOST_PARTS}")
    return part


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
        unlabelled: images without a label, where others have one.
        levels_16: images of 16-bit grey levels, and the highest level.
        further_frames: frames of image files after the first, and the first image with any.
    """

    images: Count
    shards: dict[str, Shard]
    skipped: list[str]
    unlabelled: _Counted | None = None
    levels_16: _Levels | None = None
    further_frames: _Counted | None = None


class _PlanConfig(Stored):
    size: int = Field(ge=1, lt=2**16)
    views: int = Field(0, ge=0)


class Plan(Stored):
    """Schema of `plan.json`.

    Attributes:
        jobs: number of shard records of each reader, in all parts together; version 0.1.0 did not
            write it.
        part: (i, n), see `prepare_part`.
        left_out, warnings: see `made` of the data set; version 0.1.0 did not write them.
    """

    source: str
    config: _PlanConfig
    images: Annotated[dict[str, Count], AfterValidator(_with_train)]
    class_names: ClassNames
    shard_images: list[int]
    fingerprints: list[str]
    given_palette: str | None
    part: Annotated[list[int], Field(min_length=2, max_length=2), AfterValidator(_numbered)]
    jobs: list[Count] = Field(default_factory=list)
    palette_error: dict[str, Any]
    palette: StoredPalette
    left_out: dict[str, Any] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)


class PrepareConfig(PaletteConfig):
    """How images become tokens."""

    views: int = Field(
        0,
        ge=0,
        le=1000,
        description="random crops of each training image (paper); 0: its centre square",
    )
    limit: int | None = Field(
        None, ge=1, description="at most so many images of each split, drawn by seed"
    )


def record_name(reader: int, number: int) -> str:
    """Return the name of the record of a shard."""
    return f"{reader}-{number:05d}.done.json"


@dataclass(frozen=True)
class _Job:
    """Neighbouring images of a reader: their rows [N], ascending, and for each the number of its split."""

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
        owners, counts = np.unique(self.splits, return_counts=True)
        return {SPLITS[owner]: int(count) for owner, count in zip(owners, counts, strict=True)}


@dataclass(frozen=True)
class _Work:
    """All that a worker needs for any job."""

    readers: list[Reader]
    palette: Palette
    config: PrepareConfig
    folder: Path
    classes: int
    allowance: Allowance
    reading: int  # images of all jobs

    def __call__(self, job: _Job) -> dict[str, Any]:
        tokens: dict[str, list[NDArray[np.uint16]]] = defaultdict(list)
        labels: dict[str, list[int]] = defaultdict(list)
        skipped: list[str] = []
        unlabelled, levels, frames = list[str](), list[int](), LeftOut()
        reader = self.readers[job.reader]
        count = 0
        for row, owner, (image, label) in zip(
            job.rows.tolist(), job.splits, reader.read(job.rows), strict=False
        ):
            split, count = SPLITS[owner], count + 1
            if not -1 <= label < self.classes:
                raise InputError(
                    f"{reader.name_of(row)} has the class {label}, and there are {self.classes} (from 0)"
                )
            try:
                made, level, further = self._tokens(reader, image, split, row)
            except InputError as error:
                skipped.append(f"{split} {reader.name_of(row)}: {error}")
                self.allowance.require_decoded(skipped, self.reading)
            else:
                tokens[split].append(made)
                labels[split] += [label] * len(made)
                levels += [] if level is None else [level]
                if further:
                    frames.add(FRAMES, f"{split} {name_of_image(image, row)}", count=further)
                if label < 0 and self.classes:
                    unlabelled.append(f"{split} {name_of_image(image, row)}")
        if count < len(job.rows):
            raise InputError(
                f"{reader.name_of(0)} and its neighbours have become fewer while they were read"
            )
        shards = {
            split: write_shard(
                self.folder,
                f"{split}-{job.number:05d}",
                np.concatenate(tokens[split]),
                np.array(labels[split], dtype=np.int32),
            )
            for split in tokens
        }
        written = {name: vars(shard) for name, shard in shards.items()}
        result: dict[str, Any] = {"images": len(job.rows), "shards": written, "skipped": skipped}
        if unlabelled:
            result["unlabelled"] = {"count": len(unlabelled), "first": unlabelled[0]}
        if levels:
            result["levels_16"] = {"images": len(levels), "highest": max(levels)}
        if frames:
            entry = frames.entries[FRAMES]
            result["further_frames"] = {"count": entry.count, "first": entry.first}
        write_json(self.folder / job.record, result)
        return result

    def _tokens(
        self, reader: Reader, image: Any, split: str, row: int
    ) -> tuple[NDArray[np.uint16], int | None, int]:
        """Return the tokens of an image, [max(V, 1), n], the highest level of a 16-bit one, and its further frames."""
        if isinstance(reader, TokenRows):
            if image.min() < 0 or image.max() >= len(self.palette):
                raise InputError(
                    f"tokens {image.min()} to {image.max()} in a palette of {len(self.palette)} colours"
                )
            return np.asarray(image, dtype=np.uint16)[None], None, 0
        transform = transform_of(self.config, self.config.views if split == "train" else 0)
        pixels, level, further = transform.squares_of(image, (self.config.seed, row))
        return self.palette.transform(pixels).reshape(len(pixels), -1), level, further


def prepare(
    source: str,
    out: Path,
    config: PrepareConfig,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> TokenDataset:
    """Turns a source of images into a token data set.

    Interrupted work is continued by the same call. The result does not depend on `workers`.

    Args:
        source: see `open_source`.
        out: the folder to make; it must not exist.
        workers: processes that decode and tokenise.
        progress: called with (images done, images in all).

    Raises:
        InputError: what the source, too many of its images, or `out` have wrong; or another process
            is making `out`.
    """
    require_new(out, source)
    with exclusive(out):
        folder, plan, records = _make_shards(source, out, config, (1, 1), workers, progress)
        write_dataset(folder, plan, list(records.values()))
        # The plan goes last: wherever a kill falls, the same call finishes the work or `out` is
        # complete.
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
) -> Path:
    """Makes one of n parts of a token data set, for machines that share the work without knowing of each other.

    Parts that are joined (`igpt.data.merge.merge`) are the same to the byte as what `prepare`
    makes.

    Args:
        part: (i, n), the i-th of n, from 1.
        source, config, workers, progress: see `prepare`; the same for all parts.

    Returns:
        the folder of the part, `OUT.i-of-n`.

    Raises:
        InputError: see `prepare`; or there is no such part.
    """
    require_new(out, source)
    if not 1 <= part[0] <= part[1] <= MOST_PARTS:
        raise InputError(
            f"the shards of n are 1/n to n/n, not {part[0]}/{part[1]}; n is at most {MOST_PARTS}"
        )
    out = out.with_name(f"{out.name}.{part[0]}-of-{part[1]}")
    require_new(out)
    with exclusive(out):
        folder, _, records = _make_shards(source, out, config, part, workers, progress)
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
) -> tuple[Path, dict[str, Any], dict[str, dict[str, Any]]]:
    """The folder with all shards of a part, the plan they follow, and their records in order, by name."""
    require_new(out)
    if workers < 1:
        raise InputError(f"at least one worker is needed, not {workers}")
    if workers > _MOST_WORKERS:
        raise InputError(
            f"{workers} workers are too many for this machine; give at most {_MOST_WORKERS}"
        )
    if config.size**2 * config.views > _MOST_PIXELS:
        most = _MOST_PIXELS // config.size**2
        raise InputError(
            f"{config.views} views of {config.size} px need too much memory; give at most --views {most}"
        )
    opened = open_source(source, config)
    class_names, allowance = opened.class_names, opened.allowance(config.max_bad)
    _require_distinct(class_names, source)
    allowance.require(source, opened.left_out)
    splits = {name: _limited(split, config) for name, split in opened.splits.items()}
    if config.views and isinstance(splits["train"].reader, TokenRows):
        raise InputError(
            f"{source} holds tokens, of which no random crops can be taken; leave --views out"
        )
    given = given_palette(source, splits["train"], config)
    folder = out.with_name(out.name + ".partial")
    limits = _shard_images(config)
    in_readers = Counter(job.reader for job in _jobs(splits, limits, config.views))
    wanted = {
        "source": source,
        "config": config.model_dump(mode="json", exclude={"stream"}),
        "images": {name: len(rows) for name, rows in splits.items()},
        "class_names": class_names,
        "shard_images": list(limits),
        "fingerprints": [reader.fingerprint() for reader in _readers(splits)],
        "given_palette": given.fingerprint if given else None,
        "part": list(part),
        "jobs": [in_readers[number] for number in range(len(_readers(splits)))],
        "left_out": opened.left_out.to_json(),
        "warnings": [*opened.notes, *palette_notes(given, splits["train"], config)],
    }
    plan, palette = _settle_plan(folder, wanted, splits["train"], config, given)

    def jobs() -> Iterator[_Job]:
        return islice(_jobs(splits, limits, config.views), part[0] - 1, None, part[1])

    finished = _finished(folder, jobs())
    skipped = [line for record in finished.values() for line in record["skipped"]]
    total = sum(len(job.rows) for job in jobs())
    done = sum(len(job.rows) for job in jobs() if job.record in finished)
    work = _Work(
        _readers(splits), palette, config, folder, len(class_names or ()), allowance, total
    )
    allowance.require_decoded(skipped, total)
    with running(work, workers if total >= ALONE_BELOW else 1) as run:
        for result in run(job for job in jobs() if job.record not in finished):
            skipped += result["skipped"]
            allowance.require_decoded(skipped, total)
            done += result["images"]
            if progress:
                progress(done, total)
    return folder, plan, _all_records(folder, jobs(), config.views)


def _require_distinct(class_names: list[str] | None, source: str) -> None:
    twice = [name for name, count in Counter(class_names or ()).items() if count > 1]
    if twice:
        raise InputError(
            f"{source} has more than one class named {twice[0]!r}; give each class its own name"
        )


def _finished(folder: Path, jobs: Iterator[_Job]) -> dict[str, dict[str, Any]]:
    """Return the records, by name, of which all shards are as they were written; others are made again."""
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
            f"{len(missing)} shard records of {folder} have been removed ({listed(missing)}); "
            "the same command makes them again"
        )
    return records


def require_new(out: Path, source: str | None = None) -> None:
    """Refuses a folder that exists, has no name, or lies among the images it is made from.

    Raises:
        InputError: it cannot be made.
    """
    if out.exists() or out.is_symlink() or not out.name:
        raise InputError(f"{out} exists already; remove it or choose another -o")
    require_folder_name(out)
    if source and Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise InputError(f"{out} would lie among the images of {source}; choose another -o")


def _limited(split: Split, config: PrepareConfig) -> Split:
    if config.limit is None or config.limit >= len(split):
        return split
    drawn = np.random.default_rng(config.seed).permutation(len(split))[: config.limit]
    return replace(split, indices=split.indices[np.sort(drawn)])


def _readers(splits: Mapping[str, Split]) -> list[Reader]:
    return list({id(split.reader): split.reader for split in splits.values()}.values())


def _shard_images(config: PrepareConfig) -> tuple[int, int]:
    """Return how many images a shard has at least and at most."""
    most = min(SHARD_IMAGES[1], max(1, SHARD_BYTES // (2 * config.size**2)))
    return min(SHARD_IMAGES[0], most), most


def _jobs(splits: Mapping[str, Split], limits: tuple[int, int], views: int) -> Iterator[_Job]:
    for reader, images in enumerate(_readers(splits)):
        owners = {
            SPLITS.index(name): split.indices
            for name, split in splits.items()
            if split.reader is images
        }
        size = min(limits[1] // max(1, views) or 1, max(limits[0], -(-len(images) // 32)))
        for number, first in enumerate(range(0, len(images), size)):
            parts = {
                owner: rows[slice(*np.searchsorted(rows, (first, first + size)))]
                for owner, rows in owners.items()
            }
            rows = np.concatenate(list(parts.values()))
            owned = np.repeat(
                np.array(list(parts), np.uint8), [len(part) for part in parts.values()]
            )
            order = np.argsort(rows)
            yield _Job(reader, number, rows[order], owned[order])


def _settle_plan(
    folder: Path, plan: dict[str, Any], train: Split, config: PrepareConfig, given: Palette | None
) -> tuple[dict[str, Any], Palette]:
    """The plan with its palette: an interrupted preparation's, or a new one with a given or a fitted palette."""
    if folder.exists():
        plan = _continue_plan(folder, plan)
        return plan, Palette.load(folder / PLAN)
    settled = settle_palette(plan["source"], train, config, given)
    palette, picture = settled.palette, settled.picture
    plan = {
        **plan,
        "palette_error": settled.quality,
        "palette": {"centers": palette.centers_.tolist()},
    }
    with atomic_folder(folder) as temporary:
        write_json(temporary / PLAN, plan)
        if picture:
            picture.save(temporary / PICTURE)
    return plan, palette


def _continue_plan(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    if not (folder / PLAN).exists():
        raise InputError(
            f"{folder} exists and holds no unfinished work; remove it or choose another -o"
        )
    plan = read_json(folder / PLAN, "plan", Plan)
    # Work that bad images stopped may go on with more of them: what is done does not depend on it.
    config = plan["config"]
    begun = {"jobs": wanted["jobs"]} | plan | {key: wanted[key] for key in ("left_out", "warnings")}
    begun["config"] = config | {
        "limit": config.get("limit"),
        "max_bad": wanted["config"]["max_bad"],
    }
    if {key: begun.get(key) for key in wanted} != wanted:
        raise InputError(
            f"{folder} holds unfinished work with other settings or images; remove it or choose another -o"
        )
    write_json(folder / PLAN, begun)
    return begun


def write_dataset(folder: Path, plan: Mapping[str, Any], records: list[dict[str, Any]]) -> None:
    """Writes the manifest of a folder that holds all shards of a plan, with their records in order.

    Raises:
        InputError: no training image was fit to use.
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
    """Return what was left out when the source was opened, and what the records add."""
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
    """Return the warnings of when the source was opened, and those of the records."""
    return [*plan.get("warnings", []), *_dark_levels(records)]


def _dark_levels(records: list[dict[str, Any]]) -> list[str]:
    """Return a warning where no 16-bit image has a level beyond 12 bits."""
    found = [record["levels_16"] for record in records if record.get("levels_16")]
    highest = max((levels["highest"] for levels in found), default=0)
    if not found or highest > _TWELVE_BITS:
        return []
    images = sum(levels["images"] for levels in found)
    return [
        f"16-bit images without a level above 12 bits: {images}, the highest level is {highest} of 65535, so they "
        "become nearly black; multiply 12-bit levels by 16 before you save them as 16-bit ones"
    ]
