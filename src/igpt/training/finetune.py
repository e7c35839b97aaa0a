"""Fine-tunes a whole model with a class head until the validation accuracy no longer rises (paper, section 2.3).

RUN/               config.yaml, environment.json, metrics.jsonl, model/, test.json; checkpoints/ if
nothing is below RUN/rates/RATE/    a training at each of several learning rates: config.yaml,
metrics.jsonl, checkpoints/, model/ RUN/fold-back/     the same, of the last training on training
and validation images
"""

import gc
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator

from igpt.data.tokens.batches import Batches
from igpt.data.tokens.dataset import SPLITS, TokenDataset, TokenSplit
from igpt.data.tokens.labels import few_of_each, require_classes
from igpt.environment import RunKind, describe
from igpt.errors import InputError
from igpt.files import atomic_file, write_json
from igpt.model.classifier import MASKED, classification
from igpt.model.config import ModelConfig
from igpt.model.cost import count_parameters, head_parameters
from igpt.model.directory import weights_sha256
from igpt.model.precision import resolve_precision
from igpt.model.transformer import ImageGPT
from igpt.progress import print_line
from igpt.training.checkpoints import TrainingState
from igpt.training.classification import (
    accuracies,
    errors,
    new_classifier,
    pretrained_model,
    training_batch,
    validation_batch,
)
from igpt.training.distributed import World, distributed_world
from igpt.training.engine import Engine
from igpt.training.memory import require_memory
from igpt.training.metrics import Metrics, read_metrics
from igpt.training.optimizer import Schedule
from igpt.training.run_directory import (
    device_and_stop_seconds,
    record_run,
    resolve_config,
    sole_writer,
)
from igpt.training.settings import HIGHEST_RATE, MOST, TrainConfig
from igpt.training.trainer import Diverged, Trainer, Validation

FORMAT, VERSION = "igpt-finetune", 1


class FinetuneConfig(TrainConfig):
    """A fine-tuning run: the paper's constant rate, a tenth of pretraining's, and early stopping."""

    kind: ClassVar[RunKind] = "finetune"

    model: Path = Field(description="pretrained model directory")
    tokens: Path = Field(description="token data set with labels")
    generation_weight: float = Field(
        1.0, ge=0, le=1e6, description="weight of the generative loss beside the class loss"
    )
    mask_probability: float | None = Field(
        None,
        ge=0,
        lt=1,
        description=f"share of pixels masked for BERT models, {MASKED} by default; 0 masks none",
    )
    flip: bool = Field(False, description="mirror images at random; the paper does on CIFAR")
    shift: int = Field(
        0, ge=0, le=MOST, description="reflect-pad by so many pixels and crop at random; 4 on CIFAR"
    )
    steps: int = Field(10_000, ge=1, le=MOST, description="updates at most")
    learning_rate: float = Field(3e-4, gt=0, le=HIGHEST_RATE, description="learning rate")
    learning_rates: tuple[Annotated[float, Field(gt=0, le=HIGHEST_RATE)], ...] = Field(
        (),
        description="several, in place of one: a run for each, of which validation accuracy chooses",
    )
    labels_per_class: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="train on so few images of each class only, drawn by seed as the first draw of a whole probe is",
    )
    validation_images: int | None = Field(
        None, ge=1, le=MOST, description="at most so many, spread evenly over the split"
    )
    test_images: int | None = Field(
        None, ge=1, le=MOST, description="at most so many, spread evenly over the split"
    )
    fold_back: bool = Field(
        False,
        description="train anew on training and validation images, at the rate and for the epochs chosen",
    )
    schedule: Schedule = Field(
        "constant", description="how the learning rate goes on from its peak"
    )
    validate_every: int = Field(
        250, ge=1, le=MOST, description="updates between validations; the best model is kept"
    )
    checkpoint_every: int = Field(250, ge=1, le=MOST, description="updates between checkpoints")
    patience: int | None = Field(
        5, ge=1, le=MOST, description="stop after so many validations without a better one"
    )

    @field_validator("learning_rates")
    @classmethod
    def _once(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(rates)) < len(rates):
            raise ValueError("a learning rate is named twice")
        return rates

    @property
    def in_folders(self) -> bool:
        """Whether every training has a folder of its own in the run's."""
        return bool(self.learning_rates) or self.fold_back


def finetune(
    config: FinetuneConfig,
    run: Path,
    *,
    given: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Fine-tunes a model on a labelled data set, or continues an interrupted run.

    A BERT model is trained on masked images and judged on whole ones. Where the tokens' resolution
    is not the model's, its position embeddings are interpolated.

    Args:
        run: the run directory; RUN/model becomes the best classifier by validation accuracy, or
            with `fold_back` the one trained on validation images too.
        given: settings that must be the recorded ones when resuming (default: the tokens alone).
        resume: continue `run` with its recorded settings; learning rates that have come to their
            end are not repeated (one that diverged goes on from its newest checkpoint, to the same
            end).

    Returns:
        what RUN/test.json holds: test accuracy with its interval, the learning rates tried, and the
        chosen one.

    Raises:
        InputError: model and tokens do not match or have changed, labels are missing, the classes
            do not allow it, every learning rate diverged, another process works in the directory,
            or the machine's memory cannot hold the model or a batch.
        Interrupted: on Ctrl-C or SIGTERM, after saving.
    """
    with (
        distributed_world(*device_and_stop_seconds(run, config, given, resume)) as world,
        sole_writer(run, world),
    ):
        config = resolve_config(
            run, config, {"tokens": config.tokens} if given is None else given, resume
        )
        world.barrier()  # no rank may take the directory that another makes for an old one
        if config.fold_back and config.schedule != "constant":
            raise InputError(
                "--fold-back repeats a constant rate; leave --schedule or --fold-back out"
            )
        if config.fold_back and config.labels_per_class:
            raise InputError(
                "--fold-back would add every validation label to the few; leave it out"
            )
        data = TokenDataset(config.tokens)
        if data.class_names is None:
            raise InputError(f"{config.tokens} has no classes; fine-tuning needs labels")
        splits = {name: data[name] for name in SPLITS}
        require_classes(splits, len(data.class_names), "fine-tuning")
        if config.labels_per_class:
            labels, seed = splits["train"].labels, (config.seed, config.labels_per_class, 0)
            splits["train"] = splits["train"].subset(
                few_of_each(labels, config.labels_per_class, seed)
            )
        splits["validation"] = splits["validation"].spread(config.validation_images)
        splits["test"] = splits["test"].spread(config.test_images)
        pretrained = pretrained_model(config.model, data)
        precision = world.broadcast(
            resolve_precision(config.precision, world.device)
        )  # the ranks' machines may differ
        masked = _mask_probability(config, pretrained.config)
        config = config.model_copy(update={"precision": precision, "mask_probability": masked})
        checksum, shape = weights_sha256(pretrained.state_dict()), pretrained.config
        require_memory(
            shape.model_copy(update={"resolution": data.resolution}),
            config,
            world,
            frozen=head_parameters(shape),
        )
        del pretrained  # every training reads the weights anew, for it changes them
        if resume:
            record_run(
                run,
                config,
                config.tokens,
                resume=True,
                is_main=world.is_main,
                model_sha256=checksum,
            )
        if world.is_main and shape.resolution != data.resolution:
            print_line(
                f"position embeddings: interpolated from {shape.resolution} to {data.resolution} px"
            )
        return _Finetuning(config, run, data, splits, world, shape, recorded=resume).complete()


def _mask_probability(config: FinetuneConfig, pretrained: ModelConfig) -> float:
    if pretrained.trained_as.masked:
        return MASKED if config.mask_probability is None else config.mask_probability
    if config.mask_probability:
        raise InputError(
            f"--mask-probability is for BERT models; this one is {pretrained.objective}, and nothing is masked"
        )
    return 0.0


@dataclass(frozen=True)
class _Tried:
    """A learning rate, where it was trained, and the least validation error it reached (infinite if it diverged)."""

    config: FinetuneConfig
    folder: Path
    error: float
    best_step: int

    def to_json(self) -> dict[str, Any]:
        accuracy = 1 - self.error if math.isfinite(self.error) else None
        rate = self.config.learning_rate
        return {"learning_rate": rate, "validation_accuracy": accuracy, "best_step": self.best_step}


@dataclass
class _Finetuning:
    """One or several trainings of the same model, and what comes of them.

    Args:
        splits: the images that are trained on, chosen by, tested on.
        pretrained: the model's shape.
        recorded: whether the run directory holds its settings already.
    """

    config: FinetuneConfig
    run: Path
    data: TokenDataset
    splits: Mapping[str, TokenSplit]
    world: World
    pretrained: ModelConfig
    recorded: bool

    def complete(self) -> dict[str, Any]:
        """Trains, chooses, tests and writes; what an interrupted call had done is found, or done again."""
        config, splits = self.config, self.splits
        tried = [self._try(rate) for rate in config.learning_rates or (config.learning_rate,)]
        best = min(tried, key=lambda one: (one.error, one.config.learning_rate))
        if not math.isfinite(best.error):
            raise Diverged(
                "every learning rate came to losses that are not finite; start another run with lower ones"
            )
        tested = self._tested(best.folder)
        result = {
            "format": FORMAT,
            "version": VERSION,
            "model": str(config.model),
            "tokens": str(config.tokens),
            "seed": config.seed,
            "precision": config.precision,
            "pretrained_resolution": self.pretrained.resolution,
            "resolution": self.data.resolution,
            "rates": [one.to_json() for one in tried],
            **best.to_json(),
            "epochs": best.best_step * config.batch_size / len(splits["train"]),
            "labels_per_class": config.labels_per_class,
            "train_images": len(splits["train"]),
            "validation_images": len(splits["validation"]),
            **tested,
        }
        folder = best.folder
        if config.fold_back:
            folder, steps = self._fold_back(best)
            result |= {**self._tested(folder), "fold_back": {"steps": steps, "before": tested}}
        if self.world.is_main:
            if config.in_folders:
                ImageGPT.from_pretrained(folder / "model").save_pretrained(self.run / "model")
                with atomic_file(self.run / "metrics.jsonl") as temporary:
                    shutil.copyfile(best.folder / "metrics.jsonl", temporary)
                chosen = {"learning_rate": best.config.learning_rate}
                config.model_copy(update=chosen).save(self.run / "config.yaml")
            write_json(self.run / "test.json", {**result, "environment": describe()})
        return result

    def _try(self, rate: float) -> _Tried:
        config = self.config.model_copy(
            update={"learning_rate": rate, "learning_rates": (), "fold_back": False}
        )
        folder = self.run / "rates" / str(rate) if self.config.in_folders else self.run
        try:
            progress = self._train(config, folder, self.splits["train"], "error")
        except Diverged as error:
            if len(self.config.learning_rates) < 2:
                raise
            if self.world.is_main:
                print_line(f"learning rate {rate} is out: {error}")
            return _Tried(config, folder, math.inf, 0)
        assert progress.best is not None, "the last update is validated"
        return _Tried(config, folder, progress.best, progress.best_step)

    def _fold_back(self, best: _Tried) -> tuple[Path, int]:
        """Trains anew on training and validation images, for the chosen epochs rounded up to a whole update.

        Nothing is left to choose by: the model after the last update is kept.
        """
        train = TokenSplit.joined(
            "train+validation", [self.splits["train"], self.data["validation"]]
        )
        steps = -(-best.best_step * len(train) // len(self.splits["train"]))
        config = best.config.model_copy(update={"steps": steps, "validate_every": steps})
        self._train(config, self.run / "fold-back", train, "error_on_trained")
        return self.run / "fold-back", steps

    def _train(
        self, config: FinetuneConfig, folder: Path, train: TokenSplit, error: str
    ) -> TrainingState:
        """One training, from its newest checkpoint if there is one; one that has ended in a folder is not repeated.

        Args:
            error: what the share of wrong validation images is called.
        """
        data, world = self.data, self.world
        if self.config.in_folders and (ended := world.broadcast(_ended(folder))):
            return ended
        gc.collect()  # blocks refer to themselves; those of the training before are in the way
        masked = config.mask_probability or 0.0
        has_loss = self.pretrained.trained_as.has_loss(masked > 0)
        generates = config.generation_weight > 0 and has_loss
        model, checksum = new_classifier(config.model, data, generates=generates)
        batches = Batches(
            train,
            data.resolution,
            config.batch_size,
            config.seed,
            config.flip,
            config.shift,
            world.device,
        )
        engine = Engine(
            model,
            config,
            world,
            partial(classification, generation_weight=config.generation_weight),
        )
        record_run(
            self.run,
            self.config,
            config.tokens,
            resume=self.recorded,
            is_main=world.is_main,
            model_sha256=checksum,
        )
        self.recorded = True
        if self.config.in_folders and world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            config.save(folder / "config.yaml")
        world.barrier()
        validation = self.splits["validation"]
        trainer = Trainer(
            engine,
            batches=partial(
                training_batch, self.pretrained.trained_as, batches, masked, config.seed
            ),
            validation=Validation(
                error, errors, len(validation), partial(validation_batch, validation, world)
            ),
            run=folder,
            warmup=config.warmup(len(train)),
            title=f"fine-tuning at {config.learning_rate:g}",
        )
        return trainer.train(
            resume=True, on_start=partial(self._start_line, model.config, len(train))
        )

    def _tested(self, folder: Path) -> dict[str, Any]:
        config = self.config
        return accuracies(
            folder / "model",
            self.splits["test"],
            self.world,
            config.mask_probability or 0.0,
            config.seed,
        )

    def _start_line(self, shape: ModelConfig, train_images: int, metrics: Metrics) -> None:
        metrics.write(
            "start",
            0,
            source=self.data.manifest["source"],
            parameters=count_parameters(shape),
            train_images=train_images,
            validation_images=len(self.splits["validation"]),
            classes=len(self.data.class_names or ()),
            resolution=shape.resolution,
            pretrained_resolution=self.pretrained.resolution,
        )


def _ended(folder: Path) -> TrainingState | None:
    """How a training ended, if it has."""
    path = folder / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    if not lines or lines[-1]["kind"] != "end" or not (folder / "model").exists():
        return None
    return TrainingState(best=lines[-1]["best"], best_step=lines[-1]["best_step"])
