"""A search over learning rates, and the final training with validation images."""

import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from igpt.config import read_settings
from igpt.data.tokens.dataset import TokenDataset, TokenSplit
from igpt.data.tokens.manifest import write_manifest, write_shard
from igpt.environment import read_environment, run_kind
from igpt.errors import InputError
from igpt.model.classifier import predict
from igpt.model.transformer import ImageGPT
from igpt.training.checkpoints import checkpoints
from igpt.training.finetune import FinetuneConfig, finetune
from igpt.training.metrics import read_metrics

from ..helpers.runs import Command, has_logged

RATES = [1e-4, 1e-2, 1e-3]  # the middle one decreases the loss most in so few steps
SHORT = {"steps": 30, "batch_size": 16, "validate_every": 10, "checkpoint_every": 5, "log_every": 1}
SETTINGS = {**SHORT, "precision": "fp32", "seed": 2, "shift": 1}


def flags_of(settings: dict[str, object]) -> list[str]:
    return [
        word
        for key, value in settings.items()
        for word in (f"--{key.replace('_', '-')}", str(value))
    ]


SEARCH = ["--learning-rates", *map(str, RATES), "--fold-back", *flags_of(SETTINGS)]


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def result_of(run: Path) -> dict[str, object]:
    """Return test.json without the environment."""
    result = json.loads((run / "test.json").read_text())
    del result["environment"]
    return result


def lines(run: Path, kind: str) -> list[dict[str, object]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == kind]


def accuracy(run: Path, split: TokenSplit) -> float:
    rows = np.arange(len(split))
    predicted = predict(ImageGPT.from_pretrained(run / "model"), split.rows(rows), rows)
    return float((predicted.classes == split.labels).mean())


@pytest.fixture(scope="module")
def searched(
    igpt, short_run: Path, digits: TokenDataset, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run = tmp_path_factory.mktemp("runs") / "searched"
    done = igpt("finetune", short_run, digits.path, "-o", run, *SEARCH)
    assert done.returncode == 0, done.stderr
    (run.parent / "said").write_text(done.stdout)
    return run


@pytest.fixture(scope="module")
def chosen(searched: Path) -> Path:
    return searched / "rates" / "0.01"


def test_validation_selects_the_rate(searched: Path, chosen: Path, digits: TokenDataset) -> None:
    result = result_of(searched)
    found = {}
    for rate, tried in zip(RATES, result["rates"], strict=True):
        folder = searched / "rates" / str(rate)
        errors = {line["step"]: line["error"] for line in lines(folder, "validation")}
        best = min(errors, key=lambda step: (errors[step], step))
        assert tried["learning_rate"] == rate
        assert tried["best_step"] == best
        assert tried["validation_accuracy"] == pytest.approx(1 - errors[best])
        assert accuracy(folder, digits["validation"]) == pytest.approx(1 - errors[best])
        found[rate] = 1 - errors[best]
    assert max(found.values()) == found[1e-2] > found[1e-3], "otherwise the test is meaningless"
    assert (result["learning_rate"], result["validation_accuracy"]) == (
        1e-2,
        pytest.approx(found[1e-2]),
    )
    assert result["epochs"] == result["best_step"] * 16 / len(digits["train"])
    assert (searched / "metrics.jsonl").read_bytes() == (chosen / "metrics.jsonl").read_bytes()
    settings = read_settings(searched / "config.yaml")
    assert (settings["learning_rate"], settings["learning_rates"]) == (1e-2, RATES)


def test_each_rate_gives_the_same_run_as_alone(
    chosen: Path, short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    """In particular the last one, before which two others were trained in the same process."""
    alone = {"model": short_run / "model", "tokens": digits.path, "learning_rate": 1e-3, **SETTINGS}
    finetune(FinetuneConfig.layered(alone), tmp_path / "run")
    other = chosen.parent / "0.001"
    assert weights(tmp_path / "run") == weights(other)
    assert [line["loss"] for line in lines(tmp_path / "run", "train")] == [
        line["loss"] for line in lines(other, "train")
    ]
    recorded = [read_settings(run / "config.yaml") for run in (tmp_path / "run", other)]
    assert recorded[0] == recorded[1]


def test_the_final_training_is_on_all_images_for_the_selected_epochs(
    searched: Path, short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    """It equals a run on a data set whose training images are all of them, without any
    selection."""
    result = result_of(searched)
    train, validation = digits["train"], digits["validation"]
    count = len(train) + len(validation)
    steps = result["fold_back"]["steps"]
    assert steps - 1 < result["best_step"] * count / len(train) <= steps
    both = TokenSplit.joined("train", [train, validation])
    (tmp_path / "tokens").mkdir()
    shards = {
        split.name: [
            write_shard(
                tmp_path / "tokens", split.name, split.rows(range(len(split))), split.labels
            )
        ]
        for split in (both, validation, digits["test"])
    }
    manifest = {
        "resolution": 8,
        "palette": digits.palette,
        "class_names": digits.class_names,
        "splits": shards,
    }
    write_manifest(tmp_path / "tokens", **manifest, source="a test", made={})
    settings = {**SETTINGS, "learning_rate": 1e-2, "steps": steps, "validate_every": steps}
    finetune(
        FinetuneConfig.layered(
            {"model": short_run / "model", "tokens": tmp_path / "tokens", **settings}
        ),
        tmp_path / "run",
    )
    assert weights(searched / "fold-back") == weights(tmp_path / "run")
    (start,) = lines(searched / "fold-back", "start")
    assert start["train_images"] == count


def test_the_model_is_the_last_one_and_both_are_tested(
    searched: Path, chosen: Path, digits: TokenDataset
) -> None:
    result = result_of(searched)
    assert weights(searched) == weights(searched / "fold-back") != weights(chosen)
    assert result["test_accuracy"] == pytest.approx(accuracy(searched, digits["test"]))
    before = result["fold_back"]["before"]
    assert before["test_accuracy"] == pytest.approx(accuracy(chosen, digits["test"]))
    assert before["test_images"] == result["test_images"] == len(digits["test"])
    said = (searched.parent / "said").read_text()
    for rate, tried in zip(RATES, result["rates"], strict=True):
        accuracy_reached = f"validation accuracy {tried['validation_accuracy']:.1%}"
        assert f"learning rate {rate:g}: {accuracy_reached}" in said
    assert f"the one selected by them has test accuracy {before['test_accuracy']:.1%}" in said


def test_a_report_can_be_made_of_it(igpt, searched: Path, tmp_path: Path) -> None:
    shutil.copytree(searched, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    done = igpt("report", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert (
        f"{100 * result_of(searched)['test_accuracy']:.1f}"
        in (tmp_path / "run" / "report.html").read_text()
    )


def test_kills_in_every_part_change_nothing(
    searched: Path, short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["finetune", short_run, digits.path, "-o", run, *SEARCH]
    parts = ["rates/0.0001", "rates/0.01", "rates/0.001", "fold-back"]
    for number, part in enumerate(parts):
        command = Command(tmp_path, *words, *(["--resume"] if number else []))
        command.wait_until(
            lambda part=part: has_logged(run / part, 7) and checkpoints(run / part / "checkpoints")
        )
        command.send(signal.SIGKILL)
        assert command.code() == -signal.SIGKILL
        assert not (run / "test.json").exists()
        assert not (run / "model").exists(), "nothing half-selected"
    last = Command(tmp_path, *words, "--resume")
    assert last.code() == 0, last.err
    assert result_of(run) == result_of(searched)
    for part in (".", *parts):
        assert weights(run / part) == weights(searched / part), part
    for part in parts:
        assert len(lines(run / part, "resume")) == 1, "finished trainings were not repeated"
        losses = [
            [line["loss"] for line in lines(folder / part, "train")] for folder in (run, searched)
        ]
        assert losses[0] == losses[1]


def test_a_kill_while_the_result_is_written_changes_nothing(
    igpt, searched: Path, short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    """All training was finished, and the model and the settings exist already."""
    run = tmp_path / "run"
    shutil.copytree(searched, run, ignore=shutil.ignore_patterns("checkpoints"))
    (run / "test.json").unlink()
    (run / "metrics.jsonl").unlink()
    done = igpt("finetune", short_run, digits.path, "-o", run, *SEARCH, "--resume")
    assert done.returncode == 0, done.stderr
    assert result_of(run) == result_of(searched)
    assert (run / "metrics.jsonl").read_bytes() == (searched / "metrics.jsonl").read_bytes()
    assert not list(run.rglob("checkpoints")), "nothing was trained"


def test_a_model_that_changes_between_trainings_is_refused(
    short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    """Otherwise later trainings would have other initial weights."""
    shutil.copytree(short_run / "model", tmp_path / "model")
    config = FinetuneConfig.layered(
        {"model": tmp_path / "model", "tokens": digits.path, "fold_back": True}, SETTINGS
    )
    finetune(config, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "ended")
    shutil.rmtree(tmp_path / "run" / "fold-back")
    model = ImageGPT.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.wpe.weight[3, 4] += 1e-6
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"the model is not the one that .* was started with"):
        finetune(config, tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / "fold-back").exists()
    with pytest.raises(InputError, match=r"the model is not the one that .* was started with"):
        finetune(config, tmp_path / "ended", resume=True)


def test_the_message_after_a_signal_names_the_command_to_resume(
    igpt, short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = [
        "finetune",
        short_run,
        digits.path,
        "-o",
        run,
        "--learning-rates",
        1e-3,
        1e-2,
        *flags_of(SETTINGS),
    ]
    command = Command(tmp_path, *words)
    command.wait_until(lambda: has_logged(run / "rates" / "0.01", 3))
    command.send(signal.SIGTERM)
    assert command.code() == 128 + signal.SIGTERM
    assert re.search(
        r"stopped and saved after \d+ of 30 steps; continue with: igpt finetune",
        command.complaint,
    )
    done = igpt("finetune", short_run, digits.path, "-o", run, "--resume")
    assert done.returncode == 0, done.stderr
    assert result_of(run)["learning_rate"] == 1e-2
    assert weights(run) == weights(run / "rates" / "0.01"), (
        "there is no fold-back unless it is requested"
    )


@pytest.mark.parametrize("rates", [(1e-60, 2e-60), (2e-60, 1e-60)])
def test_of_equal_results_the_lower_rate_is_selected(
    short_run: Path, digits: TokenDataset, tmp_path: Path, rates: tuple[float, float]
) -> None:
    """Both are zero in fp32."""
    small = {**SETTINGS, "steps": 2, "validate_every": 1}
    config = FinetuneConfig.layered(
        {"model": short_run / "model", "tokens": digits.path, "learning_rates": rates}, small
    )
    result = finetune(config, tmp_path / "run")
    first, second = result["rates"]
    assert first["validation_accuracy"] == second["validation_accuracy"]
    assert result["learning_rate"] == 1e-60
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (
        tmp_path / "run" / "rates" / "1e-60" / "metrics.jsonl"
    ).read_bytes()


def test_a_rate_that_diverges_is_not_selected(
    igpt, short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    words = [
        "finetune",
        short_run,
        digits.path,
        *flags_of({**SETTINGS, "max_skipped": 0, "weight_decay": 100}),
    ]
    done = igpt(*words, "-o", tmp_path / "run", "--learning-rates", "1000", "1e-3")
    assert done.returncode == 0, done.stderr
    assert "learning rate 1000.0 diverged: " in done.stdout
    result = result_of(tmp_path / "run")
    assert result["rates"][0] == {
        "learning_rate": 1000.0,
        "validation_accuracy": None,
        "best_step": 0,
    }
    assert result["learning_rate"] == 1e-3
    done = igpt(*words, "-o", tmp_path / "none", "--learning-rates", "999", "1000")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "every learning rate led to losses that are not finite" in done.stderr
    done = igpt(*words, "-o", tmp_path / "one", "--learning-rate", "1000")
    assert done.returncode == 2
    assert (
        "the last good checkpoint" in done.stderr or "there is no earlier checkpoint" in done.stderr
    )


def test_nan_weights_are_never_selected(
    short_run: Path, digits: TokenDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With too few steps to diverge: predictions from NaN logits must not count."""
    small = {**SETTINGS, "steps": 6, "validate_every": 2}
    config = FinetuneConfig.layered({"model": short_run / "model", "tokens": digits.path}, small)
    finetune(
        config.model_copy(update={"learning_rates": (1e10, 1e-3)}), tmp_path / "run"
    )  # above the bound
    assert (
        "learning rate 10000000000.0 diverged: the validation accuracy is nan"
        in capsys.readouterr().out
    )
    assert result_of(tmp_path / "run")["learning_rate"] == 1e-3


def test_words_override_settings_files(
    igpt, searched: Path, short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    """The settings of a search can be used for another run, of another model, with one rate or
    others."""
    shutil.copytree(short_run / "model", tmp_path / "other")
    words = [
        "finetune",
        tmp_path / "other",
        digits.path,
        "--config",
        searched / "config.yaml",
        "--steps",
        2,
    ]
    done = igpt(*words, "-o", tmp_path / "one", "--learning-rate", "1e-4")
    assert done.returncode == 0, done.stderr
    recorded = read_settings(tmp_path / "one" / "config.yaml")
    assert Path(recorded["model"]) == tmp_path / "other"
    assert (recorded["learning_rate"], recorded["learning_rates"]) == (1e-4, [])
    done = igpt(*words, "-o", tmp_path / "two", "--learning-rates", "1e-4", "1e-3")
    assert done.returncode == 0, done.stderr
    assert [one["learning_rate"] for one in result_of(tmp_path / "two")["rates"]] == [1e-4, 1e-3]


def test_invalid_rates_are_refused(
    short_run: Path, digits: TokenDataset, igpt, tmp_path: Path
) -> None:
    words = ["finetune", short_run, digits.path, "-o", tmp_path / "run"]
    for more, said in (
        (["--learning-rates", "1e-3", "0.001"], "a learning rate is named twice"),
        (["--learning-rates", "1e-3", "0"], "greater than 0"),
        (["--learning-rates", "1e-3", "1e300"], "less than or equal to 1000"),
        (["--learning-rate", "1e300"], "less than or equal to 1000"),
        (
            ["--learning-rates", "1e-3", "--learning-rate", "1e-3"],
            "give either one --learning-rate or several",
        ),
        (["--learning-rates"], "--learning-rates: expected at least one argument"),
    ):
        done = igpt(*words, *more)
        assert done.returncode == 2
        assert said in done.stderr
        assert not (tmp_path / "run").exists()


def test_the_kind_of_a_run_is_recorded_or_follows_from_its_settings(
    searched: Path, short_run: Path
) -> None:
    for run, kind in ((searched, "finetune"), (short_run, "pretrain")):
        environment = read_environment(run / "environment.json")
        assert environment.pop("kind") == kind
        assert run_kind(environment, read_settings(run / "config.yaml")) == kind, "as in igpt 0.1.0"


def test_searches_and_single_runs_are_not_mixed(
    igpt, searched: Path, short_run: Path, digits: TokenDataset
) -> None:
    words = ["finetune", short_run, digits.path, "-o", searched]
    assert "exists already" in igpt(*words).stderr
    assert (
        "was started with learning_rates"
        in igpt(*words, "--learning-rates", 1e-3, 1e-2, "--resume").stderr
    )
    assert "was begun by igpt pretrain" in igpt(*words[:3], "-o", short_run, "--resume").stderr
    part = FinetuneConfig.layered({"model": short_run / "model", "tokens": digits.path})
    with pytest.raises(InputError, match=r"environment\.json is missing"):
        finetune(part, searched / "fold-back", resume=True)
