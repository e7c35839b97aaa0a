"""Training batches and their augmentation, as pure functions of the seed and the step.

No position has to be saved: resuming at step s needs only the integer s, on any number of ranks.
A split that fits is kept on the training device. The rows of a larger one are read from disk for
each batch, while the model trains on the batch before.
Shapes: B images of a batch, n positions, R resolution.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from igpt.data.tokens.dataset import TokenSplit
from igpt.errors import InputError

Words = NDArray[np.uint64]

# From 8 rounds on, the first row of an epoch and the differences between neighbouring rows are
# uniform, for 7 images and more.
_ROUNDS = 12
_HELD_BYTES = 2 << 30
_CPU = torch.device("cpu")


def _mix(words: Words) -> Words:
    """Apply splitmix64's finaliser, a permutation of 64-bit words in which all bits are mixed."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def shuffled(positions: NDArray[np.int64], keys: Words, count: int) -> NDArray[np.int64]:
    """Return the images of positions under pseudo-random permutations of 0 .. count - 1.

    A Feistel network on words of as many bits as `count` needs: each round replaces one half of the
    bits by its exclusive or with a hash of the other half, which is invertible for any hash.
    Results of `count` or more pass through the network again until they are smaller (cycle
    walking). No permutation is held in memory.

    Args:
        positions: [B].
        keys: [B]; each key selects a permutation.
    """
    bits = (count - 1).bit_length()
    low = np.uint64(bits // 2)
    # Of the low and the high half.
    masks = [np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)]
    rounds = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    round_keys = _mix(keys + rounds[:, None])  # [rounds, B]
    out, walking = positions.astype(np.uint64), np.arange(len(positions))
    while len(walking):
        words = out[walking]
        halves = [words & masks[0], words >> low]
        for number, key in enumerate(round_keys[:, walking]):
            one, other = number % 2, 1 - number % 2
            halves[one] = halves[one] ^ (_mix(halves[other] ^ key) & masks[one])
        out[walking] = halves[0] | halves[1] << low
        walking = walking[out[walking] >= count]
    return out.astype(np.int64)


def batch_rows(seed: int, step: int, batch_size: int, count: int) -> NDArray[np.int64]:
    """Return the rows [B] of batch `step`.

    Each epoch is a seeded permutation of `count` rows. The epochs are concatenated and cut into
    batches.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = (positions // count).astype(np.uint64)
    return shuffled(positions % count, _mix(_mix(np.array([seed], np.uint64)) + epochs), count)


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return the array as a tensor on a device; the copy to a GPU is asynchronous."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


Tokens = TypeVar("Tokens", NDArray[np.uint16], Tensor)


def augment(
    tokens: Tokens, resolution: int, generator: np.random.Generator, *, flip: bool, shift: int
) -> Tokens:
    """Flip and shift images on the token grid, on their device: [B, n] -> [B, n].

    Each image is mirrored left-right with probability 1/2 if `flip`, and reflect-padded by `shift`
    pixels and cropped back at random (CIFAR's augmentation with shift 4, paper section 3.1). The
    random numbers are the same on every device.
    """
    if not flip and not shift:
        return tokens
    mirrored = generator.random(len(tokens)) < 0.5
    # Down and right.
    moved = generator.integers(0, 2 * shift + 1, (2, len(tokens), 1)) - shift
    # Indices before the first pixel are reflected by `abs`, those after the last by `where`.
    indices = np.abs(np.arange(resolution) + moved)  # [2, B, R]
    rows, columns = np.where(indices >= resolution, 2 * (resolution - 1) - indices, indices)
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
        device: of the batches.
        held_bytes: a split of at most this size is kept on the device, if it takes no more than a
            quarter of a GPU's free memory. The batches do not depend on it.
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
        """The split on disk, its copy in memory, or its tokens on a GPU, int16 [N, n]."""
        on_gpu = self.device.type == "cuda"
        limit = self.held_bytes
        if on_gpu:
            limit = min(limit, torch.cuda.mem_get_info(self.device)[0] // 4)
        if self.split.nbytes > limit:
            return self.split
        rows = self.split.rows(np.arange(len(self.split)))
        if on_gpu:
            # As int16, because few operations on GPUs support uint16. Not with `to_device`, whose
            # pinned memory is not freed.
            return torch.from_numpy(rows.view(np.int16)).to(self.device)
        return TokenSplit(self.split.name, [rows], [self.split.labels])

    def _rows(self, step: int) -> NDArray[np.int64]:
        return batch_rows(self.seed, step, self.batch_size, len(self.split))

    def _augmented(self, tokens: Tokens, step: int) -> Tokens:
        generator = np.random.default_rng((self.seed, step, 1))
        return augment(tokens, self.resolution, generator, flip=self.flip, shift=self.shift)

    def tokens(self, step: int) -> Tensor:
        """Return the tokens of batch `step` of all ranks, int64 [B, n]."""
        rows, source = self._rows(step), self._source
        if isinstance(source, Tensor):
            taken = source.index_select(0, to_device(rows, self.device))
            return self._augmented(taken, step).long() & 0xFFFF
        # In NumPy: PyTorch operations in this second thread would start as many threads again as
        # the optimizer step has.
        return to_device(self._augmented(source.rows(rows), step).astype(np.int64), self.device)

    def labels(self, step: int) -> Tensor:
        """Return the labels of the same images, int64 [B]; -1 where an image has none."""
        source = self.split if isinstance(self._source, Tensor) else self._source
        return to_device(source.labels_of(self._rows(step)).astype(np.int64), self.device)


Batch = tuple[Tensor, ...]


class Prefetch:
    """Prepare the next batch in a thread, which ends with the `with` block.

    Args:
        make: returns the batch of a step, as a pure function of the step. Its exceptions are raised
            when the batch of that step is asked for.
        device: of the batches.
    """

    def __init__(self, make: Callable[[int], Batch], device: torch.device) -> None:
        # Every thread has its own current GPU, by default the first one, on which pinning would
        # take memory.
        begin = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self._make = make
        self._thread = ThreadPoolExecutor(1, "prefetch", begin)
        self._pending: dict[int, Future[Batch]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __call__(self, step: int) -> Batch:
        """Return the batch of a step, and start to prepare that of the next step."""
        batch = (self._pending.get(step) or self._thread.submit(self._make, step)).result()
        self._pending = {step + 1: self._thread.submit(self._make, step + 1)}
        return batch
