"""The command line: one function a command, that parses, calls and prints."""

import sys
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from igpt.cli.data import inspect, palette, prepare
from igpt.cli.evaluation import evaluate, features, probe, score
from igpt.cli.run import (
    Commands,
    MaybeOut,
    MaybeOutFolder,
    OutFolder,
    announce,
    file_settings,
    given,
    load_model,
    model_and_run,
    require_writable,
    run_command,
)
from igpt.cli.sampling import app, complete, sample
from igpt.cli.sharing import card, push
from igpt.errors import InputError


def demo(data: str = "digits", out: MaybeOutFolder = None, steps: int | None = None) -> None:
    """Tell the whole story on one data set: palette, tokens, pretraining, probes, completions, samples, report.

    Args:
        data: "digits" (bundled), or any source that `igpt prepare` takes.
        steps: updates of pretraining; fewer for a quick look.
        out: run directory, runs/demo or runs/demo-NAME by default; what is in it already is not
            done again.
    """
    from igpt.cli.demo import tell

    tell(
        data,
        out or Path("runs", "demo" if data == "digits" else f"demo-{Path(data).resolve().name}"),
        steps,
    )


def reproduce(
    out: MaybeOutFolder = None,
    scale: Literal["cpu", "gpu"] = "cpu",
    corpus: str = "zh-plus/tiny-imagenet",
    labelled: str = "uoft-cs/cifar10",
    minutes: float | None = None,
    jobs: int | None = None,
    tokens_only: bool = False,
    rehearsal: bool = False,
) -> None:
    """Ask the paper's questions of one's own images: pretrain, probe, fine-tune, draw, and write one page of answers.

    Args:
        out: folder of it, runs/reproduction-SCALE (or rehearsal-SCALE) by default; what is in it is
            not done again.
        scale: cpu: at most an hour on two cores; gpu: some half an hour on an H100, by arithmetic.
        corpus: unlabelled images to pretrain on, any source that igpt prepare takes; labels it has
            are probed as well.
        labelled: images with labels, to judge by.
        minutes: stop after so many; the same command goes on, from where training was, and with
            other steps anew.
        jobs: steps side by side, two by default.
        tokens_only: prepare the tokens and stop; where the images are not, the same command then
            does the rest.
        rehearsal: every step at toy length, to see that all run.
    """
    from igpt.reproduction.reproduce import reproduce as run
    from igpt.reproduction.scale import scale as named

    asked = out or Path("runs", f"{'rehearsal' if rehearsal else 'reproduction'}-{scale}")
    chosen = named(scale, rehearsal=rehearsal)
    run(asked, chosen, corpus, labelled, minutes=minutes, jobs=jobs, tokens_only=tokens_only)


def plan(preset: Positional[str], flags: Any, out: MaybeOut = None) -> None:
    """Tell what a pretraining run needs: memory, time, and settings that fit into the GPUs.

    Args:
        preset: igpt-s, -m, -l, -l-48, -xl, or another that `igpt pretrain --model` takes.
        out: JSON to write.
    """
    from igpt.files import write_json
    from igpt.planning.plan import PlanConfig
    from igpt.planning.plan import plan as run
    from igpt.training.presets import preset as named

    recipe = {key: value for key, value in named(preset).items() if key in PlanConfig.model_fields}
    found = run(PlanConfig.layered(recipe, given(flags), where="the plan"))
    if out:
        write_json(out, {"preset": preset, **found.to_json()})
    print("\n".join(found.lines(preset, given(flags))))


def pretrain(
    tokens: Positional[Path],
    out: OutFolder,
    flags: Any,
    model: str | None = None,
    config: Path | None = None,
    resume: bool = False,
) -> None:
    """Train a model on tokens without labels.

    Args:
        tokens: token data set (`igpt prepare`).
        out: run directory to make, or to continue with --resume.
        model: preset of shape and recipe: igpt-s, -m, -l, -l-48, -xl, gpu-hour; for CPUs tiny,
            digits, photos, modern.
        config: settings in YAML or JSON over the preset; flags override both.
        resume: continue an interrupted run from its newest whole checkpoint.
    """
    from igpt.training.presets import preset
    from igpt.training.pretrain import PretrainConfig
    from igpt.training.pretrain import pretrain as run

    named = dict(preset(model)) if model else {}
    chosen = {**named, **file_settings(config), "tokens": tokens, **given(flags)}
    settings = PretrainConfig.layered(chosen, where="the settings")
    if not (resume or model or config):
        raise InputError(
            "name a model: --model PRESET (tiny, digits, photos, igpt-s, ...) or --config FILE"
        )
    best = run(settings, out, given={key: getattr(settings, key) for key in chosen}, resume=resume)
    announce(
        f"{best}: the best model by validation loss; next: igpt probe {out} {tokens}; igpt report {out}"
    )


def finetune(
    model: Positional[Path],
    tokens: Positional[Path],
    out: OutFolder,
    flags: Any,
    config: Path | None = None,
    resume: bool = False,
) -> None:
    """Fine-tune a model with a class head on labelled tokens.

    Args:
        model: run or model directory.
        tokens: token data set with labels.
        out: run directory to make, or to continue with --resume.
        config: settings in YAML or JSON; flags override them.
        resume: continue an interrupted run.
    """
    from igpt.training.finetune import FinetuneConfig
    from igpt.training.finetune import finetune as run

    asked = given(flags)
    if "learning_rates" in asked and ("learning_rate" in asked or not asked["learning_rates"]):
        raise InputError(
            "give one --learning-rate, or several to choose from with --learning-rates"
        )
    if "learning_rate" in asked:
        asked["learning_rates"] = ()
    chosen = {**file_settings(config), "model": model_and_run(model)[0], "tokens": tokens, **asked}
    settings = FinetuneConfig.layered(chosen, where="the settings")
    result = run(
        settings, out, given={key: getattr(settings, key) for key in chosen}, resume=resume
    )
    for tried in result["rates"] if len(result["rates"]) > 1 else ():
        reached = tried["validation_accuracy"]
        announce(
            f"learning rate {tried['learning_rate']:g}: "
            + (
                "diverged"
                if reached is None
                else f"validation accuracy {reached:.4f} at step {tried['best_step']}"
            )
        )
    low, high = result["test_interval_95"]
    announce(
        f"{out}/model: test accuracy {result['test_accuracy']:.4f} (95 %: {low:.4f} to {high:.4f}) on "
        f"{result['test_images']} images; learning rate {result['learning_rate']:g} and step {result['best_step']} "
        f"were chosen by validation accuracy {result['validation_accuracy']:.4f}"
    )
    if "modal" in result:
        modal = result["modal"]
        announce(
            f"masked as in training, the modal prediction of {modal['masks']} masks: {modal['accuracy']:.4f}"
        )
    if "fold_back" in result:
        before = result["fold_back"]["before"]["test_accuracy"]
        announce(
            f"this model was trained on validation images too; the one chosen by them has {before:.4f}"
        )


def classify(
    model: Positional[Path],
    images: Positional[tuple[Path, ...]] = (),
    top: int = 3,
    masks: int = 0,
    seed: int = 0,
    out: MaybeOut = None,
) -> None:
    """Tell the likeliest classes of images by a classifier.

    Args:
        model: run or model directory that `igpt finetune` wrote.
        images: image files.
        top: so many classes of each image.
        masks: of BERT models, the most frequent class under so many masks of 15 % of the pixels; 5
            in the paper.
        seed: of the masks.
        out: JSON to write.
    """
    import numpy as np

    from igpt.environment import describe
    from igpt.files import write_json
    from igpt.model.classifier import FORMAT, VERSION, predict
    from igpt.model.images import tokens_of_files

    if not images:
        raise InputError("give image files to classify")
    if top < 1:
        raise InputError(f"--top is at least 1, not {top}")
    if out:
        require_writable(out, FORMAT)
    path = model_and_run(model)[0]
    loaded = load_model(path)
    tokens = tokens_of_files(loaded, images).numpy().astype(np.uint16)
    # All have the row 0: what is said of an image does not depend on what else is asked.
    found = predict(loaded, tokens, np.zeros(len(images), np.int64), masks=masks, seed=seed)
    names = loaded.config.class_names or ()
    answers = []
    for image, (file, ranked) in enumerate(zip(images, found.ranked(), strict=True)):
        classes = [
            {
                "class": names[index],
                "probability": float(found.probabilities[image, index]),
                "votes": int(found.votes[image, index]),
            }
            for index in ranked[:top].tolist()
        ]
        answers.append({"file": str(file), "classes": classes})
        votes = [f" ({one['votes']} of {masks} masks)" if masks else "" for one in classes]
        told = [
            f"{one['class']} {one['probability']:.4f}{said}"
            for one, said in zip(classes, votes, strict=True)
        ]
        print(f"{file}: {', '.join(told)}")
    if out:
        about = {
            "format": FORMAT,
            "version": VERSION,
            "model": str(path),
            "masks": masks,
            "seed": seed,
        }
        write_json(out, {**about, "images": answers, "environment": describe()})


def report(run: Positional[Path]) -> None:
    """Write RUN/report.html: one page with all that a run has shown.

    Args:
        run: run directory.
    """
    from igpt.report.page import write_report

    print(write_report(run))


def import_openai(
    prefix: Positional[Path],
    out: OutFolder,
    clusters: Path | None = None,
    objective: Literal["autoregressive", "bert"] = "autoregressive",
) -> None:
    """Turn one of OpenAI's TensorFlow checkpoints into a model directory.

    Args:
        prefix: checkpoint without its ending, such as model.ckpt-1000000.
        out: model directory to write.
        clusters: kmeans_centers.npy, the palette.
        objective: what the checkpoint was trained as.
    """
    from igpt.locks import exclusive
    from igpt.model.openai import load_openai

    if out.exists():
        raise InputError(f"{out} exists already; remove it or choose another -o")
    loaded = load_openai(prefix, clusters, objective=objective)
    with exclusive(out):
        if out.exists():
            raise InputError(
                f"{out} was made by another process meanwhile; remove it or choose another -o"
            )
        loaded.save_pretrained(out)
    print(
        f"{out}: {sum(parameter.numel() for parameter in loaded.parameters()) / 1e6:.1f} M parameters"
    )


COMMANDS: Commands = {
    "demo": (demo, "igpt.cli.demo"),
    "reproduce": (reproduce, "igpt.reproduction.reproduce"),
    "palette": (palette, "igpt.data.palette_fit:PaletteConfig"),
    "prepare": (prepare, "igpt.data.prepare:PrepareConfig"),
    "inspect": (inspect, "igpt.data.tokens.inspect"),
    "plan": (plan, "igpt.planning.plan:PlanConfig"),
    "pretrain": (pretrain, "igpt.training.pretrain:PretrainConfig"),
    "finetune": (finetune, "igpt.training.finetune:FinetuneConfig"),
    "classify": (classify, "igpt.sampling.grids"),
    "probe": (probe, "igpt.evaluation.probe:ProbeConfig"),
    "score": (score, "igpt.data.image_set:ImageSetConfig"),
    "evaluate": (evaluate, "igpt.evaluation.likelihood"),
    "features": (features, "igpt.data.image_set:ImageSetConfig"),
    "sample": (sample, "igpt.sampling.grids"),
    "complete": (complete, "igpt.sampling.grids"),
    "report": (report, "igpt.report.page"),
    "card": (card, "igpt.report.card"),
    "push": (push, "igpt.report.card"),
    "import": (import_openai, "igpt.model.openai"),
    "app": (app, "igpt.webapp.server"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit code."""
    return run_command(COMMANDS, sys.argv[1:] if arguments is None else arguments)
