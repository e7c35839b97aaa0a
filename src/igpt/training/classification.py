"""The classifier that is fine-tuned, its batches, its validation error and its test.

B images of a batch, n pixels. A mask probability of 0 masks nothing.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from igpt.data.tokens.batches import Batch, Batches, to_device
from igpt.data.tokens.dataset import TokenDataset, TokenSplit
from igpt.model.classifier import class_logits, predict, with_head
from igpt.model.conditions import with_conditions
from igpt.model.directory import weights_sha256
from igpt.model.objectives import Objective, Summed
from igpt.model.resolution import at_resolution
from igpt.model.transformer import ImageGPT
from igpt.statistics import MOST_CONFUSED, accuracy_of, confusion, packed
from igpt.training.distributed import World
from igpt.training.pretrained import pretrained_model

_MODAL_MASKS = 5


def new_classifier(path: Path, data: TokenDataset, *, generates: bool) -> tuple[ImageGPT, str]:
    """Load pretrained weights at the resolution of the data, and add a class head of zeros.

    A class-conditional model loses the start tokens of its classes: the classifier sees no labels.

    Args:
        generates: whether the loss uses the generative head, which is otherwise not trained.

    Returns:
        the model, and the checksum of the pretrained weights.
    """
    pretrained = pretrained_model(path, data)
    checksum = weights_sha256(pretrained.state_dict())
    plain = with_conditions(at_resolution(pretrained, data.resolution), None)
    model = with_head(plain, tuple(data.class_names or ()), data.palette)
    model.lm_head.requires_grad_(generates)
    return model, checksum


def training_batch(
    objective: Objective, batches: Batches, mask_probability: float, seed: int, step: int
) -> Batch:
    """Return the tokens [B, n] and labels [B] of a step, and masks [B, n] if pixels are masked."""
    tokens, labels = batches.tokens(step), batches.labels(step)
    if not mask_probability:
        return tokens, labels
    generator = np.random.default_rng((seed, step, 2))
    mask = objective.mask((len(tokens), tokens.shape[1]), mask_probability, generator)
    assert mask is not None, "only models of masked pixels have a mask probability"
    return tokens, labels, to_device(mask, batches.device)


def validation_batch(split: TokenSplit, world: World, first: int, last: int) -> Batch:
    """Return the tokens and labels of images `first` to `last - 1` of a split."""
    rows = np.arange(first, last)
    arrays = split.rows(rows), split.labels_of(rows)
    return tuple(to_device(array.astype(np.int64), world.device) for array in arrays)


def errors(model: ImageGPT, tokens: Tensor, labels: Tensor) -> Summed:
    """Return the number of wrong predictions on whole images; NaN if logits are not finite."""
    logits = class_logits(model, tokens)
    wrong = (logits.argmax(dim=1) != labels).sum().double()
    return torch.where(logits.isfinite().all(), wrong, torch.nan), len(tokens)


def accuracies(
    path: Path,
    test: TokenSplit,
    world: World,
    mask_probability: float,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Return the test accuracy; with masks, also of the modal prediction (paper, section 4.6).

    Args:
        progress: called with a title, the number of images done, and their number.
    """
    model = ImageGPT.from_pretrained(path).to(world.device)
    rows = np.array_split(np.arange(len(test)), world.size)[world.rank]

    def predicted(title: str, **masking: Any) -> NDArray[np.int32]:
        answers = torch.zeros(len(test), dtype=torch.int32, device=world.device)
        shown = partial(progress, title)
        found = predict(model, test.rows(rows), rows, **masking, progress=shown)
        answers[torch.from_numpy(rows)] = torch.from_numpy(found.classes).to(answers)
        every: NDArray[np.int32] = world.all_reduce_sum(answers).cpu().numpy()
        return every

    classes, labels = predicted("testing"), test.labels
    whole = classes == labels
    result: dict[str, Any] = {f"test_{key}": value for key, value in accuracy_of(whole).items()}
    result["test_right"] = packed(whole)
    names = model.config.class_names or ()
    if len(names) <= MOST_CONFUSED:
        result["class_names"] = list(names)
        result["confusion"] = confusion(labels, classes, len(names))
    if mask_probability:
        masking = {"masks": _MODAL_MASKS, "probability": mask_probability, "seed": seed}
        result["modal"] = {
            **masking,
            **accuracy_of(predicted("testing with masks", **masking) == labels),
        }
    return result
