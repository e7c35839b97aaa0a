"""The commands of training: plan, pretrain, finetune."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from igpt.api import Run, finetune, pretrain
from igpt.cli.parser import Options, argument, value_of
from igpt.cli.run import is_first_rank
from igpt.errors import InputError
from igpt.remote import shown
from igpt.training.presets import ADAPTING, FOR_CPUS, MODELS, preset

_GROUPS = {
    "data": (
        "resolution",
        "n_colors",
        "labels_per_class",
        "validation_images",
        "test_images",
        "flip",
        "shift",
        "mask_probability",
        "seed",
        "fold_back",
    ),
    "model": (
        "from_model",
        "n_layer",
        "n_embd",
        "n_head",
        "objective",
        "positions",
        "value_residual",
        "start_from_palette",
        "condition",
        "label_dropout",
    ),
    "optimizer": (
        "steps",
        "batch_size",
        "optimizer",
        "share_color_updates",
        "learning_rate",
        "learning_rates",
        "warmup_steps",
        "schedule",
        "betas",
        "weight_decay",
        "generation_weight",
        "grad_clip",
        "max_skipped",
        "patience",
    ),
    "hardware": (
        "device",
        "precision",
        "gpus",
        "gpu",
        "gpu_memory",
        "gpu_tflops",
        "efficiency",
        "micro_batch_size",
        "shard",
        "activation_checkpointing",
        "compile",
    ),
    "logging and checkpoints": (
        "log_every",
        "validate_every",
        "probe_every",
        "probe_tokens",
        "track",
        "checkpoint_every",
        "keep_checkpoints",
        "snapshots",
        "stop_seconds",
    ),
}


class PlanOptions(Options):
    """Predict the memory and time of a pretraining run, and print a command that fits the GPUs."""

    settings = "igpt.planning.plan:PlanConfig"
    example = "igpt plan igpt-l --gpus 8 --gpu H100"
    groups = _GROUPS

    preset: str = argument(
        "igpt-s, igpt-m, igpt-l, igpt-l-48, igpt-xl, or another preset of igpt pretrain --model"
    )
    out: Path | None = Field(None, description="JSON to write")

    @classmethod
    def recipe(cls, words: Sequence[str]) -> tuple[str, Mapping[str, Any]]:
        """Return the preset that a command line names, and what it sets here."""
        name = next((word for word in words if word in MODELS), None)
        return (name, _planned(name)) if name else ("", {})

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        from igpt.files import write_json
        from igpt.planning.plan import PlanConfig
        from igpt.planning.plan import plan as run

        recipe = _planned(self.preset)
        if "gpus" in given:
            recipe.pop("gpu", None)
        found = run(PlanConfig.layered(recipe, given, where="the plan"))
        if self.out:
            write_json(self.out, {"preset": self.preset, **found.to_json()})
        print("\n".join(found.lines(self.preset, given)))


def _planned(name: str) -> dict[str, Any]:
    """Return the settings of a plan that a preset determines.

    Raises:
        InputError: there is no such preset.
    """
    from igpt.planning.plan import CPU, PlanConfig

    found = {key: value for key, value in preset(name).items() if key in PlanConfig.model_fields}
    if name in FOR_CPUS:
        return found | {"gpu": CPU, "resolution": FOR_CPUS[name]}
    return found


class Pretrain(Options):
    """Train a model on tokens, by default without labels."""

    settings = "igpt.training.pretrain:PretrainConfig"
    example = "igpt pretrain tokens/photos --model igpt-s -o runs/photos"
    one_of = ("model", "from_model", "config")
    groups = _GROUPS
    out_is_folder = True

    tokens: Path = argument("token data set (igpt prepare)")
    out: Path = Field(description="run directory to write, or to continue with --resume")
    model: str | None = Field(
        None,
        description="preset of model and training: igpt-s, igpt-m, igpt-l, igpt-l-48, igpt-xl, "
        "gpu-hour; for CPUs: tiny, digits, photos, modern; igpt models lists them",
    )
    config: Path | None = Field(
        None, description="settings in YAML or JSON; they override the preset, flags override both"
    )
    resume: bool = Field(
        False,
        description="continue an interrupted run from its newest intact checkpoint, or a finished "
        "one with more --steps or --patience",
    )
    minutes: float | None = Field(
        None,
        description="stop with a checkpoint after this time; the same command with --resume "
        "continues, for the same time again; the learning-rate schedule is that of --steps",
    )

    @classmethod
    def recipe(cls, words: Sequence[str]) -> tuple[str, Mapping[str, Any]]:
        """Return the preset that a command line names, or the recipe of --from."""
        name = value_of(words, "--model")
        if name is not None:
            return name, preset(name)
        return ("--from", ADAPTING) if value_of(words, "--from") else ("", {})

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        run = pretrain(
            self.tokens,
            self.out,
            model=self.model,
            config=self.config,
            resume=self.resume,
            minutes=self.minutes,
            **given,
        )
        if is_first_rank():
            probing = (
                f"igpt probe {run.path} {shown(self.tokens)}; " if _has_labels(self.tokens) else ""
            )
            print(
                f"{run.path / 'model'}: the best model by validation loss; next: {probing}"
                f"igpt report {run.path}"
            )


def _has_labels(tokens: Path) -> bool:
    """Return whether tokens have classes; also if the data set can no longer be read."""
    from igpt.data.tokens.dataset import TokenDataset

    try:
        return bool(TokenDataset(tokens).class_names)
    except InputError:  # training has succeeded, whatever happened to its data since
        return True


class Finetune(Options):
    """Fine-tune a model with a class head on labelled tokens."""

    settings = "igpt.training.finetune:FinetuneConfig"
    example = "igpt finetune runs/photos tokens/cifar10 -o runs/classes --flip --shift 4"
    groups = _GROUPS
    out_is_folder = True

    model: Path = argument("run, model directory, name of a built-in model, or Hub id")
    tokens: Path = argument("token data set with labels")
    out: Path = Field(description="run directory to write, or to continue with --resume")
    config: Path | None = Field(None, description="settings in YAML or JSON; flags override them")
    resume: bool = Field(False, description="continue an interrupted run")

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        run = finetune(
            self.model, self.tokens, self.out, config=self.config, resume=self.resume, **given
        )
        if is_first_rank():
            print("\n".join(_test_lines(run)))


def _test_lines(run: Run) -> Iterator[str]:
    """Yield what the command prints about the test of a fine-tuned model."""
    result = run.test
    for candidate in result["rates"] if len(result["rates"]) > 1 else ():
        accuracy = candidate["validation_accuracy"]
        yield (
            f"learning rate {candidate['learning_rate']:g}: "
            + (
                "diverged"
                if accuracy is None
                else f"validation accuracy {accuracy:.1%} at step {candidate['best_step']}"
            )
        )
    low, high = result["test_interval_95"]
    yield (
        f"{run.path}/model: test accuracy {result['test_accuracy']:.1%} (95 % interval {low:.1%} "
        f"to {high:.1%}) on {result['test_images']} images; learning rate "
        f"{result['learning_rate']:g} and step {result['best_step']} were selected by "
        f"validation accuracy {result['validation_accuracy']:.1%}"
    )
    if "modal" in result:
        modal = result["modal"]
        yield (
            f"most frequent prediction over {modal['masks']} masks, as in training: "
            f"test accuracy {modal['accuracy']:.1%}"
        )
    if "fold_back" in result:
        before = result["fold_back"]["before"]["test_accuracy"]
        yield (
            "this model was also trained on the validation images; the one selected by them "
            f"has test accuracy {before:.1%}"
        )
