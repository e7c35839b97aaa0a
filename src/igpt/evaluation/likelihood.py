"""The likelihood of images under a model, in nats/pixel.

N images, B images of a batch, n pixels of an image, C classes.
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from igpt.allocator import keep_freed_memory
from igpt.data.image_set import ImageSet, ReadImages
from igpt.data.tokens.dataset import TokenSplit
from igpt.errors import InputError
from igpt.files import atomic_file
from igpt.model.cost import batches_of, inference_batch_size
from igpt.model.objectives import pixel_losses
from igpt.model.precision import Precision, autocast
from igpt.model.transformer import ImageGPT
from igpt.statistics import auroc, mean_of

Progress = Callable[[int, int], None]  # (images done, images in all)


@torch.inference_mode()
def losses_of(
    model: ImageGPT,
    tokens: NDArray[np.uint16],
    *,
    label: int = -1,
    precision: Precision = "fp32",
) -> NDArray[np.float64]:
    """Return the negative log-likelihood of every pixel: tokens [B, n] -> nats [B, n].

    Args:
        label: the class that is given, for a class-conditional model; -1 for none.

    Raises:
        InputError: a BERT model, which has no likelihood of whole images, or broken weights.
    """
    model.config.trained_as.require("has_likelihood", "a likelihood")
    model.eval()
    device = model.device
    batch = torch.from_numpy(tokens.astype(np.int64)).to(device)
    with autocast(precision, device):
        labels = None if label < 0 else torch.full((len(batch),), label, device=device)
        found = pixel_losses(model(batch, labels=labels), batch)
    losses: NDArray[np.float64] = found.double().cpu().numpy()
    if not np.isfinite(losses).all():
        raise InputError("likelihoods are not finite; the model's weights are broken")
    return losses


def score(
    model: ImageGPT,
    split: TokenSplit,
    *,
    precision: Precision = "fp32",
    batch_size: int | None = None,
    positions: NDArray[np.int64] | None = None,
    label: int = -1,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """Return the negative log-likelihood of every image: nats/pixel, float64 [N].

    Args:
        positions: of the images in their selection, which decide on the batches (see `batches_of`);
            by default there is an image at each.
        label: see `losses_of`.

    Raises:
        InputError: see `losses_of`; or there is no image.
    """
    split.require_images("a likelihood")
    losses = np.empty(len(split))
    if model.device.type == "cpu":
        keep_freed_memory()
    size = batch_size or inference_batch_size(model.config)
    if progress:
        progress(0, len(split))
    for rows in batches_of(np.arange(len(split)) if positions is None else positions, size):
        found = losses_of(model, split.rows(rows), label=label, precision=precision)
        losses[rows] = found.mean(axis=1)
        if progress:
            progress(int(rows[-1]) + 1, len(split))
    return losses


def losses_of_images(
    model: ImageGPT,
    images: ReadImages,
    progress: Progress | None,
    *,
    precision: Precision = "fp32",
) -> Iterator[NDArray[np.float64]]:
    """Yield the negative log-likelihood of all images, see `score`: nats/pixel, float64 [N]."""
    yield score(
        model,
        images.tokens,
        precision=precision,
        positions=images.positions,
        progress=progress,
    )


def losses_by_class(
    model: ImageGPT,
    split: TokenSplit,
    classes: Sequence[str],
    *,
    precision: Precision = "fp32",
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """Return the negative log-likelihood of every image given each class: nats/pixel [N, C].

    If all classes are as frequent, the class with the least is the most probable one, by Bayes'
    rule.

    Args:
        classes: names of classes of a class-conditional model.
        progress: called with the number of classes done and in all.

    Raises:
        InputError: the model has no such class, or see `score`.
    """
    labels = [model.config.label_of(name) for name in classes]
    columns = []
    for number, label in enumerate(labels):
        if progress:
            progress(number, len(labels))
        columns.append(score(model, split, label=label, precision=precision))
    return np.stack(columns, axis=1)


def summary(losses: NDArray[np.float64]) -> dict[str, Any]:
    """Return the mean nats/pixel, its standard error and 95 % interval, and bits/pixel."""
    found = mean_of(losses)
    return {
        "images": found["count"],
        "nats_per_pixel": found["mean"],
        "standard_error": found["standard_error"],
        "interval_95": found["interval_95"],
        "bits_per_pixel": found["mean"] / float(np.log(2)),
    }


def separation_by_loss(losses: NDArray[np.float64], others: NDArray[np.float64]) -> dict[str, Any]:
    """Return the AUROC of separating other images by their higher nats/pixel: see `auroc`.

    Raises:
        InputError: fewer than two images of either.
    """
    if min(len(losses), len(others)) < 2:
        raise InputError(
            f"separating two sets needs two or more images of each, not {len(losses)} and "
            f"{len(others)}"
        )
    return auroc(losses, others)


def require_table(path: Path) -> None:
    """Raise if scores cannot be written to a file of this name.

    Raises:
        InputError: the suffix is neither .csv nor .jsonl.
    """
    if path.suffix not in (".csv", ".jsonl"):
        raise InputError(f"scores are written to a .csv or .jsonl file, not to {path.name}")


def write_scores(path: Path, images: ImageSet, losses: NDArray[np.float64]) -> None:
    """Write one line per image, atomically, as CSV or JSON lines, chosen by the suffix.

    Fields are the row in the split (`index`), the name (`image`), `nats_per_pixel`, and where the
    source has classes the number (`label`) and name (`class`) of the image's, empty or null of an
    image without.
    """
    labels = images.tokens.labels.tolist()
    fields = [
        "index",
        "image",
        "nats_per_pixel",
        *(["label", "class"] if images.class_names else []),
    ]
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, fields, lineterminator="\n")
        if path.suffix == ".csv":
            table.writeheader()
        for position, (row, loss, label) in enumerate(
            zip(images.rows.tolist(), losses, labels, strict=True)
        ):
            record = {
                "index": row,
                "image": images.name_of(position),
                "nats_per_pixel": round(float(loss), 6),
            }
            if images.class_names:
                record |= {"label": None if label < 0 else label, "class": images.class_of(label)}
            if path.suffix == ".csv":
                table.writerow(record)
            else:
                file.write(json.dumps(record) + "\n")
