"""Token data sets on disk: a manifest and memory-mapped shards that any tool can read.

dataset.json                  format, resolution, palette, class names, source, settings, shards
with checksums train-00000.tokens.npy        uint16 [N, n]: N images of n = resolution^2 tokens in
raster order train-00000.labels.npy        int32 [N]: class of each image, -1 where there is none
"""

import math
import mmap
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import AfterValidator, Field, model_validator

from igpt.data.arrays import map_array
from igpt.data.images.palette import Palette, StoredPalette
from igpt.errors import InputError, suggest
from igpt.files import (
    Stored,
    atomic_file,
    read_json,
    require_regular,
    require_schema,
    sha256_of,
    write_json,
)

FORMAT, VERSION = "igpt-tokens", 1
MANIFEST = "dataset.json"
SPLITS = ("train", "validation", "test")
_NAMES_SHOWN = 5  # of files, in a message


def _plain_name(name: str) -> str:
    if name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise ValueError("the plain name of a file in this folder is needed")
    return name


FileName = Annotated[str, Field(max_length=255), AfterValidator(_plain_name)]
Count = Annotated[int, Field(ge=0, lt=2**48)]


def _without_duplicates(names: list[str]) -> list[str]:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} is there more than once")
    return names


ClassNames = Annotated[list[str], AfterValidator(_without_duplicates)] | None


class Shard(Stored):
    """One shard's entry in the manifest; the names are those of files in the data set's folder."""

    tokens: FileName
    labels: FileName
    count: Count
    bytes: dict[FileName, Count] = Field(default_factory=dict)
    sha256: dict[FileName, str] = Field(default_factory=dict)


class _Split(Stored):
    count: Count
    shards: list[Shard]

    @model_validator(mode="after")
    def _sum(self) -> Self:
        total = sum(shard.count for shard in self.shards)
        if self.count != total:
            raise ValueError(f"the count is {self.count}, and that of its shards {total}")
        return self


class _PaletteError(Stored):
    """What the palette costs; nothing of ready tokens."""

    mse: float | None = None
    psnr_db: float | None = None

    @model_validator(mode="after")
    def _all_or_nothing(self) -> Self:
        missing = {"mse", "psnr_db"} - self.model_fields_set
        if self.mse is None:
            missing.add("mse")
        if missing and (self.model_fields_set or self.model_extra):
            raise ValueError(f"{' and '.join(sorted(missing))} is missing")
        return self


class _MadeConfig(Stored):
    views: int = Field(0, ge=0)


class _Made(Stored):
    """How a data set was made; other programs may leave any of it out."""

    config: _MadeConfig = Field(default_factory=lambda: _MadeConfig())
    images: dict[str, Count] = Field(default_factory=dict)
    skipped: list[str] = Field(default_factory=list)
    palette_error: _PaletteError = Field(default_factory=_PaletteError)
    left_out: dict[str, Any] = Field(default_factory=dict)  # see `igpt.data.left_out`
    warnings: list[str] = Field(default_factory=list)


class _ManifestPalette(StoredPalette):
    fingerprint: str


class _Manifest(Stored):
    """Schema of `dataset.json`."""

    resolution: int = Field(ge=1, lt=2**16)
    source: str
    class_names: ClassNames
    splits: dict[str, _Split]
    made: _Made
    palette: _ManifestPalette

    @model_validator(mode="after")
    def _no_file_twice(self) -> Self:
        shards = [shard for split in self.splits.values() for shard in split.shards]
        _without_duplicates([name for shard in shards for name in (shard.tokens, shard.labels)])
        return self


def write_shard(
    folder: Path, name: str, tokens: NDArray[np.uint16], labels: NDArray[np.int32]
) -> Shard:
    """Writes tokens [N, n] and labels [N] under `name`, atomically, and returns the manifest entry."""
    tokens_file, labels_file = f"{name}.tokens.npy", f"{name}.labels.npy"
    arrays: dict[str, NDArray[Any]] = {tokens_file: tokens, labels_file: labels}
    for file_name, array in arrays.items():
        with atomic_file(folder / file_name) as temporary, temporary.open("wb") as file:
            np.save(file, array)
    return Shard(
        tokens=tokens_file,
        labels=labels_file,
        count=len(tokens),
        bytes={file_name: (folder / file_name).stat().st_size for file_name in arrays},
        sha256={file_name: sha256_of(folder / file_name) for file_name in arrays},
    )


def write_manifest(
    folder: Path,
    *,
    resolution: int,
    palette: Palette,
    class_names: list[str] | None,
    splits: Mapping[str, list[Shard]],
    source: str,
    made: Mapping[str, Any],
) -> None:
    """Writes the manifest of a folder of shards; until it is there, the folder is not a data set.

    Raises:
        InputError: it would not be readable, for example because two classes have the same name.
    """
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "resolution": resolution,
        "source": source,
        "class_names": class_names,
        "splits": {
            split: {
                "count": sum(shard.count for shard in shards),
                "shards": [vars(shard) for shard in shards],
            }
            for split, shards in splits.items()
        },
        "made": dict(made),
        "palette": {"fingerprint": palette.fingerprint, "centers": palette.centers_.tolist()},
    }
    require_schema(manifest, _Manifest, folder / MANIFEST)
    write_json(folder / MANIFEST, manifest)


@dataclass(frozen=True)
class ValueRange:
    """The values that the numbers in a shard may have, and how they are named in errors.

    Attributes:
        what: "token" or "label".
        reason: where the limits come from.
    """

    what: str
    low: int
    high: int
    reason: str

    def require(self, values: NDArray[Any], path: Path) -> None:
        """Refuse values outside of the range.

        Raises:
            InputError: names the file, the first such value and the range.
        """
        if not values.size:
            return
        unsigned = values.dtype.kind == "u" and self.low == 0
        if values.max() <= self.high and (unsigned or values.min() >= self.low):
            return
        wrong = values[(values < self.low) | (values > self.high)][0]
        raise InputError(
            f"{path} holds the {self.what} {wrong}, and {self.reason} "
            f"({self.what}s {self.low} to {self.high}); prepare the data set again"
        )


@dataclass(frozen=True)
class StoredArray:
    """An array in a `.npy` file, of which pages are mapped only while rows of them are read.

    Any number of shards costs neither open files nor resident memory between two reads.

    Attributes:
        allowed: what its numbers may be; None allows all.
    """

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    allowed: ValueRange | None = None

    def __len__(self) -> int:
        return self.shape[0]

    @cached_property
    def _offset(self) -> int:
        """Where row 0 begins in the file, in bytes."""
        try:
            array = map_array(self.path)
        except InputError as error:
            raise InputError(
                f"{self.path} cannot be read ({error}); prepare the data set again"
            ) from None
        if (array.dtype, array.shape) != (self.dtype, self.shape):
            raise InputError(
                f"{self.path} does not hold {self.shape} {self.dtype} but {array.shape} {array.dtype}: "
                f"the count or the resolution in {MANIFEST} is wrong, or the file"
            )
        if not array.flags.c_contiguous:
            raise InputError(
                f"{self.path} is in Fortran order; rows are needed one after the other (C order)"
            )
        assert isinstance(array, np.memmap)
        return int(array.offset)

    def require_header(self) -> None:
        """Refuse a file whose header does not claim this type, shape and order.

        Raises:
            InputError: see above; or the file cannot be read.
        """
        _ = self._offset

    def window(self, rows: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """A mapping from the lowest to the highest of some rows [M], and where in it these are [M].

        Their pages are asked of the disk and not waited for, so that a disk serves many windows at
        once.
        """
        lowest, highest = int(rows.min()), int(rows.max())
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        begin = self._offset + lowest * row_bytes
        margin = begin % mmap.ALLOCATIONGRANULARITY
        size = margin + (highest + 1 - lowest) * row_bytes
        try:
            file = os.open(self.path, os.O_RDONLY)  # a third of the time of `open`
            try:
                mapped = mmap.mmap(file, size, access=mmap.ACCESS_READ, offset=begin - margin)
            finally:
                os.close(file)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.path} can no longer be read ({error}); it was whole when it was opened"
            ) from None
        if size <= 2 * len(rows) * (
            row_bytes + mmap.PAGESIZE
        ):  # at least about half of the pages are needed
            mapped.madvise(mmap.MADV_WILLNEED)
        else:
            mapped.madvise(
                mmap.MADV_RANDOM
            )  # or a row that the disk has not brought yet brings megabytes around it
            for row in rows.tolist():
                place = margin + (row - lowest) * row_bytes
                page = place - place % mmap.PAGESIZE
                mapped.madvise(mmap.MADV_WILLNEED, page, place + row_bytes - page)
        shape = (highest + 1 - lowest, *self.shape[1:])
        return np.ndarray(shape, self.dtype, buffer=mapped, offset=margin), rows - lowest


_Rows = StoredArray | NDArray[Any]
_WINDOWS = 128  # mapped at a time, each with an open file


def _window(shard: _Rows, rows: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    return shard.window(rows) if isinstance(shard, StoredArray) else (shard, rows)


def _require_allowed(shard: _Rows, values: NDArray[Any]) -> None:
    """Refuse values, read from a shard, that it must not hold."""
    if isinstance(shard, StoredArray) and shard.allowed:
        shard.allowed.require(values, shard.path)


def _gather(
    shards: Sequence[_Rows], starts: NDArray[np.int64], wanted: NDArray[np.int64]
) -> NDArray[Any]:
    """Some rows of arrays laid end to end, in the order asked for: [M] -> [M, ...].

    Raises:
        InputError: a shard cannot be read, or one of the rows holds what it must not.
    """
    out = np.empty((len(wanted), *shards[0].shape[1:]), shards[0].dtype)
    if not len(wanted):
        return out
    if wanted.min() < 0 or wanted.max() >= starts[-1]:
        raise IndexError(
            f"rows {wanted.min()} to {wanted.max()} are asked for, and there are {starts[-1]}"
        )
    shard = np.searchsorted(starts, wanted, side="right") - 1
    order = np.argsort(shard, kind="stable")
    groups = np.split(
        order, np.flatnonzero(np.diff(shard[order])) + 1
    )  # positions in `wanted`, one array a shard
    for first in range(0, len(groups), _WINDOWS):
        windows = []
        for here in groups[first : first + _WINDOWS]:
            index = shard[here[0]]
            windows.append((here, *_window(shards[index], wanted[here] - starts[index])))
        while windows:  # so that each is unmapped before the next is read
            here, array, rows = windows.pop(0)
            taken = array.take(
                rows, axis=0
            )  # NumPy lets other threads run while this waits for the disk
            _require_allowed(shards[shard[here[0]]], taken)
            out[here] = taken
    return out


class TokenSplit:
    """The images of one split: rows of tokens and their labels, in memory or mapped while they are read.

    Args:
        tokens: shards, uint16 [N_i, n].
        labels: of the same shards, int32 [N_i]; -1 where an image has none.
    """

    def __init__(self, name: str, tokens: Sequence[_Rows], labels: Sequence[_Rows]) -> None:
        self.name = name
        self._tokens, self._labels = tokens, labels
        self._starts = np.cumsum([0, *map(len, tokens)])

    @classmethod
    def joined(cls, name: str, splits: Sequence["TokenSplit"]) -> Self:
        """All images of some splits, one split after the other; nothing is copied."""
        tokens = [shard for split in splits for shard in split._tokens]
        return cls(name, tokens, [shard for split in splits for shard in split._labels])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def nbytes(self) -> int:
        """The size of all tokens."""
        return sum(math.prod(shard.shape) * shard.dtype.itemsize for shard in self._tokens)

    def rows(self, indices: ArrayLike) -> NDArray[np.uint16]:
        """Tokens of some images, in the order asked for: [M] -> uint16 [M, n], a copy."""
        tokens: NDArray[np.uint16] = _gather(
            self._tokens, self._starts, np.asarray(indices, dtype=np.int64)
        )
        return tokens

    def labels_of(self, indices: ArrayLike) -> NDArray[np.int32]:
        """Labels of some images, in the order asked for: [M] -> int32 [M], -1 where an image has none."""
        labels: NDArray[np.int32] = _gather(
            self._labels, self._starts, np.asarray(indices, dtype=np.int64)
        )
        return labels

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """All labels, int32 [N]: read when they are first asked for, and kept."""
        return np.concatenate(
            [np.empty(0, np.int32), *(labels.copy() for labels in self._label_shards())]
        )

    def _label_shards(self) -> Iterator[NDArray[np.int32]]:
        for shard in self._labels:
            if len(shard):
                labels = _window(shard, np.arange(len(shard)))[0]
                _require_allowed(shard, labels)
                yield labels

    def subset(self, indices: ArrayLike) -> Self:
        """Some images, in the order asked for, in memory."""
        return type(self)(self.name, [self.rows(indices)], [self.labels_of(indices)])

    def spread(self, count: int | None) -> Self:
        """At most so many images, spread evenly over all; all of them where `count` is None or no less."""
        if count is None or count >= len(self):
            return self
        return self.subset(np.arange(count) * len(self) // count)

    def require_images(self, purpose: str) -> None:
        """Refuses an empty split.

        Raises:
            InputError: there is no image in it.
        """
        if len(self) == 0:
            raise InputError(f"{purpose} needs images, and the split {self.name!r} is empty")

    def require_labels(self, purpose: str) -> None:
        """Refuses a split of which some or all images have no label.

        Raises:
            InputError: labels are missing; their number is named.
        """
        missing = sum(int((labels < 0).sum()) for labels in self._label_shards())
        if missing:
            raise InputError(
                f"{purpose} needs labels, and {missing} of {len(self)} images of {self.name!r} have none"
            )


class TokenDataset(Mapping[str, TokenSplit]):
    """A token data set folder: `dataset["train"].rows([0, 1])`.

    Opening checks the manifest, the size of every shard and the header of the first of each split.
    It reads no tokens; `verify` reads and checks all. What is read later is checked then: tokens
    beyond the palette and labels beyond the classes are refused.

    Attributes:
        resolution: model resolution in pixels; n = resolution^2 places.
        palette: the palette the tokens index.
        class_names: names of the labels, or None.
        manifest: all of `dataset.json`.

    Raises:
        InputError: no data set there, one of a later version, a malformed manifest, or a missing or
            cut-off shard.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_json(self.path / MANIFEST, "token data set")
        if self.manifest.get("format") != FORMAT:
            raise InputError(f"{self.path} is not a token data set; `igpt prepare` makes one")
        if self.manifest.get("version") != VERSION:
            raise InputError(
                f"{self.path} has format version {self.manifest.get('version')}; this igpt reads {VERSION}"
            )
        require_schema(self.manifest, _Manifest, self.path / MANIFEST)
        self.resolution: int = self.manifest["resolution"]
        self.class_names: list[str] | None = self.manifest["class_names"]
        require_files(self.path, self._shards)
        for split in self:
            for stored in (self._tokens_of(split), self._labels_of(split)):
                if stored:
                    stored[0].require_header()

    @cached_property
    def palette(self) -> Palette:
        """The palette the tokens index."""
        return Palette.load(self.path / MANIFEST)

    @property
    def _shards(self) -> list[Shard]:
        return [
            Shard(**shard)
            for split in self.manifest["splits"].values()
            for shard in split["shards"]
        ]

    def _tokens_of(self, split: str) -> list[StoredArray]:
        colors = len(self.manifest["palette"]["centers"])
        allowed = ValueRange("token", 0, colors - 1, f"the palette has {colors} colours")
        dtype, places = np.dtype(np.uint16), self.resolution**2
        shards = self.manifest["splits"][split]["shards"]
        return [
            StoredArray(self.path / shard["tokens"], dtype, (shard["count"], places), allowed)
            for shard in shards
        ]

    def _labels_of(self, split: str) -> list[StoredArray]:
        classes = len(self.class_names or ())
        allowed = ValueRange("label", -1, classes - 1, f"there are {classes} classes")
        dtype = np.dtype(np.int32)
        shards = self.manifest["splits"][split]["shards"]
        return [
            StoredArray(self.path / shard["labels"], dtype, (shard["count"],), allowed)
            for shard in shards
        ]

    def __getitem__(self, split: str) -> TokenSplit:
        if split not in self:
            raise InputError(
                f"{self.path} has no split {split!r}; {suggest(split, self.manifest['splits'])}"
            )
        if not self.manifest["splits"][split]["shards"]:  # none of its images decoded
            return TokenSplit(
                split, [np.empty((0, self.resolution**2), np.uint16)], [np.empty(0, np.int32)]
            )
        return TokenSplit(split, self._tokens_of(split), self._labels_of(split))

    def __iter__(self) -> Any:
        return iter(self.manifest["splits"])

    def __len__(self) -> int:
        return len(self.manifest["splits"])

    def __contains__(
        self, split: object
    ) -> bool:  # Mapping's own expects a KeyError from __getitem__
        return split in self.manifest["splits"]

    def verify(self) -> None:
        """Reads every shard and compares its checksum, its header and its count, and the palette's fingerprint.

        Raises:
            InputError: shards or the palette have changed, or images are missing; the files or the
                split are named.
        """
        _ = self.palette
        shards = self._shards
        checksums = {name: checksum for shard in shards for name, checksum in shard.sha256.items()}
        unchecked = [
            name
            for shard in shards
            for name in (shard.tokens, shard.labels)
            if name not in checksums
        ]
        if unchecked:
            raise InputError(f"{self.path / MANIFEST} has no checksum of {listed(unchecked)}")
        require_files(self.path, shards)
        changed = [
            name for name, checksum in checksums.items() if sha256_of(self.path / name) != checksum
        ]
        if changed:
            raise InputError(
                f"{len(changed)} of {len(checksums)} files of {self.path} have changed since they were written "
                f"({', '.join(changed)}); prepare the data set anew"
            )
        for split in self:
            for stored in (*self._tokens_of(split), *self._labels_of(split)):
                stored.require_header()
        made = self.manifest["made"]
        counts = {split: entry["count"] for split, entry in self.manifest["splits"].items()}
        views = made.get("config", {}).get("views", 0)
        require_counts(
            counts,
            made.get("images", {}),
            made.get("skipped", []),
            views,
            str(self.path / MANIFEST),
        )


def require_files(folder: Path, shards: Sequence[Shard]) -> None:
    """Refuse missing and cut-off files of shards.

    Raises:
        InputError: the files are named.
    """
    missing = []
    for shard in shards:
        for name in {shard.tokens: None, shard.labels: None, **shard.bytes}:
            file, size = folder / name, shard.bytes.get(name)
            require_regular(file)
            if not file.exists():
                missing.append(name)
            elif size is not None and file.stat().st_size != size:
                raise InputError(
                    f"{file} is damaged: {file.stat().st_size} bytes, {size} were written; prepare the data set anew"
                )
    if len(missing) == 1:
        raise InputError(f"{folder / missing[0]} is missing; prepare the data set anew")
    if missing:
        names = listed(missing)
        raise InputError(
            f"{len(missing)} files of {folder} are missing ({names}); prepare the data set anew"
        )


def require_counts(
    counts: Mapping[str, int],
    planned: Mapping[str, int],
    skipped: Sequence[str],
    views: int,
    what: str,
) -> None:
    """Refuse a number of images that differs from the number planned less the skipped ones.

    Args:
        counts: rows of tokens of each split.
        planned: images of each split; nothing is compared where there are none at all.
        skipped: a line for each skipped image, which begins with its split and a space.
        views: random crops of a training image, of which images at or below the model resolution
            have one; 0 for none.
        what: the name of the data set, or of a part of it.

    Raises:
        InputError: names the split and both numbers.
    """
    if not planned:  # other programs need not say what they planned
        return
    omitted = Counter(line.split(" ", 1)[0] for line in skipped)
    for split in sorted({*planned, *counts}):
        images = planned.get(split, 0)
        least = images - omitted[split]
        most = least * max(1, views) if split == "train" else least
        if not least <= counts.get(split, 0) <= most:
            wanted = f"{least:,}" if least == most else f"{least:,} to {most:,}"
            raise InputError(
                f"{what} has {counts.get(split, 0):,} images of {split!r}, and there should be {wanted} "
                f"({images:,} planned, {omitted[split]:,} skipped)"
            )


def listed(names: Sequence[str]) -> str:
    """Return the first of some names, and how many more there are."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
