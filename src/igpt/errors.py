"""What a user got wrong, said in one line."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """A mistake in what the user gave: the message says what was wrong and what would be right."""


def suggest(word: str, choices: Iterable[str]) -> str:
    """The end of an error message: the choice nearest to `word`, or all choices when none is near."""
    known = sorted(choices)
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"choose from: {', '.join(known)}"
