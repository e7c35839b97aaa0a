"""Features measured during training: the numbers, that nothing else changes, and resuming."""

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from igpt.data.prepare import PrepareConfig, prepare
from igpt.data.tokens.dataset import TokenDataset
from igpt.evaluation.feature_quality import effective_rank, quality_images
from igpt.evaluation.results import read_probe
from igpt.training.checkpoints import _digest, checkpoints
from igpt.training.metrics import read_metrics
from igpt.training.pretrain import PretrainConfig, pretrain

from ..helpers.runs import Command, assert_same_run, has_logged


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == kind]


@pytest.fixture(scope="module")
def probed(
    digits: TokenDataset, short: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the short run with measurements every 10 steps."""
    run = tmp_path_factory.mktemp("runs") / "probed"
    pretrain(PretrainConfig.layered({**short, "tokens": digits.path, "probe_every": 10}), run)
    return run


def test_training_is_the_same_with_and_without(
    short_run: Path, probed: Path, tmp_path: Path
) -> None:
    assert [line["step"] for line in lines(probed, "probe")] == [0, 10, 20, 24]
    assert_same_run(short_run, probed, tmp_path)
    assert not lines(short_run, "probe"), "it is off by default"
    norms = [[line["grad_norm"] for line in lines(run, "train")] for run in (short_run, probed)]
    assert norms[0] == norms[1]
    keys = [(run / "environment.json").read_text() for run in (short_run, probed)]
    assert ["probe_tokens" in text for text in keys] == [False, True]


def test_the_numbers_are_those_of_igpt_probe(
    igpt: Any, digits: TokenDataset, probed: Path, tmp_path: Path
) -> None:
    """The best model is that of the last step, whose middle layer is 1 of 0 to 2."""
    words = ("--layers", 1, "--knn", 20, "--no-baselines", "-o", tmp_path / "probe.json")
    assert igpt("probe", probed, digits.path, *words).returncode == 0
    (row,) = read_probe(tmp_path / "probe.json")["layers"]
    last = lines(probed, "probe")[-1]
    assert (last["layer"], last["k"]) == (1, 20)
    assert (last["train_images"], last["validation_images"]) == (1437, 180)
    # Other batches: sums are rounded differently, and one image may change sides.
    assert last["linear_accuracy"] == pytest.approx(row["validation_accuracy"], abs=0.006)
    assert last["knn_accuracy"] == pytest.approx(row["knn"]["validation_accuracy"], abs=0.006)
    assert 1 < last["effective_rank"] < 32


def test_a_stop_and_a_kill_between_a_step_and_its_measurement(
    digits: TokenDataset, short_flags: list[str], tmp_path: Path
) -> None:
    """Images are read four at a time, so that a measurement takes long enough to be met."""
    slow = ["--batch-size", 4, "--micro-batch-size", 1, "--steps", 4, "--validate-every", 2]
    slow += ["--checkpoint-every", 4, "--probe-every", 2]
    words = ["pretrain", digits.path, "--model", "tiny", *short_flags, *slow]
    assert Command(tmp_path, *words, "-o", tmp_path / "whole").code() == 0
    run = tmp_path / "run"

    def interrupt(number: signal.Signals, step: int, *more: str) -> int:
        command = Command(tmp_path, *words, "-o", run, *more)
        command.wait_until(lambda: has_logged(run, step, "validation"))
        command.send(number)
        code = command.code()
        assert not has_logged(run, step, "probe")
        state = json.loads((checkpoints(run / "checkpoints")[0] / "state.json").read_text())
        assert (state["step"], state["validated"], state["probed"]) == (2, 2, 0)
        return code

    assert interrupt(signal.SIGTERM, 2) == 128 + signal.SIGTERM
    assert interrupt(signal.SIGKILL, 4, "--resume") == -signal.SIGKILL
    assert has_logged(run, 2, "probe"), "it is written, and will be lost"
    last = Command(tmp_path, *words, "-o", run, "--resume")
    assert last.code() == 0, last.err
    assert_same_run(tmp_path / "whole", run, tmp_path)
    assert [line["step"] for line in lines(run, "probe")] == [0, 2, 4]
    assert lines(run, "probe") == lines(tmp_path / "whole", "probe")


def test_bert_is_measured_and_resumed_by_other_tokens_at_a_new_place(
    digits: TokenDataset, short: dict[str, object], tmp_path: Path
) -> None:
    labelled = tmp_path / "labelled"
    shutil.copytree(digits.path, labelled)
    changes = {"objective": "bert", "probe_every": 12, "probe_tokens": labelled}
    config = PretrainConfig.layered({**short, **changes, "tokens": digits.path})
    pretrain(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for folder in checkpoints(tmp_path / "cut" / "checkpoints")[:1]:
        shutil.rmtree(folder)  # as if it had been killed after step 18
    moved = labelled.rename(tmp_path / "moved")
    tokens = {"tokens": digits.path, "probe_tokens": moved}
    pretrain(config, tmp_path / "cut", given=tokens, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut", tmp_path)
    assert [line["step"] for line in lines(tmp_path / "cut", "probe")] == [0, 12, 24]
    assert lines(tmp_path / "cut", "probe") == lines(tmp_path / "whole", "probe")
    assert lines(tmp_path / "cut", "probe")[-1]["linear_accuracy"] > 0.3, "chance is 0.1"


def test_checkpoints_of_earlier_versions_are_resumed(
    igpt: Any, digits: TokenDataset, short_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    newest, older = checkpoints(run / "checkpoints")
    shutil.rmtree(newest)
    content = json.loads((older / "state.json").read_text())
    del content["probed"]
    (older / "state.json").write_text(json.dumps({**content, "sha256": _digest(content)}))
    done = igpt("pretrain", digits.path, "-o", run, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"resumed from {older}" in done.stdout
    assert_same_run(short_run, run, tmp_path)


def write_images(folder: Path, count: int, *, classes: bool) -> Path:
    for number, levels in enumerate(load_digits().images[:count]):
        place = folder / str(number % 2) if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((levels * 255 / 16).round().astype(np.uint8))
        picture.save(place / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def unusable(digits: TokenDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of token data sets that cannot measure features of the digits."""
    folder = tmp_path_factory.mktemp("unusable")
    same: dict[str, Any] = {"size": 8, "palette": str(digits.path)}
    flat = write_images(folder / "flat", 40, classes=False)
    few = write_images(folder / "few", 24, classes=True)
    prepare(str(flat), folder / "unlabelled", PrepareConfig(**same))
    prepare(str(few), folder / "too-few", PrepareConfig(**{**same, "held_out": 0.3}))
    prepare("digits", folder / "coarse", PrepareConfig(size=8, colors=5))
    prepare("digits", folder / "small", PrepareConfig(size=4))
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--probe-every", 0), "probe_every = 0"),
        (("--probe-tokens", "coarse"), "--probe-tokens needs --probe-every"),
        (("--probe-every", 5, "--probe-tokens", "unlabelled"), "unlabelled has none; name"),
        (("--probe-every", 5, "--probe-tokens", "coarse"), "palette"),
        (("--probe-every", 5, "--probe-tokens", "small"), "prepare them with --size 8"),
        (("--probe-every", 5, "--probe-tokens", "too-few"), "at least 20 training images for 20"),
        (("--probe-every", 5, "--probe-tokens", "nowhere"), "nowhere"),
    ],
)
def test_wrong_settings_are_refused(
    igpt: Any,
    digits: TokenDataset,
    unusable: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[object, ...],
    said: str,
) -> None:
    monkeypatch.chdir(unusable)
    done = igpt("pretrain", digits.path, "-o", tmp_path / "run", "--model", "tiny", *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert said in done.stderr
    assert not (tmp_path / "run").exists()


def test_other_tokens_are_refused_when_resuming(
    igpt: Any, digits: TokenDataset, probed: Path, unusable: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(probed, run)
    other = tmp_path / "other"
    shutil.copytree(digits.path, other)
    manifest = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps({**manifest, "source": "others"}))
    done = igpt("pretrain", digits.path, "-o", run, "--resume", "--probe-tokens", other)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{other} is not the data set that {run} is probed with" in done.stderr
    done = igpt("pretrain", digits.path, "-o", run, "--resume", "--probe-every", 5)
    assert "was started with probe_every = 10, not 5" in done.stderr


def test_classes_without_an_image_among_those_used_are_never_predicted(
    digits: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("igpt.evaluation.feature_quality._MOST_IMAGES", 22)
    images = quality_images(digits, digits)
    train, validation = (digits[name].spread(22).labels for name in ("train", "validation"))
    assert images.tokens.shape == (44, 64)
    known = np.unique(train)
    assert len(known) < 10, "some classes are missing, as the test needs"
    np.testing.assert_array_equal(known[images.train_labels], train)
    is_known = np.isin(validation, known)
    assert 0 < is_known.sum() < 22
    np.testing.assert_array_equal(images.validation_labels[~is_known], -1)
    np.testing.assert_array_equal(known[images.validation_labels[is_known]], validation[is_known])


def matrix(*singular: float) -> torch.Tensor:
    """Return a matrix [60, 12] with some singular values, and 0 for the others."""
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(60, 12, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))
    values = torch.tensor([*singular, *[0.0] * (12 - len(singular))], dtype=torch.float64)
    return (left * values) @ right


@pytest.mark.parametrize(
    ("singular", "rank"),
    [
        ((2.0,), 1.0),
        ((3.0,) * 5, 5.0),
        ((0.1,) * 12, 12.0),
        ((3.0, 1.0), math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4))),
    ],
)
def test_the_effective_rank_of_known_singular_values(
    singular: tuple[float, ...], rank: float
) -> None:
    assert effective_rank(matrix(*singular)) == pytest.approx(rank, abs=1e-4)
    assert effective_rank(1000 * matrix(*singular).float()) == pytest.approx(rank, abs=1e-3)


def test_the_effective_rank_follows_the_definition() -> None:
    features = torch.randn(50, 7, generator=torch.Generator().manual_seed(1)) + 2
    values = np.linalg.svd(features.double().numpy(), compute_uv=False)
    shares = values / values.sum()
    entropy = -(shares * np.log(shares)).sum()
    assert effective_rank(features) == pytest.approx(math.exp(entropy), rel=1e-9)
