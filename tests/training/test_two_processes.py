"""A run directory belongs to one process (or group of ranks); a second one is refused."""

import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from igpt.data.tokens.dataset import TokenDataset
from igpt.locks import exclusive_folder
from igpt.training.checkpoints import checkpoints
from igpt.training.metrics import read_metrics
from igpt.training.pretrain import PretrainConfig, pretrain

from ..helpers.runs import Command, assert_same_run, has_logged, losses

MOMENTS: dict[str, Callable[[Path], bool]] = {
    "as soon as it works there": lambda run: (
        (run / ".lock").exists() and (run / ".lock").stat().st_size > 0
    ),
    "when its settings are written": lambda run: (run / "config.yaml").exists(),
    "after its first update": lambda run: has_logged(run, 1),
    "after its first checkpoint": lambda run: bool(checkpoints(run / "checkpoints")),
    "after its first validation": lambda run: has_logged(run, 8, "validation"),
}


def assert_refused(second: Command, command: str, run: Path, owner: int | None = None) -> None:
    assert second.code() == 2, second.out + second.err
    said = re.match(
        rf"igpt {command}: (.+) is being written by process (\d+) on (\S+)", second.complaint
    )
    assert said, second.err
    assert (said[1], said[3]) == (str(run), socket.gethostname())
    if owner is not None:
        assert int(said[2]) == owner
    assert second.out == ""


@pytest.fixture
def words(digits: TokenDataset, short_flags: list[str], tmp_path: Path) -> list[object]:
    return ["pretrain", digits.path, "-o", tmp_path / "run", "--model", "tiny", *short_flags]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_second_one_that_resumes_is_refused_and_the_first_ends_as_if_alone(
    moment: str, words: list[object], short_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = Command(tmp_path / "first", *words)
    first.wait_until(lambda: MOMENTS[moment](run))
    first.send(signal.SIGSTOP)  # so that it is still running when the second one starts
    assert_refused(Command(tmp_path / "second", *words, "--resume"), "pretrain", run)
    first.send(signal.SIGCONT)
    assert first.code() == 0, first.err
    assert_same_run(short_run, run, tmp_path)
    assert [line["kind"] for line in read_metrics(run / "metrics.jsonl")].count("train") == 24
    assert not (run / ".lock").exists()


def test_of_two_that_start_together_one_trains(
    words: list[object], short_run: Path, tmp_path: Path
) -> None:
    both = [Command(tmp_path / name, *words) for name in ("one", "other")]
    codes = [command.code() for command in both]
    assert sorted(codes) == [0, 2], [command.err for command in both]
    assert len(both[codes.index(2)].err.splitlines()) == 1
    assert_same_run(short_run, tmp_path / "run", tmp_path)


def test_one_that_was_killed_is_taken_over(
    words: list[object], short_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = Command(tmp_path / "first", *words)
    first.wait_until(lambda: bool(checkpoints(run / "checkpoints")))
    first.send(signal.SIGKILL)
    assert first.code() == -signal.SIGKILL
    assert (run / ".lock").exists()
    second = Command(tmp_path / "second", *words, "--resume")
    assert second.code() == 0, second.err
    assert "resumed from" in second.out
    assert_same_run(short_run, run, tmp_path)
    assert not (run / ".lock").exists()


@pytest.mark.parametrize("exists", [False, True])
def test_a_refused_start_leaves_nothing(exists: bool, words: list[object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    if exists:
        run.mkdir()
        (run / "notes.txt").write_text("mine")
    with exclusive_folder(run):
        before = sorted(tmp_path.rglob("*"))
        second = Command(tmp_path / "second", *words)
        assert_refused(second, "pretrain", run, os.getpid())
        after = [path for path in sorted(tmp_path.rglob("*")) if "second" not in path.parts]
        assert after == before
    assert run.exists() == exists


def test_fine_tuning_is_refused_while_pretraining_goes_on_and_the_reverse(
    words: list[object], digits: TokenDataset, short_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    finetuning = ["finetune", short_run, digits.path, "-o", run]
    with exclusive_folder(run):
        assert_refused(Command(tmp_path / "second", *finetuning), "finetune", run, os.getpid())
        assert_refused(
            Command(tmp_path / "third", *finetuning, "--resume"), "finetune", run, os.getpid()
        )
        assert_refused(
            Command(tmp_path / "fourth", *words, "--resume"), "pretrain", run, os.getpid()
        )


def test_a_process_that_holds_the_directory_may_train_in_it(
    digits: TokenDataset, short: dict[str, object], tmp_path: Path
) -> None:
    """As the demo does."""
    config = PretrainConfig.layered({**short, "tokens": digits.path, "steps": 2})
    with exclusive_folder(tmp_path / "run"):
        pretrain(config, tmp_path / "run")
        assert (tmp_path / "run" / ".lock").exists(), "it is held until the outer one ends"
    assert max(losses(tmp_path / "run")) == 2
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_refusal_for_another_reason_leaves_no_directory(
    words: list[object], tmp_path: Path
) -> None:
    command = Command(tmp_path / "first", *words, "--n-head", 5)
    assert command.code() == 2
    assert "5 heads do not divide" in command.complaint
    assert not (tmp_path / "run").exists()
