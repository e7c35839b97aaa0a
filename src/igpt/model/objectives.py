"""Objectives: what a model is trained to predict, and everything that depends on it.

`OBJECTIVES` has them by the name that flags, settings and `config.json` use. A new objective is a
subclass of `Objective` and one call of `register`. Importing this module does not import torch, so
that reports can use it quickly. B batch, n pixels of an image, V colours, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidatorFunctionWrapHandler, WrapValidator

from igpt.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Summed = tuple["Tensor", int]  # a loss summed over images, and the number of images


class Model(Protocol):
    """The part of `ImageGPT` that objectives use."""

    config: Any
    wte: Any

    def __call__(
        self, tokens: Tensor, mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return the logits of the colour of every pixel: [B, n] -> [B, n, V]."""


class Objective(ABC):
    """An objective: the model's input, its masks, its loss and its sampler.

    Attributes:
        name: in flags and files.
        title: adjective for reports.
        predicts: what is predicted from what, for reports.
        unit: of the loss.
        causal: whether a position attends only to itself and the positions before it.
        masked: whether some pixels of the input are masked; otherwise there are no masks.
        has_start_token: whether the first position's input is the start token, so that a class can
            have its own in place of it.
        has_likelihood: whether the model defines the likelihood of whole images, so that they can
            be scored, and sampled without a prefix.
        sampler: "module:function" that generates unknown pixels; see `igpt.sampling.sampler`.
    """

    name: str
    title: str
    predicts: str
    unit: str = "nats/pixel"
    causal: bool
    masked: bool = False
    has_start_token: bool = False
    has_likelihood: bool = False
    sampler: str

    @abstractmethod
    def embed(self, model: Model, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Return the input embeddings, without positions: tokens [B, T] -> [B, T, D]."""

    def mask(
        self, shape: tuple[int, int], probability: float, generator: np.random.Generator
    ) -> NDArray[np.bool_] | None:
        """Return masks [B, n], True where a pixel is to be predicted; None if not `masked`."""
        return None

    def masks_of_rows(
        self, rows: NDArray[np.int64], n_pixels: int, probability: float, seed: tuple[int, ...]
    ) -> NDArray[np.bool_]:
        """Return masks [B, n] that depend only on the seed and an image's row: rows [B]."""
        generators = [np.random.default_rng((*seed, row)) for row in rows.tolist()]
        masks = [self.mask((1, n_pixels), probability, generator) for generator in generators]
        return np.concatenate([mask for mask in masks if mask is not None])

    @abstractmethod
    def image_losses(self, losses: Tensor, mask: Tensor | None) -> Tensor:
        """Return the loss of every image, in nats: losses of pixels [B, n], mask [B, n] -> [B]."""

    def loss(
        self,
        model: Model,
        tokens: Tensor,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Summed:
        """Return the loss summed over images, and their number.

        Sums over micro-batches and ranks, divided by the sum of their counts, weight all images
        equally.

        Args:
            labels: classes of the images under a class-conditional model, -1 for none, [B].
        """
        # No variable keeps the logits, so that they are freed once they are converted.
        losses = pixel_losses(model(tokens, mask, labels), tokens)
        return self.image_losses(losses, mask).sum(), len(tokens)

    def has_loss(self, masked: bool) -> bool:
        """Return whether there is something to predict, depending on whether pixels are masked."""
        return masked or not self.masked

    def require(self, ability: str, purpose: str) -> None:
        """Check that a model can be used for a purpose.

        Args:
            ability: name of an attribute that must be true.
            purpose: for the error message.

        Raises:
            InputError: the attribute is false.
        """
        if not getattr(self, ability):
            able = [repr(name) for name, other in OBJECTIVES.items() if getattr(other, ability)]
            raise InputError(
                f"{purpose} needs a model trained as {' or '.join(able)}; this one is {self.name!r}"
            )


class Autoregressive(Objective):
    """Predict every pixel from the pixels before it (paper, equation 2)."""

    name = "autoregressive"
    title = "autoregressive"
    predicts = "every pixel from those before it"
    causal = True
    has_start_token = True
    has_likelihood = True
    sampler = "igpt.sampling.raster:generate_in_order"

    def embed(self, model: Model, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Return the embeddings of the start token and of all tokens except the last."""
        assert mask is None, "an autoregressive model takes no mask"
        inputs = tokens.roll(1, dims=1)
        inputs[:, 0] = model.config.n_colors
        embedded: Tensor = model.wte(inputs)
        return embedded

    def image_losses(self, losses: Tensor, mask: Tensor | None) -> Tensor:
        """Return the mean loss over all n pixels of every image."""
        return losses.mean(dim=1)


class Bert(Objective):
    """Predict masked pixels from all others (paper, equation 3)."""

    name = "bert"
    title = "BERT-style"
    predicts = "masked pixels from all others"
    unit = "nats/masked pixel"
    causal = False
    masked = True
    sampler = "igpt.sampling.rounds:generate_in_rounds"

    def embed(self, model: Model, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Return the embeddings of the tokens, and zeros for masked ones."""
        x: Tensor = model.wte(tokens)
        return x if mask is None else x.masked_fill(mask[..., None], 0.0)

    def mask(
        self, shape: tuple[int, int], probability: float, generator: np.random.Generator
    ) -> NDArray[np.bool_]:
        """Mask each pixel with the given probability, and at least one pixel of every image."""
        return sample_masks(shape, probability, generator)

    def image_losses(self, losses: Tensor, mask: Tensor | None) -> Tensor:
        """Return the mean loss over the masked pixels of every image."""
        assert mask is not None, "a BERT model predicts masked pixels"
        return (losses * mask).sum(dim=1) / mask.sum(dim=1)


def pixel_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the cross-entropy of every pixel: logits [B, n, V], tokens [B, n] -> nats [B, n].

    It is computed in float32, or in float64 if the logits are float64.
    """
    import torch
    import torch.nn.functional as F

    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)


def sample_masks(
    shape: tuple[int, int], probability: float, generator: np.random.Generator
) -> NDArray[np.bool_]:
    """Return masks [B, n]: each pixel with the given probability, and at least one per image."""
    mask = generator.random(shape) < probability
    mask[np.arange(shape[0]), generator.integers(0, shape[1], shape[0])] |= ~mask.any(axis=1)
    return mask


OBJECTIVES: dict[str, Objective] = {}


def register(objective: Objective) -> None:
    """Make an objective available under its name."""
    OBJECTIVES[objective.name] = objective


register(Autoregressive())
register(Bert())
DEFAULT_OBJECTIVE = Autoregressive.name


def _registered(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    return value if value in list(OBJECTIVES) else validate(value)


# The type of settings. Help and errors list igpt's own objectives; others may be registered later.
if TYPE_CHECKING:
    ObjectiveName = str
else:
    ObjectiveName = Annotated[Literal[tuple(OBJECTIVES)], WrapValidator(_registered)]
