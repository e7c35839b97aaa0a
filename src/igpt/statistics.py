"""How sure a measured number is."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Z = 1.959963984540054  # of the normal distribution's central 95 %


def interval_of_share(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a share of independent answers, such as an accuracy.

    Unlike the normal approximation it stays within 0 and 1, and has a width when all answers are
    right.
    """
    share, z2 = right / count, _Z**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    # Rounding must not put the bound of a share of 0 or 1 on the wrong side of it.
    return (0.0 if right == 0 else middle - half, 1.0 if right == count else middle + half)


def accuracy_of(right: NDArray[np.bool_]) -> dict[str, Any]:
    """An accuracy as results are written: the share of right answers, their number and its interval."""
    hits, count = int(right.sum()), len(right)
    return {
        "accuracy": hits / count,
        "images": count,
        "interval_95": list(interval_of_share(hits, count)),
    }


def packed(right: NDArray[np.bool_]) -> str:
    """Which of N answers are right, as results are written: a bit each in hexadecimal, the first one highest."""
    return np.packbits(right).tobytes().hex()


def unpacked(text: str, count: int) -> NDArray[np.bool_]:
    """The N answers of `packed`."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(bool)


def paired_difference(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> tuple[float, float]:
    """The difference of two accuracies on the same images, and half of its 95 % confidence interval.

    Only the images on which one is right and the other wrong make it uncertain (the normal interval
    of their mean).

    Args:
        first, second: which answers are right, [N], or several such that are averaged, [..., N].
    """
    apart = (first.astype(np.float64) - second).reshape(-1, first.shape[-1]).mean(axis=0)
    return float(apart.mean()), _Z * float(apart.std(ddof=1)) / math.sqrt(len(apart))


def mean_of(values: NDArray[np.float64]) -> dict[str, Any]:
    """A mean over independent values as results are written: with its standard error and interval (None of one)."""
    mean = float(values.mean())
    error = None if len(values) < 2 else float(values.std(ddof=1) / math.sqrt(len(values)))
    interval = None if error is None else [mean - _Z * error, mean + _Z * error]
    return {"mean": mean, "standard_error": error, "interval_95": interval, "count": len(values)}


def auroc(lower: NDArray[np.float64], higher: NDArray[np.float64]) -> dict[str, Any]:
    """How well a number tells two kinds apart, of which the second should have the higher ones.

    The area under the receiver operating characteristic: the share of pairs in which the second
        kind's is higher, ties
    counting half. Its variance is DeLong's (Biometrics 44, 1988), by ranks (Sun and Xu, IEEE Signal
    Processing Letters 21, 2014); the interval is the normal one of its logit, which stays within 0
    and 1. Where DeLong's variance is 0, as when all pairs agree, the interval is that of as many
    independent pairs as there are.

    Args:
        lower, higher: of the first kind [M] and of the second [N], independent, two or more each.
    """
    from scipy.stats import rankdata

    first, second = len(lower), len(higher)
    assert min(first, second) > 1, "a variance needs two values of each kind"
    ranks = rankdata(np.concatenate([lower, higher]))
    below = (
        ranks[first:] - rankdata(higher)
    ) / first  # [N]: the share of the first kind below each of the second
    above = (
        1 - (ranks[:first] - rankdata(lower)) / second
    )  # [M]: the share of the second kind above each of the first
    area = float(below.mean())
    error = math.sqrt(below.var(ddof=1) / second + above.var(ddof=1) / first)
    if not error:
        pairs = min(first, second)
        interval = interval_of_share(round(area * pairs), pairs)
    else:
        middle, half = math.log(area / (1 - area)), _Z * error / (area * (1 - area))
        interval = (_logistic(middle - half), _logistic(middle + half))
    return {"auroc": area, "standard_error": error, "interval_95": list(interval)}


def _logistic(value: float) -> float:
    return 0.5 * (1 + math.tanh(value / 2))  # of any value, without an overflow
