"""Classifiers: a class head over the mean of the final norm's output, and what it says of images.

    model = ImageGPT.from_pretrained("RUN/model")  # what `igpt finetune` wrote
    predict(model, tokens, np.arange(len(tokens))).classes

transformers reads such a directory as ImageGPTForImageClassification, and agrees when it is fed
[start, x1 .. x(n-1)]; its attention is always causal, so that it cannot compute a BERT classifier.
N images, B of them at a time, n places, C classes.
"""

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
MASKED = 0.15  # share of the places that is masked (paper, section 4.6)


def with_head(model: ImageGPT, class_names: tuple[str, ...], palette: Palette) -> ImageGPT:
    """The model in fp32 with a class head that starts at zero, in place of one that it may have.

    Weights that are fp32 already are shared.
    """
    config = model.config.model_copy(update={"class_names": class_names})
    weights = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}
    weights["score.weight"] = torch.zeros(len(class_names), config.n_embd)
    with torch.device("meta"):
        classifier = ImageGPT(config, palette)
    classifier.load_state_dict(weights, assign=True)
    return classifier


def class_logits(model: ImageGPT, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of the classes: tokens [B, n] -> float32 [B, C] (float64 stays); `mask` as in `ImageGPT.hidden`."""
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
    """Return the fine-tuning loss: class cross-entropy plus weighted generative loss, and the number of images.

    The class head reads the mean over positions of the final norm's output (paper, section 2.3).
    Labels are [B] in 0 .. C-1. The generative loss is the objective's; a BERT model has one only
    where pixels are masked.
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
    """What a classifier says of N images.

    Attributes:
        classes: the predicted ones, int64 [N].
        probabilities: float64 [N, C]; under several masks, their mean.
        votes: under how many masks each class is the likeliest, int64 [N, C].
    """

    classes: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    votes: NDArray[np.int64]

    def ranked(self) -> NDArray[np.int64]:
        """The classes of every image, [N, C]: the predicted one, then by votes, then by probability."""
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
) -> Predictions:
    """Classes of images [N, n].

    Args:
        rows: a number for every image, [N]. Its masks and its draws depend on that and the seed
            alone.
        masks: 0 masks nothing. Of a BERT model, the modal prediction over so many masks (paper,
            section 4.6); equally frequent classes are drawn from.
        probability: of a place to be masked.

    Raises:
        InputError: the model has no class head or broken weights, or it is autoregressive and masks
            are asked for.
    """
    if model.config.class_names is None:
        raise InputError("the model has no class head; `igpt finetune` makes a classifier of it")
    if masks < 0 or not 0 <= seed < 2**63:
        raise InputError(
            f"masks are 0 or more and a seed lies in 0 .. 2^63 - 1, not {masks} and {seed}"
        )
    objective = model.config.trained_as
    if masks:
        objective.require("masked", "masking at test time")
    model.eval()
    device, places, classes = (
        model.device,
        model.config.n_pixels,
        len(model.config.class_names),
    )
    probabilities = np.zeros((len(rows), classes))
    votes = np.zeros((len(rows), classes), np.int64)
    if device.type == "cpu":
        keep_freed_memory()
    size = inference_batch_size(model.config)
    for first in range(0, len(rows), size):
        some = slice(first, first + size)
        images = torch.from_numpy(tokens[some].astype(np.int64)).to(device)
        for draw in range(max(masks, 1)):
            drawn = (
                objective.masks_of_rows(rows[some], places, probability, (seed, draw))
                if masks
                else None
            )
            logits = class_logits(
                model, images, None if drawn is None else torch.from_numpy(drawn).to(device)
            )
            if not logits.isfinite().all():
                raise InputError("the class logits are not finite; the model's weights are broken")
            probabilities[some] += logits.double().softmax(dim=1).cpu().numpy() / max(masks, 1)
            votes[np.arange(len(rows))[some], logits.argmax(dim=1).cpu().numpy()] += 1
    return Predictions(modal(votes, rows, (seed, masks)), probabilities, votes)


def modal(
    votes: NDArray[np.int64], rows: NDArray[np.int64], seed: tuple[int, ...]
) -> NDArray[np.int64]:
    """The class with the most votes of every image [N]: votes [N, C].

    Equally frequent ones are drawn from, by the seed and the number that `rows` [N] gives the
    image.
    """
    predicted: NDArray[np.int64] = votes.argmax(axis=1)
    tied = votes == votes.max(axis=1, keepdims=True)
    for image in np.flatnonzero(tied.sum(axis=1) > 1).tolist():
        generator = np.random.default_rng((*seed, int(rows[image])))
        predicted[image] = generator.choice(np.flatnonzero(tied[image]))
    return predicted
