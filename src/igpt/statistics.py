"""Confidence intervals of measured values. SciPy is imported where it is used."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LEVEL = 0.95  # of all intervals

# Classes up to which the predictions are counted for every pair of classes.
MOST_CONFUSED = 100


def interval_of_share(right: int, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % confidence interval of a proportion, such as an accuracy.

    Unlike the normal approximation, it stays within 0 and 1, and has a width if all answers are
    right.
    """
    from scipy.stats import binomtest

    interval = binomtest(right, count).proportion_ci(_LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def accuracy_of(right: NDArray[np.bool_]) -> dict[str, Any]:
    """Return an accuracy with the number of images and its interval, as results store it."""
    hits, count = int(right.sum()), len(right)
    return {
        "accuracy": hits / count,
        "images": count,
        "interval_95": list(interval_of_share(hits, count)),
    }


def packed(right: NDArray[np.bool_]) -> str:
    """Return N booleans as hexadecimal, one bit each, the first one highest."""
    return np.packbits(right).tobytes().hex()


def unpacked(text: str, count: int) -> NDArray[np.bool_]:
    """Return the N booleans of `packed`."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(bool)


def confusion(
    labels: NDArray[np.integer[Any]], predicted: NDArray[np.integer[Any]], classes: int
) -> list[list[int]]:
    """Return how often images of each class (row) were predicted as each class (column)."""
    pairs = labels.astype(np.int64) * classes + predicted
    counts = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    table: list[list[int]] = counts.tolist()
    return table


def paired_difference(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the difference of two accuracies on the same images, and half of its 95 % interval.

    Only images on which exactly one of the two is right contribute to the variance. The interval is
    the normal one of the mean.

    Args:
        first, second: which answers are right, [N], or several of these to be averaged, [..., N].
    """
    difference = (first.astype(np.float64) - second).reshape(-1, first.shape[-1]).mean(axis=0)
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    return float(difference.mean()), _quantile() * error


def mean_of(values: NDArray[np.float64]) -> dict[str, Any]:
    """Return the mean of values, its standard error and interval (None for one value)."""
    mean = float(values.mean())
    error = None if len(values) < 2 else float(values.std(ddof=1) / math.sqrt(len(values)))
    interval = None if error is None else interval_around(mean, error)
    return {"mean": mean, "standard_error": error, "interval_95": interval, "count": len(values)}


def interval_around(value: float, error: float) -> list[float]:
    """Return the normal 95 % interval of a value with a standard error."""
    return [value + sign * _quantile() * error for sign in (-1, 1)]


def auroc(lower: NDArray[np.float64], higher: NDArray[np.float64]) -> dict[str, Any]:
    """Return the area under the ROC curve of separating two sets by a value.

    It is the share of pairs in which the value of the second set is higher; ties count half. The
    variance is DeLong's (Biometrics 44, 1988), computed from ranks (Sun and Xu, IEEE Signal
    Processing Letters 21, 2014). The interval is the normal one of the logit, which stays within 0
    and 1. If DeLong's variance is 0, as when all pairs agree, it is Wilson's interval of as many
    independent pairs as the smaller set has values.

    Args:
        lower, higher: values of the first set [M] and of the second [N], two or more each.
    """
    from scipy.special import expit, logit
    from scipy.stats import rankdata

    first, second = len(lower), len(higher)
    assert min(first, second) > 1, "a variance needs two values of each set"
    ranks = rankdata(np.concatenate([lower, higher]))
    # [N]: the share of the first set below each value of the second.
    below = (ranks[first:] - rankdata(higher)) / first
    # [M]: the share of the second set above each value of the first.
    above = 1 - (ranks[:first] - rankdata(lower)) / second
    area = float(below.mean())
    error = math.sqrt(below.var(ddof=1) / second + above.var(ddof=1) / first)
    if error:
        half = _quantile() * error / (area * (1 - area))
        interval = [float(expit(logit(area) + sign * half)) for sign in (-1, 1)]
    else:
        pairs = min(first, second)
        interval = list(interval_of_share(round(area * pairs), pairs))
    return {"auroc": area, "standard_error": error, "interval_95": interval}


def _quantile() -> float:
    """Return the number of standard errors on each side of a normal interval, 1.96."""
    from scipy.stats import norm

    return float(norm.ppf((1 + _LEVEL) / 2))
