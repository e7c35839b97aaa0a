"""Folders of image files behind a URL, such as the objects of S3 with a common prefix. N images."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igpt.data.sources.folders import Listing, copies, listing_of, with_kinds
from igpt.data.sources.readers import Reader, digest
from igpt.errors import InputError
from igpt.remote import file_system, reasons

# Images in memory; they are fetched at the same time.
_CHUNK = 64


@dataclass(frozen=True)
class RemoteImages:
    """Image files behind a URL.

    Args:
        folder: the URL.
        names: relative to it, an Arrow array [N].
        sizes: in bytes, int64 [N].
        labels: see `ImageFiles`.
    """

    folder: str
    names: Any
    sizes: NDArray[np.int64]
    labels: NDArray[np.int32] | None

    def __len__(self) -> int:
        return len(self.names)

    def read(self, rows: NDArray[np.int64]) -> Iterator[tuple[Any, int]]:
        """See `Reader`.

        Raises:
            InputError: the store does not answer, or denies access.
        """
        system, path = file_system(self.folder)
        for first in range(0, len(rows), _CHUNK):
            some = rows[first : first + _CHUNK].tolist()
            paths = [f"{path}/{self.names[row].as_py()}" for row in some]
            with reasons(self.folder):  # `cat` would take brackets in names for patterns
                found = system.cat_ranges(paths, None, None, on_error="return")
            for row, content in zip(some, found, strict=True):
                if isinstance(content, FileNotFoundError):  # since it was listed
                    content = InputError("no such file")
                elif isinstance(content, Exception):
                    with reasons(self.name_of(row)):
                        raise content
                label = -1 if self.labels is None else int(self.labels[row])
                yield {"bytes": content, "path": self.name_of(row)}, label

    def name_of(self, row: int) -> str:
        """See `Reader`."""
        return f"{self.folder}/{self.names[row].as_py()}"

    def fingerprint(self) -> str:
        """See `Reader`."""
        names = (name.as_py() for name in self.names)
        labels = self.labels
        return digest(
            [*zip(names, self.sizes.tolist(), strict=True)]
            + ([] if labels is None else labels.tolist())
        )


@dataclass(frozen=True)
class RemoteFiles:
    """The files of a folder behind a URL.

    Attributes:
        folder: the URL, without a slash at the end.
        sizes: of all files, in bytes, int64.
    """

    folder: str
    sizes: NDArray[np.int64] = field(repr=False)

    def where(self, name: str) -> str:
        """See `Files`."""
        return f"{self.folder}/{name}" if name else self.folder

    def local(self, names: Sequence[str]) -> AbstractContextManager[Path]:
        """See `Files`."""
        system, path = file_system(self.folder)
        with reasons(self.folder):
            contents = {name: system.cat_file(f"{path}/{name}") for name in names}
        return copies(self.folder, contents)

    def reader(
        self, top: str, names: Any, positions: NDArray[np.int64], labels: NDArray[np.int32] | None
    ) -> Reader:
        """See `Files`."""
        return RemoteImages(self.where(top), names, self.sizes[positions], labels)


def list_url(url: str) -> tuple[RemoteFiles, Listing]:
    """Return the files below a URL, or the one image file that it is, by kind.

    Raises:
        InputError: there are none, or they cannot be listed.
    """
    system, path = file_system(url)
    path = path.rstrip("/")
    with reasons(url):
        found = system.find(path, detail=True)
        if not found:
            system.info(path)  # raises if it is not there, such as without the bucket
    folder = url.rstrip("/")
    if set(found) == {path}:  # one file
        folder, path = folder.rpartition("/")[0], path.rpartition("/")[0]
    names = sorted(found)
    sizes = np.array([found[name].get("size") or 0 for name in names], np.int64)
    listing = listing_of(with_kinds(name[len(path) + 1 :] for name in names), url)
    return RemoteFiles(folder, sizes), listing
