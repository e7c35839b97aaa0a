"""The quality of samples and completions, measured in features of a model.

N images, D features of an image.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from igpt.data.tokens.dataset import TokenSplit
from igpt.errors import InputError
from igpt.evaluation.features import pooled
from igpt.model.images import decode_images, split_of_images
from igpt.model.transformer import ImageGPT
from igpt.sampling.jobs import SamplingSettings
from igpt.sampling.sampler import complete, sample
from igpt.statistics import interval_around, mean_of

Progress = Callable[[int, int], None]  # (done, in all)
Phases = Callable[[str, int, int], None]  # (title, done, in all)
Features = NDArray[np.floating[Any]]
_AT_ONCE = 256  # rows of distances


def measure(
    model: ImageGPT,
    originals: TokenSplit,
    of: ImageGPT,
    layer: int,
    settings: SamplingSettings,
    *,
    samples: int,
    completions: int,
    keep_rows: int,
    show: Phases,
) -> dict[str, Any]:
    """Sample and complete images with a model, and compare them with true images.

    The true images are compared as the model sees them: at its resolution, in its palette.

    Args:
        originals: tokens of the model.
        of: the model whose features are compared; it may be the same one.
        layer: of these features.
        samples: number of images to sample for the Frechet distance; 0 for none.
        completions: number of originals to complete, spread evenly, each once; 0 for none.
        keep_rows: rows that are kept in completions.

    Returns:
        `frechet` as `frechet_with_interval`, and `completions` as `nearer_images`, with the same
            for images whose hidden pixels are another image's instead (`other_pixels`).

    Raises:
        InputError: there are too few images, `of` sees a larger resolution than `model`, or the
            model cannot sample whole images.
    """
    if of.config.resolution > model.config.resolution:
        raise InputError(
            f"the model of the features sees {of.config.resolution} px, and the samples have "
            f"{model.config.resolution} px; choose one that sees no more"
        )
    n, seed = model.config.n_pixels, settings.get("seed", 0)
    if completions:  # before the samples, which may take long
        if completions > len(originals):
            raise InputError(f"there are {len(originals)} images, not {completions} to complete")
        if completions < 2:
            raise InputError("completions are compared with other images: give 2 or more, not 1")
        if not 0 <= keep_rows < model.config.resolution:
            raise InputError(
                f"the rows to keep are 0 to {model.config.resolution - 1}, not {keep_rows}"
            )

    def features(split: TokenSplit, title: str) -> Features:
        if of is not model:
            tokens = torch.from_numpy(split.rows(np.arange(len(split))).astype(np.int64))
            split = split_of_images(of, decode_images(model, tokens))
        batches = pooled(
            of, split, last=layer, progress=lambda done, total: show(title, done, total)
        )
        return np.concatenate([batch[layer] for batch in batches])

    result: dict[str, Any] = {}
    if samples:
        for images in (samples, len(originals)):
            require_enough(images, of.config.n_embd)
        sampled = sample(
            model,
            torch.empty(samples, 0, dtype=torch.long),
            progress=lambda done, total: show("sampling", done // n, total // n),
            **settings,
        )
        result["frechet"] = frechet_with_interval(
            features(_split(sampled), "features of samples"),
            features(originals, "features of images"),
            seed=seed,
            progress=lambda done, total: show("bootstrap", done, total),
        )
    if completions:
        chosen = originals.spread(completions)
        tokens = torch.from_numpy(chosen.rows(np.arange(completions)).astype(np.int64))
        completed = complete(
            model,
            tokens,
            keep_rows,
            progress=lambda done, total: show("completing", done // n, total // n),
            **settings,
        )
        kept = torch.arange(n) < keep_rows * model.config.resolution
        mixed = torch.where(kept, tokens, tokens.roll(1, 0))
        true = features(chosen, "features of images")
        result["completions"] = {
            "keep_rows": keep_rows,
            **nearer_images(features(_split(completed), "features of completions"), true),
            "other_pixels": nearer_images(features(_split(mixed), "features of mixed"), true),
        }
    return result


def _split(tokens: torch.Tensor) -> TokenSplit:
    rows = tokens.cpu().numpy().astype(np.uint16)
    return TokenSplit("generated", [rows], [np.full(len(rows), -1, np.int32)])


def frechet_distance(one: Features, other: Features) -> float:
    """Return the Frechet distance of two sets of features, as normal distributions.

    It is |m - M|^2 + trace(C + K - 2 (C K)^(1/2)), with means m and M and covariances C and K, in
    float64 and without shrinkage (Heusel et al. 2017, arXiv 1706.08500, with Inception's features).

    Args:
        one, other: [N, D] and [M, D].

    Raises:
        InputError: a set has no more images than features, so that its covariance is singular.
    """
    for features in (one, other):
        require_enough(*features.shape)
    (mean, root), (other_mean, other_root) = map(_moments, (one, other))
    # With C = A'A and K = B'B, the trace of (C K)^(1/2) is the sum of the singular values of A B'.
    shared = np.linalg.svd(root @ other_root.T, compute_uv=False).sum()
    spread = (root**2).sum() + (other_root**2).sum() - 2 * shared
    return float(((mean - other_mean) ** 2).sum() + spread)


def require_enough(images: int, width: int) -> None:
    """Refuse a Frechet distance of no more images than features.

    Raises:
        InputError: names both numbers.
    """
    if images <= width:
        raise InputError(
            f"a Frechet distance in {width} features needs more than {width} images on both sides, "
            f"not {images}"
        )


def _moments(features: Features) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean [D] and a root A [D, D] of the covariance C = A'A."""
    exact = features.astype(np.float64)
    mean = exact.mean(axis=0)
    root: NDArray[np.float64] = np.asarray(
        np.linalg.qr((exact - mean) / np.sqrt(len(exact) - 1), mode="r")
    )
    return mean, root


def frechet_with_interval(
    one: Features,
    other: Features,
    *,
    resamples: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return the Frechet distance, its standard error by bootstrap, and the normal 95 % interval.

    Both sets are resampled with replacement. The interval does not include the bias of the
    distance, which grows as N falls (Chong and Forsyth 2020, arXiv 1911.07023).

    Raises:
        InputError: see `frechet_distance`.
    """
    distance = frechet_distance(one, other)
    generator = np.random.default_rng(seed)
    found = np.empty(resamples)
    for number in range(resamples):
        found[number] = frechet_distance(
            *(each[generator.integers(len(each), size=len(each))] for each in (one, other))
        )
        if progress:
            progress(number + 1, resamples)
    error = float(found.std(ddof=1))
    low, high = interval_around(distance, error)
    return {
        "distance": distance,
        "standard_error": error,
        "interval_95": [max(0.0, low), high],
        "images": [len(one), len(other)],
        "features": one.shape[1],
        "resamples": resamples,
    }


def nearer_images(completed: Features, originals: Features) -> dict[str, Any]:
    """Return the mean share of other images that are nearer to a completion than its own original.

    It is 0 if each completion is nearest to its original, and 0.5 by chance. Nearness is the
    Euclidean distance of features; images at the same distance count half.

    Args:
        completed, originals: [N, D], of the same images.

    Raises:
        InputError: there are fewer than two images.
    """
    count = len(originals)
    if count < 2:
        raise InputError(f"completions are compared with other images: give 2 or more, not {count}")
    exact = originals.astype(np.float64)
    shares = np.empty(count)
    for first in range(0, count, _AT_ONCE):
        rows = np.arange(first, min(first + _AT_ONCE, count))
        block = completed[rows].astype(np.float64)
        distances = np.stack([((exact - one) ** 2).sum(axis=1) for one in block])
        own = distances[np.arange(len(rows)), rows][:, None]
        # The own original is one of those at the same distance.
        nearer = (distances < own).sum(axis=1) + ((distances == own).sum(axis=1) - 1) / 2
        shares[rows] = nearer / (count - 1)
    found = mean_of(shares)
    low, high = found["interval_95"]
    return found | {"interval_95": [max(0.0, low), min(1.0, high)]}
