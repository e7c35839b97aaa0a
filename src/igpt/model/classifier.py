"""Classifiers: a class head over the mean of the final norm's output, and its predictions.

    model = ImageGPT.from_pretrained("RUN/model")  # written by `igpt finetune`
    predict(model, tokens, np.arange(len(tokens))).classes

transformers reads such a directory as ImageGPTForImageClassification, and gives the same logits for
the input [start, x1 .. x(n-1)]. Its attention is always causal, so that it cannot compute BERT
classifiers. N images, B of them at a time, n pixels, C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from igpt.allocator import keep_freed_memory
from igpt.data.images.palette import Palette
from igpt.errors import InputError
from igpt.model.cost import inference_batch_size
from igpt.model.objectives import Summed, pixel_losses
from igpt.model.transformer import ImageGPT

FORMAT, VERSION = "igpt-classify", 1  # of answers in JSON
MASKED = 0.15  # share of the pixels that is masked (paper, section 4.6)


def with_head(model: ImageGPT, class_names: tuple[str, ...], palette: Palette) -> ImageGPT:
    """Return the model in fp32 with a new class head, which starts at zero.

    Weights that are in fp32 already are shared.
    """
    config = model.config.model_copy(update={"class_names": class_names})
    weights = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}
    weights["score.weight"] = torch.zeros(len(class_names), config.n_embd)
    with torch.device("meta"):
        classifier = ImageGPT(config, palette)
    classifier.load_state_dict(weights, assign=True)
    return classifier


def class_logits(model: ImageGPT, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the logits of the classes: tokens [B, n] -> [B, C], in float32 or float64."""
    logits: Tensor = model.score(model.hidden(tokens, mask).mean(dim=1))
    return logits if logits.dtype == torch.float64 else logits.float()


def classification(
    model: ImageGPT,
    tokens: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    generation_weight: float = 1.0,
) -> Summed:
    """Return the summed fine-tuning loss, and the number of images.

    It is the class cross-entropy plus the weighted generative loss of the objective (paper, section
    2.3). The class head reads the mean over positions of the final norm's output. Labels are [B] in
    0 .. C-1. A BERT model has a generative loss only where pixels are masked.
    """
    objective = model.config.trained_as
    hidden = model.hidden(tokens, mask)  # [B, n, D]
    loss = F.cross_entropy(model.score(hidden.mean(dim=1)).float(), labels, reduction="sum")
    if generation_weight and objective.has_loss(mask is not None):
        losses = pixel_losses(model.lm_head(hidden), tokens)
        loss = loss + generation_weight * objective.image_losses(losses, mask).sum()
    return loss, len(tokens)


@dataclass(frozen=True)
class Predictions:
    """Predictions for N images.

    Attributes:
        classes: int64 [N].
        probabilities: float64 [N, C]; the mean over the masks if there are several.
        votes: the number of masks under which each class is the likeliest, int64 [N, C].
    """

    classes: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    votes: NDArray[np.int64]

    def ranked(self) -> NDArray[np.int64]:
        """Return all classes of every image: the predicted one, then by votes and probability."""
        predicted = np.arange(self.votes.shape[1]) == self.classes[:, None]
        order: NDArray[np.int64] = np.lexsort(
            (-self.probabilities, -self.votes, ~predicted), axis=1
        )
        return order


@torch.inference_mode()
def predict(
    model: ImageGPT,
    tokens: NDArray[np.uint16],
    rows: NDArray[np.int64],
    *,
    masks: int = 0,
    probability: float = MASKED,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Predict the classes of images, tokens [N, n].

    Args:
        rows: a number for every image, [N]; its masks and the resolution of ties depend only on
            this number and the seed.
        masks: number of masks per image; 0 masks nothing. With masks (BERT models), the prediction
            is the most frequent one (paper, section 4.6); ties are resolved at random.
        probability: of a pixel to be masked.
        progress: called with (images done, images in all).

    Raises:
        InputError: the model has no class head or broken weights, or its objective has no masks.
    """
    if model.config.class_names is None:
        raise InputError("the model has no class head; `igpt finetune` makes a classifier of it")
    if masks < 0 or not 0 <= seed < 2**63:
        raise InputError(
            f"masks are 0 or more and a seed lies in 0 .. 2^63 - 1, not {masks} and {seed}"
        )
    objective, device = model.config.trained_as, model.device
    if masks:
        objective.require("masked", "masking at test time")
    if device.type == "cpu":
        keep_freed_memory()
    model.eval()
    n_pixels, passes = model.config.n_pixels, max(masks, 1)
    probabilities = np.zeros((len(rows), len(model.config.class_names)))
    votes = np.zeros((len(rows), len(model.config.class_names)), np.int64)
    size = inference_batch_size(model.config)
    for first in range(0, len(rows), size):
        if progress:
            progress(first, len(rows))
        some = slice(first, first + size)
        images = torch.from_numpy(tokens[some].astype(np.int64)).to(device)
        for number in range(passes):
            mask = None
            if masks:
                sampled = objective.masks_of_rows(rows[some], n_pixels, probability, (seed, number))
                mask = torch.from_numpy(sampled).to(device)
            logits = class_logits(model, images, mask)
            if not logits.isfinite().all():
                raise InputError("the class logits are not finite; the model's weights are broken")
            probabilities[some] += logits.double().softmax(dim=1).cpu().numpy() / passes
            votes[np.arange(len(rows))[some], logits.argmax(dim=1).cpu().numpy()] += 1
    return Predictions(modal(votes, rows, (seed, masks)), probabilities, votes)


def modal(
    votes: NDArray[np.int64], rows: NDArray[np.int64], seed: tuple[int, ...]
) -> NDArray[np.int64]:
    """Return the class with the most votes for every image: votes [N, C] -> [N].

    Ties are resolved at random, by the seed and the image's number in `rows` [N].
    """
    predicted: NDArray[np.int64] = votes.argmax(axis=1)
    tied = votes == votes.max(axis=1, keepdims=True)
    for image in np.flatnonzero(tied.sum(axis=1) > 1).tolist():
        generator = np.random.default_rng((*seed, int(rows[image])))
        predicted[image] = generator.choice(np.flatnonzero(tied[image]))
    return predicted
