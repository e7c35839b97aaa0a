"""The configuration of a model, and its form in the Hub's `config.json`.

D width, V colours; n = R^2 pixels of an image of resolution R.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from igpt.config import Config
from igpt.data.images.palette import MAX_COLORS
from igpt.errors import InputError, suggest
from igpt.files import Stored
from igpt.model.norm import NORM_EPS
from igpt.model.objectives import DEFAULT_OBJECTIVE, OBJECTIVES, Objective, ObjectiveName
from igpt.model.variants import Variants

Shape = tuple[int, ...]
VERSION = 1  # of the settings under "igpt"
# With a transparent entry in the palette, so that versions of igpt without it refuse the model.
VERSION_TRANSPARENT = 2
_LARGEST = 2**62
_CLASSIFIER = "ImageGPTForImageClassification"
_Size = Annotated[int, Field(ge=1, le=2**31 - 1)]


class HubSettings(Stored):
    """Schema of "igpt" in `config.json`; the settings of a variant are there too."""

    version: int = VERSION
    objective: ObjectiveName = DEFAULT_OBJECTIVE
    resolution: _Size | None = None
    conditions: list[str] | None = None


class HubConfig(Stored):
    """Schema of `config.json`: transformers' ImageGPTConfig, and igpt's settings under "igpt"."""

    model_type: Literal["imagegpt", "igpt"]
    architectures: list[str] | None = None
    vocab_size: Annotated[int, Field(ge=2, le=MAX_COLORS + 1)]
    n_positions: _Size
    n_embd: _Size
    n_layer: _Size
    n_head: _Size
    n_inner: _Size | None = None
    activation_function: str = "quick_gelu"
    layer_norm_epsilon: float = NORM_EPS
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = False
    id2label: dict[str, str] | None = None
    transformers_weights: str | None = None
    igpt: HubSettings = HubSettings()

    def class_names(self, where: Path) -> tuple[str, ...]:
        """Return the names of the classes in order.

        Raises:
            InputError: there are none, the keys are not "0", "1", ..., or two classes have the same
                name.
        """
        labels = self.id2label
        if not labels or any(str(index) not in labels for index in range(len(labels))):
            shown = repr(labels)
            shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
            raise InputError(
                f"{where} has id2label = {shown}; the classes by number, from 0 on, are needed"
            )
        names = tuple(labels[str(index)] for index in range(len(labels)))
        if len(set(names)) < len(names):
            double = next(name for index, name in enumerate(names) if name in names[:index])
            raise InputError(
                f"{where} has id2label with two classes named {double!r}; names must differ"
            )
        return names


class ShapeConfig(Config):
    """Shape and objective of a model, which pretraining and planning share with it."""

    n_layer: int = Field(24, ge=1, le=_LARGEST, description="blocks")
    n_embd: int = Field(512, ge=1, le=_LARGEST, description="width")
    n_head: int = Field(8, ge=1, le=_LARGEST, description="attention heads")
    objective: ObjectiveName = Field(DEFAULT_OBJECTIVE, description="next pixel, or masked pixels")

    @property
    def trained_as(self) -> Objective:
        """The objective that `objective` names."""
        return OBJECTIVES[self.objective]


class ModelConfig(ShapeConfig, Variants):
    """Configuration of a model: shape, objective, variants, colours and classes."""

    resolution: int = Field(32, ge=1, description="image side in pixels")
    n_colors: int = Field(512, ge=1, description="palette size")
    bias: bool = Field(
        False, description="biases in the linear layers: only for models made elsewhere"
    )
    class_names: tuple[str, ...] | None = Field(
        None, description="classes of the classification head, if there is one"
    )
    conditions: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="classes with a start token each, if the model is class-conditional",
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.n_embd % self.n_head:
            raise ValueError(f"{self.n_head} heads do not divide a width of {self.n_embd}")
        if self.positions == "rotary" and (head := self.n_embd // self.n_head) % 4:
            raise ValueError(
                f"rotary positions rotate quarters of a head, and its width of {head} is not "
                "divisible by 4"
            )
        return self

    @model_validator(mode="after")
    def _conditions_fit(self) -> Self:
        names = self.conditions or ()
        if names and not self.trained_as.has_start_token:
            raise ValueError(f"the objective {self.objective!r} has no start token for classes")
        if double := next((name for i, name in enumerate(names) if name in names[:i]), None):
            raise ValueError(f"there are two classes named {double!r}")
        return self

    @property
    def faithful(self) -> bool:
        """Whether it is the paper's model, which transformers' ImageGPT computes too."""
        return super().faithful and self.conditions is None

    @property
    def n_pixels(self) -> int:
        """Number of pixels of an image, n."""
        return self.resolution**2

    @property
    def n_inputs(self) -> int:
        """Number of input tokens: the colours, the start token, and those of the classes.

        The start token has the number V; that of class k has V + 1 + k.
        """
        return self.n_colors + 1 + len(self.conditions or ())

    def label_of(self, name: str) -> int:
        """Return the number of a class of a class-conditional model.

        Raises:
            InputError: the model has no such class, or no classes.
        """
        if self.conditions is None:
            raise InputError(
                f"the class {name!r} is asked for, and the model has no classes; "
                "`igpt pretrain --condition labels` trains one that has"
            )
        if name not in self.conditions:
            raise InputError(f"the model has no class {name!r}; {suggest(name, self.conditions)}")
        return self.conditions.index(name)

    def to_hub(self) -> dict[str, Any]:
        """Return the contents of `config.json`, which transformers refuses for a variant."""
        hub: dict[str, Any] = {
            "model_type": "imagegpt",
            "architectures": [
                "ImageGPTForCausalImageModeling" if self.class_names is None else _CLASSIFIER
            ],
            "vocab_size": self.n_colors + 1,  # the last row of wte is the start token
            "n_positions": self.n_pixels,
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
        if self.conditions is not None:
            hub["activation_function"] = "a class-conditional model: read it with igpt"
            hub["igpt"]["conditions"] = self.conditions
        return hub

    def parameter_shapes(self) -> Iterator[tuple[str, Shape]]:
        """Yield the name and shape of every parameter of the model, without building it."""
        width = self.n_embd
        linear = {
            "attn.c_attn": (3 * width, width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (4 * width, width),
            "mlp.c_proj": (width, 4 * width),
        }
        for layer in range(self.n_layer):
            for name, shape in linear.items():
                yield f"h.{layer}.{name}.weight", shape
                if self.bias:
                    yield f"h.{layer}.{name}.bias", shape[:1]
            yield f"h.{layer}.ln_1.weight", (width,)
            yield f"h.{layer}.ln_2.weight", (width,)
            if self.value_residual and layer > 0:
                yield f"h.{layer}.attn.mix", (2,)
        yield "ln_f.weight", (width,)
        yield "lm_head.weight", (self.n_colors, width)
        if self.class_names is not None:
            yield "score.weight", (len(self.class_names), width)
        yield "wte.weight", (self.n_inputs, width)
        if self.positions == "learned":
            yield "wpe.weight", (self.n_pixels, width)

    def require_shapes(self, found: Mapping[str, Shape], where: str) -> None:
        """Check the names and shapes of tensors, without building the model.

        Raises:
            InputError: a tensor is missing, has another shape, or is not part of the model; the
                first one is named.
        """

        def require(name: str, shape: object, expected: object) -> None:
            if shape != expected:
                raise InputError(
                    f"the weights in {where} do not fit its config.json: {name} is {shape}, "
                    f"{expected} is expected"
                )

        known = set()
        for name, shape in self.parameter_shapes():
            require(name, found.get(name, "missing"), shape)
            known.add(name)
        for name in sorted(found.keys() - known):
            require(name, found[name], "nothing")

    @classmethod
    def from_hub(cls, hub: HubConfig, names: Collection[str], where: Path) -> Self:
        """Return the configuration of a model directory.

        Args:
            names: of its tensors, from which biases and a class head are inferred.
            where: path of the `config.json`, for errors.

        Raises:
            InputError: a setting that `ImageGPT` does not implement, or settings that contradict
                each other.
        """
        from_transformers, width, n_pixels = (
            hub.model_type == "imagegpt",
            hub.n_embd,
            hub.n_positions,
        )
        resolution = math.isqrt(n_pixels)
        unlike = {
            "activation_function": from_transformers and hub.activation_function != "quick_gelu",
            "n_inner": hub.n_inner not in (None, 4 * width),
            "scale_attn_weights": not hub.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": hub.scale_attn_by_inverse_layer_idx,
            "add_cross_attention": hub.add_cross_attention,
            "layer_norm_epsilon": hub.layer_norm_epsilon != NORM_EPS,
            "n_positions": resolution**2 != n_pixels,
        }
        for key, bad in unlike.items():
            if bad:
                raise InputError(
                    f"{where} has {key} = {getattr(hub, key)!r}, which iGPT does not have"
                )
        if hub.tie_word_embeddings:
            raise InputError(
                f"{where} has tie_word_embeddings = True; the input embeddings have one row more "
                "than the output matrix, so that they cannot be the same"
            )
        if hub.igpt.resolution not in (None, resolution):
            raise InputError(
                f"{where} has igpt.resolution = {hub.igpt.resolution}, but n_positions = "
                f"{n_pixels} is {resolution}^2"
            )
        extra = hub.igpt.model_extra or {}
        varied = {
            key: value
            for key, value in extra.items()
            if not from_transformers or key in Variants.model_fields
        }
        variants = Variants.layered(varied, where=str(where))
        is_conditional = hub.igpt.conditions is not None
        if from_transformers and (is_conditional or not variants.faithful):
            varied |= {"conditions": hub.igpt.conditions} if is_conditional else {}
            raise InputError(
                f"{where} has model_type = 'imagegpt' with {varied}; a variant has "
                "model_type = 'igpt'"
            )
        if (
            _CLASSIFIER in (hub.architectures or ())
            and "score.weight" not in names
            and "lm_head.weight" in names
        ):
            raise InputError(
                f"{where} describes a classifier, but its weights have no class head: "
                "score.weight is missing"
            )
        settings = {
            "resolution": resolution,
            "n_colors": hub.vocab_size - 1,
            "n_layer": hub.n_layer,
            "n_embd": width,
            "n_head": hub.n_head,
            "objective": hub.igpt.objective,
            "bias": any(name.endswith(".bias") for name in names),
            "class_names": hub.class_names(where) if "score.weight" in names else None,
            "conditions": hub.igpt.conditions,
        }
        return cls.layered(settings, variants.model_dump(), where=str(where))
