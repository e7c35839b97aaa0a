"""Training batches and their augmentation, as pure functions of the seed and the step.

Nothing here has a position to save: resuming at step s needs the integer s, on any number of ranks.
    A split that fits
is held on the training device; of a larger one, each batch's rows are read from disk, while the
batch before is used.
Shapes: B images of a batch, n places, R resolution.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from igpt.data.tokens.dataset import TokenSplit
from igpt.errors import InputError

Words = NDArray[np.uint64]

# from 8 on, first places and differences of neighbours are uniform over epochs of 7 images and more
_ROUNDS = 12
_HELD_BYTES = 2 << 30
_CPU = torch.device("cpu")


def _mix(words: Words) -> Words:
    """The finaliser of splitmix64: a permutation of all 64-bit words in which every bit depends on every bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def shuffled(positions: NDArray[np.int64], keys: Words, count: int) -> NDArray[np.int64]:
    """Where pseudo-random permutations of 0 .. count - 1, one a key, put some positions: [B], keys [B] -> [B].

    A Feistel network on the words of as many bits as `count` needs: half of the bits are exchanged
    for their exclusive or with a hash of the other half, in turns, which can be undone whatever the
    hash is. A result that is too large goes through once more until it is not (cycle walking), so
    that no permutation need be held in memory.
    """
    bits = (count - 1).bit_length()
    low = np.uint64(bits // 2)
    masks = [
        np.uint64((1 << bits // 2) - 1),
        np.uint64((1 << bits - bits // 2) - 1),
    ]  # of the low and the high half
    turns = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    round_keys = _mix(keys + turns[:, None])  # [rounds, B]
    out, walking = positions.astype(np.uint64), np.arange(len(positions))
    while len(walking):
        words = out[walking]
        halves = [words & masks[0], words >> low]
        for turn, key in enumerate(round_keys[:, walking]):
            one, other = turn % 2, 1 - turn % 2
            halves[one] = halves[one] ^ (_mix(halves[other] ^ key) & masks[one])
        out[walking] = halves[0] | halves[1] << low
        walking = walking[out[walking] >= count]
    return out.astype(np.int64)


def batch_rows(seed: int, step: int, batch_size: int, count: int) -> NDArray[np.int64]:
    """The rows [B] of batch `step`: seeded permutations of `count` rows, one an epoch, laid end to end and cut."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = (positions // count).astype(np.uint64)
    return shuffled(positions % count, _mix(_mix(np.array([seed], np.uint64)) + epochs), count)


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array as a tensor on a device; a GPU copies it without making this thread wait."""
    tensor = torch.from_numpy(array)
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else tensor.to(device)
    )


Tokens = TypeVar("Tokens", NDArray[np.uint16], Tensor)


def augment(
    tokens: Tokens, resolution: int, generator: np.random.Generator, *, flip: bool, shift: int
) -> Tokens:
    """Mirrors and shifts images on the token grid, where they are: [B, n] -> [B, n].

    Each image is mirrored left-right with probability 1/2 if `flip`, and reflect-padded by `shift`
    places and cropped back at random (CIFAR's augmentation with shift 4, paper section 3.1). The
    draws are the same on every device.
    """
    if not flip and not shift:
        return tokens
    mirrored = generator.random(len(tokens)) < 0.5
    moved = generator.integers(0, 2 * shift + 1, (2, len(tokens), 1)) - shift  # down and right
    places = np.abs(
        np.arange(resolution) + moved
    )  # [2, B, R]; what lies before the first place is reflected by abs
    rows, columns = np.where(places >= resolution, 2 * (resolution - 1) - places, places)
    if flip:
        columns = np.where(mirrored[:, None], resolution - 1 - columns, columns)
    taken = (rows[:, :, None] * resolution + columns[:, None, :]).reshape(tokens.shape)
    if isinstance(tokens, Tensor):
        return tokens.take_along_dim(to_device(taken, tokens.device), dim=1)
    return np.take_along_axis(tokens, taken, axis=1)


@dataclass(frozen=True)
class Batches:
    """Training batches of a split, each a pure function of (seed, step).

    Args:
        flip: see `augment`.
        shift: see `augment`.
        device: where the batches are wanted.
        held_bytes: a split with at most so many bytes of tokens is held on the device, if they take
            no more than a quarter of a GPU's free memory. The batches do not depend on it.
    """

    split: TokenSplit
    resolution: int
    batch_size: int
    seed: int = 0
    flip: bool = False
    shift: int = 0
    device: torch.device = _CPU
    held_bytes: int = _HELD_BYTES

    def __post_init__(self) -> None:
        if len(self.split) == 0:
            raise InputError(
                f"the split {self.split.name!r} is empty; there is nothing to train on"
            )
        if self.shift >= self.resolution:
            raise InputError(f"a shift of {self.shift} does not fit images of {self.resolution} px")

    @cached_property
    def _source(self) -> TokenSplit | Tensor:
        """What batches are taken from: the split on disk, its copy in memory, or int16 [N, n] on a GPU."""
        on_gpu = self.device.type == "cuda"
        room = (
            min(self.held_bytes, torch.cuda.mem_get_info(self.device)[0] // 4)
            if on_gpu
            else self.held_bytes
        )
        if self.split.nbytes > room:
            return self.split
        rows = self.split.rows(np.arange(len(self.split)))
        if on_gpu:  # not by `to_device`, whose pinned memory is not given back
            return torch.from_numpy(rows.view(np.int16)).to(
                self.device
            )  # few operations on GPUs know uint16
        return TokenSplit(self.split.name, [rows], [self.split.labels])

    def _rows(self, step: int) -> NDArray[np.int64]:
        return batch_rows(self.seed, step, self.batch_size, len(self.split))

    def _augmented(self, tokens: Tokens, step: int) -> Tokens:
        generator = np.random.default_rng((self.seed, step, 1))
        return augment(tokens, self.resolution, generator, flip=self.flip, shift=self.shift)

    def tokens(self, step: int) -> Tensor:
        """Tokens of the whole batch number `step`, int64 [B, n]; a rank takes its part of them."""
        rows, source = self._rows(step), self._source
        if isinstance(source, Tensor):
            taken = source.index_select(0, to_device(rows, self.device))
            return self._augmented(taken, step).long() & 0xFFFF
        # In NumPy: of PyTorch's operations, a second thread would start as many threads again as
        # the update has.
        return to_device(self._augmented(source.rows(rows), step).astype(np.int64), self.device)

    def labels(self, step: int) -> Tensor:
        """Labels of the same images, int64 [B]; -1 where an image has none."""
        source = self.split if isinstance(self._source, Tensor) else self._source
        return to_device(source.labels_of(self._rows(step)).astype(np.int64), self.device)


Batch = tuple[Tensor, ...]


class Prefetch:
    """Makes the batch after the one asked for in a thread of its own, which ends with the `with` block.

    Args:
        make: the batch of a step; a pure function of the step. What it raises reaches who asks for
            that step.
        device: where it makes them.
    """

    def __init__(self, make: Callable[[int], Batch], device: torch.device) -> None:
        # Every thread has a current GPU of its own, at first the first one, on which pinning would
        # take memory.
        begin = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self._make = make
        self._thread = ThreadPoolExecutor(1, "prefetch", begin)
        self._coming: dict[int, Future[Batch]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __call__(self, step: int) -> Batch:
        """The batch of a step; the next step's is begun."""
        batch = (self._coming.get(step) or self._thread.submit(self._make, step)).result()
        self._coming = {step + 1: self._thread.submit(self._make, step + 1)}
        return batch
