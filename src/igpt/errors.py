"""Exceptions, and suggestions for misspelt words."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """A user error. The message says what was wrong and what would be right, in one line."""


class Interrupted(Exception):  # noqa: N818  it is no error
    """A signal or a time limit stopped long work after its state was saved.

    Attributes:
        number: of the signal; 0 for a time limit.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class LostRank(Exception):  # noqa: N818  it is not this rank's error
    """Another rank failed or disappeared; the message names it, and the reason if known."""


def suggest(word: str, choices: Iterable[str]) -> str:
    """Return the end of an error message: the choice nearest to `word`, or all if none is near."""
    known = sorted(choices)
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"choose from: {', '.join(known)}"
