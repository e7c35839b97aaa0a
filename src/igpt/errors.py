"""What a user got wrong, said in one line."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """A mistake in what the user gave: the message says what was wrong and what would be right."""


class Interrupted(Exception):  # noqa: N818  it is no error
    """A signal ended long work after all was saved; carries the signal's number and says what was reached."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class LostRank(Exception):  # noqa: N818  it is not this rank's error
    """Another process of the same training has failed or vanished; the message says which, and why if it could tell."""


def suggest(word: str, choices: Iterable[str]) -> str:
    """The end of an error message: the choice nearest to `word`, or all choices when none is near."""
    known = sorted(choices)
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"choose from: {', '.join(known)}"
