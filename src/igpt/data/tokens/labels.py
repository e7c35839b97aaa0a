"""What classifiers ask of labels: every class in training, and so few images of each as are wanted."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igpt.data.tokens.dataset import TokenSplit
from igpt.errors import InputError


def few_of_each(
    labels: NDArray[np.integer[Any]], per_class: int, seed: Sequence[int]
) -> NDArray[np.int64]:
    """The numbers of so few images of each class, drawn by `seed`: ascending, [C per_class].

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
    """Refuses splits, "train" among them, by which no classifier can be fitted and judged.

    Raises:
        InputError: a split is empty or lacks labels; there are fewer training images than classes,
            or all are of one class; a split has classes that training lacks, or that are not among
            the `classes` that have names.
    """
    for split in splits.values():
        split.require_images(purpose)
        split.require_labels(purpose)
    if len(splits["train"]) < classes:
        raise InputError(
            f"{purpose} needs a training image of every class; there are {len(splits['train'])} for {classes}"
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
                f"{len(strange)} classes of the {name} images have no training image; {purpose} needs every class in "
                f"training (there are {len(splits['train'])} training images of {len(known)} classes)"
            )
