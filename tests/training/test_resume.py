"""Interrupted training equals uninterrupted training, bit for bit; damage is named."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError
from igpt.training.checkpoints import checkpoints, newest_whole
from igpt.training.metrics import Metrics, read_metrics
from igpt.training.pretrain import PretrainConfig, pretrain

from ..helpers.runs import Command, assert_same_run, has_logged, losses


def test_killed_before_the_first_checkpoint_then_resumed(
    digits: TokenDataset, short_run: Path, short_flags: list[str], tmp_path: Path
) -> None:
    """Later kills: test_kills.py."""
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
        24,
    ]
    command = Command(tmp_path, *words)
    command.wait_until(lambda: has_logged(run, 3))
    command.send(signal.SIGKILL)
    assert command.code() == -signal.SIGKILL
    assert not checkpoints(run / "checkpoints")
    again = Command(tmp_path, *words, "--resume")
    assert again.code() == 0, again.err
    assert_same_run(short_run, run, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_names_the_command_to_resume(
    igpt,
    digits: TokenDataset,
    short_run: Path,
    short_flags: list[str],
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    run = tmp_path / "stopped"
    command = Command(tmp_path, "pretrain", digits.path, "-o", run, "--model", "tiny", *short_flags)
    command.wait_until(lambda: has_logged(run, 7))
    command.send(number)
    assert command.code() == 128 + number
    said, _, words = command.complaint.partition("continue with: igpt ")
    assert "saved after" in said
    assert words.startswith("pretrain")
    assert words.endswith("--resume")
    done = igpt(*words.split())
    assert done.returncode == 0, done.stderr
    assert_same_run(short_run, run, tmp_path)


def test_sittings_of_a_time_limit_give_the_same_run(
    igpt, digits: TokenDataset, short_run: Path, short_flags: list[str], tmp_path: Path
) -> None:
    """The limit is over at once, so a sitting is one step; the last one has no limit."""
    run = tmp_path / "run"
    words = ["pretrain", digits.path, "-o", run, "--model", "tiny", *short_flags]
    done = igpt(*words, "--minutes", 1e-6)
    assert (done.returncode, done.stderr) == (0, "")
    said, _, again = done.stdout.splitlines()[-1].partition("; continue with: igpt ")
    assert said == "stopped and saved after 1 of 24 steps"
    done = igpt(*again.split())
    assert "stopped and saved after 2 of 24 steps" in done.stdout
    assert checkpoints(run / "checkpoints")[0].name == "step-00000002"
    assert igpt(*words, "--resume").returncode == 0
    assert_same_run(short_run, run, tmp_path)


def test_a_run_that_stopped_early_is_continued_with_more_patience(
    igpt, digits: TokenDataset, short_flags: list[str], tmp_path: Path
) -> None:
    """The validation loss only rises at this learning rate, from the second validation on."""
    run = tmp_path / "run"
    words = ["pretrain", digits.path, "-o", run, "--model", "tiny", *short_flags]
    words += ["--learning-rate", 1, "--validate-every", 2, "--grad-clip", 0]
    done = igpt(*words, "--patience", 1)
    assert "stopped early: 1 validations without improvement" in done.stdout
    first = read_metrics(run / "metrics.jsonl")[-1]
    assert (first["kind"], first["step"] < 24) == ("end", True)
    done = igpt("pretrain", digits.path, "-o", run, "--resume", "--patience", 100)
    assert done.returncode == 0, done.stderr
    assert PretrainConfig.load(run / "config.yaml").patience == 100
    lines = read_metrics(run / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in lines if line["kind"] == "end"] == [
        ("end", 24)
    ]
    # A preset's patience and steps do not replace the recorded ones.
    config = {**PretrainConfig.load(run / "config.yaml").model_dump(mode="json")}
    at = words.index("--steps")
    del words[at : at + 2]
    assert igpt(*words, "--resume").returncode == 0
    assert PretrainConfig.load(run / "config.yaml").model_dump(mode="json") == config


def test_bert_muon_and_shared_updates_resume_exactly_too(
    digits: TokenDataset, short: dict[str, object], tmp_path: Path
) -> None:
    changes = {
        "objective": "bert",
        "log_every": 5,
        "optimizer": "muon",
        "share_color_updates": True,
        "positions": "rotary",  # no matrix is left for AdamW
    }  # a line spans a checkpoint
    config = PretrainConfig.layered({**short, **changes, "tokens": digits.path})
    pretrain(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for folder in sorted((tmp_path / "cut" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(folder)  # as if it had been killed after step 18
    pretrain(config, tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut", tmp_path)


def test_micro_batches_only_change_rounding(
    digits: TokenDataset, short: dict[str, object], short_run: Path, tmp_path: Path
) -> None:
    pretrain(
        PretrainConfig.layered({**short, "tokens": digits.path, "micro_batch_size": 5}),
        tmp_path / "run",
    )
    for step, loss in losses(tmp_path / "run").items():
        assert loss == pytest.approx(losses(short_run)[step], abs=2e-5)


def test_damaged_checkpoints_are_skipped_and_named(
    igpt, digits: TokenDataset, short_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    words = [
        "pretrain",
        digits.path,
        "-o",
        run,
        "--resume",
        "--checkpoint-every",
        3,
        "--keep-checkpoints",
        3,
    ]
    newest, older = checkpoints(run / "checkpoints")
    (newest / "__0_0.distcp").unlink()
    assert igpt(*words).returncode == 0
    newest, middle, oldest = checkpoints(run / "checkpoints")
    assert oldest == older
    os.truncate(newest / "__0_0.distcp", 1000)
    (middle / "__0_0.distcp").unlink()
    done = igpt(*words)
    assert done.returncode == 0, done.stderr
    said = done.stdout.replace("\n", "")
    assert f"skipped: {newest}/__0_0.distcp is damaged: 1000 bytes, " in said
    assert f"skipped: {middle}/__0_0.distcp is missing" in said
    assert f"resumed from {oldest}" in said
    assert_same_run(short_run, run, tmp_path)
    assert newest_whole(run / "checkpoints") == (newest, []), "it was replaced"


def test_without_a_valid_checkpoint_resuming_is_an_error(
    igpt, digits: TokenDataset, short_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    for path in (run / "checkpoints").iterdir():
        (path / "state.json").unlink()
    done = igpt("pretrain", digits.path, "-o", run, "--resume")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "state.json is missing" in done.stderr
    assert "no whole checkpoint" in done.stderr


def test_run_directories_of_pretraining_and_fine_tuning_are_not_mixed(
    igpt, digits: TokenDataset, short_run: Path, tmp_path: Path
) -> None:
    for words, expected in [
        (["-o", short_run, "--model", "tiny"], "exists already; --resume continues it"),
        (["-o", tmp_path / "none", "--resume"], "there is no run to resume"),
        (
            ["-o", short_run, "--resume", "--learning-rate", "0.1"],
            "was started with learning_rate = 0.003, not 0.1",
        ),
    ]:
        done = igpt("pretrain", digits.path, *words)
        assert done.returncode == 2
        assert expected in done.stderr


def test_a_run_with_automatic_settings_can_be_resumed_after_moving(
    igpt, digits: TokenDataset, short_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(short_run, tmp_path / "run")
    shutil.copytree(digits.path, tmp_path / "moved")
    done = igpt(
        "pretrain", tmp_path / "moved", "-o", tmp_path / "run", "--precision", "auto", "--resume"
    )
    assert done.returncode == 0, done.stderr


def test_changed_tokens_are_refused_on_resume(
    digits: TokenDataset, short: dict[str, object], tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    shutil.copytree(digits.path, tokens)
    config = PretrainConfig.layered({**short, "tokens": tokens, "steps": 2})
    pretrain(config, tmp_path / "run")
    manifest = json.loads((tokens / "dataset.json").read_text())
    (tokens / "dataset.json").write_text(json.dumps({**manifest, "source": "another"}))
    with pytest.raises(InputError, match="or it has changed since"):
        pretrain(config, tmp_path / "run", resume=True)


def test_diverging_loss_stops_and_names_the_last_checkpoint(
    igpt, digits: TokenDataset, short_flags: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = [
        *short_flags,
        "--learning-rate",
        "1000",
        "--weight-decay",
        "1000",
        "--warmup-steps",
        "0",
        "--checkpoint-every",
        "1",
    ]
    done = igpt("pretrain", digits.path, "-o", run, "--model", "tiny", *flags)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "at step" in line or "after" in line
    reached = int(re.search(r"(?:at step|after) (\d+)", line)[1])
    good = (
        int(re.search(r"the last good checkpoint is \S+step-(\d+)", line)[1])
        if "is /" in line
        else 0
    )
    steps = reached - ("at step" in line)
    assert good < steps, "the newest one contains the weights that gave this loss"


def test_full_disk_is_one_line_and_loses_nothing(
    igpt, digits: TokenDataset, short_run: Path, short_flags: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"

    words = ["pretrain", digits.path, "-o", run, "--model", "tiny", *short_flags]
    command = Command(tmp_path, *words, largest_file=150_000)
    assert command.code() == 2
    assert "File too large" in command.complaint
    assert not list((run / "checkpoints").glob("*")), "something incomplete was left"
    again = igpt("pretrain", digits.path, "-o", run, "--resume")
    assert again.returncode == 0, again.stderr
    assert_same_run(short_run, run, tmp_path)


def test_metrics_with_a_truncated_last_line_are_continued(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in range(4):
        metrics.write("train", step, loss=1.0)
    with metrics.path.open("a") as file:
        file.write('{"kind": "train", "st')
    assert [line["step"] for line in read_metrics(metrics.path)] == [0, 1, 2, 3]
    metrics.cut_after(2, 2)
    metrics.write("train", 3, loss=2.0)
    assert [line["loss"] for line in read_metrics(metrics.path)] == [1.0, 1.0, 1.0, 2.0]
