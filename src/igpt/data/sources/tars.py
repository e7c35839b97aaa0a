"""WebDataset tars: their splits, samples and classes.

A sample is a run of members whose names differ only after the first dot.
"""

import tarfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igpt.data.left_out import HIDDEN, LeftOut, listed
from igpt.data.sources.classes import ClassColumn, require_known, sort_classes
from igpt.data.sources.file_kinds import ending_of, is_hidden, is_image_ending, may_hold_images
from igpt.data.sources.readers import Reader, RowsOfFiles, rows_by_part
from igpt.data.sources.splits import Opened
from igpt.errors import InputError
from igpt.remote import name_in, opened


@dataclass(frozen=True)
class Sample:
    """The members of one sample, by their endings."""

    tar: tarfile.TarFile
    members: dict[str, tarfile.TarInfo]

    @property
    def start(self) -> int:
        """The offset of its first member in the tar."""
        return next(iter(self.members.values())).offset

    def image(self, ending: str | None) -> dict[str, Any] | None:
        """Return the image's `{"bytes", "path"}`; None where the sample has none."""
        chosen = self._image_ending(ending)
        if chosen not in self.members:
            return None
        return {"bytes": self._read(chosen), "path": self.members[chosen].name}

    def name_of(self, ending: str | None) -> str:
        """Return the name of the image, or of the first member where there is no image."""
        return self.members.get(self._image_ending(ending), next(iter(self.members.values()))).name

    def _image_ending(self, ending: str | None) -> str:
        return ending if ending is not None else next(filter(is_image_ending, self.members), "")

    def value(self, column: str) -> str | None:
        """Return the text of a member or a field of the `.json` member; None without one."""
        if column in self.members:
            return self._read(column).decode(errors="replace").strip() or None
        field = self._json.get(column)
        return None if field is None else str(field).strip() or None

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
class TarSamples(RowsOfFiles):
    """Samples of WebDataset tars.

    Args:
        image: the ending of the members that are images; None takes the first image of each sample.
        label: the ending of the members with the class, or a field of the `.json` members.
        starts: the offsets of the samples in each tar, int64 [count].
    """

    starts: tuple[NDArray[np.int64], ...]

    def read(self, rows: NDArray[np.int64]) -> Iterator[tuple[Any, int]]:
        """See `Reader`."""
        for sample in self._samples(rows):
            value = sample.value(self.label.name) if self.label else None
            yield sample.image(self.image), self.label.number(value) if self.label else -1

    def _samples(self, rows: NDArray[np.int64]) -> Iterator[Sample]:
        for number, within in rows_by_part(rows, self.counts):
            with _opened_tar(self.files[number]) as tar:
                for start in self.starts[number][within].tolist():
                    tar.firstmember = None  # type: ignore[attr-defined]  # read on opening
                    tar.offset = start
                    assert tar.fileobj is not None
                    tar.fileobj.seek(start)
                    entries = _entries(tar, self.files[number])
                    yield next(entry for entry in entries if isinstance(entry, Sample))

    def name_of(self, row: int) -> str:
        """See `Reader`."""
        ((file, _),) = self.by_file(np.array([row]))
        sample = next(self._samples(np.array([row])))
        return f"{name_in(file)}: {sample.name_of(self.image)}"


@contextmanager
def _opened_tar(file: str) -> Iterator[tarfile.TarFile]:
    """Open a tar.

    Raises:
        InputError: it is not a tar, or it is cut off; also while it is read.
    """
    try:
        # Compressed tars are not supported: they can only be read from the beginning.
        with opened(file) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            yield tar
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(
            f"{file} is not readable as an uncompressed tar: {error}; is it cut off?"
        ) from None


def entries_of(file: str) -> Iterator[Sample | tarfile.TarInfo]:
    """Yield the samples of a tar, and the members that belong to no sample, without its folders.

    Hidden files and files in hidden or system folders belong to no sample. A member is read when it
    is used.

    Raises:
        InputError: it is not a tar, or it is cut off.
    """
    with _opened_tar(file) as tar:
        yield from _entries(tar, file)


def _entries(tar: tarfile.TarFile, file: str) -> Iterator[Sample | tarfile.TarInfo]:
    """Yield the samples and other members from the current offset on."""
    key, members = "", dict[str, tarfile.TarInfo]()
    for member in _members(tar, file):
        name = PurePosixPath(member.name)
        stem, dot, ending = name.name.partition(".")
        if member.isdir():
            continue
        if not member.isfile() or not stem or not dot or any(map(is_hidden, name.parts)):
            yield member
            continue
        ending = ending.lower()
        if f"{name.parent}/{stem}" != key or ending in members:
            if members:
                yield Sample(tar, members)
            key, members = f"{name.parent}/{stem}", {}
        members[ending] = member
    if members:
        yield Sample(tar, members)


def _members(tar: tarfile.TarFile, file: str) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar and of tars that were appended to it (`cat a.tar b.tar`)."""
    assert tar.fileobj is not None
    while True:
        while (member := tar.next()) is not None:
            # A TarFile keeps every header it has read; drop them to save memory.
            tar.members = []  # type: ignore[attr-defined]
            yield member
        end = tar.offset
        tar.fileobj.seek(end)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise InputError(f"{file} has no end: it is cut off or damaged after {end} bytes")
        following = _next_data(tar)
        if following is None:
            return
        tar.offset = following
        tar.fileobj.seek(following)


def _next_data(tar: tarfile.TarFile) -> int | None:
    """Return the offset of the next block that is not all zeros; None at the end of the file."""
    assert tar.fileobj is not None
    while chunk := tar.fileobj.read(256 * tarfile.BLOCKSIZE):
        kept = chunk.lstrip(b"\0")
        if kept:
            zeros = len(chunk) - len(kept)
            start: int = tar.fileobj.tell() - len(chunk)
            return start + zeros - zeros % tarfile.BLOCKSIZE
    return None


def open_tars(splits: Mapping[str, Sequence[str]], image: str | None, label: str | None) -> Opened:
    """Open the splits of WebDataset tars and find their classes.

    Classes are the texts of the `.cls` members, of the members with the ending `label`, or the
    field `label` of the `.json` members.

    Args:
        splits: the tars of each split, "train" among them.
        image, label: requested columns; the label "none" ignores classes.

    Raises:
        InputError: a tar is cut off or has no images, or training lacks a class.
    """
    column = None if label == "none" else label or "cls"
    starts: dict[str, list[NDArray[np.int64]]] = {split: [] for split in splits}
    classes: dict[str, set[str]] = {split: set() for split in splits}
    left_out = LeftOut()
    # The endings of unused members in the order of their first ones.
    unused = dict[str, None]()
    for split, file in ((split, file) for split, tars in splits.items() for file in tars):
        offsets, images = array("q"), 0
        for entry in entries_of(file):
            if not isinstance(entry, Sample):
                _leave_out(entry, file, left_out)
                continue
            offsets.append(entry.start)
            endings = [ending for ending in entry.members if is_image_ending(ending)]
            if image is None and len(endings) > 1:
                examples = " and ".join(entry.members[ending].name for ending in endings[:2])
                raise InputError(
                    f"samples of {file} have several images; name one with --image-column: "
                    f"{listed(endings, 5)}; members whose names agree up to the first dot are one "
                    f"sample, such as {examples}"
                )
            has_image = bool(endings) if image is None else image in entry.members
            images += has_image
            used = {image or next(iter(endings), "")}
            value = entry.value(column) if column else None
            if column and value is not None:
                classes[split].add(value)
                used.add(column if column in entry.members else "json")
            for ending in (ending for ending in entry.members if has_image and ending not in used):
                name = f"{name_in(file)}: {entry.members[ending].name}"
                left_out.add(f"further members of samples {ending_of(name)}", name)
                unused[ending] = None
        if offsets and not images:
            ending = f" that end in .{image}" if image else ""
            raise InputError(f"{file} holds no images{ending}")
        starts[split].append(np.array(offsets, np.int64))
    names = sort_classes(classes["train"])
    first = splits["train"][0]
    if label not in (None, "none") and not names:
        raise InputError(f"no sample of {first} has a .{label} member or such a field in its .json")
    require_known(names, classes, first.rpartition("/")[0] or ".")
    numbered = ClassColumn.of_names(column, names) if names and column else None
    readers: dict[str, Reader] = {
        split: TarSamples(
            tuple(tars), tuple(map(len, starts[split])), image, numbered, tuple(starts[split])
        )
        for split, tars in splits.items()
    }
    notes = list[str]()
    if label is None and not names:
        members = listed([f".{ending}" for ending in unused])
        others = f" (there are members ending in {members})" if unused else ""
        notes.append(
            f"no labels: no training sample has a .cls member{others}; --label-column names the "
            "ending of other members, or a field of the .json members"
        )
    return Opened(readers, names or None, left_out, notes)


def _leave_out(member: tarfile.TarInfo, file: str, left_out: LeftOut) -> None:
    """Count a member of a tar that belongs to no sample."""
    name = PurePosixPath(member.name)
    if any(map(is_hidden, name.parts)):
        left_out.add(HIDDEN, f"{name_in(file)}: {member.name}")
        return
    kind = "tar members" if member.isfile() else "tar members that are links or devices"
    left_out.add(
        f"{kind} {ending_of(name.name)}",
        f"{name_in(file)}: {member.name}",
        possible_images=may_hold_images(name.name),
    )
