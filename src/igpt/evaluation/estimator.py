"""A model's features as a scikit-learn transformer.

N images, n pixels, D width, L layers, R resolution.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from igpt.builtin_models import find_builtin
from igpt.errors import InputError
from igpt.evaluation.export import best_layer, require_layer
from igpt.evaluation.features import pooled
from igpt.model.images import split_of_images
from igpt.model.locate import model_and_run
from igpt.model.precision import Precision
from igpt.model.transformer import ImageGPT


class ImageGPTFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Transform images into the features of one layer, averaged over positions: float32 [N, D].

    Images are uint8 [N, H, W, 3], grey ones [N, H, W], or a list of PIL images, paths or arrays of
    any sizes; their centre squares are brought to the model's resolution and palette. `fit`
    only reads the model. Features are not scaled; `igpt probe` applies the equivalent of a
    `StandardScaler` to them.

    Args:
        model: a run, a model directory, the name of a built-in model ("photos-16") or a Hub id.
        layer: 0 is the first block's input, L the final norm's output; None uses the best
            layer of a run or built-in model that has a `probe.json`, and the middle one otherwise.
        batch_size: images at a time; None takes as many as have 65,536 positions.
        precision: "fp32", or "bf16" products.

    Attributes:
        model_: the `ImageGPT`, on a GPU if there is one.
        layer_: the layer whose features are taken.
        n_features_out_: D.
    """

    def __init__(
        self,
        model: str | Path = "openai/imagegpt-small",
        layer: int | None = None,
        batch_size: int | None = None,
        precision: Precision = "fp32",
    ) -> None:
        self.model = model
        self.layer = layer
        self.batch_size = batch_size
        self.precision = precision

    def fit(self, X: Any, y: Any = None) -> Self:  # noqa: N803  scikit-learn calls it so
        """Read the model; images and classes are not used.

        Raises:
            InputError: no model there, one without a palette, or settings out of range.
        """
        if (self.batch_size is not None and self.batch_size < 1) or self.precision not in (
            "fp32",
            "bf16",
        ):
            raise InputError(
                f"batch_size is 1 or more and precision fp32 or bf16, not {self.batch_size} and "
                f"{self.precision!r}"
            )
        model = ImageGPT.from_pretrained(self.model)
        if model.palette is None:
            raise InputError(f"{self.model} holds no palette; add its preprocessor_config.json")
        layer = self.layer
        path, run = model_and_run(self.model)
        probed = run if path == run / "model" else find_builtin(self.model)
        if layer is None and probed:
            layer = best_layer(probed)
        if layer is None:
            layer = model.config.n_layer // 2
        require_layer(layer, model.config.n_layer)
        self.model_, self.layer_, self.n_features_out_ = model, layer, model.config.n_embd
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:  # noqa: N803
        """Return the features of images, float32 [N, D].

        Raises:
            InputError: an item is not an image; its index is named.
            NotFittedError: `fit` was not called.
        """
        check_is_fitted(self)
        model = self.model_.to("cuda" if torch.cuda.is_available() else "cpu")
        split = split_of_images(self.model_, X)
        batches = pooled(
            model, split, precision=self.precision, batch_size=self.batch_size, last=self.layer_
        )
        return np.concatenate([batch[self.layer_] for batch in batches])

    @property
    def _n_features_out(self) -> int:
        return int(self.n_features_out_)  # scikit-learn's names for them

    def __getstate__(self) -> dict[str, Any]:
        # A model that was fitted on a GPU is also used on machines without one.
        state: dict[str, Any] = super().__getstate__()
        return state | {"model_": deepcopy(state["model_"]).cpu()} if "model_" in state else state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.three_d_array = False, True
        tags.transformer_tags.preserves_dtype = []  # always float32
        return tags
