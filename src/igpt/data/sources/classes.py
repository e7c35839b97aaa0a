"""Class names: from the values of a column, sorted, numbered, and checked across splits."""

import math
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from igpt.errors import InputError


def is_missing(value: Any) -> bool:
    """Return whether the value of a column is missing: null or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def class_name(value: Any) -> str:
    """Return the class name of a value; whole numbers have no decimal point.

    Tables with missing values often store whole numbers as floating-point numbers.
    """
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


@dataclass(frozen=True)
class ClassColumn:
    """A column of classes.

    Args:
        name: of the column.
        numbers: the number of each class name; None where the values are the numbers.
    """

    name: str
    numbers: Mapping[str, int] | None = None

    @classmethod
    def of_names(cls, name: str, class_names: Iterable[str]) -> "ClassColumn":
        """Return a column whose values are class names, numbered in their order."""
        return cls(name, {word: number for number, word in enumerate(class_names)})

    def number(self, value: Any) -> int:
        """Return the number of a value's class, -1 for a missing value."""
        if is_missing(value):
            return -1
        return int(value) if self.numbers is None else self.numbers[class_name(value)]


def sort_classes(names: Iterable[str]) -> list[str]:
    """Return class names in order, numerically where all are numbers."""
    # Sort as text first, so that "1" and "01" have a defined order.
    ordered = sorted(names)
    try:
        return sorted(ordered, key=int)
    except ValueError:
        return ordered


def require_known(known: Iterable[str], others: Mapping[str, Iterable[str]], source: str) -> None:
    """Raise if a split has classes that the training split does not have.

    Args:
        known: the classes of the training split.
        others: the classes of each split.
        source: what the error names.

    Raises:
        InputError: there are such classes.
    """
    known = set(known)
    for split, classes in others.items():
        unknown = sorted(set(classes) - known)
        if not unknown:
            continue
        shown = ", ".join(map(repr, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
        normalized = {unicodedata.normalize("NFC", name) for name in known}
        same = [name for name in unknown if unicodedata.normalize("NFC", name) in normalized]
        if same:
            shown += f"; {same[0]!r} is a class of train in another Unicode normalization form"
        raise InputError(
            f"{source}: the labels disagree between splits: {split} has {len(unknown)} "
            f"that train does not have ({shown}); correct them, or ignore labels with "
            "--label-column none"
        )
