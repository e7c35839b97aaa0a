"""Arrays in `.npy` files whose rows are read through short-lived memory maps."""

import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igpt.data.arrays import map_array
from igpt.data.tokens.manifest import MANIFEST
from igpt.errors import InputError


@dataclass(frozen=True)
class ValueRange:
    """The range of the values in a shard, and its description in errors.

    Attributes:
        what: "token" or "label".
        reason: the origin of the limits.
    """

    what: str
    low: int
    high: int
    reason: str

    def require(self, values: NDArray[Any], path: Path) -> None:
        """Raise an `InputError` that names the file, the first value out of range and the range."""
        if not values.size:
            return
        unsigned = values.dtype.kind == "u" and self.low == 0
        if values.max() <= self.high and (unsigned or values.min() >= self.low):
            return
        wrong = values[(values < self.low) | (values > self.high)][0]
        raise InputError(
            f"{path} holds the {self.what} {wrong}, and {self.reason} "
            f"({self.what}s {self.low} to {self.high}); prepare the data set again"
        )


@dataclass(frozen=True)
class StoredArray:
    """An array in a `.npy` file that is mapped into memory only while rows are read.

    Between reads, a shard takes no open file and no resident memory.

    Attributes:
        allowed: the range of its values; None allows all.
    """

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    allowed: ValueRange | None = None

    def __len__(self) -> int:
        return self.shape[0]

    @cached_property
    def _offset(self) -> int:
        """The position of row 0 in the file, in bytes."""
        try:
            array = map_array(self.path)
        except InputError as error:
            raise InputError(
                f"{self.path} cannot be read ({error}); prepare the data set again"
            ) from None
        if (array.dtype, array.shape) != (self.dtype, self.shape):
            raise InputError(
                f"{self.path} does not hold {self.shape} {self.dtype} but {array.shape} "
                f"{array.dtype}: the count or the resolution in {MANIFEST} is wrong, or the file"
            )
        if not array.flags.c_contiguous:
            raise InputError(
                f"{self.path} is in Fortran order; rows are needed one after the other (C order)"
            )
        assert isinstance(array, np.memmap)
        return int(array.offset)

    def require_header(self) -> None:
        """Raise an `InputError` if the header has another type, shape or order."""
        _ = self._offset

    def window(self, rows: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Map the file from the lowest to the highest of some rows [M].

        Returns:
            The mapped rows, and the indices [M] of the asked ones among them. Their pages are
            requested without waiting, so that the disk serves many windows at once.
        """
        lowest, highest = int(rows.min()), int(rows.max())
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        begin = self._offset + lowest * row_bytes
        margin = begin % mmap.ALLOCATIONGRANULARITY
        size = margin + (highest + 1 - lowest) * row_bytes
        try:
            file = os.open(self.path, os.O_RDONLY)  # a third of the time of `open`
            try:
                mapped = mmap.mmap(file, size, access=mmap.ACCESS_READ, offset=begin - margin)
            finally:
                os.close(file)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.path} can no longer be read ({error}); it was whole when it was opened"
            ) from None
        if size <= 2 * len(rows) * (row_bytes + mmap.PAGESIZE):
            # About half of the pages or more are needed.
            mapped.madvise(mmap.MADV_WILLNEED)
        else:
            # Without this, reading one row from disk also reads megabytes around it.
            mapped.madvise(mmap.MADV_RANDOM)
            for row in rows.tolist():
                position = margin + (row - lowest) * row_bytes
                page = position - position % mmap.PAGESIZE
                mapped.madvise(mmap.MADV_WILLNEED, page, position + row_bytes - page)
        shape = (highest + 1 - lowest, *self.shape[1:])
        return np.ndarray(shape, self.dtype, buffer=mapped, offset=margin), rows - lowest


Rows = StoredArray | NDArray[Any]
_WINDOWS = 128  # mapped at a time, each with an open file


def all_rows(shard: Rows) -> NDArray[Any]:
    """Return all rows of a shard; those of a file are mapped, and their values are checked."""
    values = _window(shard, np.arange(len(shard)))[0]
    _require_allowed(shard, values)
    return values


def take_rows(
    shards: Sequence[Rows], starts: NDArray[np.int64], wanted: NDArray[np.int64]
) -> NDArray[Any]:
    """Copy rows of several arrays that are numbered as one, in the given order: [M] -> [M, ...].

    Args:
        starts: the first row of each array, and the end of the last.

    Raises:
        InputError: a shard cannot be read, or a value is outside of its range.
    """
    out = np.empty((len(wanted), *shards[0].shape[1:]), shards[0].dtype)
    if not len(wanted):
        return out
    if wanted.min() < 0 or wanted.max() >= starts[-1]:
        raise IndexError(
            f"rows {wanted.min()} to {wanted.max()} are asked for, and there are {starts[-1]}"
        )
    shard = np.searchsorted(starts, wanted, side="right") - 1
    order = np.argsort(shard, kind="stable")
    # One array of positions in `wanted` for each shard.
    groups = np.split(order, np.flatnonzero(np.diff(shard[order])) + 1)
    for first in range(0, len(groups), _WINDOWS):
        windows = []
        for group in groups[first : first + _WINDOWS]:
            index = shard[group[0]]
            windows.append((group, *_window(shards[index], wanted[group] - starts[index])))
        while windows:
            # Popped, so that each window is unmapped before the next is read.
            group, array, rows = windows.pop(0)
            # NumPy releases the GIL while `take` waits for the disk.
            taken = array.take(rows, axis=0)
            _require_allowed(shards[shard[group[0]]], taken)
            out[group] = taken
    return out


def _window(shard: Rows, rows: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    return shard.window(rows) if isinstance(shard, StoredArray) else (shard, rows)


def _require_allowed(shard: Rows, values: NDArray[Any]) -> None:
    if isinstance(shard, StoredArray) and shard.allowed:
        shard.allowed.require(values, shard.path)
