"""Files and images of a source that are left out: counted by kind, with the first name of each."""

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
    """Files or images of one kind that are left out.

    Attributes:
        count: how many.
        first: the name of the first one; for columns, up to ten names.
        possible_images: whether they are images, or files that may be or hold images; these count
            against `max_bad`.
    """

    count: int
    first: str
    possible_images: bool


@dataclass
class LeftOut:
    """Everything that is left out of a source, by kind, in the order of discovery."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def add(self, kind: str, first: str, *, count: int = 1, possible_images: bool = False) -> None:
        """Count `count` more of a kind; the first name is kept."""
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
        """Number of images, and of files that may be or hold images, that are left out."""
        return sum(entry.count for entry in self.entries.values() if entry.possible_images)

    def text(self, *, only_possible_images: bool = False) -> str:
        """Return a summary in one line: "files ending in .heic: 30 (first: a.heic); ..."."""
        shown = [
            f"{kind}: {entry.count} ({'' if kind.startswith(COLUMNS) else 'first: '}{entry.first})"
            for kind, entry in self.entries.items()
            if entry.possible_images or not only_possible_images
        ]
        more = len(shown) - _KINDS_SHOWN
        return "; ".join(shown[:_KINDS_SHOWN]) + (f"; and {more} more kinds" if more > 0 else "")

    def advice(self) -> str:
        """Return advice on left-out archives and HEIC files, to append to `text`."""
        words = ""
        packed = next(
            (entry for kind, entry in self.entries.items() if kind.endswith(ARCHIVES)), None
        )
        if packed:
            words += f"; unpack {packed.first} first"
        if any(kind.endswith(_HEIC) for kind in self.entries):
            words += (
                "; Pillow cannot decode HEIC here: convert to JPEG or PNG, or install pillow-heif"
            )
        return words

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Return a JSON object that `from_json` reads."""
        return {kind: vars(entry) for kind, entry in self.entries.items()}

    @classmethod
    def from_json(cls, value: Any, where: str) -> "LeftOut":
        """Return the value that `to_json` was called on.

        Raises:
            InputError: the object is malformed; names `where` and the key.
        """
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: left_out should be a JSON object")
        entries = {}
        for kind, entry in value.items():
            require_schema(entry, _StoredEntry, f"{where}: left_out.{kind}")
            entries[str(kind)] = Entry(entry["count"], entry["first"], entry["possible_images"])
        return cls(entries)


def left_out_of(made: Mapping[str, Any], where: str) -> LeftOut:
    """Return what was left out of a token data set, from the entry "made" of its manifest.

    Manifests of version 0.1.0 name only the images that do not decode.

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
    """Return up to `most` names in one line, and the number of the others."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _printable(name: str) -> str:
    """Escape line ends and invalid UTF-8 in the name of a file."""
    return name if name.isprintable() else repr(name)[1:-1]


@dataclass(frozen=True)
class Allowance:
    """Number of possible images of a source that may be left out.

    Args:
        images: number of images of the source that are not left out.
        left_out: number of possible images that are left out before decoding.
        max_bad: share of all of these that may be left out.
    """

    images: int
    left_out: int
    max_bad: float

    @property
    def total(self) -> int:
        """Number of images and possible images of the source."""
        return self.images + self.left_out

    def require(self, source: str, left_out: LeftOut) -> None:
        """Raise if too many possible images are left out before decoding.

        Raises:
            InputError: names the counts, and the value of `--max-bad` that allows it.
        """
        allowed = _whole(self.max_bad * self.total)
        if self.left_out > allowed:
            raise InputError(
                f"{self.left_out} of {self.total} files or images of {source} would be left out, "
                f"where --max-bad {self.max_bad:g} allows {allowed}: "
                f"{left_out.text(only_possible_images=True)}{left_out.advice()}; "
                f"--max-bad {_enough(self.left_out / self.total)} continues without them"
            )

    def undecoded(self, reading: int) -> int:
        """Return how many of `reading` images of the source may fail to decode."""
        share = (self.max_bad * self.total - self.left_out) / max(1, self.images)
        return _whole(max(0.0, share) * reading)

    def require_decoded(self, bad: Sequence[str], reading: int) -> None:
        """Raise if too many of `reading` images do not decode.

        Raises:
            InputError: names the counts, the first image, and the value of `--max-bad` that allows
                them.
        """
        allowed = self.undecoded(reading)
        if len(bad) > allowed:
            share = (len(bad) / reading * self.images + self.left_out) / self.total
            before = ""
            if self.left_out:
                before = f", plus {self.left_out} possible images left out before"
            raise InputError(
                f"images that do not decode: {len(bad)}, where --max-bad {self.max_bad:g} allows "
                f"{allowed}{before}; the first: {bad[0]}; repair or remove them, or continue "
                f"without them with a larger --max-bad ({_enough(share)} is enough)"
            )


def _whole(number: float) -> int:
    return math.floor(number + 1e-9)


def _enough(share: float) -> str:
    """Return a share, rounded up to a few digits."""
    for digits in (2, 3, 4, 6, 9):
        value = math.ceil(share * 10**digits - 1e-9) / 10**digits
        if value <= 1.1 * share:
            break
    return f"{min(1.0, value):.9g}"
