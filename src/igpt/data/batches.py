"""Which images make batch number s, and how they are varied: pure functions of the seed and s.

Nothing here has a position to save: resuming at step s needs the integer s, on any number of ranks.
Shapes: B images of a batch, n places, R resolution.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from igpt.data.tokens import TokenSplit
from igpt.errors import InputError


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(count)


def batch_rows(seed: int, step: int, batch_size: int, count: int) -> NDArray[np.int64]:
    """The rows [B] of batch `step`: seeded permutations of `count` rows, one an epoch, laid end to end and cut."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, within = positions // count, positions % count
    rows = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = _epoch_order(seed, int(epoch), count)[within[here]]
    return rows


def vary(
    tokens: NDArray[np.uint16], resolution: int, generator: np.random.Generator, *, flip: bool, shift: int
) -> NDArray[np.uint16]:
    """Mirrors and shifts images on the token grid: [B, n] -> [B, n].

    Each image is mirrored left-right with probability 1/2 if `flip`, and reflect-padded by `shift` places and cropped
    back at random (CIFAR's augmentation with shift 4, paper section 3.1).
    """
    if not flip and not shift:
        return tokens
    grid = tokens.reshape(-1, resolution, resolution)
    mirrored = generator.random(len(grid)) < 0.5
    down, right = generator.integers(0, 2 * shift + 1, (2, len(grid)))
    if flip:
        grid = np.where(mirrored[:, None, None], grid[:, :, ::-1], grid)
    if shift:
        padded = np.pad(grid, ((0, 0), (shift, shift), (shift, shift)), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (resolution, resolution), axis=(1, 2))
        grid = windows[np.arange(len(grid)), down, right]
    return grid.reshape(len(tokens), -1)


@dataclass(frozen=True)
class Batches:
    """Training batches of a split, each a pure function of (seed, step).

    Args:
        flip, shift: see `vary`.
    """

    split: TokenSplit
    resolution: int
    batch_size: int
    seed: int = 0
    flip: bool = False
    shift: int = 0

    def __post_init__(self) -> None:
        if len(self.split) == 0:
            raise InputError(f"the split {self.split.name!r} is empty; there is nothing to train on")
        if self.shift >= self.resolution:
            raise InputError(f"a shift of {self.shift} does not fit images of {self.resolution} px")

    def batch(self, step: int) -> tuple[NDArray[np.uint16], NDArray[np.int32]]:
        """Tokens [B, n] and labels [B] of the whole batch number `step`; a rank takes its part of it."""
        rows = batch_rows(self.seed, step, self.batch_size, len(self.split))
        generator = np.random.default_rng((self.seed, step, 1))
        tokens = vary(self.split.rows(rows), self.resolution, generator, flip=self.flip, shift=self.shift)
        return tokens, self.split.labels[rows]
