"""Compare Palette.fit with scikit-learn's KMeans and MiniBatchKMeans: seconds, and mean squared
errors on CIFAR-10.

Goal: not slower than KMeans with its default settings, at an equal or lower error. Every seed
samples other images, on which the contenders alternate. The error of a pixel is the squared
distance to the nearest centre, summed over RGB, in 8-bit levels, found by the same exact search for
all; held-out pixels are from other images. All may use all cores: for one core, run it under
`taskset -c 0`.
"""

from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import sklearn
from common import CIFAR10, cifar10, record, run, show
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from sklearn.cluster import KMeans, MiniBatchKMeans

from igpt.data.images.palette import Palette

OURS = "igpt Palette"
SHORT = "KMeans, 30 iterations"
DEFAULT = "KMeans, 300 iterations (default)"
MINI = "MiniBatchKMeans"
MEASURES = ("seconds", "fit_mse", "held_out_mse")


def fit(name: str, pixels: NDArray[np.uint8], colors: int, seed: int) -> Any:
    if name == OURS:
        return Palette(colors, seed=seed).fit(pixels)
    floats = pixels.astype(np.float32)
    if name == MINI:
        return MiniBatchKMeans(colors, n_init="auto", random_state=seed).fit(floats)
    return KMeans(
        colors, n_init="auto", max_iter=30 if name == SHORT else 300, random_state=seed
    ).fit(floats)


def mean_squared_error(model: Any, pixels: NDArray[np.uint8]) -> float:
    centers = (
        (model.centers_.astype(float) + 1) * 127.5
        if isinstance(model, Palette)
        else model.cluster_centers_
    )
    return float((cKDTree(centers).query(pixels, workers=-1)[0] ** 2).mean())


def main(data: Path = CIFAR10, images: int = 977, colors: int = 512, seeds: int = 3) -> None:
    """Time fits of palettes to CIFAR-10.

    Args:
        data: folder with CIFAR-10 as Parquet.
        images: of 1,024 pixels each, to fit to; as many others are held out.
        colors: k.
        seeds: fits of each contender, with seeds 0, 1, ...
    """
    Palette(2).fit(np.arange(9, dtype=np.uint8).reshape(3, 3))  # so that imports are not timed
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in (OURS, SHORT, DEFAULT, MINI)}
    for seed in range(seeds):
        drawn = cifar10(data, "train", 2 * images, seed)
        pixels, held_out = drawn[:images].reshape(-1, 3), drawn[images:].reshape(-1, 3)
        for name in runs:
            start = perf_counter()
            model = fit(name, pixels, colors, seed)
            found = (
                perf_counter() - start,
                mean_squared_error(model, pixels),
                mean_squared_error(model, held_out),
            )
            runs[name].append(dict(zip(MEASURES, found, strict=True)))
            print(
                "seed {}, {}: {:.1f} s, fit {:.3f}, held out {:.3f}".format(seed, name, *found),
                flush=True,
            )

    rows, summary = [], {}
    for name, own in runs.items():
        medians = {key: median(one[key] for one in own) for key in MEASURES}
        ratios = {
            key: median(one[key] / ours[key] for one, ours in zip(own, runs[OURS], strict=True))
            for key in MEASURES
        }
        summary[name] = {"median": medians, "median_ratio_to_ours": ratios}
        seconds, *errors = medians.values()
        slower, *worse = ratios.values()
        figures = [f"{seconds:.2f}", *(f"{error:.3f}" for error in errors)]
        rows.append([name, *figures, f"{slower:.2f}", *(f"{ratio:.4f}" for ratio in worse)])
    title = (
        f"{images * 1024:,} pixels, k = {colors}: medians of {seeds} seeds, and of ratios to "
        f"{OURS} at the same seed"
    )
    show(
        title, ["", "seconds", "fit MSE", "held-out MSE", "seconds x", "fit x", "held-out x"], rows
    )
    settings = {
        "pixels": images * 1024,
        "colors": colors,
        "seeds": seeds,
        "scikit_learn": sklearn.__version__,
    }
    record("palette", {**settings, "summary": summary, "runs": runs})


if __name__ == "__main__":
    run(main)
