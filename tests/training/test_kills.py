"""Runs that are killed at any moment are resumed to the same result."""

import random
import re
import signal
import time
from pathlib import Path

import pytest

from igpt.data.prepare import PrepareConfig, prepare
from igpt.data.tokens.dataset import TokenDataset
from igpt.training.checkpoints import checkpoints, step_of

from ..helpers.runs import Command, assert_same_run, has_logged, losses


def left_behind(run: Path) -> list[Path]:
    """Return what was being written, under a temporary name."""
    hidden = [*run.glob(".*"), *(run / "checkpoints").glob(".*")]
    return [path for path in hidden if path.name != ".lock"]


def saved_steps(run: Path) -> list[int]:
    return [step_of(path) for path in checkpoints(run / "checkpoints")]


def test_eight_kills_at_random_moments_change_nothing(
    digits: TokenDataset, short_run: Path, short_flags: list[str], tmp_path: Path
) -> None:
    """Kill after every second step: during the next save, or after a random delay."""
    run = tmp_path / "run"
    words = [
        "pretrain",
        digits.path,
        "-o",
        run,
        "--model",
        "tiny",
        *short_flags,
        "--checkpoint-every",
        1,
    ]
    delays, cut_off = random.Random(0), 0
    for kill in range(8):
        command = Command(tmp_path, *words, *(["--resume"] if kill else []))
        command.wait_until(lambda step=2 * kill + 1: max(saved_steps(run), default=0) >= step)
        if kill % 2:
            command.wait_until(lambda: left_behind(run))
        else:
            time.sleep(delays.uniform(0, 0.08))
        command.send(signal.SIGKILL)
        assert command.code() == -signal.SIGKILL, command.err
        cut_off += bool(left_behind(run))
    assert cut_off, "no kill happened during a save"
    last = Command(tmp_path, *words, "--resume")
    assert last.code() == 0, last.err
    assert "resumed from" in last.out
    assert "skipped:" not in last.out, "a kill damages nothing"
    assert_same_run(short_run, run, tmp_path)
    assert not left_behind(run)


@pytest.fixture(scope="module")
def half_held_out(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """Write the digits with 809 validation images."""
    settings = PrepareConfig(size=8, held_out=0.45)
    return prepare("digits", tmp_path_factory.mktemp("tokens") / "half", settings)


def test_a_step_that_outlasts_the_deadline_is_abandoned(
    half_held_out: TokenDataset, short_flags: list[str], tmp_path: Path
) -> None:
    slow = [
        "--batch-size",
        600,
        "--n-embd",
        64,
        "--steps",
        2,
        "--validate-every",
        2,
        "--checkpoint-every",
        1,
    ]
    words = ["pretrain", half_held_out.path, "--model", "tiny", *short_flags, *slow]
    assert Command(tmp_path, *words, "-o", tmp_path / "whole").code() == 0
    run = tmp_path / "run"
    command = Command(tmp_path, *words, "-o", run, "--stop-seconds", "0.1")
    command.wait_until(lambda: saved_steps(run) == [1])
    command.send(signal.SIGTERM)
    assert command.code() == 128 + signal.SIGTERM
    newest = run / "checkpoints" / "step-00000001"
    assert (
        command.complaint == f"igpt: not saved within 0.1 seconds; the newest checkpoint: {newest}"
    )
    assert max(losses(run)) == 1, "the second step was not waited for"
    last = Command(tmp_path, *words, "-o", run, "--resume")
    assert last.code() == 0, last.err
    assert_same_run(tmp_path / "whole", run, tmp_path)


def test_an_interrupted_validation_is_repeated_after_resuming(
    half_held_out: TokenDataset, short_flags: list[str], tmp_path: Path
) -> None:
    """Including the last one, after which nothing else remains to be done."""
    few = [
        "--batch-size",
        4,
        "--micro-batch-size",
        1,
        "--steps",
        4,
        "--validate-every",
        2,
    ]  # 4 images at a time
    long = ["--n-layer", 4, "--validation-images", 809]
    words = ["pretrain", half_held_out.path, "--model", "tiny", *short_flags, *few, *long]
    assert Command(tmp_path, *words, "-o", tmp_path / "whole").code() == 0
    run = tmp_path / "run"
    for step in (2, 4):
        command = Command(tmp_path, *words, "-o", run, *(["--resume"] if step > 2 else []))
        command.wait_until(lambda step=step: has_logged(run, step))
        command.send(signal.SIGTERM)
        assert command.code() == 128 + signal.SIGTERM, command.out + command.err
        assert re.search(
            f"stopped and saved after {step} of 4 steps; continue with: igpt pretrain",
            command.complaint,
        )
        assert not has_logged(run, step, "validation")
        assert saved_steps(run)[0] == step
        if step == 2:  # its validation is written, and lost again with the kill
            command = Command(tmp_path, *words, "-o", run, "--resume")
            command.wait_until(lambda: has_logged(run, 2, "validation"))
            command.send(signal.SIGKILL)
            assert command.code() == -signal.SIGKILL
    last = Command(tmp_path, *words, "-o", run, "--resume")
    assert last.code() == 0, last.err
    assert_same_run(tmp_path / "whole", run, tmp_path)
