"""Intervals and standard errors against SciPy's."""

import numpy as np
import pytest
from scipy.stats import binomtest, sem

from igpt.confidence import accuracy_of, interval_of_share, mean_of


@pytest.mark.parametrize(("right", "count"), [(0, 10), (1, 10), (8, 10), (10, 10), (9630, 10_000), (1, 1)])
def test_the_interval_is_wilsons(right: int, count: int) -> None:
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert interval_of_share(right, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_an_accuracy_stands_with_its_images_and_interval() -> None:
    assert accuracy_of(3, 4) == {"accuracy": 0.75, "images": 4, "interval_95": list(interval_of_share(3, 4))}
    assert interval_of_share(0, 5)[0] == 0.0
    assert interval_of_share(5, 5)[1] == 1.0


def test_a_mean_stands_with_its_standard_error() -> None:
    values = np.array([1.0, 2.0, 4.0])
    error = sem(values)
    assert mean_of(values) == {
        "mean": pytest.approx(7 / 3),
        "standard_error": pytest.approx(error),
        "interval_95": pytest.approx([7 / 3 - 1.96 * error, 7 / 3 + 1.96 * error], abs=1e-3),
        "count": 3,
    }
    assert mean_of(values[:1])["standard_error"] is None
