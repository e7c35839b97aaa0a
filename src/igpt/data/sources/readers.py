"""Undecoded images by row, from tables, Parquet files, image files and tars: nothing of them stays in memory.

What is read for one row is an image that `open_image` takes, so that a broken one is an error of
that image alone, and the number of its class, -1 where it has none. N images.
"""

import hashlib
import math
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice, pairwise
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from igpt.data.images.decode import register_decoders
from igpt.errors import InputError
from igpt.files import require_regular

_AT_ONCE = 256  # rows of a table in memory
_BUFFER = 1 << 23  # bytes of a Parquet column


class Reader(Protocol):
    """Images of one split of a source."""

    def __len__(self) -> int:
        """How many images there are."""

    def read(self, rows: NDArray[np.int64]) -> Iterator[tuple[Any, int]]:
        """The undecoded images of some rows, in ascending order, each with the number of its class."""

    def name_of(self, row: int) -> str:
        """How a person finds an image."""

    def fingerprint(self) -> str:
        """Differs where the images differ by number, name or size; the same on every machine."""


def digest(parts: Iterable[object]) -> str:
    """SHA-256 of some values, in hexadecimal."""
    total = hashlib.sha256()
    for part in parts:
        total.update(f"{part}\n".encode(errors="surrogateescape"))
    return total.hexdigest()


def file_size(path: str | Path) -> int | None:
    """The size of a file in bytes; None where there is none on this machine."""
    try:
        return os.stat(path).st_size  # noqa: PTH116  a third of the time, and there may be millions
    except OSError:
        return None


@dataclass(frozen=True)
class Column:
    """The column of classes: its name, and the number of each of its values (None: the values are the numbers)."""

    name: str
    numbers: Mapping[str, int] | None = None

    def number(self, value: Any) -> int:
        """The number of a class; -1 for none."""
        if is_missing(value):
            return -1
        return int(value) if self.numbers is None else self.numbers[word_of(value)]


def is_missing(value: Any) -> bool:
    """Return whether a value of a column is none: null, or not a number."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def word_of(value: Any) -> str:
    """Return the class name of a value: words as they are, and whole numbers without a decimal point.

    Tables with missing values often hold whole numbers as floating-point ones.
    """
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


@dataclass(frozen=True)
class TableRows:
    """Rows of a `datasets.Dataset`, which has a memory-mapped Arrow file or a table in memory."""

    table: Any
    image: str
    label: Column | None

    def __len__(self) -> int:
        return len(self.table)

    def read(self, rows: NDArray[np.int64]) -> Iterator[tuple[Any, int]]:
        """See `Reader`."""
        for first in range(0, len(rows), _AT_ONCE):
            read = self.table[rows[first : first + _AT_ONCE]]
            labels = read[self.label.name] if self.label else [None] * len(read[self.image])
            for image, value in zip(read[self.image], labels, strict=True):
                yield image, self.label.number(value) if self.label else -1

    def name_of(self, row: int) -> str:
        """See `Reader`."""
        return _row_name(row, self.table[row][self.image])

    def fingerprint(self) -> str:
        """See `Reader`."""
        return digest([len(self.table), self.image, self.label and self.label.name])


def name_of_image(image: Any, row: int) -> str:
    """Return the path of an undecoded image, or its row: asking the reader may mean to read a table or tar again."""
    path = image.get("path") if isinstance(image, dict) else image
    name = str(path) if isinstance(path, str | Path) else ""
    return (
        name.encode(errors="backslashreplace").decode() or f"row {row}"
    )  # a tar's names may be no UTF-8


def _row_name(row: int, record: Any) -> str:
    path = record.get("path") if isinstance(record, dict) else record
    return f"row {row} ({path})" if isinstance(path, str) else f"row {row}"


@dataclass(frozen=True)
class ParquetRows:
    """Rows of Parquet files, local or remote: only the groups with wanted rows are read, and there is no copy on disk.

    Args:
        files: paths, or addresses that fsspec opens.
        counts: rows of each.
    """

    files: tuple[str, ...]
    counts: tuple[int, ...]
    image: str
    label: Column | None

    def __len__(self) -> int:
        return sum(self.counts)

    def read(self, rows: NDArray[np.int64]) -> Iterator[tuple[Any, int]]:
        """See `Reader`."""
        for file, wanted in _by_file(rows, self.counts):
            with opened_parquet(self.files[file]) as parquet:
                yield from self._read(parquet, wanted)

    def _read(self, parquet: Any, wanted: NDArray[np.int64]) -> Iterator[tuple[Any, int]]:
        sizes = [
            parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)
        ]
        columns = [self.image, *([self.label.name] if self.label else [])]
        for group, within in _by_file(wanted, sizes):
            first = 0
            for batch in parquet.iter_batches(
                _AT_ONCE, [group], columns=columns, use_threads=False
            ):
                if first > within[-1]:
                    break
                chosen = batch.take(
                    within[(within >= first) & (within < first + len(batch))] - first
                )
                first += len(batch)
                labels = chosen[self.label.name].to_pylist() if self.label else [None] * len(chosen)
                for image, value in zip(chosen[self.image].to_pylist(), labels, strict=True):
                    yield image, self.label.number(value) if self.label else -1

    def name_of(self, row: int) -> str:
        """See `Reader`."""
        ((file, within),) = _by_file(np.array([row]), self.counts)
        record, _ = next(self.read(np.array([row])))
        return f"{PurePosixPath(self.files[file]).name} {_row_name(int(within[0]), record)}"

    def fingerprint(self) -> str:
        """See `Reader`."""
        names = [(PurePosixPath(file).name, file_size(file)) for file in self.files]
        return digest(
            [self.image, self.label and self.label.name, *zip(names, self.counts, strict=True)]
        )


@contextmanager
def opened_parquet(file: str) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`, local or remote.

    Raises:
        InputError: it is not readable as Parquet.
    """
    import fsspec
    import pyarrow.parquet as pq

    if "://" not in file:
        require_regular(Path(file))
    try:
        # Left to themselves, Arrow takes whole row groups into memory, and fsspec fetches what
        # nobody will read.
        system, path = fsspec.core.url_to_fs(file)
        with (
            system.open(path, "rb", cache_type="none") as stream,
            pq.ParquetFile(stream, pre_buffer=False, buffer_size=_BUFFER) as parquet,
        ):
            yield parquet
    except InputError:
        raise
    except Exception as error:  # of many types: Arrow has some, and networks others
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{file} is not readable as Parquet: {reason[:300]}") from None


def _by_file(
    rows: NDArray[np.int64], counts: Sequence[int]
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Which of the ascending `rows` lie in which file, counted within it; files without any are left out."""
    starts = np.cumsum([0, *counts])
    cuts = np.searchsorted(rows, starts)
    for file, (first, last) in enumerate(pairwise(cuts)):
        if first < last:
            yield file, rows[first:last] - starts[file]


@dataclass(frozen=True)
class ImageFiles:
    """Image files of a folder.

    Args:
        names: of the files, relative to the folder, in an Arrow array: a Python list takes three
            times the memory.
        labels: the number of each image's class, int32 [N], -1 without one; None where there are no
            classes.
    """

    folder: Path
    names: Any
    labels: NDArray[np.int32] | None

    def __len__(self) -> int:
        return len(self.names)

    def read(self, rows: NDArray[np.int64]) -> Iterator[tuple[Any, int]]:
        """See `Reader`."""
        for row in rows:
            yield (
                self.folder / self.names[row].as_py(),
                -1 if self.labels is None else int(self.labels[row]),
            )

    def name_of(self, row: int) -> str:
        """See `Reader`."""
        return str(self.folder / self.names[row].as_py())

    def fingerprint(self) -> str:
        """See `Reader`."""
        names = (name.as_py() for name in self.names)
        files = digest((name, file_size(f"{self.folder}/{name}")) for name in names)
        return (
            files
            if self.labels is None
            else digest([files, hashlib.sha256(self.labels.tobytes()).hexdigest()])
        )


@dataclass(frozen=True)
class TarSamples:
    """Samples of WebDataset tars: neighbouring members whose names differ after the first dot only.

    Args:
        files: the tars.
        counts: samples of each.
        image: the ending of the members that are images; None takes the first image of each sample.
        label: the ending of the members with the class, or a field of the `.json` ones.
    """

    files: tuple[Path, ...]
    counts: tuple[int, ...]
    image: str | None
    label: Column | None

    def __len__(self) -> int:
        return sum(self.counts)

    def read(self, rows: NDArray[np.int64]) -> Iterator[tuple[Any, int]]:
        """See `Reader`."""
        for file, wanted in _by_file(rows, self.counts):
            remaining = iter(wanted.tolist())
            row = next(remaining)
            for number, sample in enumerate(samples_of(self.files[file])):
                if number == row:
                    value = sample.value(self.label.name) if self.label else None
                    yield sample.image(self.image), self.label.number(value) if self.label else -1
                    row = next(remaining, None)
                    if row is None:
                        break

    def name_of(self, row: int) -> str:
        """See `Reader`."""
        ((file, within),) = _by_file(np.array([row]), self.counts)
        sample = next(islice(samples_of(self.files[file]), int(within[0]), None))
        return f"{self.files[file].name}: {sample.name_of(self.image)}"

    def fingerprint(self) -> str:
        """See `Reader`."""
        names = [(file.name, file_size(file)) for file in self.files]
        return digest(
            [self.image, self.label and self.label.name, *zip(names, self.counts, strict=True)]
        )


@dataclass(frozen=True)
class Sample:
    """The members of a tar that belong together, by their endings."""

    tar: tarfile.TarFile
    members: dict[str, tarfile.TarInfo]

    def image(self, ending: str | None) -> dict[str, Any] | None:
        """The image's `{"bytes", "path"}`; None where the sample has none."""
        chosen = self._chosen(ending)
        return (
            {"bytes": self._read(chosen), "path": self.members[chosen].name}
            if chosen in self.members
            else None
        )

    def name_of(self, ending: str | None) -> str:
        """The name of the image, or of the first member where there is none."""
        return self.members.get(self._chosen(ending), next(iter(self.members.values()))).name

    def _chosen(self, ending: str | None) -> str:
        return ending if ending is not None else next(filter(is_image_ending, self.members), "")

    def value(self, column: str) -> str | None:
        """The text of a member, or a field of the `.json` one; None where it is empty or missing."""
        if column in self.members:
            return self._read(column).decode(errors="replace").strip() or None
        field = self._json.get(column)
        return None if field is None else str(field).strip() or None

    def sources_of(self, column: str | None) -> set[str]:
        """Return the endings of the members that hold the value of a column."""
        if column is None:
            return set()
        return {column} if column in self.members else {"json"}

    @cached_property
    def _json(self) -> dict[str, Any]:
        import json

        try:
            fields = json.loads(self._read("json")) if "json" in self.members else {}
        except ValueError:
            fields = {}
        return fields if isinstance(fields, dict) else {}

    def _read(self, ending: str) -> bytes:
        file = self.tar.extractfile(self.members[ending])
        return file.read() if file else b""


@dataclass(frozen=True)
class StrayMember:
    """A member of a tar that belongs to no sample.

    Attributes:
        is_file: whether it is a regular file; links and devices are not.
    """

    name: str
    is_file: bool


def samples_of(path: Path) -> Iterator[Sample]:
    """Yield the samples of a tar, one after the other; members are read only when they are asked for.

    Raises:
        InputError: it is not a tar, or it is cut off.
    """
    return (entry for entry in entries_of(path) if isinstance(entry, Sample))


def entries_of(path: Path) -> Iterator[Sample | StrayMember]:
    """Yield the samples of a tar, and the members that belong to none; folders are not members.

    Hidden files and what lies in hidden or system folders belong to no sample.

    Raises:
        InputError: it is not a tar, or it is cut off.
    """
    require_regular(path)
    try:
        with tarfile.open(
            path, "r:"
        ) as tar:  # a compressed one can only be read from its beginning
            key, members = "", dict[str, tarfile.TarInfo]()
            for member in _members(tar, path):
                place = PurePosixPath(member.name)
                stem, dot, ending = place.name.partition(".")
                if member.isdir():
                    continue
                if not member.isfile() or not stem or not dot or any(map(is_hidden, place.parts)):
                    yield StrayMember(member.name, member.isfile())
                    continue
                ending = ending.lower()
                if f"{place.parent}/{stem}" != key or ending in members:
                    if members:
                        yield Sample(tar, members)
                    key, members = f"{place.parent}/{stem}", {}
                members[ending] = member
            if members:
                yield Sample(tar, members)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(
            f"{path} is not readable as an uncompressed tar: {error}; is it cut off?"
        ) from None


def _members(tar: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar, and of others that were joined to it (`cat a.tar b.tar`)."""
    while True:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it keeps every header it has seen
            yield member
        end = tar.offset
        assert tar.fileobj is not None
        tar.fileobj.seek(end)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise InputError(f"{path} has no end: it is cut off or damaged after {end} bytes")
        following = _after_zeros(tar)
        if following is None:
            return
        tar.offset = following
        tar.fileobj.seek(following)


def _after_zeros(tar: tarfile.TarFile) -> int | None:
    """Return where the first block lies, from the position of the file on, that is not all zeros; None without one."""
    assert tar.fileobj is not None
    while chunk := tar.fileobj.read(256 * tarfile.BLOCKSIZE):
        kept = chunk.lstrip(b"\0")
        if kept:
            within = len(chunk) - len(kept)
            start: int = tar.fileobj.tell() - len(chunk)
            return start + within - within % tarfile.BLOCKSIZE
    return None


_SYSTEM_NAMES = frozenset(
    {
        "@eadir",
        "@recently-snapshot",
        "@recycle",
        "@tmp",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "__macosx",
        "__pycache__",
        "desktop.ini",
        "ehthumbs.db",
        "lost+found",
        "system volume information",
        "thumbs.db",
    }
)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is hidden, or made by a system for itself."""
    return (name.startswith(".") and name != "..") or name.lower() in _SYSTEM_NAMES


def is_image_ending(ending: str) -> bool:
    """Whether Pillow opens files that end so; of several endings, the last counts."""
    return f".{ending.rpartition('.')[2].lower()}" in image_endings()


@cache
def image_endings() -> frozenset[str]:
    """The endings of files that Pillow opens."""
    from PIL import Image

    register_decoders()

    return (
        frozenset(
            ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN
        )
        - _OTHER
    )


_OTHER = {
    ".pdf",
    ".ps",
    ".eps",
    ".mpg",
    ".mpeg",
    ".h5",
    ".hdf",
    ".grib",
    ".bufr",
    ".fit",
    ".fits",
    ".wmf",
    ".emf",
}
