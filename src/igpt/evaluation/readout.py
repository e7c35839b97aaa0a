"""A probe's classifier kept beside its figures, and what it says of an image.

`igpt probe` writes it as probe.safetensors beside probe.json: mean, scale [D], coef [C, D] and intercept [C] of the
best layer.
B images, n places, D width, C classes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from igpt.errors import InputError
from igpt.evaluation.regression import Classifiers
from igpt.files import atomic_file
from igpt.model.transformer import ImageGPT

FORMAT, VERSION = "igpt-readout", "1"
_PARTS = ("mean", "scale", "coef", "intercept")


@dataclass(frozen=True)
class Readout:
    """A linear classifier of one layer's features.

    Attributes:
        layer: whose features, averaged over all places, it reads.
        class_names: of the rows of `coef`.
        mean, scale, coef, intercept: see `Classifiers`, of a single setting.
    """

    layer: int
    class_names: tuple[str, ...]
    mean: Tensor
    scale: Tensor
    coef: Tensor
    intercept: Tensor

    @classmethod
    def of(cls, fitted: Classifiers, layer: int, class_names: tuple[str, ...]) -> Self:
        """The first of fitted classifiers."""
        parts = fitted.mean, fitted.scale, fitted.coef[0], fitted.intercept[0]
        return cls(layer, class_names, *(part.cpu().float() for part in parts))

    def save(self, path: Path) -> None:
        """Writes it, atomically."""
        about = {"format": FORMAT, "version": VERSION, "layer": str(self.layer)}
        about["classes"] = json.dumps(self.class_names)
        tensors = {name: getattr(self, name).contiguous() for name in _PARTS}
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata=about)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            InputError: it is damaged, or of another format.
        """
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if (about.get("format"), about.get("version")) != (FORMAT, VERSION):
                    raise InputError(f"{path} is no {FORMAT} of version {VERSION}; run igpt probe anew")
                parts = [file.get_tensor(name) for name in _PARTS]
        except SafetensorError as error:
            raise InputError(f"{path} is damaged ({error}); run igpt probe anew") from None
        return cls(int(about["layer"]), tuple(json.loads(about["classes"])), *parts)

    @torch.inference_mode()
    def probabilities(self, model: ImageGPT, tokens: Tensor) -> Tensor:
        """Of the classes of images: tokens [B, n] -> [B, C].

        Raises:
            InputError: the model has other layers than the one that was probed.
        """
        if self.layer > model.config.n_layer or len(self.mean) != model.config.n_embd:
            raise InputError("the run's probe is of another model; run igpt probe anew")
        device = model.wte.weight.device
        features = next(x for layer, x in enumerate(model.features(tokens.to(device))) if layer == self.layer)
        standard = (features.float().mean(dim=1).cpu() - self.mean) / self.scale
        return (standard @ self.coef.t() + self.intercept).softmax(dim=1)
