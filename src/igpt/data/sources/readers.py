"""Readers: undecoded images by row, from tables, Parquet files and image files.

A reader keeps no images in memory. For each row it yields anything that `open_image` takes, so a
damaged image is an error of that image alone, and the number of its class, -1 without one.
N images.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from igpt.data.sources.classes import ClassColumn
from igpt.errors import InputError
from igpt.files import require_regular

# Rows of a table in memory.
_CHUNK = 256
# Bytes of a Parquet column.
_BUFFER = 1 << 23


class Reader(Protocol):
    """Images of one split of a source."""

    def __len__(self) -> int:
        """Return the number of images."""

    def read(self, rows: NDArray[np.int64]) -> Iterator[tuple[Any, int]]:
        """Yield the undecoded images and class numbers of some rows, which ascend."""

    def name_of(self, row: int) -> str:
        """Return a name by which a user finds an image."""

    def fingerprint(self) -> str:
        """Return a hash of the images' number, names and sizes, equal on every machine."""


def digest(parts: Iterable[object]) -> str:
    """Return the SHA-256 of some values, in hexadecimal."""
    total = hashlib.sha256()
    for part in parts:
        total.update(f"{part}\n".encode(errors="surrogateescape"))
    return total.hexdigest()


def file_size(path: str | Path) -> int | None:
    """Return the size of a file in bytes; None where it is not on this machine."""
    try:
        # Three times as fast as `Path.stat`, and there may be millions of files.
        return os.stat(path).st_size  # noqa: PTH116
    except OSError:
        return None


def name_of_image(image: Any, row: int) -> str:
    """Return the path of an undecoded image, or its row.

    Unlike `Reader.name_of`, this does not read the table or tar again.
    """
    path = image.get("path") if isinstance(image, dict) else image
    name = str(path) if isinstance(path, str | Path) else ""
    # Names in a tar may not be UTF-8.
    return name.encode(errors="backslashreplace").decode() or f"row {row}"


def _row_name(row: int, record: Any) -> str:
    path = record.get("path") if isinstance(record, dict) else record
    return f"row {row} ({path})" if isinstance(path, str) else f"row {row}"


@dataclass(frozen=True)
class TableRows:
    """Rows of a `datasets.Dataset`: a memory-mapped Arrow file or a table in memory."""

    table: Any
    image: str
    label: ClassColumn | None

    def __len__(self) -> int:
        return len(self.table)

    def read(self, rows: NDArray[np.int64]) -> Iterator[tuple[Any, int]]:
        """See `Reader`."""
        for first in range(0, len(rows), _CHUNK):
            chunk = self.table[rows[first : first + _CHUNK]]
            yield from _with_labels(chunk[self.image], chunk, self.label)

    def name_of(self, row: int) -> str:
        """See `Reader`."""
        return _row_name(row, self.table[row][self.image])

    def fingerprint(self) -> str:
        """See `Reader`."""
        return digest([len(self.table), self.image, self.label and self.label.name])


def _with_labels(
    images: Sequence[Any], columns: Any, label: ClassColumn | None
) -> Iterator[tuple[Any, int]]:
    if label is None:
        yield from ((image, -1) for image in images)
    else:
        yield from zip(images, map(label.number, columns[label.name]), strict=True)


@dataclass(frozen=True)
class RowsOfFiles:
    """Rows of several files, in the order of the files.

    Args:
        files: paths, or addresses that fsspec opens.
        counts: the number of rows of each.
        image: the column of images.
        label: the column of classes.
    """

    files: tuple[str, ...]
    counts: tuple[int, ...]
    image: str | None
    label: ClassColumn | None

    def __len__(self) -> int:
        return sum(self.counts)

    def by_file(self, rows: NDArray[np.int64]) -> Iterator[tuple[str, NDArray[np.int64]]]:
        """Yield each file that holds some of the ascending rows, and these rows within it."""
        for file, within in rows_by_part(rows, self.counts):
            yield self.files[file], within

    def fingerprint(self) -> str:
        """See `Reader`."""
        names = [(PurePosixPath(file).name, file_size(file)) for file in self.files]
        label = self.label and self.label.name
        return digest([self.image, label, *zip(names, self.counts, strict=True)])


def rows_by_part(
    rows: NDArray[np.int64], counts: Sequence[int]
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield each part that holds some of the ascending rows, and these rows within it.

    Args:
        counts: the number of rows of each part.
    """
    starts = np.cumsum([0, *counts])
    cuts = np.searchsorted(rows, starts)
    for part, (first, last) in enumerate(pairwise(cuts)):
        if first < last:
            yield part, rows[first:last] - starts[part]


@dataclass(frozen=True)
class ParquetRows(RowsOfFiles):
    """Rows of Parquet files, local or remote; only row groups with requested rows are read."""

    image: str

    def read(self, rows: NDArray[np.int64]) -> Iterator[tuple[Any, int]]:
        """See `Reader`."""
        for file, within in self.by_file(rows):
            with opened_parquet(file) as parquet:
                yield from self._read(parquet, within)

    def _read(self, parquet: Any, rows: NDArray[np.int64]) -> Iterator[tuple[Any, int]]:
        metadata = parquet.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        columns = [self.image, *([self.label.name] if self.label else [])]
        for group, within in rows_by_part(rows, sizes):
            first = 0
            for batch in parquet.iter_batches(_CHUNK, [group], columns=columns, use_threads=False):
                if first > within[-1]:
                    break
                in_batch = (within >= first) & (within < first + len(batch))
                chunk = batch.take(within[in_batch] - first).to_pydict()
                first += len(batch)
                yield from _with_labels(chunk[self.image], chunk, self.label)

    def name_of(self, row: int) -> str:
        """See `Reader`."""
        ((file, within),) = self.by_file(np.array([row]))
        record, _ = next(self.read(np.array([row])))
        return f"{PurePosixPath(file).name} {_row_name(int(within[0]), record)}"


@contextmanager
def opened_parquet(file: str) -> Iterator[Any]:
    """Open a `pyarrow.parquet.ParquetFile`, local or remote.

    Raises:
        InputError: it is not readable as Parquet.
    """
    import fsspec
    import pyarrow.parquet as pq

    if "://" not in file:
        require_regular(Path(file))
    try:
        # By default, Arrow loads whole row groups, and fsspec fetches more than is read.
        system, path = fsspec.core.url_to_fs(file)
        with (
            system.open(path, "rb", cache_type="none") as stream,
            pq.ParquetFile(stream, pre_buffer=False, buffer_size=_BUFFER) as parquet,
        ):
            yield parquet
    except InputError:
        raise
    except Exception as error:  # Arrow and network file systems raise errors of many types.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{file} is not readable as Parquet: {reason[:300]}") from None


@dataclass(frozen=True)
class ImageFiles:
    """Image files of a folder.

    Args:
        names: of the files, relative to the folder, an Arrow array (a Python list takes three
            times the memory).
        labels: the class number of each image, int32 [N], -1 without one; None without classes.
    """

    folder: Path
    names: Any
    labels: NDArray[np.int32] | None

    def __len__(self) -> int:
        return len(self.names)

    def read(self, rows: NDArray[np.int64]) -> Iterator[tuple[Any, int]]:
        """See `Reader`."""
        for row in rows:
            label = -1 if self.labels is None else int(self.labels[row])
            yield self.folder / self.names[row].as_py(), label

    def name_of(self, row: int) -> str:
        """See `Reader`."""
        return str(self.folder / self.names[row].as_py())

    def fingerprint(self) -> str:
        """See `Reader`."""
        names = (name.as_py() for name in self.names)
        files = digest((name, file_size(f"{self.folder}/{name}")) for name in names)
        if self.labels is None:
            return files
        return digest([files, hashlib.sha256(self.labels.tobytes()).hexdigest()])
