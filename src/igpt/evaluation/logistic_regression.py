"""Multinomial logistic regression on features, by L-BFGS, or by SGD for many rows.

N rows, D features, C classes, S settings (strengths or learning rates) that are fitted at once,
since reading the rows
is what takes the time: every row that is read serves all of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from igpt.data.tokens.batches import batch_rows
from igpt.errors import InputError
from igpt.evaluation.features import Rows, read_blocks

STRENGTHS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)  # to select from
_ROWS = 4096  # rows per block
_HISTORY = 10  # pairs in L-BFGS's memory
# above this number of features, diagonalizing their covariance takes longer than it saves
_ROTATED = 4096
# smallest share of the expected decrease; rounding error of a loss
_SUFFICIENT, _NOISE = 1e-4, 1e-7
_SGD_CONVERGED = 1e-2  # relative to the gradient's norm at the start


@dataclass(frozen=True)
class Classifiers:
    """S linear classifiers on standardized features: softmax(coef (x - mean) / scale + intercept).

    Attributes:
        mean, scale: of the features they were fitted to, [D].
        coef, intercept: [S, C, D] and [S, C], as in scikit-learn's LogisticRegression with one row
            a class.
        loss: the minimized loss of each, a mean over rows, [S].
        converged: whether the gradient is below the tolerance.
        iterations: of the solver.
    """

    mean: Tensor
    scale: Tensor
    coef: Tensor
    intercept: Tensor
    loss: Tensor
    converged: list[bool]
    iterations: list[int]

    def only(self, setting: int) -> "Classifiers":
        """Return the classifier with one index."""
        some = slice(setting, setting + 1)
        return replace(
            self,
            coef=self.coef[some],
            intercept=self.intercept[some],
            loss=self.loss[some],
            converged=self.converged[some],
            iterations=self.iterations[some],
        )

    def predict(self, features: Rows) -> NDArray[np.int64]:
        """Return the likeliest class of every row, by each classifier: [N, D] -> [S, N].

        Raises:
            InputError: features that are not finite.
        """
        settings, classes, width = self.coef.shape
        weights = self.coef.reshape(-1, width).t()
        found = []
        for rows in read_blocks(features, self.mean.device, _ROWS):
            if not bool(rows.isfinite().all()):
                raise InputError("features are not finite; the model's weights are broken")
            logits = torch.addmm(
                self.intercept.reshape(-1), (rows - self.mean) / self.scale, weights
            )
            found.append(logits.view(-1, settings, classes).argmax(dim=2))
        return torch.cat(found).t().cpu().numpy()


def fit_lbfgs(
    features: Rows,
    labels: NDArray[np.int64],
    strengths: Sequence[float],
    *,
    device: torch.device | None = None,
    tolerance: float = 1e-5,
    max_iterations: int = 1000,
) -> Classifiers:
    """Return the optimum of L2-regularized logistic regression for every strength.

    The objective is scikit-learn's with a mean over rows, for standardized features:
    cross-entropy + |coef|^2 / (2 C N), without a penalty on the intercept. For two classes it is
    scikit-learn's too, whose single row of coefficients is the difference of the two rows here.

    The features are rotated to their principal axes, which does not change the penalty, and scaled
    along them by the curvature of the loss at the start. L-BFGS then needs tens of iterations
    instead of hundreds.

    Args:
        labels: 0 .. C - 1, [N].
        strengths: scikit-learn's C, inverse strengths of the regularization.
        device: where to compute (default: the CPU).
        tolerance: of the gradient's norm in the scaled coordinates, relative to a loss below 1.

    Raises:
        InputError: features that are not finite.
    """
    count, classes = len(labels), int(labels.max()) + 1
    target_device = device or torch.device("cpu")
    mean, scale = moments(features, target_device)
    rows, axes, variances = _rotated(features, mean, scale)
    targets = torch.from_numpy(labels).to(target_device)
    penalty = torch.tensor(
        [(2 if classes == 2 else 1) / (strength * count) for strength in strengths]
    )
    penalty = penalty.double().to(target_device)[:, None, None]  # [S, 1, 1]
    # At the start all classes are equally likely, and the curvature along each axis is its variance
    # over C.
    steps = (variances / classes + penalty[:, 0]).rsqrt()[:, :, None]  # [S, D, 1]
    free = classes**0.5

    def evaluate(point: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        weights = point[:, :-1] * steps[which]  # [A, D, C]
        loss, slope, tilt = _cross_entropy(rows, targets, weights, point[:, -1] * free)
        loss = loss + penalty[which, 0, 0] / 2 * weights.square().sum((1, 2))
        slope = (slope + penalty[which] * weights) * steps[which]
        return loss, torch.cat([slope, tilt[:, None] * free], dim=1)

    start = torch.zeros(
        len(strengths), rows.shape[1] + 1, classes, dtype=torch.float64, device=target_device
    )
    point, loss, converged, iterations = _lbfgs(evaluate, start, tolerance, max_iterations)
    weights = point[:, :-1] * steps
    coef = (axes @ weights if axes is not None else weights).transpose(1, 2).float()
    return Classifiers(
        mean, scale, coef, (point[:, -1] * free).float(), loss, converged, iterations
    )


def _lbfgs(
    evaluate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor, list[bool], list[int]]:
    """Minimize S smooth convex functions at once; return points, values, convergence, steps.

    Args:
        evaluate: values [A] and gradients of the functions numbered [A], at a point for each.
        start: [S, ...].
    """

    def dot(one: Tensor, other: Tensor) -> Tensor:
        return (one * other).sum((1, 2), keepdim=True)  # [S, 1, 1]

    point = start
    value, gradient = evaluate(point, torch.arange(len(start), device=start.device))
    curvature = torch.ones_like(dot(start, start))
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    iterations = torch.zeros(len(start), dtype=torch.int64)
    stuck = torch.zeros_like(value, dtype=torch.bool)
    for _ in range(max_iterations):
        live = (gradient.flatten(1).norm(dim=1) > tolerance * value.clamp(max=1)) & ~stuck
        if not live.any():
            break
        direction, taken = -gradient, []
        for moved, turned, weight in reversed(pairs):
            share = weight * dot(moved, direction)
            direction = direction - share * turned
            taken.append(share)
        direction = direction * curvature
        for (moved, turned, weight), share in zip(pairs, reversed(taken), strict=True):
            direction = direction + (share - weight * dot(turned, direction)) * moved
        next_point, next_value, next_gradient, moving = _search(
            evaluate, point, value, gradient, direction, live
        )
        stuck |= live & ~moving
        moved, turned = next_point - point, next_gradient - gradient
        along = dot(moved, turned)
        sound = (
            along > 0
        )  # rounding may violate it close to the optimum, and inactive functions have not moved
        pairs.append((moved, turned, torch.where(sound, 1 / along, 0.0)))
        curvature = torch.where(sound, along / dot(turned, turned), curvature)
        del pairs[:-_HISTORY]
        point, value, gradient = next_point, next_value, next_gradient
        iterations += moving.cpu()
    converged = gradient.flatten(1).norm(dim=1) <= tolerance * value.clamp(max=1)
    return point, value, converged.tolist(), iterations.tolist()


def _search(
    evaluate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    point: Tensor,
    value: Tensor,
    gradient: Tensor,
    direction: Tensor,
    live: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Halve the step of each active function until it decreases enough, or keep its point."""
    point, value, gradient = point.clone(), value.clone(), gradient.clone()
    slope = (direction * gradient).sum((1, 2))
    length, waiting = torch.ones_like(value), live.clone()
    for _ in range(20):
        which = waiting.nonzero()[:, 0]
        if not len(which):
            break
        tried = point[which] + length[which, None, None] * direction[which]
        found, turned = evaluate(tried, which)
        allowed = (
            value[which]
            + _SUFFICIENT * length[which] * slope[which]
            + _NOISE * (1 + value[which].abs())
        )
        good = found <= allowed
        done = which[good]
        point[done], value[done], gradient[done] = tried[good], found[good], turned[good]
        waiting[done] = False
        length[waiting] *= 0.5
    return point, value, gradient, live & ~waiting


def _cross_entropy(
    rows: Tensor, targets: Tensor, weights: Tensor, intercepts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean cross-entropy [A] and its gradients by weights and intercepts.

    Products are fp32, sums over blocks of rows fp64.
    """
    settings, width, classes = weights.shape
    flat = weights.permute(1, 0, 2).reshape(width, -1).to(rows.dtype)
    shift = intercepts.reshape(-1).to(rows.dtype)
    loss = torch.zeros_like(weights[:, 0, 0])
    slope, tilt = weights.new_zeros(len(shift), width), weights.new_zeros(len(shift))
    for first in range(0, len(rows), _ROWS):
        block, chosen = rows[first : first + _ROWS], targets[first : first + _ROWS]
        log_shares = torch.addmm(shift, block, flat).view(-1, settings, classes).log_softmax(dim=2)
        right = chosen[:, None, None].expand(-1, settings, 1)
        loss -= log_shares.gather(2, right)[:, :, 0].sum(0, dtype=torch.float64)
        residual = (
            log_shares.exp_()
            .scatter_add_(2, right, log_shares.new_full(right.shape, -1.0))
            .flatten(1)
        )
        slope += residual.t() @ block  # in the other order, a narrow product takes twice the time
        tilt += residual.sum(0, dtype=torch.float64)
    slope = slope.view(settings, classes, width).transpose(1, 2)
    return loss / len(rows), slope / len(rows), tilt.view(settings, classes) / len(rows)


def moments(features: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of every feature, [D] each; 1 for a constant feature.

    Raises:
        InputError: features that are not finite.
    """
    mean, square = torch.zeros(2, features.shape[1], dtype=torch.float64, device=device)
    for rows in read_blocks(features, device, _ROWS):
        mean += rows.sum(0, dtype=torch.float64) / len(features)
    for rows in read_blocks(features, device, _ROWS):
        square += (rows - mean).square().sum(0) / len(features)
    if not bool(square.isfinite().all()):
        raise InputError(
            "features of the training images are not finite; the model's weights are broken"
        )
    deviation = square.sqrt()
    constant = deviation <= 1e-6 * mean.abs()  # rounding error
    return mean.float(), torch.where(constant, 1.0, deviation).float()


def _rotated(features: Rows, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return standardized features on their principal axes [N, D], the axes, the variances."""
    count, width = features.shape
    if width > _ROTATED:
        rows = torch.cat(
            [(block - mean) / scale for block in read_blocks(features, mean.device, _ROWS)]
        )
        return rows, None, torch.ones_like(mean, dtype=torch.float64)
    covariance = torch.zeros(width, width, dtype=torch.float64, device=mean.device)
    for block in read_blocks(features, mean.device, _ROWS):
        standard = (block - mean) / scale
        covariance += standard.t() @ standard
    variances, axes = torch.linalg.eigh(covariance / count)
    rows = torch.empty(count, width, device=mean.device)
    for number, block in enumerate(read_blocks(features, mean.device, _ROWS)):
        torch.mm(
            (block - mean) / scale,
            axes.float(),
            out=rows[number * _ROWS : number * _ROWS + len(block)],
        )
    return rows, axes, variances.clamp(min=0)


def fit_sgd(
    features: Rows,
    labels: NDArray[np.int64],
    rates: Sequence[float],
    *,
    steps: int,
    batch_size: int,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Classifiers:
    """Fit by SGD with momentum 0.9 and a cosine schedule, for every learning rate.

    At most some thousand rows are in memory. Features are standardized and divided by sqrt(D), so
    that those of an image have a norm of about 1. There is no regularization except for the limited
    number of steps.

    Raises:
        InputError: features that are not finite.
    """
    classes, width = int(labels.max()) + 1, features.shape[1]
    target_device = device or torch.device("cpu")
    mean, scale = moments(features, target_device)
    divisor = scale * width**0.5
    peaks = torch.tensor(rates, device=target_device)[:, None, None]
    weights = torch.zeros(
        len(rates), width + 1, classes, device=target_device
    )  # the last of D + 1 is the intercept
    momentum = torch.zeros_like(weights)

    def gradient(rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        block = torch.from_numpy(np.asarray(features[rows])).to(target_device)
        block = F.pad((block - mean) / divisor, (0, 1), value=1.0)
        logits = (block @ weights.permute(1, 0, 2).flatten(1)).view(len(rows), len(rates), classes)
        log_shares = logits.log_softmax(dim=2)
        right = (
            torch.from_numpy(labels[rows])
            .to(target_device)[:, None, None]
            .expand(-1, len(rates), 1)
        )
        loss = -log_shares.gather(2, right)[:, :, 0].sum(0, dtype=torch.float64)
        residual = (
            log_shares.exp_()
            .scatter_add_(2, right, log_shares.new_full(right.shape, -1.0))
            .flatten(1)
        )
        return loss, (residual.t() @ block).view(len(rates), classes, width + 1).transpose(1, 2)

    def whole() -> tuple[Tensor, Tensor]:
        blocks = [
            np.arange(first, min(first + _ROWS, len(labels)))
            for first in range(0, len(labels), _ROWS)
        ]
        losses, slopes = zip(*map(gradient, blocks), strict=True)
        return sum(losses) / len(labels), (sum(slopes) / len(labels)).flatten(1).norm(dim=1)

    before = whole()[1]
    for step in range(steps):
        _, slope = gradient(np.sort(batch_rows(seed, step, batch_size, len(labels))))
        momentum.mul_(0.9).add_(slope, alpha=1 / batch_size)
        weights -= peaks * (0.5 + 0.5 * math.cos(math.pi * step / steps)) * momentum
        if progress and step % 100 == 99:
            progress(step + 1, steps)
    loss, after = whole()
    coef, intercept = weights[:, :-1].transpose(1, 2) / width**0.5, weights[:, -1]
    converged = (after <= _SGD_CONVERGED * before).tolist()
    return Classifiers(mean, scale, coef, intercept, loss, converged, [steps] * len(rates))
