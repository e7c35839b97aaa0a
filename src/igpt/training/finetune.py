"""Fine-tuning: train a model and a class head, with early stopping (paper, section 2.3).

RUN/               config.yaml, environment.json, metrics.jsonl, model/, test.json, and checkpoints/
                   unless there are the following folders
RUN/rates/RATE/    one training per learning rate: config.yaml, metrics.jsonl, checkpoints/, model/
RUN/fold-back/     the same for a last training, on training and validation images
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

from igpt.config import PathOrUrl
from igpt.data.tokens.batches import Batches
from igpt.data.tokens.dataset import TokenDataset, TokenSplit
from igpt.data.tokens.labels import require_classes, subset_per_class
from igpt.data.tokens.manifest import SPLITS
from igpt.environment import RunKind, describe
from igpt.errors import InputError
from igpt.files import atomic_file, write_json
from igpt.model.classifier import MASKED, classification
from igpt.model.config import ModelConfig
from igpt.model.cost import count_parameters, head_parameters
from igpt.model.directory import weights_sha256
from igpt.model.transformer import ImageGPT
from igpt.progress import print_line, progress_bar
from igpt.remote import shown
from igpt.training.checkpoints import TrainingState
from igpt.training.classification import (
    accuracies,
    errors,
    new_classifier,
    training_batch,
    validation_batch,
)
from igpt.training.distributed import World
from igpt.training.engine import Engine
from igpt.training.memory import require_memory
from igpt.training.metrics import Metrics, read_metrics
from igpt.training.optimizer import Schedule
from igpt.training.pretrained import pretrained_model
from igpt.training.run_directory import open_run, record_run
from igpt.training.settings import HIGHEST_RATE, MOST, TrainConfig
from igpt.training.trackers import EXAMPLES
from igpt.training.trainer import Diverged, Trainer, Validation

FORMAT, VERSION = "igpt-finetune", 1


class FinetuneConfig(TrainConfig):
    """Settings of fine-tuning; the paper's learning rate: constant, a tenth of pretraining's."""

    kind: ClassVar[RunKind] = "finetune"

    model: Path = Field(description="pretrained model directory")
    tokens: PathOrUrl = Field(description="token data set with labels: a folder, or a URL (s3://)")
    generation_weight: float = Field(
        1.0,
        ge=0,
        le=1e6,
        description="weight of the generative loss, in addition to the class loss",
    )
    mask_probability: float | None = Field(
        None,
        ge=0,
        lt=1,
        description=f"share of pixels masked for BERT models, {MASKED} by default; 0: no masks",
    )
    flip: bool = Field(False, description="mirror images at random, as the paper does on CIFAR")
    shift: int = Field(
        0,
        ge=0,
        le=MOST,
        description="shift images at random by up to this many pixels, with reflected borders; "
        "4 on CIFAR",
    )
    steps: int = Field(10_000, ge=1, le=MOST, description="maximum number of optimizer steps")
    learning_rate: float = Field(3e-4, gt=0, le=HIGHEST_RATE, description="learning rate")
    learning_rates: tuple[Annotated[float, Field(gt=0, le=HIGHEST_RATE)], ...] = Field(
        (),
        description="train with each of these instead, and select by validation accuracy",
    )
    labels_per_class: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="train on a random subset with this many images per class, the same subset as "
        "the first subset of `igpt probe`",
    )
    validation_images: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="maximum number of validation images, spread evenly over the split",
    )
    test_images: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="maximum number of test images, spread evenly over the split",
    )
    fold_back: bool = Field(
        False,
        description="train again on training and validation images, with the selected learning "
        "rate and number of epochs",
    )
    schedule: Schedule = Field("constant", description="learning-rate schedule after the warm-up")
    validate_every: int = Field(
        250, ge=1, le=MOST, description="steps between validations; the best model is kept"
    )
    checkpoint_every: int = Field(250, ge=1, le=MOST, description="steps between checkpoints")
    patience: int | None = Field(
        5, ge=1, le=MOST, description="stop after this many validations without improvement"
    )

    @field_validator("learning_rates")
    @classmethod
    def _are_distinct(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(rates)) < len(rates):
            raise ValueError("a learning rate is named twice")
        return rates

    @property
    def in_folders(self) -> bool:
        """Whether every training has its own folder in the run directory."""
        return bool(self.learning_rates) or self.fold_back


def finetune(
    config: FinetuneConfig,
    run: Path,
    *,
    given: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Fine-tune a model on a labelled data set, or resume an interrupted run.

    A BERT model is trained on masked images, and evaluated on whole ones. If the tokens have
    another resolution than the model, its position embeddings are interpolated.

    Args:
        run: run directory. RUN/model becomes the best classifier by validation accuracy; with
            `fold_back`, the one trained on validation images too.
        given: settings that must equal the recorded ones when resuming (default: the tokens alone).
        resume: continue `run` with its recorded settings. Completed trainings are not repeated; one
            that diverged is, from its newest checkpoint and with the same result.

    Returns:
        the content of RUN/test.json: test accuracy with its interval, the learning rates tried, and
        the selected one.

    Raises:
        InputError: model and tokens do not match or have changed, labels are missing or do not
            suffice, every learning rate diverged, another process works in the directory, or the
            model or a batch does not fit into memory.
        Interrupted: on Ctrl-C or SIGTERM, after saving.
    """
    with open_run(run, config, given, resume) as (config, world):
        if config.fold_back and config.schedule != "constant":
            raise InputError(
                "--fold-back repeats a constant rate; leave --schedule or --fold-back out"
            )
        if config.fold_back and config.labels_per_class:
            raise InputError(
                "--fold-back would add all validation labels to --labels-per-class; "
                "leave one of them out"
            )
        data = TokenDataset(config.tokens)
        if data.class_names is None:
            raise InputError(f"{shown(config.tokens)} has no classes; fine-tuning needs labels")
        splits = {name: data[name] for name in SPLITS}
        require_classes(splits, len(data.class_names), "fine-tuning")
        if config.labels_per_class:
            labels, seed = splits["train"].labels, (config.seed, config.labels_per_class, 0)
            splits["train"] = splits["train"].subset(
                subset_per_class(labels, config.labels_per_class, seed)
            )
        splits["validation"] = splits["validation"].spread(config.validation_images)
        splits["test"] = splits["test"].spread(config.test_images)
        pretrained = pretrained_model(config.model, data)
        masked = _mask_probability(config, pretrained.config)
        config = config.model_copy(update={"mask_probability": masked})
        checksum, shape = weights_sha256(pretrained.state_dict()), pretrained.config
        require_memory(
            shape.model_copy(update={"resolution": data.resolution}),
            config,
            world,
            frozen=head_parameters(shape),
        )
        del pretrained  # every training changes the weights, and reads them itself
        if resume:
            record_run(
                run,
                config,
                data.path,
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
            f"--mask-probability is for BERT models; this one is {pretrained.objective}, and "
            "nothing is masked"
        )
    return 0.0


@dataclass(frozen=True)
class _Tried:
    """A training with one learning rate; its lowest validation error is inf if it diverged."""

    config: FinetuneConfig
    folder: Path
    error: float
    best_step: int

    def to_json(self) -> dict[str, Any]:
        accuracy = 1 - self.error if math.isfinite(self.error) else None
        rate = self.config.learning_rate
        return {"learning_rate": rate, "validation_accuracy": accuracy, "best_step": self.best_step}


def _accuracy_text(error: float) -> str:
    return f"accuracy {1 - error:.1%}" if math.isfinite(error) else f"accuracy {error}"


@dataclass
class _Finetuning:
    """One or several trainings of the same model, and the test of the best one.

    Args:
        splits: images for training, validation and test.
        pretrained: configuration of the pretrained model.
        recorded: whether the run directory has its settings already.
    """

    config: FinetuneConfig
    run: Path
    data: TokenDataset
    splits: Mapping[str, TokenSplit]
    world: World
    pretrained: ModelConfig
    recorded: bool

    def complete(self) -> dict[str, Any]:
        """Train, select, test, and write the results; completed trainings are not repeated."""
        config, splits = self.config, self.splits
        tried = [self._try(rate) for rate in config.learning_rates or (config.learning_rate,)]
        best = min(tried, key=lambda one: (one.error, one.config.learning_rate))
        if not math.isfinite(best.error):
            raise Diverged(
                "every learning rate led to losses that are not finite; "
                "start another run with lower ones"
            )
        tested = self._test(best.folder)
        result = {
            "format": FORMAT,
            "version": VERSION,
            "model": str(config.model),
            "tokens": shown(config.tokens),
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
            counted = ("class_names", "confusion")
            before = {key: value for key, value in tested.items() if key not in counted}
            result |= {**self._test(folder), "fold_back": {"steps": steps, "before": before}}
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
            state = self._train(config, folder, self.splits["train"], "error")
        except Diverged as error:
            if len(self.config.learning_rates) < 2:
                raise
            if self.world.is_main:
                print_line(f"learning rate {rate} diverged: {error}")
            return _Tried(config, folder, math.inf, 0)
        assert state.best is not None, "the last step is validated"
        return _Tried(config, folder, state.best, state.best_step)

    def _fold_back(self, best: _Tried) -> tuple[Path, int]:
        """Train again on training and validation images, for as many epochs as the best training.

        No images are left to select a model by, so the one after the last step is kept.
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
        """Train once, or resume; a completed training is not repeated.

        Args:
            error: name of the validation error in metrics.jsonl.
        """
        data, world = self.data, self.world
        if self.config.in_folders and (ended := world.broadcast(_final_state(folder))):
            return ended
        gc.collect()  # blocks have reference cycles, and those of the previous training take memory
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
            self.data.path,
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
                error,
                _accuracy_text,
                errors,
                len(validation),
                partial(validation_batch, validation, world),
            ),
            run=folder,
            warmup=config.warmup(len(train)),
            title=f"fine-tuning at {config.learning_rate:g}",
            examples=validation.rows(range(min(EXAMPLES, len(validation)))) if generates else None,
        )
        return trainer.train(
            resume=True, on_start=partial(self._write_start, model.config, len(train))
        )

    def _test(self, folder: Path) -> dict[str, Any]:
        config = self.config
        with progress_bar(quiet=not self.world.is_main) as show:
            return accuracies(
                folder / "model",
                self.splits["test"],
                self.world,
                config.mask_probability or 0.0,
                config.seed,
                show,
            )

    def _write_start(self, shape: ModelConfig, train_images: int, metrics: Metrics) -> None:
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


def _final_state(folder: Path) -> TrainingState | None:
    """Return the final state of a training, or None if it has not ended."""
    path = folder / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    if not lines or lines[-1]["kind"] != "end" or not (folder / "model").exists():
        return None
    return TrainingState(best=lines[-1]["best"], best_step=lines[-1]["best_step"])
