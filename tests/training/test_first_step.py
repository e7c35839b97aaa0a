"""A run without a first step can be started again; one with a first step cannot."""

import shutil
import signal
from pathlib import Path

import pytest

from igpt.config import read_settings
from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError
from igpt.training import pretrain as pretraining
from igpt.training.engine import Engine
from igpt.training.finetune import FinetuneConfig, finetune
from igpt.training.metrics import Metrics
from igpt.training.pretrain import PretrainConfig, pretrain
from igpt.training.run_directory import has_begun

from ..helpers.runs import Command, assert_same_run, has_logged


@pytest.fixture
def config(digits: TokenDataset, short: dict[str, object]) -> PretrainConfig:
    return PretrainConfig.layered({**short, "tokens": digits.path})


def fail_in_the_first_step(
    run: Path, config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(*arguments: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "update", update)
        with pytest.raises(RuntimeError, match="out of memory"):
            pretrain(config, run)
    assert (run / "config.yaml").exists()


def test_after_an_error_in_the_first_step_the_run_can_be_started_again(
    config: PretrainConfig, short_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    fail_in_the_first_step(
        run, config.model_copy(update={"batch_size": 999, "snapshots": (0,)}), monkeypatch
    )
    assert (run / "snapshots" / "step-00000000").exists()
    pretrain(config, run)
    assert_same_run(short_run, run, tmp_path)
    assert read_settings(run / "config.yaml")["batch_size"] == 16
    assert not (run / "snapshots").exists(), "of the earlier settings"


def test_resuming_uses_the_recorded_settings(
    config: PretrainConfig, short_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in_the_first_step(tmp_path / "run", config, monkeypatch)
    pretrain(config, tmp_path / "run", resume=True)
    assert_same_run(short_run, tmp_path / "run", tmp_path)


def test_after_a_kill_before_the_first_step_the_run_can_be_started_again(
    digits: TokenDataset, short_flags: list[str], short_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["pretrain", digits.path, "-o", run, "--model", "tiny", *short_flags]
    command = Command(tmp_path, *words)
    command.wait_until((run / "config.yaml").exists)
    command.send(signal.SIGKILL)
    assert command.code() == -signal.SIGKILL
    if has_logged(run, 1):
        pytest.skip("it was faster than the kill")
    again = Command(tmp_path, *words)
    assert again.code() == 0, again.err
    assert_same_run(short_run, run, tmp_path)


def test_a_run_with_steps_is_not_overwritten(
    config: PretrainConfig, short_run: Path, tmp_path: Path
) -> None:
    for kept in ("checkpoints", "model", "metrics.jsonl"):
        run = tmp_path / kept
        shutil.copytree(short_run, run)
        for name in {"checkpoints", "model", "metrics.jsonl"} - {kept}:
            (shutil.rmtree if (run / name).is_dir() else Path.unlink)(run / name)
        before = sorted(run.rglob("*"))
        with pytest.raises(InputError, match="exists already; --resume continues it"):
            pretrain(config, run)
        assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("kind", ["train", "validation", "end"])
def test_a_line_of_metrics_counts_as_a_first_step(kind: str, tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write("start", 0)
    metrics.write("machine", 0)
    assert not has_begun(tmp_path)
    metrics.write(kind, 1, loss=1.0, best=None, best_step=0)
    assert has_begun(tmp_path)


def test_metrics_that_cannot_be_read_are_not_overwritten(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    fail_in_the_first_step(run, config, monkeypatch)
    (run / "metrics.jsonl").write_text("[]\n")
    with pytest.raises(InputError, match="exists already"):
        pretrain(config, run)
    assert (run / "metrics.jsonl").read_text() == "[]\n"


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "rates/mine", "checkpoints/mine"])
def test_other_files_are_not_overwritten(name: str, config: PretrainConfig, tmp_path: Path) -> None:
    """A settings file in the current folder, for example, with `-o .`."""
    run = tmp_path / "run"
    (run / name).parent.mkdir(parents=True)
    (run / name).write_text("mine: 1\n")
    with pytest.raises(InputError, match="exists already"):
        pretrain(config, run)
    assert (run / name).read_text() == "mine: 1\n"


def test_only_files_that_a_start_wrote_are_removed(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    fail_in_the_first_step(run, config, monkeypatch)
    mine = [run / "notes.txt", run / "rates" / "notes.txt", run / "checkpoints" / "notes.txt"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    pretrain(config.model_copy(update={"steps": 2}), run)
    assert all(path.read_text() == "mine" for path in mine)


def test_a_search_over_rates_without_a_step_can_be_started_again(
    short_run: Path, digits: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "model": short_run / "model",
        "tokens": digits.path,
        "steps": 2,
        "validate_every": 2,
        "batch_size": 8,
    }
    searched = FinetuneConfig.layered({**settings, "learning_rates": (1e-3, 1e-2)})
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "update", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finetune(searched, tmp_path / "run")
    assert (tmp_path / "run" / "rates" / "0.001" / "config.yaml").exists()
    finetune(searched.model_copy(update={"learning_rates": (2e-3,)}), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "rates").iterdir()] == ["0.002"]
    with pytest.raises(InputError, match="exists already"):
        finetune(searched, tmp_path / "run")


def test_control_c_before_the_loop_is_one_line_and_leaves_nothing_incomplete(
    digits: TokenDataset, short_flags: list[str], short_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["pretrain", digits.path, "-o", run, "--model", "tiny", *short_flags]
    for moment in (".lock", "environment.json", "config.yaml"):
        command = Command(tmp_path, *words)
        command.wait_until((run / moment).exists)
        command.send(signal.SIGINT)
        assert command.code() == 130, command.out + command.err
        assert command.complaint
        # A lock that was just being created may stay; the next process takes it over.
        assert not [path for path in run.glob(".*") if path.name != ".lock"], "no temporary file"
        if run.exists() and has_begun(run):
            shutil.rmtree(run)  # it was faster than the signal, and has saved
    assert pretraining.pretrain is pretrain
    last = Command(tmp_path, *words)
    assert last.code() == 0, last.err
    assert_same_run(short_run, run, tmp_path)


def test_control_c_during_the_setup_leaves_a_directory_that_can_be_started(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of the calls of the setup."""

    def interrupt(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    run = tmp_path / "run"
    for name in ("TokenDataset", "Batches", "ImageGPT", "Engine", "record_run", "Trainer"):
        with monkeypatch.context() as patch:
            patch.setattr(pretraining, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                pretrain(config, run)
        assert not list(tmp_path.rglob(".*"))
        assert run.exists() == (name == "Trainer")
    pretrain(config.model_copy(update={"steps": 2}), run)
