"""Fine-tunes a whole model with a class head until the validation accuracy no longer rises (paper, section 2.3).

RUN/               config.yaml, environment.json, metrics.jsonl, model/, test.json; checkpoints/ if nothing is below
RUN/rates/RATE/    a training at each of several learning rates: config.yaml, metrics.jsonl, checkpoints/, model/
RUN/fold-back/     the same, of the last training on training and validation images

B images of a batch, n places.
"""

import gc
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor

from igpt.confidence import accuracy_of, packed
from igpt.data.batches import Batch, Batches, to_device
from igpt.data.tokens import SPLITS, TokenDataset, TokenSplit, few_of_each, require_classes
from igpt.environment import describe
from igpt.errors import InputError
from igpt.files import atomic_file, write_json
from igpt.model.checkpoint import weights_sha256
from igpt.model.classifier import MASKED, class_logits, predict, with_head
from igpt.model.cost import count_parameters
from igpt.model.objectives import Summed, classification, draw_masks
from igpt.model.precision import settle_precision
from igpt.model.resolution import at_resolution
from igpt.model.transformer import ImageGPT, ModelConfig
from igpt.training.distributed import Team, team
from igpt.training.engine import Engine
from igpt.training.metrics import Metrics, read_metrics
from igpt.training.optimizer import Schedule
from igpt.training.run import record_run, settle_config
from igpt.training.settings import TrainConfig
from igpt.training.state import Progress
from igpt.training.trainer import Diverged, Trainer, Validation

FORMAT, VERSION = "igpt-finetune", 1
_MODAL_MASKS = 5  # paper, section 4.6


class FinetuneConfig(TrainConfig):
    """A fine-tuning run: the paper's constant rate, a tenth of pretraining's, and early stopping."""

    model: Path = Field(description="pretrained model directory")
    tokens: Path = Field(description="token data set with labels")
    generation_weight: float = Field(1.0, ge=0, description="weight of the generative loss beside the class loss")
    mask_probability: float | None = Field(
        None, ge=0, lt=1, description=f"share of pixels masked for BERT models, {MASKED} by default; 0 masks none"
    )
    flip: bool = Field(False, description="mirror images at random; the paper does on CIFAR")
    shift: int = Field(0, ge=0, description="reflect-pad by so many pixels and crop at random; 4 on CIFAR")
    steps: int = Field(10_000, ge=1, description="updates at most")
    learning_rate: float = Field(3e-4, gt=0, description="learning rate")
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (), description="several, in place of one: a run for each, of which validation accuracy chooses"
    )
    labels_per_class: int | None = Field(
        None,
        ge=1,
        description="train on so few images of each class only, drawn by seed as the first draw of igpt probe is",
    )
    validation_images: int | None = Field(None, ge=1, description="at most so many, spread evenly over the split")
    test_images: int | None = Field(None, ge=1, description="at most so many, spread evenly over the split")
    fold_back: bool = Field(
        False, description="train anew on training and validation images, at the rate and for the epochs chosen"
    )
    schedule: Schedule = Field("constant", description="how the learning rate goes on from its peak")
    validate_every: int = Field(250, ge=1, description="updates between validations; the best model is kept")
    checkpoint_every: int = Field(250, ge=1, description="updates between checkpoints")
    patience: int | None = Field(5, ge=1, description="stop after so many validations without a better one")

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
    config: FinetuneConfig, run: Path, *, given: Mapping[str, Any] | None = None, resume: bool = False
) -> dict[str, Any]:
    """Fine-tunes a model on a labelled data set, or continues an interrupted run.

    A BERT model is trained on masked images and judged on whole ones. Where the tokens' resolution is not the model's,
    its position embeddings are interpolated.

    Args:
        run: the run directory; RUN/model becomes the best classifier by validation accuracy, or with `fold_back` the
            one trained on validation images too.
        given: settings that must be the recorded ones when resuming (default: the tokens alone).
        resume: continue `run` with its recorded settings; learning rates that have come to their end are not repeated
            (one that diverged goes on from its newest checkpoint, to the same end).

    Returns:
        what RUN/test.json holds: test accuracy with its interval, the learning rates tried, and the chosen one.

    Raises:
        InputError: model and tokens do not match or have changed, labels are missing, the classes do not allow it, or
            every learning rate diverged.
        Interrupted: on Ctrl-C or SIGTERM, after saving.
    """
    with team(config.device) as us:
        config = settle_config(run, config, {"tokens": config.tokens} if given is None else given, resume)
        us.wait()  # no rank may take the directory that another makes for an old one
        if config.fold_back and config.schedule != "constant":
            raise InputError("--fold-back repeats a constant rate; leave --schedule or --fold-back out")
        if config.fold_back and config.labels_per_class:
            raise InputError("--fold-back would add every validation label to the few; leave it out")
        data = TokenDataset(config.tokens)
        if data.class_names is None:
            raise InputError(f"{config.tokens} has no classes; fine-tuning needs labels")
        splits = {name: data[name] for name in SPLITS}
        require_classes(splits, len(data.class_names), "fine-tuning")
        if config.labels_per_class:
            labels, seed = splits["train"].labels, (config.seed, config.labels_per_class, 0)
            splits["train"] = splits["train"].subset(few_of_each(labels, config.labels_per_class, seed))
        splits["validation"] = splits["validation"].spread(config.validation_images)
        splits["test"] = splits["test"].spread(config.test_images)
        pretrained = _pretrained(config, data)
        precision = us.tell(settle_precision(config.precision, us.device))  # measured: ranks may differ
        masked = _mask_probability(config, pretrained.config)
        config = config.model_copy(update={"precision": precision, "mask_probability": masked})
        checksum, shape = weights_sha256(pretrained.state_dict()), pretrained.config
        del pretrained  # every training reads the weights anew, for it changes them
        if resume:
            record_run(run, config, config.tokens, resume=True, leads=us.leads, model_sha256=checksum)
        if us.leads and shape.resolution != data.resolution:
            print(f"position embeddings: interpolated from {shape.resolution} to {data.resolution} px")
        return _Finetuning(config, run, data, splits, us, shape, recorded=resume).complete()


def _mask_probability(config: FinetuneConfig, pretrained: ModelConfig) -> float:
    if pretrained.objective == "bert":
        return MASKED if config.mask_probability is None else config.mask_probability
    if config.mask_probability:
        raise InputError("--mask-probability is for BERT models; this one is autoregressive, and nothing is masked")
    return 0.0


def _pretrained(config: FinetuneConfig, data: TokenDataset) -> ImageGPT:
    model = ImageGPT.from_pretrained(config.model)
    if model.palette is not None:
        model.palette.require_same(data.palette, "the model", str(config.tokens))
    broken = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise InputError(f"the weights in {config.model} are broken: {broken[0]} is not finite ({len(broken)} such)")
    return model


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
    us: Team
    pretrained: ModelConfig
    recorded: bool

    def complete(self) -> dict[str, Any]:
        """Trains, chooses, tests and writes; what an interrupted call had done is found, or done again."""
        config, splits = self.config, self.splits
        tried = [self._try(rate) for rate in config.learning_rates or (config.learning_rate,)]
        best = min(tried, key=lambda one: (one.error, one.config.learning_rate))
        if not math.isfinite(best.error):
            raise Diverged("every learning rate came to losses that are not finite; start another run with lower ones")
        tested = self._tested(best.folder / "model")
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
            result |= {**self._tested(folder / "model"), "fold_back": {"steps": steps, "before": tested}}
        if self.us.leads:
            if config.in_folders:
                ImageGPT.from_pretrained(folder / "model").save_pretrained(self.run / "model")
                with atomic_file(self.run / "metrics.jsonl") as temporary:
                    shutil.copyfile(best.folder / "metrics.jsonl", temporary)
                chosen = {"learning_rate": best.config.learning_rate}
                config.model_copy(update=chosen).save(self.run / "config.yaml")
            write_json(self.run / "test.json", {**result, "environment": describe()})
        return result

    def _try(self, rate: float) -> _Tried:
        config = self.config.model_copy(update={"learning_rate": rate, "learning_rates": (), "fold_back": False})
        folder = self.run / "rates" / str(rate) if self.config.in_folders else self.run
        try:
            progress = self._train(config, folder, self.splits["train"], "error")
        except Diverged as error:
            if len(self.config.learning_rates) < 2:
                raise
            if self.us.leads:
                print(f"learning rate {rate} is out: {error}")
            return _Tried(config, folder, math.inf, 0)
        assert progress.best is not None, "the last update is validated"
        return _Tried(config, folder, progress.best, progress.best_step)

    def _fold_back(self, best: _Tried) -> tuple[Path, int]:
        """Trains anew on training and validation images, for the chosen epochs rounded up to a whole update.

        Nothing is left to choose by: the model after the last update is kept.
        """
        train = TokenSplit.joined("train+validation", [self.splits["train"], self.data["validation"]])
        steps = -(-best.best_step * len(train) // len(self.splits["train"]))
        config = best.config.model_copy(update={"steps": steps, "validate_every": steps})
        self._train(config, self.run / "fold-back", train, "error_on_trained")
        return self.run / "fold-back", steps

    def _train(self, config: FinetuneConfig, folder: Path, train: TokenSplit, error: str) -> Progress:
        """One training, from its newest checkpoint if there is one; one that has ended in a folder is not repeated.

        Args:
            error: what the share of wrong validation images is called.
        """
        data, us = self.data, self.us
        if self.config.in_folders and (ended := us.tell(_ended(folder))):
            return ended
        gc.collect()  # blocks refer to themselves; those of the training before are in the way
        model, checksum = _classifier(config, data)
        batches = Batches(train, data.resolution, config.batch_size, config.seed, config.flip, config.shift, us.device)
        engine = Engine(model, config, us, partial(classification, generation_weight=config.generation_weight))
        record_run(self.run, self.config, config.tokens, resume=self.recorded, leads=us.leads, model_sha256=checksum)
        self.recorded = True
        if self.config.in_folders and us.leads:
            folder.mkdir(parents=True, exist_ok=True)
            config.save(folder / "config.yaml")
        us.wait()
        validation = self.splits["validation"]
        trainer = Trainer(
            engine,
            batches=partial(_batch, batches, config),
            validation=Validation(error, _errors, len(validation), partial(_validation_batch, validation, us)),
            run=folder,
            warmup=config.warmup(len(train)),
            title=f"fine-tuning at {config.learning_rate:g}",
        )
        return trainer.train(resume=True, on_start=partial(self._start_line, model.config, len(train)))

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

    def _tested(self, path: Path) -> dict[str, Any]:
        """Accuracy on the test images; of a BERT model trained on masked images, that of its modal prediction too."""
        test, us = self.splits["test"], self.us
        model = ImageGPT.from_pretrained(path).to(us.device)
        rows = np.array_split(np.arange(len(test)), us.size)[us.rank]

        def right(**masking: Any) -> NDArray[np.bool_]:
            answers = torch.zeros(len(test), dtype=torch.int32, device=us.device)
            hits = predict(model, test.rows(rows), rows, **masking).classes == test.labels_of(rows)
            answers[torch.from_numpy(rows)] = torch.from_numpy(hits).to(answers)
            return us.sum(answers).cpu().numpy().astype(bool)

        whole = right()
        result: dict[str, Any] = {f"test_{key}": value for key, value in accuracy_of(whole).items()}
        result["test_right"] = packed(whole)
        if self.config.mask_probability:
            masking = {"masks": _MODAL_MASKS, "probability": self.config.mask_probability, "seed": self.config.seed}
            result["modal"] = {**masking, **accuracy_of(right(**masking))}
        return result


def _ended(folder: Path) -> Progress | None:
    """How a training ended, if it has."""
    path = folder / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    if not lines or lines[-1]["kind"] != "end" or not (folder / "model").exists():
        return None
    return Progress(best=lines[-1]["best"], best_step=lines[-1]["best_step"])


def _classifier(config: FinetuneConfig, data: TokenDataset) -> tuple[ImageGPT, str]:
    """The pretrained weights at the tokens' resolution, with a class head that starts at zero; their checksum."""
    pretrained = _pretrained(config, data)
    checksum = weights_sha256(pretrained.state_dict())
    model = with_head(at_resolution(pretrained, data.resolution), tuple(data.class_names or ()), data.palette)
    if not config.generation_weight or (model.config.objective == "bert" and not config.mask_probability):
        model.lm_head.requires_grad_(False)  # nothing in the loss reads it
    return model, checksum


def _batch(batches: Batches, config: FinetuneConfig, step: int) -> Batch:
    tokens, labels = batches.tokens(step), batches.labels(step)
    if not config.mask_probability:
        return tokens, labels
    generator = np.random.default_rng((config.seed, step, 2))
    masks = draw_masks((len(tokens), tokens.shape[1]), config.mask_probability, generator)
    return tokens, labels, to_device(masks, batches.device)


def _validation_batch(split: TokenSplit, us: Team, first: int, last: int) -> Batch:
    rows = np.arange(first, last)
    arrays = split.rows(rows), split.labels_of(rows)
    return tuple(to_device(array.astype(np.int64), us.device) for array in arrays)


def _errors(model: ImageGPT, tokens: Tensor, labels: Tensor) -> Summed:
    """Images [B] whose likeliest class is not their label, NaN where logits are not finite; nothing is masked."""
    logits = class_logits(model, tokens)
    wrong = (logits.argmax(dim=1) != labels).sum().double()
    return torch.where(logits.isfinite().all(), wrong, torch.nan), len(tokens)
