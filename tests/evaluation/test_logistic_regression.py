"""Logistic regression: scikit-learn's optimum is reached, or the failure is reported; SGD is
compared with a plain loop."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from igpt.errors import InputError
from igpt.evaluation import logistic_regression as regression
from igpt.evaluation.logistic_regression import fit_lbfgs, fit_sgd

STRENGTHS = (1e-3, 0.1, 10.0)


def problem(
    count: int, width: int, classes: int, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return correlated features, of many scales and far from zero, and classes that overlap."""
    generator = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), generator.integers(0, classes, count - classes)])
    centers = generator.normal(size=(classes, width))
    features = (centers[labels] + 2 * generator.normal(size=(count, width))) @ generator.normal(
        size=(width, width)
    )
    features = features * 10.0 ** generator.uniform(-3, 3, width) + 10.0 ** generator.uniform(
        -3, 3, width
    )
    return features.astype(np.float32), labels


def scikit_learns(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    strength: float,
    found: regression.Classifiers,
) -> LogisticRegression:
    standard = (features.astype(np.float64) - found.mean.numpy()) / found.scale.numpy()
    return LogisticRegression(C=strength, tol=1e-9, max_iter=20_000).fit(standard, labels)


@pytest.mark.parametrize(
    ("count", "width", "classes"), [(600, 24, 5), (600, 24, 2), (40, 60, 4), (900, 6, 30)], ids=str
)
def test_the_optimum_is_scikit_learns(count: int, width: int, classes: int) -> None:
    features, labels = problem(count, width, classes)
    other, _ = problem(500, width, classes, seed=1)
    found = fit_lbfgs(features, labels, STRENGTHS)
    assert all(found.converged)
    predicted = found.predict(other)
    for index, strength in enumerate(STRENGTHS):
        theirs = scikit_learns(features, labels, strength, found)
        coef, intercept = (
            found.coef[index].double().numpy(),
            found.intercept[index].double().numpy(),
        )
        if classes == 2:  # scikit-learn only stores the difference
            coef, intercept = coef[1:] - coef[:1], intercept[1:] - intercept[:1]
        size = np.abs(theirs.coef_).max()
        np.testing.assert_allclose(coef, theirs.coef_, atol=1e-3 * size)
        np.testing.assert_allclose(
            intercept, theirs.intercept_, atol=1e-3 * max(size, np.abs(theirs.intercept_).max())
        )
        standard = (other.astype(np.float64) - found.mean.numpy()) / found.scale.numpy()
        assert (predicted[index] == theirs.predict(standard)).mean() >= 0.996


def test_strengths_fitted_together_equal_those_fitted_alone() -> None:
    features, labels = problem(400, 12, 3)
    together = fit_lbfgs(features, labels, STRENGTHS)
    for index, strength in enumerate(STRENGTHS):
        alone = fit_lbfgs(features, labels, [strength])
        np.testing.assert_allclose(alone.coef[0], together.coef[index], atol=2e-3)
        assert abs(alone.iterations[0] - together.iterations[index]) <= 2


def test_the_result_without_principal_axes_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = problem(400, 12, 3)
    rotated = fit_lbfgs(features, labels, STRENGTHS, tolerance=1e-6)
    monkeypatch.setattr(regression, "_ROTATED", 11)
    plain = fit_lbfgs(features, labels, STRENGTHS, tolerance=1e-6)
    assert all(plain.converged)
    assert sum(plain.iterations) > 2 * sum(rotated.iterations), (
        "the axes reduce the number of iterations"
    )
    np.testing.assert_allclose(plain.coef, rotated.coef, atol=2e-3)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = problem(400, 12, 3)
    whole = fit_lbfgs(features, labels, STRENGTHS)
    monkeypatch.setattr(regression, "_ROWS", 64)
    blocks = fit_lbfgs(features, labels, STRENGTHS)
    np.testing.assert_allclose(blocks.coef, whole.coef, atol=2e-3)
    assert (blocks.predict(features) == whole.predict(features)).mean() > 0.99


def test_missing_convergence_is_reported() -> None:
    features, labels = problem(400, 12, 3)
    short = fit_lbfgs(features, labels, STRENGTHS, max_iterations=2)
    assert short.converged == [False] * 3
    assert short.iterations == [2] * 3
    mixed = fit_lbfgs(features, labels, [1e-6, 1e4], max_iterations=12)
    assert mixed.converged == [True, False], "for each strength"
    assert mixed.iterations[0] < 12


def test_for_separable_classes_a_small_gradient_is_not_enough() -> None:
    """Almost without regularization the loss decreases for ever, and the gradient with it."""
    features, labels = problem(40, 60, 4)
    found = fit_lbfgs(features, labels, [0.1, 1e9], max_iterations=200)
    assert found.converged == [True, False]


def test_a_constant_feature_has_no_influence() -> None:
    features, labels = problem(300, 8, 3)
    features[:, 2] = 7.3
    found = fit_lbfgs(features, labels, [0.1])
    assert found.converged == [True]
    assert float(found.coef[0, :, 2].abs().max()) < 1e-4
    assert found.scale[2] == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_features_are_refused(value: float) -> None:
    features, labels = problem(300, 8, 3)
    features[17, 3] = value
    for fit in (
        lambda: fit_lbfgs(features, labels, [1.0]),
        lambda: fit_sgd(features, labels, [1.0], steps=1, batch_size=2),
    ):
        with pytest.raises(InputError, match="features of the training images are not finite"):
            fit()


def plain_sgd(
    features: NDArray[np.float32], labels: NDArray[np.int64], rate: float, steps: int, size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the result of the textbook algorithm, one step at a time."""
    standard = (features - features.mean(0, dtype=np.float64)) / features.std(0, dtype=np.float64)
    x = np.hstack([standard / np.sqrt(features.shape[1]), np.ones((len(features), 1))])
    weights = np.zeros((x.shape[1], labels.max() + 1))
    velocity = np.zeros_like(weights)
    for step in range(steps):
        rows = regression.batch_rows(3, step, size, len(labels))
        shares = np.exp(x[rows] @ weights)
        shares /= shares.sum(1, keepdims=True)
        shares[np.arange(size), labels[rows]] -= 1
        velocity = 0.9 * velocity + x[rows].T @ shares / size
        weights -= rate * (1 + np.cos(np.pi * step / steps)) / 2 * velocity
    return weights[:-1].T / np.sqrt(features.shape[1]), weights[-1]


def test_sgd_equals_the_plain_loop() -> None:
    features, labels = problem(200, 10, 3)
    found = fit_sgd(features, labels, [3.0, 0.3], steps=50, batch_size=16, seed=3)
    for index, rate in enumerate((3.0, 0.3)):
        coef, intercept = plain_sgd(features, labels, rate, 50, 16)
        np.testing.assert_allclose(found.coef[index], coef, atol=1e-4)
        np.testing.assert_allclose(found.intercept[index], intercept, atol=1e-4)
    assert found.converged == [False, False], "fifty steps are few"


def test_sgd_approaches_the_optimum_and_a_diverging_rate_is_not_selected() -> None:
    features, labels = problem(400, 6, 3)
    optimum = fit_lbfgs(features, labels, [1e6])
    found = fit_sgd(features, labels, [1e30, 3.0], steps=1500, batch_size=64)
    assert float(found.loss[1]) == pytest.approx(float(optimum.loss[0]), abs=2e-3)
    assert found.converged == [False, True]
    right = (found.predict(features) == labels).mean(axis=1)
    assert right[0] < right[1]
    again = fit_sgd(features, labels, [1e30, 3.0], steps=1500, batch_size=64)
    assert torch.equal(found.coef[1], again.coef[1])
