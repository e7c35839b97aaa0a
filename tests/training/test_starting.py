"""Training that starts from a pretrained model, and training a finished run for longer."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from igpt.config import read_settings
from igpt.data.prepare import PrepareConfig, prepare
from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError
from igpt.evaluation.likelihood import score
from igpt.model.classifier import with_head
from igpt.model.resolution import at_resolution
from igpt.model.transformer import ImageGPT
from igpt.training.metrics import read_metrics
from igpt.training.optimizer import learning_rate
from igpt.training.pretrain import PretrainConfig, pretrain

from ..helpers.runs import Command, assert_same_run, has_logged, losses


@pytest.fixture(scope="module")
def smaller(short_run: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """Return the digits at 6 px, in the palette of the 8-px model."""
    settings = PrepareConfig(size=6, palette=str(short_run / "model"))
    return prepare("digits", tmp_path_factory.mktemp("tokens") / "smaller", settings)


def settings(data: TokenDataset, short: dict[str, object], start: Path, **more: object):
    training = {key: value for key, value in short.items() if not key.startswith("n_")}
    return PretrainConfig.layered(training, {"tokens": data.path, "from_model": start, **more})


def test_training_starts_from_the_weights_of_the_model(
    short: dict[str, object], short_run: Path, smaller: TokenDataset, tmp_path: Path
) -> None:
    """With a learning rate of almost 0, the model stays what it was."""
    slow = settings(smaller, short, short_run / "model", steps=1, learning_rate=1e-20)
    trained = ImageGPT.from_pretrained(pretrain(slow, tmp_path / "run"))
    start = at_resolution(ImageGPT.from_pretrained(short_run / "model"), 6)
    assert trained.config == start.config
    for name, tensor in start.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor, rtol=0, atol=1e-8)
    recorded = read_settings(tmp_path / "run" / "config.yaml")
    assert (recorded["n_layer"], recorded["n_embd"]) == (2, 32), "those of the model"
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["model_sha256"]
    (first,) = losses(tmp_path / "run", "validation").values()
    count = short["validation_images"]
    rows = smaller["validation"].spread(count)
    assert first == pytest.approx(score(start, rows).mean(), abs=1e-5)


def test_a_classifier_loses_its_head(
    short: dict[str, object], short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    model = ImageGPT.from_pretrained(short_run / "model")
    with_head(model, ("a", "b"), digits.palette).save_pretrained(tmp_path / "classifier")
    config = settings(digits, short, tmp_path / "classifier", steps=1, validate_every=1)
    trained = ImageGPT.from_pretrained(pretrain(config, tmp_path / "run"))
    assert trained.config.class_names is None


def test_killed_and_resumed_training_from_a_model_is_the_same(
    igpt: Callable, short_run: Path, short_flags: list[str], smaller: TokenDataset, tmp_path: Path
) -> None:
    flags = short_flags[6:]  # without the shape
    words = ["pretrain", smaller.path, "--from", short_run, *flags, "-o"]
    done = igpt(*words, tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    assert "position embeddings: interpolated from 8 to 6 px" in done.stdout
    for name, step in (("early", 3), ("late", 14)):
        command = Command(tmp_path, *words, tmp_path / name)
        command.wait_until(lambda name=name, step=step: has_logged(tmp_path / name, step))
        command.send(signal.SIGKILL)
        command.code()
        again = igpt("pretrain", smaller.path, "-o", tmp_path / name, "--resume")
        assert again.returncode == 0, again.stderr
        assert_same_run(tmp_path / "whole", tmp_path / name, tmp_path)


def test_what_does_not_fit_the_model_is_refused_in_one_line(
    igpt: Callable, short_run: Path, photographs: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    other = prepare(str(photographs), tmp_path / "other", PrepareConfig(size=6, colors=17))
    start = ("--from", short_run)
    for words, said in (
        (
            (other.path, *start),
            f"prepare tokens for this model: igpt prepare {photographs} --size 6 "
            f"--palette {short_run}/model -o {other.path}-for-{short_run.name}",
        ),
        ((digits.path, *start, "--n-layer", 3), "has n_layer = 2, not 3; leave --n-layer out"),
        ((digits.path, *start, "--objective", "bert"), "leave --objective out"),
        ((digits.path, *start, "--model", "tiny"), "leave --model out"),
        ((digits.path, *start, "--start-from-palette"), "--start-from-palette is for new models"),
        ((digits.path, "--from", tmp_path / "none"), "no model directory"),
    ):
        done = igpt("pretrain", *words, "-o", tmp_path / "run")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert said in done.stderr
        assert not (tmp_path / "run").exists()


def test_more_steps_with_a_constant_rate_equal_an_uninterrupted_run(
    short: dict[str, object], digits: TokenDataset, tmp_path: Path
) -> None:
    whole = PretrainConfig.layered(short, {"tokens": digits.path, "schedule": "constant"})
    half = whole.model_copy(update={"steps": 16})
    pretrain(whole, tmp_path / "whole")
    pretrain(half, tmp_path / "longer")
    pretrain(whole, tmp_path / "longer", given={"steps": 24}, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "longer", tmp_path)
    assert read_settings(tmp_path / "longer" / "config.yaml")["steps"] == 24
    with pytest.raises(InputError, match="was started with steps = 24, not 20"):
        pretrain(half, tmp_path / "longer", given={"steps": 20}, resume=True)


def test_more_steps_continue_with_the_schedule_of_all_steps(
    igpt: Callable, short_flags: list[str], short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    """A cosine that has ended at 0 rises to the rate that a longer run has at that step."""
    for name in ("longer", "killed"):
        shutil.copytree(short_run, tmp_path / name)
    words = ["pretrain", digits.path, "--resume", "--steps", 40, "-o"]
    assert igpt(*words, tmp_path / "longer").returncode == 0
    rates = {
        line["step"]: line["learning_rate"]
        for line in read_metrics(tmp_path / "longer" / "metrics.jsonl")
        if line["kind"] == "train"
    }
    for step, total in ((23, 24), (24, 40), (39, 40)):
        expected = learning_rate(step, peak=3e-3, warmup=4, total=total, schedule="cosine")
        assert rates[step + 1] == expected
    command = Command(tmp_path, *words, tmp_path / "killed")
    command.wait_until(lambda: has_logged(tmp_path / "killed", 33))
    command.send(signal.SIGKILL)
    command.code()
    again = igpt("pretrain", digits.path, "-o", tmp_path / "killed", "--resume")
    assert again.returncode == 0, again.stderr
    assert_same_run(tmp_path / "longer", tmp_path / "killed", tmp_path)
