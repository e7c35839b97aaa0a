"""Compare the probe's L-BFGS with scikit-learn's LogisticRegression: seconds, losses and
accuracies on CIFAR-10.

Goal: ten times as fast for 24 layers of 512 features of 50,000 images, on the same cores. The
features of a layer are replaced by those of random convolutions, with one seed per layer: as
correlated as those of a network (the condition number of their covariance is about 40,000), and
accurate enough that the optimum is not trivial. Both get the same standardized features, and fit
all strengths; scikit-learn starts each from the solution of the previous one. It has its default
tolerance, which stops it further from the optimum than ours, as the losses show. For layers that
both fit, they alternate.
"""

import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import sklearn
import torch
import torch.nn.functional as F
from common import CIFAR10, cifar10, record, run, show
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from igpt.evaluation.logistic_regression import fit_lbfgs

STRENGTHS = (1e-3, 1e-2, 0.1, 1.0)
TEST = 10_000


def random_features(images: NDArray[np.uint8], width: int, seed: int) -> NDArray[np.float32]:
    """Return means over the quadrants of width / 4 random 6x6 filters, rectified: [N, width]."""
    filters = torch.randn(width // 4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    filters -= filters.mean((1, 2, 3), keepdim=True)
    filters /= filters.square().sum((1, 2, 3), keepdim=True).sqrt()
    found = []
    for first in range(0, len(images), 500):
        block = torch.from_numpy(images[first : first + 500]).permute(0, 3, 1, 2) / 127.5 - 1
        found.append(
            F.adaptive_avg_pool2d(F.relu(F.conv2d(block, filters, stride=2) - 0.1), 2).flatten(1)
        )
    return torch.cat(found).numpy()


def labels_of(folder: Path, split: str, count: int, seed: int) -> NDArray[np.int64]:
    """Return the labels of the images that `cifar10` samples."""
    column = (
        pq.read_table(sorted(folder.rglob(f"{split}-*.parquet")), columns=["label"])
        .column("label")
        .to_numpy()
    )
    return column[np.random.default_rng(seed).choice(len(column), count, replace=False)].astype(
        np.int64
    )


def objective(
    x: NDArray[np.float32], y: NDArray[np.int64], coef: Any, intercept: Any, strength: float
) -> float:
    """Return mean cross-entropy and penalty, in float64."""
    logits = (
        torch.from_numpy(x).double() @ torch.as_tensor(coef).double().t()
        + torch.as_tensor(intercept).double()
    )
    penalty = float((torch.as_tensor(coef).double() ** 2).sum()) / (2 * strength * len(x))
    return float(F.cross_entropy(logits, torch.from_numpy(y))) + penalty


def main(
    data: Path = CIFAR10,
    images: int = 50_000,
    width: int = 512,
    layers: int = 24,
    rival_layers: int = 3,
) -> None:
    """Time probes of many layers.

    Args:
        data: folder with CIFAR-10 as Parquet.
        images: to fit to; 10,000 others are tested.
        width: features of a layer.
        layers: that ours fits.
        rival_layers: of them, that scikit-learn fits as well, since it takes minutes a layer.
    """
    pictures, y = cifar10(data, "train", images, 0), labels_of(data, "train", images, 0)
    held_out, truth = cifar10(data, "test", TEST, 0), labels_of(data, "test", TEST, 0)
    runs: list[dict[str, Any]] = []
    for layer in range(layers):
        x, x_test = (random_features(each, width, layer) for each in (pictures, held_out))
        mean, scale = x.mean(0), x.std(0)
        x, x_test = (x - mean) / scale, (x_test - mean) / scale
        if not layer:
            fit_lbfgs(x[:5000], y[:5000], STRENGTHS)  # so that only the fit is timed
        start = time.perf_counter()
        ours = fit_lbfgs(x, y, STRENGTHS)
        result: dict[str, Any] = {
            "layer": layer,
            "seconds": time.perf_counter() - start,
            "converged": ours.converged,
            "iterations": ours.iterations,
            "accuracy": (ours.predict(x_test) == truth).mean(axis=1).tolist(),
        }
        if layer < rival_layers:
            rival = LogisticRegression(max_iter=2000, warm_start=True)
            result["scikit_learn"] = []
            for number, strength in enumerate(STRENGTHS):
                start = time.perf_counter()
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # not converged
                    rival.set_params(C=strength).fit(x, y)
                own = (
                    ours.coef[number] / ours.scale,
                    ours.intercept[number] - ours.coef[number] @ (ours.mean / ours.scale),
                )
                result["scikit_learn"].append(
                    {
                        "strength": strength,
                        "seconds": time.perf_counter() - start,
                        "iterations": int(rival.n_iter_[0]),
                        "accuracy": float((rival.predict(x_test) == truth).mean()),
                        "excess_loss": objective(x, y, rival.coef_, rival.intercept_, strength)
                        - objective(x, y, *own, strength),
                    }
                )
        runs.append(result)
        print(
            f"layer {layer}: {result['seconds']:.2f} s",
            *(each["seconds"] for each in result.get("scikit_learn", ())),
            flush=True,
        )

    both = [each for each in runs if "scikit_learn" in each]
    theirs = [sum(one["seconds"] for one in each["scikit_learn"]) for each in both]
    ratio = median(their / each["seconds"] for their, each in zip(theirs, both, strict=True))
    total = sum(each["seconds"] for each in runs)
    rows = [
        [
            "igpt",
            f"{median(each['seconds'] for each in runs):.2f}",
            f"{total:.1f}",
            str(max(runs[0]["iterations"])),
        ],
        [
            "scikit-learn",
            f"{median(theirs):.1f}",
            f"{ratio * total:.0f} (by the ratio)",
            str(both[0]["scikit_learn"][-1]["iterations"]),
        ],
    ]
    show(
        f"{layers} layers, {images:,} images, {width} features, {len(STRENGTHS)} strengths: "
        f"{ratio:.1f} times",
        ["", "seconds per layer (median)", f"{layers} layers", "most iterations"],
        rows,
    )
    settings = {
        "images": images,
        "width": width,
        "layers": layers,
        "strengths": STRENGTHS,
        "threads": torch.get_num_threads(),
    }
    record(
        "probe",
        {
            **settings,
            "scikit_learn": sklearn.__version__,
            "times_as_fast": ratio,
            "seconds": total,
            "runs": runs,
        },
    )


if __name__ == "__main__":
    run(main)
