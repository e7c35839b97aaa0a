"""The Frechet distance and the distances of completions, against SciPy and known cases."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from igpt.errors import InputError
from igpt.evaluation.quality import frechet_distance, frechet_with_interval, nearer_images


def by_sqrtm(one: np.ndarray, other: np.ndarray) -> float:
    """Compute the distance from covariances and SciPy's square root of a matrix."""
    c, k = (np.atleast_2d(np.cov(each, rowvar=False)) for each in (one, other))
    root = sqrtm(c @ k)
    return float(((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(c + k - 2 * root.real))


def features(seed: int, count: int, width: int, scale: float = 1.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(width, width)) * np.logspace(0, -3, width)
    return (generator.normal(size=(count, width)) @ mixing * scale + seed).astype(np.float32)


@pytest.mark.parametrize(("count", "width"), [(40, 1), (60, 12), (300, 64)])
def test_the_distance_is_that_of_scipys_root(count: int, width: int) -> None:
    one, other = features(1, count, width), features(2, count + 30, width, 1.5)
    expected = by_sqrtm(one.astype(np.float64), other.astype(np.float64))
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-9)


def test_equal_sets_and_shifted_ones() -> None:
    one = features(3, 100, 8)
    assert abs(frechet_distance(one, one)) < 1e-9
    exact = one.astype(np.float64)
    assert frechet_distance(exact, exact + 2) == pytest.approx(8 * 4)


def test_the_interval_covers_the_distance_of_large_sets() -> None:
    generator = np.random.default_rng(0)

    def draw(count: int, shift: float) -> np.ndarray:
        return generator.normal(shift, 1, (count, 2))

    covered = 0
    for seed in range(40):
        found = frechet_with_interval(draw(400, 0), draw(400, 0.7), seed=seed, resamples=60)
        low, high = found["interval_95"]
        covered += low <= 2 * 0.7**2 <= high
        assert low < found["distance"] < high
    assert covered >= 34
    assert (found["images"], found["features"], found["resamples"]) == ([400, 400], 2, 60)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(InputError, match="in 12 features needs more than 12 images on both"):
        frechet_distance(features(1, 12, 12), features(2, 40, 12))
    with pytest.raises(InputError, match="both sides, not 12"):
        frechet_distance(features(1, 40, 12), features(2, 12, 12))


def test_the_share_of_nearer_images() -> None:
    originals = features(4, 300, 6)
    assert nearer_images(originals, originals)["mean"] == 0
    assert nearer_images(np.zeros((9, 3)), np.ones((9, 3)))["mean"] == 0.5  # all at one distance
    line = np.arange(5.0)[:, None]
    found = nearer_images(np.array([1.0, 2, 3, 4, 4])[:, None], line)
    nearer = np.array([1.5, 1.5, 1.5, 1, 0])  # an image at the same distance counts half
    assert found["mean"] == pytest.approx((nearer / 4).mean())
    assert found["standard_error"] == pytest.approx((nearer / 4).std(ddof=1) / np.sqrt(5))
    first, second = np.random.default_rng(0).normal(size=(2, 300, 6))
    low, high = nearer_images(first, second)["interval_95"]
    assert low < 0.5 < high
    with pytest.raises(InputError, match="give 2 or more, not 1"):
        nearer_images(line[:1], line[:1])
