"""Helpers of the data tests: read whole sources and folders, EXIF orientations, connections."""

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from igpt.data.sources.catalogue import SourceConfig, Split, open_source
from igpt.errors import InputError

# EXIF 2.3, table 6: the visual sides of the stored row 0 and column 0, as NumPy operations on the
# stored grid.
DISPLAYED = {
    1: lambda grid: grid,
    2: lambda grid: grid[:, ::-1],
    3: lambda grid: grid[::-1, ::-1],
    4: lambda grid: grid[::-1],
    5: lambda grid: grid.transpose(1, 0, 2),
    6: lambda grid: np.rot90(grid, -1),
    7: lambda grid: grid[::-1, ::-1].transpose(1, 0, 2),
    8: lambda grid: np.rot90(grid, 1),
}


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files below a folder, including hidden ones."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def counts(splits: dict[str, Split]) -> list[int]:
    assert list(splits) == ["train", "validation", "test"]
    return [len(split) for split in splits.values()]


def labels(split: Split) -> list[int]:
    return [label for _, label in split.read(np.arange(len(split)))]


def whole(source: Path | str, **settings: str) -> tuple[list[tuple[Any, int]], list[str] | None]:
    """Return all images of the training reader, including held-out ones, and the class names."""
    splits, names, *_ = open_source(str(source), SourceConfig(**settings))
    reader = splits["train"].reader
    return list(reader.read(np.arange(len(reader)))), names


def refusal(source: Path | str, **settings: str) -> str:
    with pytest.raises(InputError) as caught:
        open_source(str(source), SourceConfig(**settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def connections(server: socket.socket) -> int:
    """Return how many connections wait at a server that has accepted none."""
    server.setblocking(False)
    count = 0
    while True:
        try:
            connection, _ = server.accept()
        except BlockingIOError:
            return count
        connection.close()
        count += 1
