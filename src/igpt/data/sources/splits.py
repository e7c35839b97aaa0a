"""Splits: their usual names, the splits that a source has, and the readers of opened splits."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from igpt.data.left_out import LeftOut
from igpt.data.sources.readers import Reader

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


def are_splits(names: Collection[str], *, alone: bool = True) -> bool:
    """Return whether folders or words of these names are splits.

    A class may be called "train". It is a split next to another split, or as the only name.

    Args:
        alone: whether the source has nothing outside these folders.
    """
    known = [SPLIT_NAMES[name.lower()] for name in names if name.lower() in SPLIT_NAMES]
    return "train" in known and (len(known) > 1 or (alone and len(names) == 1))


def split_by_words(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the files of each split by the words in their paths.

    The name of a split is the first word that is the usual name of one (`train/0.tar`,
    `cats-val-0001.tar`), or the first word of all; "dev" counts only without any other name.

    Args:
        names: of the files, relative to their folder.
    """
    found = dict[str, list[str]]()
    for name in names:
        words = [word.rstrip("0123456789") for word in re.split(r"[-_./]", name.lower())]
        # "dev" has other meanings too, so it sorts last.
        known = sorted(filter(SPLIT_NAMES.__contains__, words), key="dev".__eq__)
        found.setdefault((known or words)[0], []).append(name)
    return found


@dataclass(frozen=True)
class Splits:
    """The splits of a source, not opened.

    Attributes:
        parts: the content of each split by its name in the source: a `Reader`, a table, a list of
            tars, or a folder.
        left_out: what belongs to no split.
        notes: what a user should know, one line each.
    """

    parts: Mapping[str, Any]
    left_out: LeftOut = field(default_factory=LeftOut)
    notes: list[str] = field(default_factory=list)


class Opened(NamedTuple):
    """Opened splits.

    Attributes:
        readers: of the chosen splits.
        class_names: None without classes.
        left_out: what the splits hold that is not used.
        notes: what a user should know, one line each.
    """

    readers: dict[str, Reader]
    class_names: list[str] | None
    left_out: LeftOut
    notes: list[str]
