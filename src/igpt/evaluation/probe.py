"""Linear probes: the accuracy of a linear classifier on the features of each layer.

N images, C classes, D features, S settings of the solver.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from igpt.config import Config
from igpt.data.tokens.dataset import TokenDataset, TokenSplit
from igpt.data.tokens.labels import require_classes, subset_per_class
from igpt.data.tokens.manifest import MANIFEST, SPLITS
from igpt.environment import describe
from igpt.errors import InputError
from igpt.evaluation.features import (
    ConcatenatedColumns,
    ConcatenatedRows,
    Masking,
    Pixels,
    Rows,
    stored,
)
from igpt.evaluation.likelihood import losses_by_class
from igpt.evaluation.logistic_regression import STRENGTHS, Classifiers, fit_lbfgs, fit_sgd
from igpt.evaluation.neighbours import classify_by_neighbours, require_neighbours
from igpt.evaluation.probe_classifier import ProbeClassifier
from igpt.evaluation.results import PROBE, PROBE_VERSION
from igpt.files import atomic_file, sha256_of, sync, write_json
from igpt.locks import exclusive_folder
from igpt.model.classifier import modal
from igpt.model.match import require_match
from igpt.model.precision import Precision, resolve_precision
from igpt.model.transformer import ImageGPT
from igpt.statistics import MOST_CONFUSED, confusion, interval_of_share, packed

Progress = Callable[[str, int, int], None]  # (what, done, in all)
Strength = Annotated[float, Field(ge=1e-12, le=1e12)]
Rate = Annotated[float, Field(ge=1e-12, le=1e4)]
Count = Annotated[int, Field(ge=1, le=2**53)]
_MOST = 64  # values of a setting with several: memory is proportional to their number


class ProbeConfig(Config):
    """Settings of a probe."""

    layers: tuple[int, ...] = Field((), description="layers to probe; all by default")
    concatenate: tuple[int, ...] = Field(
        (), description="also probe the concatenated features of these layers"
    )
    labels_per_class: tuple[Count, ...] = Field(
        (),
        max_length=_MOST,
        description="numbers of labels per class: also probe the best layer with each of them",
    )
    subsets: int = Field(
        5, ge=2, le=1000, description="random subsets for each number of labels per class"
    )
    solver: Literal["lbfgs", "sgd"] = Field(
        "lbfgs", description="sgd if the features do not fit into memory"
    )
    strengths: tuple[Strength, ...] = Field(
        STRENGTHS,
        min_length=1,
        max_length=_MOST,
        description="inverse regularization strengths (scikit-learn's C) to select from (lbfgs)",
    )
    learning_rates: tuple[Rate, ...] = Field(
        (30.0, 10.0, 3.0, 1.0, 0.3),
        min_length=1,
        max_length=_MOST,
        description="learning rates to select from (sgd)",
    )
    steps: int = Field(1_000_000, ge=1, le=10**9, description="steps of sgd")
    batch_size: int = Field(128, ge=1, le=16_384, description="batch size of sgd")
    fold_back: bool = Field(
        True, description="refit with the selected setting on training and validation images"
    )
    knn: Count | None = Field(
        None,
        description="also classify by this many nearest neighbours, by cosine similarity; 20 is "
        "usual",
    )
    by_likelihood: bool = Field(
        False,
        description="class-conditional models: also classify the test images by their likelihood "
        "given each class",
    )
    masks: int = Field(
        0,
        ge=0,
        le=100,
        description="BERT models: mask the input, and use the most frequent prediction over this "
        "many masks",
    )
    limit: Count | None = Field(
        None, description="maximum number of images per split, a random subset"
    )
    test_images: Count | None = Field(
        None, description="maximum number of test images; overrides --limit for the test split"
    )
    baselines: bool = Field(
        True, description="also probe raw pixels and an untrained model of the same shape"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "fp32",
        description="precision of matrix products when computing features; auto: bf16 if the "
        "processor has instructions for it",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="seed of all random choices: images, masks, the untrained model, batches of "
        "sgd",
    )


@dataclass(frozen=True)
class Images:
    """The images of a split, as a probe uses them.

    Attributes:
        features: of every layer, under every mask: m lists of L + 1 arrays [N, D].
        labels: 0 .. C - 1, [N].
        rows: their numbers in the split, by which ties between masks are broken.
    """

    features: Sequence[Sequence[Rows]]
    labels: NDArray[np.int64]
    rows: NDArray[np.int64]

    def of(self, layers: Sequence[int]) -> "Images":
        """Return the images with the features of some layers only, concatenated."""
        if len(layers) == 1:
            return replace(self, features=[[masked[layers[0]]] for masked in self.features])
        chosen = [
            [ConcatenatedColumns([masked[layer] for layer in layers])] for masked in self.features
        ]
        return replace(self, features=chosen)


def probe(
    model: ImageGPT,
    data: TokenDataset,
    config: ProbeConfig,
    features: Path,
    *,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], ProbeClassifier]:
    """Probe the layers of a model on a labelled data set.

    Args:
        features: folder that the features are written to; those that it holds already are not made
            again.

    Returns:
        what `probe.json` holds, and the best layer's classifier; see `write_probe`.

    Raises:
        InputError: model and tokens do not match, labels are missing, the splits' classes do not
            allow a probe, there is no such layer, the features are not finite, or another process
            works in `features`.
    """
    require_match(model, data)
    depth = model.config.n_layer
    layers = config.layers or tuple(range(depth + 1))
    for layer in (*layers, *config.concatenate):
        if not 0 <= layer <= depth:
            raise InputError(
                f"there is no layer {layer}; the layers are 0 to {depth}, and layer {depth} is the "
                "output of the final norm"
            )
    if len(config.concatenate) == 1 or any(
        len(set(named)) < len(named) for named in (layers, config.concatenate)
    ):
        raise InputError(
            "--layers and --concatenate must not repeat a layer; --concatenate needs at least two"
        )
    if config.masks:
        model.config.trained_as.require("masked", "masking at test time")
    limits: dict[str, int | None] = dict.fromkeys(SPLITS, config.limit)
    limits["test"] = config.test_images or config.limit
    sampled = {name: subset_images(data[name], limits[name], config.seed) for name in SPLITS}
    splits = {name: split for name, (split, _) in sampled.items()}
    require_classes(splits, len(data.class_names or ()), "a probe")
    if config.by_likelihood:
        for name in data.class_names or ():
            model.config.label_of(name)
    if config.knn:  # raise for invalid settings before the work
        require_neighbours(config.knn, len(sampled["train"][0]), "--knn")
    if config.labels_per_class:
        subset_per_class(sampled["train"][0].labels, max(config.labels_per_class), (config.seed,))
    if (features / "model" / "config.json").exists():
        raise InputError(f"{features} is a run; name a folder of its own for the features")
    if features.exists() and not features.is_dir():
        raise InputError(f"{features} is a file; name a folder for the features")
    with exclusive_folder(features):
        return _probe(model, data, config, features, layers, sampled, limits, progress)


def _probe(
    model: ImageGPT,
    data: TokenDataset,
    config: ProbeConfig,
    features: Path,
    layers: Sequence[int],
    sampled: Mapping[str, tuple[TokenSplit, NDArray[np.int64]]],
    limits: Mapping[str, int | None],
    progress: Progress | None,
) -> tuple[dict[str, Any], ProbeClassifier]:
    """Probe sampled images; everything has been checked."""
    report = progress or (lambda what, done, total: None)
    precision = resolve_precision(config.precision, model.device)
    config = config.model_copy(update={"precision": precision})
    known = np.unique(sampled["train"][0].labels)
    checksum = sha256_of(data.path / MANIFEST)
    descriptions = {
        name: {"tokens_sha256": checksum, "drawn": limit and [limit, config.seed], "split": name}
        for name, limit in limits.items()
    }
    images = _images(
        model,
        sampled,
        known,
        config,
        precision,
        features / "model",
        descriptions,
        partial(report, "features"),
    )
    device = model.device
    fit = partial(fit_and_test, config=config, device=device)
    result, best = _probe_layers(fit, images, layers, partial(report, "probes"))
    class_names = tuple((data.class_names or [])[number] for number in known)
    classifier = ProbeClassifier.of(best, result["best_layer"], class_names)
    if len(class_names) <= MOST_CONFUSED:
        test = images["test"].of([result["best_layer"]])
        found = _predicted(best, test, config.seed)[0]
        result["class_names"] = list(class_names)
        result["confusion"] = confusion(test.labels, found, len(class_names))
    if config.concatenate:
        report("concatenated layers", 0, 1)
        row, _ = fit({name: split.of(config.concatenate) for name, split in images.items()})
        result["concatenated"] = {"layers": list(config.concatenate), **row}
    if config.labels_per_class:
        layer = result["best_layer"]
        chosen = {name: split.of([layer]) for name, split in images.items()}
        result["few_labels"] = []
        for number, count in enumerate(config.labels_per_class):
            report("few labels", number, len(config.labels_per_class))
            row = few_labels(chosen, count, config, device)
            result["few_labels"].append({"per_class": count, "layer": layer, **row})
    if config.by_likelihood:
        test_split, labels = sampled["test"][0], images["test"].labels
        losses = losses_by_class(
            model,
            test_split,
            class_names,
            precision=precision,
            progress=partial(report, "likelihoods"),
        )
        answers = losses.argmin(axis=1) == labels
        result["by_likelihood"] = _test_row(answers)
    compared: dict[str, Any] = {}
    if config.baselines:
        report("raw pixels", 0, 1)
        positions = model.config.n_pixels
        pixels = {
            name: replace(images[name], features=[[Pixels(split, data.palette, positions)]])
            for name, (split, _) in sampled.items()
        }
        compared["raw_pixels"], _ = fit(pixels)
        if config.labels_per_class:
            compared["raw_pixels"]["few_labels"] = [
                {"per_class": count, **few_labels(pixels, count, config, device)}
                for count in config.labels_per_class
            ]
        torch.manual_seed(config.seed)
        untrained = ImageGPT(model.config, model.palette).to(device)
        folder = features / f"untrained-{config.seed}"
        untrained_images = _images(
            untrained,
            sampled,
            known,
            config,
            precision,
            folder,
            descriptions,
            partial(report, "untrained: features"),
        )
        compared["untrained"], _ = _probe_layers(
            fit, untrained_images, layers, partial(report, "untrained: probes")
        )
    content = {
        "format": PROBE,
        "version": PROBE_VERSION,
        "tokens": str(data.path),
        "source": data.manifest["source"],
        "config": config.model_dump(mode="json"),
        "seed": config.seed,
        "classes": len(known),
        "images": {name: len(split.labels) for name, split in images.items()},
        **result,
        "baselines": compared,
        "environment": describe(),
    }
    return content, classifier


def write_probe(path: Path, result: Mapping[str, Any], classifier: ProbeClassifier) -> None:
    """Write a `probe.json`, and its classifier to a `.safetensors` file of the same name.

    `probe.json` stores the fingerprint of the classifier and is replaced first; if the process is
    killed before the classifier is replaced, `ProbeClassifier.of_probe` finds that they differ.
    """
    with atomic_file(path.with_suffix(".safetensors")) as temporary:
        temporary.write_bytes(classifier.to_bytes())
        sync(temporary)  # a full disk is detected before anything is replaced
        write_json(path, {**result, "classifier": classifier.fingerprint})


def subset_images(
    split: TokenSplit, limit: int | None, seed: int
) -> tuple[TokenSplit, NDArray[np.int64]]:
    """Return at most `limit` images of a split, and their rows."""
    rows = np.arange(len(split))
    if limit is None or limit >= len(split):
        return split, rows
    rows = np.sort(np.random.default_rng(seed).permutation(len(split))[:limit])
    return split.subset(rows), rows


def _images(
    model: ImageGPT,
    sampled: Mapping[str, tuple[TokenSplit, NDArray[np.int64]]],
    known: NDArray[np.int32],
    config: ProbeConfig,
    precision: Precision,
    folder: Path,
    descriptions: Mapping[str, Mapping[str, Any]],
    progress: Callable[[int, int], None],
) -> dict[str, Images]:
    """Return the features of all splits; with masks, `config.masks` per test image."""
    images, before = {}, 0
    masks = {name: 1 if name == "train" else max(1, config.masks) for name in sampled}
    total = sum(len(split) * masks[name] for name, (split, _) in sampled.items())
    for name, (split, rows) in sampled.items():
        features = []
        for mask in range(masks[name]):
            masking = Masking(mask, seed=config.seed) if config.masks else None
            target = folder / (f"{name}-mask-{mask}" if masking else name)
            features.append(
                stored(
                    model,
                    split,
                    target,
                    of=descriptions[name],
                    masking=masking,
                    precision=precision,
                    progress=partial(_progress_after, progress, before, total),
                )
            )
            before += len(split)
        images[name] = Images(features, np.searchsorted(known, split.labels), rows)
    return images


def _progress_after(
    progress: Callable[[int, int], None], before: int, total: int, done: int, _: int
) -> None:
    progress(before + done, total)


def _probe_layers(
    fit: Callable[[Mapping[str, Images]], tuple[dict[str, Any], Classifiers]],
    images: Mapping[str, Images],
    layers: Sequence[int],
    progress: Callable[[int, int], None],
) -> tuple[dict[str, Any], Classifiers]:
    """Return a row per layer, the index of the best by validation accuracy, its classifier."""
    rows, fitted = [], []
    progress(0, len(layers))
    for number, layer in enumerate(layers):
        row, classifier = fit({name: split.of([layer]) for name, split in images.items()})
        rows.append({"layer": layer, **row})
        fitted.append(classifier)
        progress(number + 1, len(layers))
    best = max(range(len(rows)), key=lambda number: rows[number]["validation_accuracy"])
    return {"layers": rows, "best_layer": rows[best]["layer"]}, fitted[best]


def fit_and_test(
    images: Mapping[str, Images], *, config: ProbeConfig, device: torch.device
) -> tuple[dict[str, Any], Classifiers]:
    """Fit on training images, and select the setting by validation accuracy; test the classifier.

    With `fold_back`, the classifier is first refit on training and validation images.

    Returns:
        a row of `probe.json`, and the classifier that was tested.
    """
    train, validation, test = (images[name] for name in SPLITS)
    name, settings = "regularisation", config.strengths
    solve: Callable[..., Classifiers] = fit_lbfgs
    if config.solver == "sgd":
        name, settings = "learning_rate", config.learning_rates
        solve = partial(fit_sgd, steps=config.steps, batch_size=config.batch_size, seed=config.seed)
    fitted = solve(train.features[0][0], train.labels, settings, device=device)
    correct = (_predicted(fitted, validation, config.seed) == validation.labels).sum(axis=1)
    best = int(correct.argmax())
    final, index, converged = fitted, best, fitted.converged[best]
    if config.fold_back:
        both = ConcatenatedRows(train.features[0][0], validation.features[0][0])
        labels = np.concatenate([train.labels, validation.labels])
        final, index = solve(both, labels, settings[best : best + 1], device=device), 0
        converged = converged and final.converged[0]
    answers = (_predicted(final, test, config.seed) == test.labels)[index]
    row = {
        "validation_accuracy": int(correct[best]) / len(validation.labels),
        **_test_row(answers),
        name: settings[best],
        "converged": converged,
        "iterations": fitted.iterations[best],
    }
    if config.knn:
        row["knn"] = _test_neighbours(images, config.knn, config, device)
    return row, final.only(index)


def _test_neighbours(
    images: Mapping[str, Images], k: int, config: ProbeConfig, device: torch.device
) -> dict[str, Any]:
    """Return the accuracies of classification by k nearest neighbours.

    Neighbours of validation images are training images; those of test images are, with
    `fold_back`, also validation images.
    """
    train, validation, test = (images[name] for name in SPLITS)
    classes = int(train.labels.max()) + 1

    def answered(known: Rows, labels: NDArray[np.int64], asked: Images) -> NDArray[np.bool_]:
        predicted = [
            classify_by_neighbours(known, labels, masked[0], k, device=device)[None]
            for masked in asked.features
        ]
        answers = _most_frequent(np.stack(predicted), classes, asked, config.seed)[0]
        correct: NDArray[np.bool_] = answers == asked.labels
        return correct

    known, labels = train.features[0][0], train.labels
    validated = answered(known, labels, validation)
    if config.fold_back:
        known = ConcatenatedRows(known, validation.features[0][0])
        labels = np.concatenate([labels, validation.labels])
    return {
        "k": k,
        "validation_accuracy": int(validated.sum()) / len(validation.labels),
        **_test_row(answered(known, labels, test)),
    }


def _test_row(right: NDArray[np.bool_]) -> dict[str, Any]:
    """Return a test accuracy with its interval and the answers that are right, [N]."""
    hits, count = int(right.sum()), len(right)
    return {
        "test_accuracy": hits / count,
        "test_interval_95": list(interval_of_share(hits, count)),
        "test_right": packed(right),
    }


def _predicted(classifiers: Classifiers, images: Images, seed: int) -> NDArray[np.int64]:
    """Return the class that each classifier predicts for each image, [S, N], over all masks."""
    predicted = np.stack([classifiers.predict(masked[0]) for masked in images.features])
    return _most_frequent(predicted, classifiers.coef.shape[1], images, seed)


def _most_frequent(
    predicted: NDArray[np.int64], count: int, images: Images, seed: int
) -> NDArray[np.int64]:
    """Return the most frequent predictions under m masks: [m, S, N] -> [S, N].

    Args:
        count: number of classes.
    """
    answers: NDArray[np.int64] = predicted[0]
    if len(predicted) > 1:
        classes = np.arange(count)
        # S of [N, C]
        votes = ((each[..., None] == classes).sum(axis=0) for each in predicted.swapaxes(0, 1))
        answers = np.stack([modal(each, images.rows, (seed, len(predicted))) for each in votes])
    return answers


def few_labels(
    images: Mapping[str, Images], per_class: int, config: ProbeConfig, device: torch.device
) -> dict[str, Any]:
    """Return the accuracy with few labels per class: mean and deviation over subsets.

    The strength is the one with the best mean validation accuracy; nothing is folded back.

    Raises:
        InputError: a class has fewer training images.
    """
    train, test = images["train"], images["test"]
    correct: dict[str, list[NDArray[np.int64]]] = {"validation": [], "test": []}
    converged = []
    for subset in range(config.subsets):
        rows = subset_per_class(train.labels, per_class, (config.seed, per_class, subset))
        fitted = fit_lbfgs(
            train.features[0][0][rows], train.labels[rows], config.strengths, device=device
        )
        for name, counts in correct.items():
            right = _predicted(fitted, images[name], config.seed) == images[name].labels
            counts.append(right.sum(axis=1))
        converged.append(fitted.converged)
    best = int(np.sum(correct["validation"], axis=0).argmax())
    accuracies = np.array([counts[best] for counts in correct["test"]]) / len(test.labels)
    return {
        "regularisation": config.strengths[best],
        "converged": all(each[best] for each in converged),
        "test_accuracies": accuracies.tolist(),
        "mean": float(accuracies.mean()),
        "standard_deviation": float(accuracies.std(ddof=1)),
    }
