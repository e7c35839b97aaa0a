"""ZIP archives of images, read in place: their members, and a reader of some of them.

The list of an archive's members is read once. A worker gets the place of each image in the
archives, and reads it there. N images, M members.
"""

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from igpt.data.sources.folders import Listing, copies, listing_of, with_kinds
from igpt.data.sources.readers import Reader, digest
from igpt.errors import InputError
from igpt.remote import name_in, opened

# The place of a member: the number of its archive, the offset of its header, its compressed and
# its full size in bytes, its CRC-32, and the method of its compression.
_PLACE = np.dtype(
    [
        ("file", "i4"),
        ("offset", "i8"),
        ("stored", "i8"),
        ("size", "i8"),
        ("crc", "u4"),
        ("method", "u2"),
    ]
)
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 1  # a flag
_HEADER = 30  # bytes, before the name
_LARGEST = 1 << 30  # bytes of an image file


@dataclass(frozen=True)
class ZipImages:
    """Images in ZIP archives.

    Args:
        files: the archives: paths, or URLs.
        names: of the members, an Arrow array [N].
        places: of the members in the archives, [N], by archive.
        labels: see `ImageFiles`.
    """

    files: tuple[str, ...]
    names: Any
    places: NDArray[np.void]
    labels: NDArray[np.int32] | None

    def __len__(self) -> int:
        return len(self.names)

    def read(self, rows: NDArray[np.int64]) -> Iterator[tuple[Any, int]]:
        """See `Reader`."""
        of_files = np.split(rows, np.flatnonzero(np.diff(self.places["file"][rows])) + 1)
        for some in of_files if len(rows) else ():
            with opened(self.files[self.places["file"][some[0]]]) as archive:
                for row in some.tolist():
                    content = _content(archive, self.places[row])
                    label = -1 if self.labels is None else int(self.labels[row])
                    yield {"bytes": content, "path": self.names[row].as_py()}, label

    def name_of(self, row: int) -> str:
        """See `Reader`."""
        return f"{name_in(self.files[self.places['file'][row]])}: {self.names[row].as_py()}"

    def fingerprint(self) -> str:
        """See `Reader`."""
        names = (name.as_py() for name in self.names)
        crcs, labels = self.places["crc"].tolist(), self.labels
        return digest(
            [*zip(names, self.places["size"].tolist(), crcs, strict=True)]
            + ([] if labels is None else labels.tolist())
        )


def _content(archive: IO[bytes], place: NDArray[np.void]) -> bytes | InputError:
    """Return the content of a member, or the reason why it cannot be read."""
    offset, stored, size = (int(place[key]) for key in ("offset", "stored", "size"))
    if size > _LARGEST:
        return InputError(f"it has {size:,} bytes, and images of at most {_LARGEST:,} are read")
    archive.seek(offset)
    header = archive.read(_HEADER)
    if len(header) < _HEADER or not header.startswith(b"PK\3\4"):
        return InputError("damaged in the ZIP archive: it does not begin where the list says")
    # The lengths of the name and of an extra field, which are between the header and the content.
    skipped = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    archive.seek(offset + _HEADER + skipped)
    content = archive.read(min(stored, _LARGEST))
    if place["method"] == zipfile.ZIP_DEFLATED:
        try:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        except zlib.error as error:
            return InputError(f"damaged in the ZIP archive: {error}")
    if len(content) != size or zlib.crc32(content) != place["crc"]:
        return InputError("damaged in the ZIP archive: its checksum is another")
    return content


@dataclass(frozen=True)
class ZipFiles:
    """The members of ZIP archives as the files of one folder.

    Attributes:
        source: the archive, or the folder of the archives.
        files: the archives.
        names: of all members, as a user knows them [M].
        places: [M].
    """

    source: str
    files: tuple[str, ...]
    names: list[str]
    places: NDArray[np.void]

    def where(self, name: str) -> str:
        """See `Files`."""
        return f"{self.source}/{name}" if name else self.source

    def local(self, names: Sequence[str]) -> AbstractContextManager[Path]:
        """See `Files`.

        Raises:
            InputError: a file is damaged, or in several of the archives.
        """
        return copies(self.source, {name: self._content_of(name) for name in names})

    def _content_of(self, name: str) -> bytes:
        found = [number for number, other in enumerate(self.names) if other == name]
        if len(found) > 1:
            raise InputError(f"{self.source} has {name} in several ZIP archives; unpack them first")
        place = self.places[found[0]]
        with opened(self.files[place["file"]]) as archive:
            content = _content(archive, place)
        if isinstance(content, InputError):
            raise InputError(f"{self.where(name)}: {content}")
        return content

    def reader(
        self, top: str, names: Any, positions: NDArray[np.int64], labels: NDArray[np.int32] | None
    ) -> Reader:
        """See `Files`."""
        return ZipImages(self.files, names, self.places[positions], labels)


def list_zips(source: str, folders: dict[str, str]) -> tuple[ZipFiles, Listing]:
    """Return the members of ZIP archives, and those of them that are images.

    Args:
        source: the archive, or the folder of the archives.
        folders: the folder that the members of each archive are in, "" or with a slash at the end;
            by path or URL of the archive.

    Raises:
        InputError: an archive is damaged or encrypted.
    """
    names, places = list[str](), list[tuple[int, ...]]()
    for number, (file, folder) in enumerate(folders.items()):
        for member in _members(file):
            name = member.filename
            # Some programs of Windows write backslashes.
            names.append(folder + (name if "/" in name else name.replace("\\", "/")).lstrip("/"))
            sizes = member.compress_size, member.file_size
            places.append((number, member.header_offset, *sizes, member.CRC, member.compress_type))
    files = ZipFiles(source, tuple(folders), names, np.array(places, _PLACE))
    return files, listing_of(with_kinds(names), source)


def _members(file: str) -> list[zipfile.ZipInfo]:
    """Return the members of an archive; of several of one name, the last, as when unpacking."""
    try:
        with opened(file) as stream, zipfile.ZipFile(stream) as archive:
            members = [one for one in archive.infolist() if archive.NameToInfo[one.filename] is one]
    except InputError:
        raise
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{file} is not readable as a ZIP: {error}; is it cut off?") from None
    for member in members:
        if member.flag_bits & _ENCRYPTED:
            raise InputError(f"{file} is encrypted ({member.filename}); unpack it first")
        if member.compress_type not in _METHODS and not member.is_dir():
            raise InputError(
                f"{file} is compressed by method {member.compress_type} ({member.filename}), and "
                "only stored and deflated members can be read in place; unpack it first"
            )
    return members
