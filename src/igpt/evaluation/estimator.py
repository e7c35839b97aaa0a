"""A model's features as a scikit-learn transformer.

N images, n pixels, D width, L layers, R resolution.
"""

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from igpt.data.images.transform import Transform
from igpt.data.tokens.dataset import TokenSplit
from igpt.errors import InputError
from igpt.evaluation.export import best_layer, require_layer
from igpt.evaluation.features import pooled
from igpt.model.precision import Precision
from igpt.model.transformer import ImageGPT


class ImageGPTFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Transform images into the features of one layer, averaged over positions: float32 [N, D].

    Images are uint8 [N, H, W, 3], grey ones [N, H, W], or a list of PIL images, paths or arrays of
    any sizes; their centre squares are brought to the model's resolution and palette. `fit`
    only reads the model. Features are not scaled; `igpt probe` applies the equivalent of a
    `StandardScaler` to them.

    Args:
        model: a run, a model directory or a Hub id.
        layer: 0 is the first block's input, L the final norm's output; None uses the best
            layer of a run that has a `probe.json`, and the middle one otherwise.
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
        run = Path(self.model)
        is_run = (run / "model" / "config.json").exists()
        model = ImageGPT.from_pretrained(run / "model" if is_run else self.model)
        if model.palette is None:
            raise InputError(f"{self.model} holds no palette; add its preprocessor_config.json")
        layer = self.layer
        if layer is None and is_run:
            layer = best_layer(run)
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
        tokens = self._tokens(X)
        split = TokenSplit("images", [tokens], [np.full(len(tokens), -1, dtype=np.int32)])
        batches = pooled(
            model, split, precision=self.precision, batch_size=self.batch_size, last=self.layer_
        )
        return np.concatenate([batch[self.layer_] for batch in batches])

    def _tokens(self, images: Iterable[Any]) -> NDArray[np.uint16]:
        if isinstance(images, str | Path) or not isinstance(images, Iterable):
            raise InputError(f"a list or an array of images is needed, not {type(images).__name__}")
        if isinstance(images, np.ndarray) and images.dtype.kind not in "OU":
            _require_pixels(images)
        transform, palette = Transform(self.model_.config.resolution), self.model_.palette
        assert palette is not None
        tokens = []
        for index, image in enumerate(images):
            try:
                tokens.append(palette.transform(transform(image)).reshape(-1))
            except InputError as error:
                raise InputError(f"image {index}: {error}") from None
        if not tokens:
            raise InputError("there are no images here")
        return np.stack(tokens)

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


def _require_pixels(images: NDArray[Any]) -> None:
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise InputError(
            f"an array of images is uint8 [N, H, W, 3] or [N, H, W], not {images.dtype} "
            f"{list(images.shape)}"
        )
    if images.ndim == 3 and images.shape[-1] in (3, 4):
        raise InputError(
            f"{list(images.shape)} looks like one coloured image; an array of images is [N, H, W, "
            "3]"
        )
