"""Token data sets on disk: a manifest and memory-mapped shards that any tool can read.

dataset.json                  format, resolution, palette, class names, source, settings, shards with checksums
train-00000.tokens.npy        uint16 [N, n]: N images of n = resolution^2 tokens in raster order
train-00000.labels.npy        int32 [N]: class of each image, -1 where there is none
"""

import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from igpt.data.palette import Palette
from igpt.errors import InputError, suggest
from igpt.files import atomic_file, read_json, sha256_of, write_json

FORMAT, VERSION = "igpt-tokens", 1
MANIFEST = "dataset.json"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Shard:
    """One shard's entry in the manifest; paths are relative to the data set's folder."""

    tokens: str
    labels: str
    count: int
    bytes: dict[str, int] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)


def write_shard(folder: Path, name: str, tokens: NDArray[np.uint16], labels: NDArray[np.int32]) -> Shard:
    """Writes tokens [N, n] and labels [N] under `name`, atomically, and returns the manifest entry."""
    tokens_file, labels_file = f"{name}.tokens.npy", f"{name}.labels.npy"
    arrays: dict[str, NDArray[Any]] = {tokens_file: tokens, labels_file: labels}
    for file_name, array in arrays.items():
        with atomic_file(folder / file_name) as temporary, temporary.open("wb") as file:
            np.save(file, array)
    return Shard(
        tokens_file,
        labels_file,
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
    """Writes the manifest of a folder of shards; until it is there, the folder is not a data set."""
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "version": VERSION,
            "resolution": resolution,
            "source": source,
            "class_names": class_names,
            "splits": {
                split: {"count": sum(shard.count for shard in shards), "shards": [vars(shard) for shard in shards]}
                for split, shards in splits.items()
            },
            "made": dict(made),
            "palette": {"fingerprint": palette.fingerprint, "centers": palette.centers_.tolist()},
        },
    )


@dataclass(frozen=True)
class StoredArray:
    """An array in a `.npy` file, of which pages are mapped only while rows of them are read.

    Any number of shards costs neither open files nor resident memory between two reads.
    """

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]

    @cached_property
    def _offset(self) -> int:
        """Where row 0 begins in the file, in bytes."""
        try:
            array = np.lib.format.open_memmap(self.path, mode="r")
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path} cannot be read ({error}); prepare the data set anew") from None
        if (array.dtype, array.shape, array.flags.c_contiguous) != (self.dtype, self.shape, True):
            raise InputError(f"{self.path} does not hold {self.shape} {self.dtype}; prepare the data set anew")
        return int(array.offset)

    def window(self, rows: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """A mapping from the lowest to the highest of some rows [M], and where in it these are [M].

        Their pages are asked of the disk and not waited for, so that a disk serves many windows at once.
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
            raise InputError(f"{self.path} can no longer be read ({error}); it was whole when it was opened") from None
        if size <= 2 * len(rows) * (row_bytes + mmap.PAGESIZE):  # at least about half of the pages are needed
            mapped.madvise(mmap.MADV_WILLNEED)
        else:
            mapped.madvise(mmap.MADV_RANDOM)  # or a row that the disk has not brought yet brings megabytes around it
            for row in rows.tolist():
                place = margin + (row - lowest) * row_bytes
                page = place - place % mmap.PAGESIZE
                mapped.madvise(mmap.MADV_WILLNEED, page, place + row_bytes - page)
        shape = (highest + 1 - lowest, *self.shape[1:])
        return np.ndarray(shape, self.dtype, buffer=mapped, offset=margin), rows - lowest


_Shard = StoredArray | NDArray[Any]
_WINDOWS = 128  # mapped at a time, each with an open file


def _window(shard: _Shard, rows: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    return shard.window(rows) if isinstance(shard, StoredArray) else (shard, rows)


def _gather(shards: Sequence[_Shard], starts: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[Any]:
    """Some rows of arrays laid end to end, in the order asked for: [M] -> [M, ...]."""
    out = np.empty((len(wanted), *shards[0].shape[1:]), shards[0].dtype)
    if not len(wanted):
        return out
    if wanted.min() < 0 or wanted.max() >= starts[-1]:
        raise IndexError(f"rows {wanted.min()} to {wanted.max()} are asked for, and there are {starts[-1]}")
    shard = np.searchsorted(starts, wanted, side="right") - 1
    order = np.argsort(shard, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(shard[order])) + 1)  # positions in `wanted`, one array a shard
    for first in range(0, len(groups), _WINDOWS):
        windows = []
        for here in groups[first : first + _WINDOWS]:
            index = shard[here[0]]
            windows.append((here, *_window(shards[index], wanted[here] - starts[index])))
        while windows:  # so that each is unmapped before the next is read
            here, array, rows = windows.pop(0)
            out[here] = array.take(rows, axis=0)  # NumPy lets other threads run while this waits for the disk
    return out


class TokenSplit:
    """The images of one split: rows of tokens and their labels, in memory or mapped while they are read.

    Args:
        tokens: shards, uint16 [N_i, n].
        labels: of the same shards, int32 [N_i]; -1 where an image has none.
    """

    def __init__(self, name: str, tokens: Sequence[_Shard], labels: Sequence[_Shard]) -> None:
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
        tokens: NDArray[np.uint16] = _gather(self._tokens, self._starts, np.asarray(indices, dtype=np.int64))
        return tokens

    def labels_of(self, indices: ArrayLike) -> NDArray[np.int32]:
        """Labels of some images, in the order asked for: [M] -> int32 [M], -1 where an image has none."""
        labels: NDArray[np.int32] = _gather(self._labels, self._starts, np.asarray(indices, dtype=np.int64))
        return labels

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """All labels, int32 [N]: read when they are first asked for, and kept."""
        return np.concatenate([np.empty(0, np.int32), *(labels.copy() for labels in self._label_shards())])

    def _label_shards(self) -> Iterator[NDArray[np.int32]]:
        return (_window(shard, np.arange(len(shard)))[0] for shard in self._labels if len(shard))

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
            raise InputError(f"{purpose} needs labels, and {missing} of {len(self)} images of {self.name!r} have none")


class TokenDataset(Mapping[str, TokenSplit]):
    """A token data set folder: `dataset["train"].rows([0, 1])`.

    Opening checks the manifest and the size of every shard, and reads no tokens; `verify` reads and checks all.

    Attributes:
        resolution: model resolution in pixels; n = resolution^2 places.
        palette: the palette the tokens index.
        class_names: names of the labels, or None.
        manifest: all of `dataset.json`.

    Raises:
        InputError: no data set there, one of a later version, or a missing or cut-off shard.
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
        self.resolution: int = self.manifest["resolution"]
        self.class_names: list[str] | None = self.manifest["class_names"]
        for split in self.manifest["splits"].values():
            for shard in split["shards"]:
                self._check_sizes(shard)

    @cached_property
    def palette(self) -> Palette:
        """The palette the tokens index."""
        palette = Palette.from_centers(self.manifest["palette"]["centers"])
        if palette.fingerprint != self.manifest["palette"]["fingerprint"]:
            raise InputError(f"{self.path / MANIFEST}: the palette does not match its fingerprint; was it edited?")
        return palette

    def _check_sizes(self, shard: Mapping[str, Any]) -> None:
        for name, size in shard["bytes"].items():
            file = self.path / name
            if not file.exists():
                raise InputError(f"{file} is missing; prepare the data set anew")
            if file.stat().st_size != size:
                raise InputError(
                    f"{file} is damaged: {file.stat().st_size} bytes, {size} were written; prepare the data set anew"
                )

    def __getitem__(self, split: str) -> TokenSplit:
        try:
            shards = self.manifest["splits"][split]["shards"]
        except KeyError:
            raise InputError(f"{self.path} has no split {split!r}; {suggest(split, self.manifest['splits'])}") from None
        tokens, labels = np.dtype(np.uint16), np.dtype(np.int32)
        places = self.resolution**2
        if not shards:  # none of its images decoded
            return TokenSplit(split, [np.empty((0, places), tokens)], [np.empty(0, labels)])
        return TokenSplit(
            split,
            [StoredArray(self.path / shard["tokens"], tokens, (shard["count"], places)) for shard in shards],
            [StoredArray(self.path / shard["labels"], labels, (shard["count"],)) for shard in shards],
        )

    def __iter__(self) -> Any:
        return iter(self.manifest["splits"])

    def __len__(self) -> int:
        return len(self.manifest["splits"])

    def __contains__(self, split: object) -> bool:  # Mapping's own expects a KeyError from __getitem__
        return split in self.manifest["splits"]

    def verify(self) -> None:
        """Reads every shard and compares its checksum, and the palette's.

        Raises:
            InputError: shards or the palette have changed; the files are named.
        """
        _ = self.palette
        shards = [shard for split in self.manifest["splits"].values() for shard in split["shards"]]
        checksums = {name: checksum for shard in shards for name, checksum in shard["sha256"].items()}
        changed = [name for name, checksum in checksums.items() if sha256_of(self.path / name) != checksum]
        if changed:
            raise InputError(
                f"{len(changed)} of {len(checksums)} files of {self.path} have changed since they were written "
                f"({', '.join(changed)}); prepare the data set anew"
            )
