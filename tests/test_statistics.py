"""Intervals and standard errors against SciPy's."""

import numpy as np
import pytest
from scipy.stats import binomtest, sem

from igpt.statistics import (
    accuracy_of,
    interval_of_share,
    mean_of,
    packed,
    paired_difference,
    unpacked,
)


@pytest.mark.parametrize(
    ("right", "count"), [(0, 10), (1, 10), (8, 10), (10, 10), (9630, 10_000), (1, 1)]
)
def test_the_interval_is_wilsons(right: int, count: int) -> None:
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert interval_of_share(right, count) == pytest.approx(
        (expected.low, expected.high), abs=1e-12
    )


def test_an_accuracy_is_printed_with_its_images_and_interval() -> None:
    interval = list(interval_of_share(3, 4))
    right = np.array([True, True, False, True])
    assert accuracy_of(right) == {"accuracy": 0.75, "images": 4, "interval_95": interval}
    assert interval_of_share(0, 5)[0] == 0.0
    assert interval_of_share(5, 5)[1] == 1.0


def test_a_mean_is_printed_with_its_standard_error() -> None:
    values = np.array([1.0, 2.0, 4.0])
    error = sem(values)
    assert mean_of(values) == {
        "mean": pytest.approx(7 / 3),
        "standard_error": pytest.approx(error),
        "interval_95": pytest.approx([7 / 3 - 1.96 * error, 7 / 3 + 1.96 * error], abs=1e-3),
        "count": 3,
    }
    assert mean_of(values[:1])["standard_error"] is None


@pytest.mark.parametrize("count", [1, 8, 13, 1000])
def test_answers_are_the_same_after_packing_and_unpacking(count: int) -> None:
    right = np.random.default_rng(count).random(count) < 0.4
    assert (unpacked(packed(right), count) == right).all()
    assert len(packed(right)) == 2 * -(-count // 8)


def test_a_paired_difference_has_a_smaller_error_than_two_accuracies() -> None:
    """Compare with the variance of matched proportions, (b + c - (b - c)^2 / N) / N^2, where b
    images are correct only in the first and c only in the second."""
    generator = np.random.default_rng(0)
    first = generator.random(2000) < 0.5
    second = np.where(generator.random(2000) < 0.9, first, ~first)
    b, c = (first & ~second).sum(), (second & ~first).sum()
    found, half = paired_difference(first, second)
    assert found == pytest.approx((b - c) / 2000)
    assert half == pytest.approx(1.96 * np.sqrt(b + c - (b - c) ** 2 / 2000) / 2000, rel=1e-3)
    assert half < 1.96 * np.sqrt(2 * 0.25 / 2000) / 2
