"""Linear probes: how well a linear classifier reads the classes from each layer (paper, section 2.3).

N images, C classes, D features.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from igpt.data.tokens import SPLITS, TokenDataset, TokenSplit
from igpt.environment import describe
from igpt.errors import InputError
from igpt.evaluation.features import extract, require_match
from igpt.model.precision import Precision
from igpt.model.transformer import ImageGPT

FORMAT, VERSION = "igpt-probe", 1
STRENGTHS = (0.001, 0.01, 0.1, 1.0)  # inverse L2 strengths C of scikit-learn, tried from strong to weak
Features = Mapping[str, NDArray[np.float32]]  # split -> [N, D]
Progress = Callable[[str, int, int], None]  # (what, done, in all)


def fit_linear(
    features: Features, labels: Mapping[str, NDArray[np.int32]], *, max_iter: int = 500
) -> dict[str, float | bool]:
    """L-BFGS logistic regression on standardised features: fitted on train, its L2 strength chosen on validation.

    Returns:
        validation_accuracy, test_accuracy, regularisation (scikit-learn's C), and whether the solver converged.

    Raises:
        InputError: features that are not finite, or a single class.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    for split, array in features.items():
        if not np.isfinite(array).all():
            raise InputError(f"features of the {split} images are not finite; the model's weights are broken")
    if len(np.unique(labels["train"])) < 2:
        raise InputError("a probe needs at least two classes among the training images")
    mean = features["train"].mean(axis=0)
    scale = features["train"].std(axis=0)
    scale[scale == 0] = 1
    scaled = {split: (array - mean) / scale for split, array in features.items()}
    best: dict[str, float | bool] = {}
    classifier = LogisticRegression(max_iter=max_iter, warm_start=True)
    for strength in STRENGTHS:
        classifier.set_params(C=strength)
        # One thread: on problems of this size a second one costs ten times what it gains.
        with threadpool_limits(1), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            classifier.fit(scaled["train"], labels["train"])
        accuracy = float(classifier.score(scaled["validation"], labels["validation"]))
        if not best or accuracy > best["validation_accuracy"]:
            best = {
                "validation_accuracy": accuracy,
                "test_accuracy": float(classifier.score(scaled["test"], labels["test"])),
                "regularisation": strength,
                "converged": not any(issubclass(warning.category, ConvergenceWarning) for warning in caught),
            }
    return best


def probe_model(
    model: ImageGPT,
    splits: Mapping[str, TokenSplit],
    *,
    precision: Precision = "fp32",
    name: str = "model",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Probes of all L + 1 layers: a row for each, and the best layer by validation accuracy (ties: the earlier)."""
    labels = {split: rows.labels for split, rows in splits.items()}
    done, total = 0, sum(map(len, splits.values()))
    features: dict[str, NDArray[np.float32]] = {}
    for split, rows in splits.items():
        features[split] = extract(model, rows, precision=precision)
        done += len(rows)
        if progress:
            progress(f"{name}: features", done, total)
    layers: list[dict[str, Any]] = []
    count = len(features["train"])
    for layer in range(count):
        row = fit_linear({split: array[layer] for split, array in features.items()}, labels)
        layers.append({"layer": layer, **row})
        if progress:
            progress(f"{name}: probes", layer + 1, count)
    best = max(layers, key=lambda row: row["validation_accuracy"])
    return {"layers": layers, "best_layer": best["layer"]}


def probe(
    model: ImageGPT,
    data: TokenDataset,
    *,
    limit: int | None = None,
    baselines: bool = True,
    precision: Precision = "fp32",
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Probes every layer of a model on a labelled data set: what `probe.json` holds.

    Args:
        limit: at most so many images of each split, drawn by seed.
        baselines: probe raw pixels, and an untrained model of the same shape, as well.
        precision: of the products that make the features.

    Raises:
        InputError: model and tokens do not match, labels are missing, or the splits' classes do not allow a probe.
    """
    require_match(model, data)
    if limit is not None and limit < 1:
        raise InputError(f"a limit is at least one image, not {limit}")
    if not 0 <= seed < 2**63:
        raise InputError(f"a seed lies in 0 .. 2^63 - 1, not {seed}")
    splits = {name: _drawn(data[name], limit, seed) for name in SPLITS}
    for rows in splits.values():
        rows.require_images("a probe")
        rows.require_labels("a probe")
    _check_classes(splits)
    result = probe_model(model, splits, precision=precision, progress=progress)
    compared: dict[str, Any] = {}
    if baselines:
        pixels = {name: _pixels(data, rows) for name, rows in splits.items()}
        if progress:
            progress("raw pixels", 0, 1)
        compared["raw_pixels"] = fit_linear(pixels, {name: rows.labels for name, rows in splits.items()})
        torch.manual_seed(seed)
        untrained = ImageGPT(model.config, model.palette).to(model.wte.weight.device)
        compared["untrained"] = probe_model(untrained, splits, precision=precision, name="untrained", progress=progress)
    return {
        "format": FORMAT,
        "version": VERSION,
        "tokens": str(data.path),
        "source": data.manifest["source"],
        "seed": seed,
        "precision": precision,
        "classes": len(data.class_names or ()),
        "images": {name: len(rows) for name, rows in splits.items()},
        **result,
        "baselines": compared,
        "environment": describe(),
    }


def _drawn(split: TokenSplit, limit: int | None, seed: int) -> TokenSplit:
    if limit is None or limit >= len(split):
        return split
    rows = np.sort(np.random.default_rng(seed).permutation(len(split))[:limit])
    return TokenSplit(split.name, [split.rows(rows)], [split.labels_of(rows)])


def _check_classes(splits: Mapping[str, TokenSplit]) -> None:
    known = set(splits["train"].labels.tolist())
    for name, rows in splits.items():
        strange = set(rows.labels.tolist()) - known
        if strange:
            raise InputError(
                f"{len(strange)} classes of the {name} images have no training image; a probe needs every class in "
                f"training (there are {len(splits['train'])} training images of {len(known)} classes)"
            )


def _pixels(data: TokenDataset, split: TokenSplit) -> NDArray[np.float32]:
    colors = data.palette.centers_[split.rows(np.arange(len(split)))]  # [N, n, 3]
    return colors.reshape(len(split), -1)


def best_row(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row of the best layer."""
    best: Mapping[str, Any] = result["layers"][result["best_layer"]]
    return best
