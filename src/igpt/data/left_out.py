"""What a source holds that is not used: counts by kind with the first name of each, and how much of it is allowed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from igpt.errors import InputError
from igpt.files import Stored, require_schema

HIDDEN = "hidden and system files"
SPECIAL = "FIFOs, sockets and devices"
UNLISTED = "images that no metadata file lists"
OUTSIDE = "images outside the folders of the splits"
BAD = "images that do not decode"
UNLABELLED = "labels (the images are kept without one)"
COLUMNS = "columns"
FRAMES = "further frames of images"
ARCHIVES = (".zip", ".7z", ".rar", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".lz4")
_HEIC = (".heic", ".heif", ".hif")
_KINDS_SHOWN = 12


class _StoredEntry(Stored):
    count: int = Field(ge=1)
    first: str
    possible_images: bool


@dataclass(frozen=True)
class Entry:
    """What is left out of one kind.

    Attributes:
        count: how many.
        first: the name of the first one; of columns, the names of up to ten.
        possible_images: whether they are images, or files that may be or hold some: these count
            against `max_bad`.
    """

    count: int
    first: str
    possible_images: bool


@dataclass
class LeftOut:
    """Everything that is left out of a source, by kind, in the order in which it was found."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def add(self, kind: str, first: str, *, count: int = 1, possible_images: bool = False) -> None:
        """Count `count` more of a kind; the name of the first one ever counted is kept."""
        known = self.entries.get(kind)
        if known:
            assert known.possible_images == possible_images
            count += known.count
            first = known.first
        self.entries[kind] = Entry(count, _printable(first), possible_images)

    def update(self, other: "LeftOut") -> None:
        """Add everything that `other` counts."""
        for kind, entry in other.entries.items():
            self.add(kind, entry.first, count=entry.count, possible_images=entry.possible_images)

    def __bool__(self) -> bool:
        return bool(self.entries)

    @property
    def possible_images(self) -> int:
        """How many images, or files that may be or hold some, are left out."""
        return sum(entry.count for entry in self.entries.values() if entry.possible_images)

    def text(self, *, only_possible_images: bool = False) -> str:
        """Return everything in one line: "files ending in .heic: 30 (first: a.heic); ..."."""
        told = [
            f"{kind}: {entry.count} ({'' if kind.startswith(COLUMNS) else 'first: '}{entry.first})"
            for kind, entry in self.entries.items()
            if entry.possible_images or not only_possible_images
        ]
        more = len(told) - _KINDS_SHOWN
        return "; ".join(told[:_KINDS_SHOWN]) + (f"; and {more} more kinds" if more > 0 else "")

    def advice(self) -> str:
        """Return what to do about archives and HEIC that are left out, to be put behind `text`."""
        words = ""
        packed = next(
            (entry for kind, entry in self.entries.items() if kind.endswith(ARCHIVES)), None
        )
        if packed:
            words += f"; unpack {packed.first} first"
        if any(kind.endswith(_HEIC) for kind in self.entries):
            words += "; Pillow has no decoder for HEIC here: convert to JPEG or PNG, or install pillow-heif"
        return words

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Return what `from_json` reads."""
        return {kind: vars(entry) for kind, entry in self.entries.items()}

    @classmethod
    def from_json(cls, value: Any, where: str) -> "LeftOut":
        """Read what `to_json` returned.

        Raises:
            InputError: it is something else; names `where` and the key.
        """
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: left_out should be a JSON object")
        entries = {}
        for kind, entry in value.items():
            require_schema(entry, _StoredEntry, f"{where}: left_out.{kind}")
            entries[str(kind)] = Entry(entry["count"], entry["first"], entry["possible_images"])
        return cls(entries)


def left_out_of(made: Mapping[str, Any], where: str) -> LeftOut:
    """Return what was left out of a token data set, by the entry "made" of its manifest.

    Manifests of version 0.1.0 name the images that do not decode, and nothing else.

    Raises:
        InputError: the entry is malformed.
    """
    if "left_out" in made:
        return LeftOut.from_json(made["left_out"], where)
    left_out = LeftOut()
    skipped = made.get("skipped") or []
    if skipped:
        left_out.add(BAD, skipped[0], count=len(skipped), possible_images=True)
    return left_out


def listed(names: Sequence[str], most: int = 10) -> str:
    """Return names in one line, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _printable(name: str) -> str:
    """Escape line ends and what is no UTF-8 in the name of a file."""
    return name if name.isprintable() else repr(name)[1:-1]


@dataclass(frozen=True)
class Allowance:
    """How many possible images of a source may be left out.

    Args:
        images: of the source, that are not left out.
        left_out: possible images that are left out before any is decoded.
        max_bad: the share of all of these that may be left out.
    """

    images: int
    left_out: int
    max_bad: float

    @property
    def total(self) -> int:
        """Images and possible images of the source."""
        return self.images + self.left_out

    def require(self, source: str, left_out: LeftOut) -> None:
        """Refuse a source of which too much is left out before any image is decoded.

        Raises:
            InputError: names the counts, and the value of `--max-bad` that allows it.
        """
        allowed = _whole(self.max_bad * self.total)
        if self.left_out > allowed:
            raise InputError(
                f"{self.left_out} of {self.total} files or images of {source} would be left out, where --max-bad "
                f"{self.max_bad:g} allows {allowed}: {left_out.text(only_possible_images=True)}{left_out.advice()}; "
                f"--max-bad {_enough(self.left_out / self.total)} goes on without them"
            )

    def undecoded(self, reading: int) -> int:
        """Return how many images may fail to decode where `reading` of the source's images are read."""
        share = (self.max_bad * self.total - self.left_out) / max(1, self.images)
        return _whole(max(0.0, share) * reading)

    def require_decoded(self, bad: Sequence[str], reading: int) -> None:
        """Refuse more images that do not decode than are allowed where `reading` images are read.

        Raises:
            InputError: names the counts, the first image, and the value of `--max-bad` that allows
                so many.
        """
        allowed = self.undecoded(reading)
        if len(bad) > allowed:
            share = (len(bad) / reading * self.images + self.left_out) / self.total
            before = (
                f", besides {self.left_out} possible images left out before"
                if self.left_out
                else ""
            )
            raise InputError(
                f"images that do not decode: {len(bad)}, where --max-bad {self.max_bad:g} allows "
                f"{allowed}{before}; the first: {bad[0]}; mend or remove them, or go on without them by a larger "
                f"--max-bad ({_enough(share)} allows so many)"
            )


def _whole(number: float) -> int:
    return math.floor(number + 1e-9)


def _enough(share: float) -> str:
    """Return a short number that is no less than a share."""
    for digits in (2, 3, 4, 6, 9):
        value = math.ceil(share * 10**digits - 1e-9) / 10**digits
        if value <= 1.1 * share:
            break
    return f"{min(1.0, value):.9g}"
