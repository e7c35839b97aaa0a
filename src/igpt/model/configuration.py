"""The shape of a model, and its form in the `config.json` of the Hub."""

import math
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from igpt.errors import InputError
from igpt.model.norm import NORM_EPS
from igpt.model.variants import Variants

Objective = Literal["autoregressive", "bert"]


class ModelConfig(Variants):
    """Shape and objective of a model, and where it differs from the paper's."""

    resolution: int = Field(32, ge=1, description="image side in pixels")
    n_colors: int = Field(512, ge=1, description="palette size")
    n_layer: int = Field(24, ge=1, description="blocks")
    n_embd: int = Field(512, ge=1, description="width")
    n_head: int = Field(8, ge=1, description="attention heads")
    objective: Objective = Field("autoregressive", description="what the model was trained to predict")
    bias: bool = Field(False, description="biases in the linear layers: only for models made elsewhere")
    class_names: tuple[str, ...] | None = Field(None, description="classes of the classification head, if there is one")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.n_embd % self.n_head:
            raise ValueError(f"{self.n_head} heads do not divide a width of {self.n_embd}")
        if self.positions == "rotary" and (head := self.n_embd // self.n_head) % 4:
            raise ValueError(f"rotary positions turn quarters of a head, and its width of {head} is not divisible by 4")
        return self

    @property
    def n_places(self) -> int:
        """Pixels of an image, n."""
        return self.resolution**2

    def to_hub(self) -> dict[str, Any]:
        """The `config.json` of transformers' ImageGPT, ours beside it; of a variant, one that transformers refuses."""
        hub: dict[str, Any] = {
            "model_type": "imagegpt",
            "architectures": [
                "ImageGPTForCausalImageModeling" if self.class_names is None else "ImageGPTForImageClassification"
            ],
            "vocab_size": self.n_colors + 1,  # the last row of wte is the start-of-sequence embedding
            "n_positions": self.n_places,
            "n_embd": self.n_embd,
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "n_inner": 4 * self.n_embd,
            "activation_function": "quick_gelu",
            "layer_norm_epsilon": NORM_EPS,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "scale_attn_weights": True,
            "tie_word_embeddings": False,
            "bos_token_id": self.n_colors,
            "igpt": {"objective": self.objective, "resolution": self.resolution},
        }
        if self.class_names is not None:
            hub["id2label"] = dict(enumerate(self.class_names))
            hub["label2id"] = {name: index for index, name in enumerate(self.class_names)}
        if not self.faithful:
            hub |= {"model_type": "igpt", "activation_function": "see igpt"}
            hub["igpt"] |= self.variants.model_dump()
        return hub

    @classmethod
    def from_hub(cls, hub: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        """The configuration of a model directory.

        Raises:
            InputError: a variant of ImageGPT that this model does not compute.
        """
        ours, foreign = hub.get("igpt", {}), hub.get("model_type") != "igpt"
        for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if not isinstance(hub.get(key), int) or hub[key] < 1:
                raise InputError(f"config.json has {key} = {hub.get(key)!r}; a positive whole number is needed")
        width, places = hub["n_embd"], hub["n_positions"]
        unlike = {
            "activation_function": foreign and hub.get("activation_function", "quick_gelu") != "quick_gelu",
            "n_inner": hub.get("n_inner") not in (None, 4 * width),
            "scale_attn_weights": not hub.get("scale_attn_weights", True),
            "scale_attn_by_inverse_layer_idx": bool(hub.get("scale_attn_by_inverse_layer_idx")),
            "layer_norm_epsilon": hub.get("layer_norm_epsilon", NORM_EPS) != NORM_EPS,
            "n_positions": math.isqrt(places) ** 2 != places,
        }
        for key, bad in unlike.items():
            if bad:
                raise InputError(f"config.json has {key} = {hub.get(key)!r}, which iGPT does not have")
        settings = {
            "resolution": math.isqrt(places),
            "n_colors": hub["vocab_size"] - 1,
            "n_layer": hub["n_layer"],
            "n_embd": width,
            "n_head": hub["n_head"],
            "objective": ours.get("objective", "autoregressive"),
            "bias": any(name.endswith(".bias") for name in tensors),
        }
        if "score.weight" in tensors:
            labels = hub.get("id2label")
            if not isinstance(labels, dict) or not all(str(key).isdecimal() for key in labels):
                raise InputError(f"config.json has id2label = {labels!r}; the classes by number are needed")
            settings["class_names"] = tuple(labels[key] for key in sorted(labels, key=int))
        if not foreign:
            varied = {key: value for key, value in ours.items() if key not in ("version", "objective", "resolution")}
            settings |= Variants.layered(varied, where="config.json").model_dump()
        return cls.layered(settings, where="config.json")
