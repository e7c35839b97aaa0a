"""Pretraining: a new model, trained with an objective, by default without labels."""

import time
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from igpt.config import PathOrUrl
from igpt.data.left_out import listed
from igpt.data.tokens.batches import Batch, Batches, to_device
from igpt.data.tokens.dataset import TokenDataset, TokenSplit
from igpt.data.tokens.manifest import NAMES_SHOWN
from igpt.environment import RunKind
from igpt.errors import InputError
from igpt.evaluation.feature_quality import quality_images
from igpt.model.config import ModelConfig, ShapeConfig
from igpt.model.cost import count_parameters
from igpt.model.directory import weights_sha256
from igpt.model.objectives import Model, Objective, Summed
from igpt.model.transformer import ImageGPT
from igpt.model.variants import Variants
from igpt.progress import print_line
from igpt.remote import shown
from igpt.training.distributed import World
from igpt.training.engine import Engine
from igpt.training.memory import require_memory
from igpt.training.metrics import Metrics
from igpt.training.pretrained import generative_part, pretrained_model
from igpt.training.run_directory import open_run, record_run
from igpt.training.settings import MOST, TrainConfig
from igpt.training.trackers import EXAMPLES
from igpt.training.trainer import Probing, Trainer, Validation

# Pixels from which the frequencies of the colours are estimated: 16,384 images at 32 px, which is
# also the maximum number of images.
_COUNTED_PIXELS = 2**24
# Probability and seed: the same for all runs, so that their validation losses can be compared.
_VALIDATION_MASKS = (0.15, 0)
_MAX_MINUTES = 1_000_000


class PretrainConfig(ShapeConfig, Variants, TrainConfig):
    """A pretraining run; resolution and palette come with the tokens."""

    kind: ClassVar[RunKind] = "pretrain"
    extendable: ClassVar[frozenset[str]] = frozenset({"steps"})

    tokens: PathOrUrl = Field(description="token data set: a folder, or a URL (s3://)")
    from_model: Path | None = Field(
        None,
        description="run, model directory or Hub id to start from, instead of random weights; its "
        "shape, objective and palette are used",
        json_schema_extra={"flag": "--from"},
    )
    resolution: int | None = Field(
        None, ge=1, le=MOST, description="image side that the tokens must have; presets name one"
    )
    start_from_palette: bool = Field(
        False, description="initialize colour embeddings from the palette's RGB values"
    )
    condition: Literal["labels"] | None = Field(
        None,
        description="labels: also learn a start token for each class of the tokens, so that images "
        "of a class can be sampled (autoregressive models)",
    )
    label_dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="probability with which --condition labels replaces the label of an image by "
        "no class, which guidance and everything without labels use",
    )
    mask_probability: float = Field(0.15, gt=0, lt=1, description="share of pixels that BERT masks")
    flip: bool = Field(False, description="mirror images at random; not in the paper's pretraining")
    shift: int = Field(
        0,
        ge=0,
        le=MOST,
        description="shift images at random by up to this many pixels, with reflected borders",
    )
    validation_images: int = Field(
        4096,
        ge=1,
        le=MOST,
        description="maximum number of validation images, spread evenly over the split",
    )
    probe_every: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="steps between measurements of the middle layer's features with labelled "
        "images: linear probe, 20 nearest neighbours, effective rank",
    )
    probe_tokens: PathOrUrl | None = Field(
        None,
        description="token data set with labels for --probe-every; by default the tokens that are "
        "trained on",
    )


def pretrain(
    config: PretrainConfig,
    run: Path,
    *,
    given: dict[str, Any] | None = None,
    resume: bool = False,
    minutes: float | None = None,
) -> Path:
    """Pretrain a model, or resume an interrupted run; the result does not depend on interruptions.

    With `from_model`, the shape, the objective and the variants are those of that model, whatever
    the settings; its position embeddings are interpolated if the tokens have another resolution.
    Start tokens of classes are those that `condition` asks for: see `with_conditions`.

    Args:
        run: the run directory: config.yaml, environment.json, metrics.jsonl, checkpoints/, model/.
        given: settings that must equal the recorded ones when resuming, and those of the model to
            start from (default: the tokens alone). When resuming, `steps` may be larger than
            recorded: the learning-rate schedule is then that of the larger number.
        resume: continue `run` with its recorded settings.
        minutes: time of this call, which does not change the learning-rate schedule. When it is
            over, training stops after the current step, and after a validation that is due; at
            least one step is done. All ranks stop after the same step.

    Returns:
        the directory of the best model by validation loss, RUN/model.

    Raises:
        InputError: the settings, the tokens or the directory are invalid; another process works in
            the directory; or the model or a batch does not fit into memory.
        Interrupted: on Ctrl-C or SIGTERM, or after `minutes`; a checkpoint was saved.
    """
    if minutes is not None and not 0 < minutes <= _MAX_MINUTES:
        raise InputError(f"--minutes is more than 0 and at most {_MAX_MINUTES:,}, not {minutes:g}")
    end = None if minutes is None else time.monotonic() + 60 * minutes
    with open_run(run, config, given, resume) as (config, world):
        data = TokenDataset(config.tokens)
        _require_resolution(config, data)
        start, checksum, pretrained_resolution = None, None, None
        if config.from_model:
            pretrained = pretrained_model(config.from_model, data)
            checksum = weights_sha256(pretrained.state_dict())
            pretrained_resolution = pretrained.config.resolution
            config = _as_model(config, pretrained.config, given or {})
            start = generative_part(pretrained, data, _conditions(config, data))
        shape = start.config if start else _model_config(config, data)
        require_memory(shape, config, world)
        train = Batches(
            data["train"],
            data.resolution,
            config.batch_size,
            config.seed,
            config.flip,
            config.shift,
            world.device,
        )
        checked = _validation_tokens(data["validation"], config)
        labels = data["validation"].spread(len(checked)).labels if shape.conditions else None
        probing = _probing(config, data, shape, world)
        objective = shape.trained_as
        torch.manual_seed(config.seed)
        if start:
            model = start
        else:
            with torch.device("meta"):  # the engine initializes the weights
                model = ImageGPT(shape, data.palette, config.start_from_palette)
        loss = partial(_loss_of_labels, objective) if shape.conditions else objective.loss
        engine = Engine(model, config, world, loss)
        record_run(
            run,
            config,
            data.path,
            resume=resume,
            is_main=world.is_main,
            model_sha256=checksum,
            probe_tokens=TokenDataset(config.probe_tokens or data.path).path if probing else None,
        )
        world.barrier()
        is_new = world.is_main and not resume
        if is_new and pretrained_resolution not in (None, data.resolution):
            print_line(
                f"position embeddings: interpolated from {pretrained_resolution} to "
                f"{data.resolution} px"
            )
        if is_new and shape.conditions:
            _print_missing(shape.conditions, train.split)
        validation = Validation(
            "loss",
            "loss {:.4f}".format,
            loss,
            len(checked),
            partial(_validation_batch, objective, checked, world, labels=labels),
        )
        trainer = Trainer(
            engine,
            batches=partial(_training_batch, objective, train, config),
            validation=validation,
            run=run,
            warmup=config.warmup(len(train.split)),
            probing=probing,
            examples=checked[:EXAMPLES],
            end=end,
        )
        trainer.train(resume=resume, on_start=partial(_write_start, shape, data, checked))
    return run / "model"


def _require_resolution(config: PretrainConfig, data: TokenDataset) -> None:
    if config.resolution not in (None, data.resolution):
        raise InputError(
            f"{shown(config.tokens)} has images of {data.resolution} px, and the model is for "
            f"{config.resolution} px; prepare tokens with --size {config.resolution}, or train "
            f"with --resolution {data.resolution}"
        )


def _as_model(config: PretrainConfig, model: ModelConfig, given: dict[str, Any]) -> PretrainConfig:
    """Return the settings with the shape, objective and variants of the model to start from.

    Raises:
        InputError: a given setting is another one.
    """
    if config.start_from_palette:
        raise InputError("--start-from-palette is for new models; leave it or --from out")
    changes = {
        name: getattr(model, name) for name in (*ShapeConfig.model_fields, *Variants.model_fields)
    }
    for name, value in changes.items():
        if given.get(name, value) != value:
            raise InputError(
                f"{config.from_model} has {name} = {value}, not {given[name]}; leave "
                f"--{name.replace('_', '-')} out"
            )
    return config.model_copy(update=changes)


def _model_config(config: PretrainConfig, data: TokenDataset) -> ModelConfig:
    shared = {name: getattr(config, name) for name in ShapeConfig.model_fields}
    return ModelConfig.layered(
        shared,
        config.variants.model_dump(),
        {"resolution": data.resolution, "n_colors": len(data.palette)},
        {"conditions": _conditions(config, data)},
        where="the model",
    )


def _conditions(config: PretrainConfig, data: TokenDataset) -> tuple[str, ...] | None:
    """Return the classes that get a start token, or None if there is no condition.

    Raises:
        InputError: the tokens have no labels, or the objective has no start token.
    """
    if config.condition is None:
        return None
    config.trained_as.require("has_start_token", "--condition labels")
    if not data.class_names or data["train"].labels.max(initial=-1) < 0:
        raise InputError(
            f"--condition labels needs training images with labels, and {data.path} has none; "
            "leave it out, or prepare images with classes"
        )
    return tuple(data.class_names)


def _print_missing(names: tuple[str, ...], split: TokenSplit) -> None:
    """Print what some images and classes lack, if anything: labels, and training images."""
    counts = np.bincount(split.labels + 1, minlength=len(names) + 1)
    if counts[0]:
        print_line(
            f"{counts[0]} of {len(split)} training images have no label, and count as no class"
        )
    absent = [name for name, count in zip(names, counts[1:], strict=True) if not count]
    if absent:
        print_line(
            f"classes without a training image, whose start tokens are not trained: "
            f"{listed(absent, NAMES_SHOWN)}"
        )


def _loss_of_labels(objective: Objective, model: Model, tokens: Tensor, labels: Tensor) -> Summed:
    """Return the loss of images under a class-conditional model, given their classes."""
    return objective.loss(model, tokens, labels=labels)


def _training_batch(
    objective: Objective, train: Batches, config: PretrainConfig, step: int
) -> Batch:
    """Return the tokens of a training step, and their labels or masks if there are any."""
    tokens = train.tokens(step)
    if config.condition:
        generator = np.random.default_rng((config.seed, step, 3))
        dropped = to_device(generator.random(len(tokens)) < config.label_dropout, train.device)
        return tokens, train.labels(step).masked_fill(dropped, -1)
    generator = np.random.default_rng((config.seed, step, 2))
    mask = objective.mask((len(tokens), tokens.shape[1]), config.mask_probability, generator)
    return (tokens,) if mask is None else (tokens, to_device(mask, train.device))


def _validation_tokens(split: TokenSplit, config: PretrainConfig) -> NDArray[np.uint16]:
    if len(split) == 0:
        raise InputError("the validation split is empty; the best model is selected by it")
    count = min(config.validation_images, len(split))
    return split.rows(np.arange(count) * len(split) // count)


def _validation_batch(
    objective: Objective,
    checked: NDArray[np.uint16],
    world: World,
    first: int,
    last: int,
    labels: NDArray[np.int32] | None = None,
) -> Batch:
    """Return validation images `first` to `last - 1`; every run has the same masks."""
    tokens = to_device(checked[first:last].astype(np.int64), world.device)
    if labels is not None:
        return tokens, to_device(labels[first:last].astype(np.int64), world.device)
    probability, seed = _VALIDATION_MASKS
    mask = objective.mask((last, checked.shape[1]), probability, np.random.default_rng(seed))
    return (tokens,) if mask is None else (tokens, to_device(mask[first:], world.device))


def _probing(
    config: PretrainConfig, data: TokenDataset, shape: ModelConfig, world: World
) -> Probing | None:
    """Return how features are measured during training, or None if they are not."""
    if config.probe_every is None:
        if config.probe_tokens is not None:
            raise InputError("--probe-tokens needs --probe-every, the steps between measurements")
        return None
    labelled = data if config.probe_tokens is None else TokenDataset(config.probe_tokens)
    images = quality_images(labelled, data)
    return Probing(
        config.probe_every,
        shape.n_layer // 2,
        len(images.tokens),
        lambda first, last: to_device(images.tokens[first:last].astype(np.int64), world.device),
        partial(images.measure, device=world.device),
    )


def _write_start(
    shape: ModelConfig, data: TokenDataset, checked: NDArray[np.uint16], metrics: Metrics
) -> None:
    """Write the first line of metrics, with the validation losses of two trivial models.

    They are a uniform distribution, and the frequencies of the colours in the training images.
    """
    colors = shape.n_colors
    train = data["train"]
    count = min(len(train), 16384, max(1, _COUNTED_PIXELS // shape.n_pixels))
    sampled = train.rows(np.arange(count) * len(train) // count)
    # One is added to every count: a colour that is absent from training has a finite loss.
    frequency = np.bincount(sampled.ravel(), minlength=colors) + 1.0
    unigram = -np.log(frequency / frequency.sum())[checked].mean()
    metrics.write(
        "start",
        0,
        source=data.manifest["source"],
        parameters=count_parameters(shape),
        train_images=len(train),
        validation_images=len(checked),
        places=shape.n_pixels,
        n_colors=colors,
        **({"classes": len(shape.conditions)} if shape.conditions else {}),
        uniform_loss=float(np.log(colors)),
        unigram_loss=float(unigram),
    )
