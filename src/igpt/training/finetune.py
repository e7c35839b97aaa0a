"""Fine-tunes a whole model with a class head until the validation accuracy no longer rises (paper, section 2.3)."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from igpt.data.batches import Batch, Batches, to_device
from igpt.data.tokens import TokenDataset, TokenSplit
from igpt.errors import InputError
from igpt.files import write_json
from igpt.model.cost import count_parameters
from igpt.model.objectives import Summed, classification
from igpt.model.precision import settle_precision
from igpt.model.transformer import ImageGPT
from igpt.training.distributed import Team, team
from igpt.training.engine import Engine
from igpt.training.metrics import Metrics
from igpt.training.optimizer import Schedule
from igpt.training.run import record_run, settle_config
from igpt.training.settings import TrainConfig
from igpt.training.trainer import Trainer, Validation

_BATCH = 256  # images at a time when nothing is kept for a backward pass


class FinetuneConfig(TrainConfig):
    """A fine-tuning run: the paper's constant rate, a tenth of pretraining's, and early stopping."""

    model: Path = Field(description="pretrained model directory")
    tokens: Path = Field(description="token data set with labels")
    generation_weight: float = Field(1.0, ge=0, description="weight of the generative loss beside the class loss")
    flip: bool = Field(False, description="mirror images at random; the paper does on CIFAR")
    shift: int = Field(0, ge=0, description="reflect-pad by so many pixels and crop at random; 4 on CIFAR")
    steps: int = Field(10_000, ge=1, description="updates at most")
    learning_rate: float = Field(3e-4, gt=0, description="learning rate")
    schedule: Schedule = Field("constant", description="how the learning rate goes on from its peak")
    validate_every: int = Field(250, ge=1, description="updates between validations; the best model is kept")
    checkpoint_every: int = Field(250, ge=1, description="updates between checkpoints")
    patience: int | None = Field(5, ge=1, description="stop after so many validations without a better one")


def finetune(
    config: FinetuneConfig, run: Path, *, given: Mapping[str, Any] | None = None, resume: bool = False
) -> dict[str, Any]:
    """Fine-tunes a model on a labelled data set, or continues an interrupted run.

    Args:
        run: the run directory; RUN/model becomes the best classifier by validation accuracy.
        given: settings that must be the recorded ones when resuming (default: the tokens alone).
        resume: continue `run` with its recorded settings.

    Returns:
        what RUN/test.json holds: test accuracy, images, and the update the classifier was chosen at.

    Raises:
        InputError: model and tokens do not match, or labels are missing.
        Interrupted: on Ctrl-C or SIGTERM, after saving.
    """
    with team(config.device) as us:
        config = settle_config(run, config, {"tokens": config.tokens} if given is None else given, resume)
        us.wait()  # no rank may take the directory that another makes for an old one
        data = TokenDataset(config.tokens)
        if data.class_names is None:
            raise InputError(f"{config.tokens} has no classes; fine-tuning needs labels")
        for name in ("train", "validation", "test"):
            data[name].require_images("fine-tuning")
            data[name].require_labels("fine-tuning")
        precision = us.tell(settle_precision(config.precision, us.device))  # measured: ranks may differ
        config = config.model_copy(update={"precision": precision})
        torch.manual_seed(config.seed)
        model = _with_head(config, data)
        train = Batches(
            data["train"], data.resolution, config.batch_size, config.seed, config.flip, config.shift, us.device
        )
        engine = Engine(model, config, us, partial(classification, generation_weight=config.generation_weight))
        record_run(run, config, config.tokens, resume=resume, leads=us.leads)
        us.wait()
        validation = data["validation"]
        trainer = Trainer(
            engine,
            batches=partial(_batch, train),
            validation=Validation("error", _errors, len(validation), partial(_validation_batch, validation, us)),
            run=run,
            warmup=config.warmup(len(train.split)),
            title="fine-tuning",
        )
        progress = trainer.train(resume=resume, on_start=partial(_start_line, model, data))
    best = ImageGPT.from_pretrained(run / "model").to(us.device)
    result = {
        "test_accuracy": accuracy(best, data["test"]),
        "test_images": len(data["test"]),
        "validation_accuracy": 1 - (progress.best or 0.0),
        "best_step": progress.best_step,
    }
    if us.leads:
        write_json(run / "test.json", result)
    return result


def _with_head(config: FinetuneConfig, data: TokenDataset) -> ImageGPT:
    """The pretrained weights with a class head that starts at zero."""
    pretrained = ImageGPT.from_pretrained(config.model)
    if pretrained.config.resolution != data.resolution:
        raise InputError(
            f"the model sees {pretrained.config.resolution} px, {config.tokens} has {data.resolution} px; prepare the "
            f"images with --size {pretrained.config.resolution}"
        )
    if pretrained.palette is not None:
        pretrained.palette.require_same(data.palette, "the model", str(config.tokens))
    shape = pretrained.config.model_copy(update={"class_names": tuple(data.class_names or ())})
    model = ImageGPT(shape, data.palette)
    trunk = {name: tensor for name, tensor in pretrained.state_dict().items() if name != "score.weight"}
    model.load_state_dict(trunk, strict=False)
    if shape.objective == "bert" or not config.generation_weight:
        model.lm_head.requires_grad_(False)  # nothing in the loss reads it
    return model


def _batch(train: Batches, step: int) -> Batch:
    return train.tokens(step), train.labels(step)


def _validation_batch(split: TokenSplit, us: Team, first: int, last: int) -> Batch:
    rows = np.arange(first, last)
    arrays = split.rows(rows), split.labels_of(rows)
    return tuple(to_device(array.astype(np.int64), us.device) for array in arrays)


def _errors(model: ImageGPT, tokens: Tensor, labels: Tensor) -> Summed:
    """Images [B] whose likeliest class is not their label."""
    return (_logits(model, tokens).argmax(dim=1) != labels).sum(), len(tokens)


def _logits(model: ImageGPT, tokens: Tensor) -> Tensor:
    logits: Tensor = model.score(model.hidden(tokens).mean(dim=1)).float()
    return logits


@torch.inference_mode()
def class_logits(model: ImageGPT, tokens: NDArray[np.uint16]) -> Tensor:
    """Logits of the classes, [N, C], of token images [N, n], all at once."""
    return _logits(model, to_device(tokens.astype(np.int64), model.wte.weight.device))


def accuracy(model: ImageGPT, split: TokenSplit) -> float:
    """Share of a split's images whose likeliest class is their label."""
    right = 0
    for first in range(0, len(split), _BATCH):
        rows = np.arange(first, min(first + _BATCH, len(split)))
        predicted = class_logits(model, split.rows(rows)).argmax(dim=1).cpu().numpy()
        right += int((predicted == split.labels_of(rows)).sum())
    return right / len(split)


def _start_line(model: ImageGPT, data: TokenDataset, metrics: Metrics) -> None:
    metrics.write(
        "start",
        0,
        source=data.manifest["source"],
        parameters=count_parameters(model.config),
        train_images=len(data["train"]),
        validation_images=len(data["validation"]),
        classes=len(data.class_names or ()),
    )
