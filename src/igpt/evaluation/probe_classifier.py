"""The classifier of a linear probe: its file format, and the classes that it predicts.

`igpt probe` writes the classifier of the best layer to probe.safetensors, next to probe.json: mean,
scale [D], coef [C, D] and intercept [C].
B images, n positions, D width, C classes.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from igpt.errors import InputError
from igpt.evaluation.logistic_regression import Classifiers
from igpt.evaluation.results import read_probe
from igpt.files import Stored, require_regular, require_schema, require_shallow
from igpt.model.transformer import ImageGPT

FORMAT, VERSION = "igpt-readout", "1"
_PARTS = ("mean", "scale", "coef", "intercept")


class _Metadata(Stored):
    """The metadata of the file, all strings."""

    layer: Annotated[str, Field(pattern=r"^\d{1,9}$")]
    classes: str


class _Classes(Stored):
    """The metadata `classes`, which is JSON."""

    classes: Annotated[list[str], Field(min_length=1)]


@dataclass(frozen=True)
class ProbeClassifier:
    """A linear classifier of one layer's features.

    Attributes:
        layer: the layer whose features, averaged over all positions, are classified.
        class_names: names of the classes, one for each row of `coef`.
        mean, scale, coef, intercept: see `Classifiers`, for one regularization strength.
    """

    layer: int
    class_names: tuple[str, ...]
    mean: Tensor
    scale: Tensor
    coef: Tensor
    intercept: Tensor

    @classmethod
    def of(cls, fitted: Classifiers, layer: int, class_names: tuple[str, ...]) -> Self:
        """Return the classifier of the first fitted setting."""
        parts = fitted.mean, fitted.scale, fitted.coef[0], fitted.intercept[0]
        return cls(layer, class_names, *(part.cpu().float() for part in parts))

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of layer, class names and tensors, which `probe.json` records."""
        digest = hashlib.sha256(json.dumps([self.layer, *self.class_names]).encode())
        for name in _PARTS:
            digest.update(getattr(self, name).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def to_bytes(self) -> bytes:
        """Return the content of the file, which `load` reads."""
        about = {"format": FORMAT, "version": VERSION, "layer": str(self.layer)}
        about["classes"] = json.dumps(self.class_names)
        return save({name: getattr(self, name).contiguous() for name in _PARTS}, metadata=about)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the classifier in a file.

        Raises:
            InputError: the file is missing, damaged, or of another format.
        """
        about, tensors = _read(path)
        if (about.get("format"), about.get("version")) != (FORMAT, VERSION):
            raise InputError(
                f"{path} is not an {FORMAT} file of version {VERSION}; run igpt probe again"
            )
        require_schema(about, _Metadata, path)
        try:
            classes = json.loads(about["classes"])
        except (ValueError, RecursionError):
            raise InputError(
                f"{path}: classes is not readable as JSON; run igpt probe again"
            ) from None
        require_shallow(classes, path)
        require_schema({"classes": classes}, _Classes, path)
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        width = shapes.get("mean", [0])[-1:]
        expected = {
            "mean": width,
            "scale": width,
            "coef": [len(classes), *width],
            "intercept": [len(classes)],
        }
        for name, shape in expected.items():
            if name not in tensors:
                raise InputError(f"{path}: the tensor {name!r} is missing; run igpt probe again")
            if shapes[name] != shape or tensors[name].dtype != torch.float32:
                found = f"{tensors[name].dtype} {shapes[name]}"
                raise InputError(
                    f"{path}: {name} is {found}, and float32 {shape} is needed; run igpt probe "
                    "again"
                )
            if not bool(tensors[name].isfinite().all()):
                raise InputError(f"{path}: {name} is not finite; run igpt probe again")
        return cls(int(about["layer"]), tuple(classes), *(tensors[name] for name in _PARTS))

    @classmethod
    def of_probe(cls, probe: Path) -> Self | None:
        """Return the classifier that belongs to a `probe.json`, or None if there is none.

        Raises:
            InputError: one of the files is damaged, or they belong to different probes.
        """
        path = probe.with_suffix(".safetensors")
        if not path.exists():
            return None
        if not probe.exists():
            raise InputError(
                f"{path} has no {probe.name} next to it; run igpt probe again, or remove it"
            )
        found, classifier = read_probe(probe), cls.load(path)
        recorded = found.get("classifier")  # probes of earlier versions have none
        expected = (None, classifier.fingerprint)
        if classifier.layer != found.get("best_layer") or recorded not in expected:
            raise InputError(
                f"{path} is not the classifier of {probe}; run igpt probe again, or remove the "
                "former"
            )
        return classifier

    @torch.inference_mode()
    def probabilities(self, model: ImageGPT, tokens: Tensor) -> Tensor:
        """Return the probabilities of the classes of images: tokens [B, n] -> [B, C].

        Raises:
            InputError: the depth or width of the model differs from that of the probed one.
        """
        if self.layer > model.config.n_layer or len(self.mean) != model.config.n_embd:
            raise InputError("the probe of the run belongs to another model; run igpt probe again")
        device = model.device
        features = next(
            x for layer, x in enumerate(model.features(tokens.to(device))) if layer == self.layer
        )
        standard = (features.float().mean(dim=1).cpu() - self.mean) / self.scale
        return (standard @ self.coef.t() + self.intercept).softmax(dim=1)


def require_replaceable(path: Path) -> None:
    """Raise if an existing file is not a probe's classifier, so that it is not overwritten.

    Raises:
        InputError: it contains something else, such as a model's weights, or is no regular file.
    """
    if path.exists() and _read(path)[0].get("format") != FORMAT:
        raise InputError(
            f"{path} is not a probe's classifier and would be overwritten; choose another -o"
        )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the metadata of a file of tensors, and the tensors of a classifier that it has."""
    require_regular(path)
    if not path.is_file():
        raise InputError(
            f"{path} is {'a folder' if path.exists() else 'missing'}; igpt probe writes this file"
        )
    try:
        with safe_open(path, "pt") as file:
            stored = set(file.keys())
            tensors = {name: file.get_tensor(name) for name in _PARTS if name in stored}
            return file.metadata() or {}, tensors
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); run igpt probe again") from None
