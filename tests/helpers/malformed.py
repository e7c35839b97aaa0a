"""Every way in which a result file may be malformed, one change at a time."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_VALUES: list[Any] = [
    None,
    "x",
    "\ud800",
    [],
    {},
    [None],
    True,
    -1,
    0.5,
    float("nan"),
    10**400,
    10**30,
    1e308,
]
_LARGE = 4  # elements of a list that are changed: the others are of the same kind


def _unlike(value: Any) -> list[Any]:
    return [other for other in _VALUES if json.dumps(other) != json.dumps(value)]


def variants(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield a description of a change and the changed value: every key deleted, and replaced by
    values of other types."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield f"without {key}", {name: other for name, other in value.items() if name != key}
            for other in _unlike(part):
                yield f"{key} = {other!r:.20}", {**value, key: other}
            for what, changed in variants(part):
                yield f"{key}: {what}", {**value, key: changed}
    elif isinstance(value, list):
        for index in range(min(len(value), _LARGE)):
            for other in _unlike(value[index]):
                yield f"{index} = {other!r:.20}", [*value[:index], other, *value[index + 1 :]]
            for what, changed in variants(value[index]):
                yield f"{index}: {what}", [*value[:index], changed, *value[index + 1 :]]


def contents(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield files that are truncated, binary, deeply nested, or something else than an object."""
    for end in (0, 1, len(whole) // 2, len(whole) - 2):
        yield f"cut off after {end} bytes", whole[:end]
    yield "binary", bytes(range(256)) * 4
    yield "deep", b'{"format": ' + b"[" * 500 + b"]" * 500 + b"}"
    yield "deeper", b"[" * 100_000
    for text in (b"null", b"[]", b'"x"', b"1", b"NaN"):
        yield text.decode(), text


def files(path: Path) -> Iterator[str]:
    """Replace `path` by one malformed JSON file after the other, and at the end by the original."""
    whole = path.read_bytes()
    for what, value in variants(json.loads(whole)):
        path.write_text(json.dumps(value))
        yield what
    for what, content in contents(whole):
        path.write_bytes(content)
        yield what
    path.write_bytes(whole)
    yield from others(path)


def others(path: Path) -> Iterator[str]:
    """Replace `path` by a FIFO and a folder, and at the end by the original file."""
    whole = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    yield "a FIFO"
    path.unlink()
    path.mkdir()
    yield "a folder"
    path.rmdir()
    path.write_bytes(whole)
