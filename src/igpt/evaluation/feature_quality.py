"""The quality of one layer's features while a model trains: three numbers from labelled images.

N training images, M validation images, D features, C classes, n pixels of an image.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from igpt.data.tokens.dataset import TokenDataset, TokenSplit
from igpt.data.tokens.labels import require_classes
from igpt.errors import InputError
from igpt.evaluation.logistic_regression import STRENGTHS, fit_lbfgs
from igpt.evaluation.neighbours import classify_by_neighbours, require_neighbours

NEIGHBOURS = 20
_MOST_IMAGES = 4096  # of each split


@dataclass(frozen=True)
class FeatureQuality:
    """What is measured at a step of training; accuracies are shares of the validation images.

    Attributes:
        linear_accuracy: of logistic regression, with the best of the strengths of `igpt probe`.
        knn_accuracy: of the weighted vote of k nearest neighbours, by cosine similarity.
        k: number of these neighbours.
        effective_rank: of the features of the training images, see `effective_rank`.
        train_images, validation_images: numbers of images.
    """

    linear_accuracy: float
    knn_accuracy: float
    k: int
    effective_rank: float
    train_images: int
    validation_images: int

    def text(self) -> str:
        """Return the three numbers in words."""
        return (
            f"linear probe {self.linear_accuracy:.1%}, {self.k} nearest neighbours "
            f"{self.knn_accuracy:.1%}, effective rank {self.effective_rank:.1f}"
        )


@dataclass(frozen=True)
class QualityImages:
    """The images from which the quality of features is measured.

    Attributes:
        tokens: of the training images, then of the validation images, uint16 [N + M, n].
        train_labels: 0 .. C - 1, [N].
        validation_labels: [M]; -1 for a class without one of the training images.
    """

    tokens: NDArray[np.uint16]
    train_labels: NDArray[np.int64]
    validation_labels: NDArray[np.int64]

    def measure(self, features: NDArray[np.float32], device: torch.device) -> FeatureQuality:
        """Return the quality of the features of these images, [N + M, D].

        Raises:
            InputError: features that are not finite.
        """
        count = len(self.train_labels)
        train, validation = features[:count], features[count:]
        fitted = fit_lbfgs(train, self.train_labels, STRENGTHS, device=device)
        linear = (fitted.predict(validation) == self.validation_labels).mean(axis=1).max()
        nearest = classify_by_neighbours(
            train, self.train_labels, validation, NEIGHBOURS, device=device
        )
        return FeatureQuality(
            float(linear),
            float((nearest == self.validation_labels).mean()),
            NEIGHBOURS,
            effective_rank(torch.from_numpy(train).to(device)),
            count,
            len(validation),
        )


def quality_images(data: TokenDataset, trained: TokenDataset) -> QualityImages:
    """Return at most 4,096 training and 4,096 validation images of a labelled data set.

    They are spread evenly over the splits, and the same at every step and for every seed.

    Args:
        data: the labelled data set.
        trained: the data set that the model is trained on.

    Raises:
        InputError: the resolutions or palettes differ, or labels are missing or do not allow a
            probe.
    """
    if data.resolution != trained.resolution:
        raise InputError(
            f"--probe-every: {data.path} has images of {data.resolution} px, and the training "
            f"tokens have {trained.resolution} px; prepare them with --size {trained.resolution}"
        )
    trained.palette.require_same(data.palette, str(trained.path), str(data.path))
    if data.class_names is None:
        raise InputError(
            f"--probe-every needs labels, and {data.path} has none; name labelled tokens with "
            "--probe-tokens"
        )
    splits = {name: data[name] for name in ("train", "validation")}
    require_classes(splits, len(data.class_names), "--probe-every")
    train, validation = (split.spread(_MOST_IMAGES) for split in splits.values())
    require_neighbours(NEIGHBOURS, len(train), "--probe-every")
    known = np.unique(train.labels)
    if len(known) < 2:
        raise InputError(
            f"--probe-every: all of the {len(train)} training images of {data.path} that it uses "
            "have the same class"
        )
    nearest = np.searchsorted(known, validation.labels).clip(max=len(known) - 1)
    found = np.where(known[nearest] == validation.labels, nearest, -1)
    return QualityImages(
        np.concatenate([_tokens(train), _tokens(validation)]),
        np.searchsorted(known, train.labels),
        found,
    )


def _tokens(split: TokenSplit) -> NDArray[np.uint16]:
    return split.rows(np.arange(len(split)))


def effective_rank(features: torch.Tensor) -> float:
    """Return RankMe of features [N, D]: exp of the entropy of their singular values (1 to D).

    The singular values are divided by their sum; the features are not centred (Garrido et al. 2023,
    arXiv 2210.02885, equation 1; its constant 1e-7 is left out, since 0 log 0 is 0 here). It is 1
    if all rows are multiples of one vector, and D if all directions have the same size.

    Singular values are the roots of the eigenvalues of the D x D matrix of products, in float64:
    those below 1e-8 of the largest one are lost in rounding, and would not change the result.
    """
    rows = features.double()
    values = torch.linalg.eigvalsh(rows.t() @ rows).clamp(min=0).sqrt()
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())
