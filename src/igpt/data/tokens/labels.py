"""Labels of classifiers: checks of the classes, and subsets with few images of each class."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igpt.data.tokens.dataset import TokenSplit
from igpt.errors import InputError


def subset_per_class(
    labels: NDArray[np.integer[Any]], per_class: int, seed: Sequence[int]
) -> NDArray[np.int64]:
    """Return the indices of `per_class` images of each of C classes, ascending, [C per_class].

    Args:
        seed: of the random subset.

    Raises:
        InputError: a class has fewer images.
    """
    members = [np.flatnonzero(labels == number) for number in np.unique(labels)]
    fewest = min(map(len, members))
    if fewest < per_class:
        raise InputError(
            f"{per_class} labels a class are asked for, and one class has {fewest} training images"
        )
    generator = np.random.default_rng(seed)
    return np.sort(np.concatenate([generator.permutation(each)[:per_class] for each in members]))


def require_classes(splits: Mapping[str, TokenSplit], classes: int, purpose: str) -> None:
    """Raise if a classifier cannot be fitted and evaluated on some splits, "train" among them.

    Raises:
        InputError: a split is empty or lacks labels; there are fewer training images than classes,
            or all have the same class; a split has classes without a training image, or outside of
            the `classes` with names.
    """
    for split in splits.values():
        split.require_images(purpose)
        split.require_labels(purpose)
    if len(splits["train"]) < classes:
        raise InputError(
            f"{purpose} needs a training image of every class; there are {len(splits['train'])} "
            f"for {classes}"
        )
    known = np.unique(splits["train"].labels)
    if known[-1] >= classes:
        raise InputError(
            f"there are {classes} classes (from 0), and a training image has the label {known[-1]}"
        )
    if len(known) < 2:
        raise InputError(f"{purpose} needs at least two classes among the training images")
    for name, split in splits.items():
        strange = np.setdiff1d(split.labels, known)
        if len(strange):
            raise InputError(
                f"{len(strange)} classes of the {name} images have no training image; {purpose} "
                f"needs every class in training (there are {len(splits['train'])} training images "
                f"of {len(known)} classes)"
            )
