"""Interrupted training gives what uninterrupted training gives, to the bit; damage is seen and named."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from igpt.data.tokens import TokenDataset
from igpt.errors import InputError
from igpt.training.metrics import Metrics, read_metrics
from igpt.training.pretrain import PretrainConfig, pretrain


def losses(run: Path) -> dict[int, float]:
    lines = read_metrics(run / "metrics.jsonl")
    found = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
    assert [step for step, _ in found] == sorted({step for step, _ in found}), "a step is told twice"
    return dict(found)


def assert_same_run(one: Path, other: Path, tmp_path: Path) -> None:
    assert losses(one) == losses(other)
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (one, other)]
    assert weights[0] == weights[1]
    states = []
    for number, run in enumerate((one, other)):
        newest = sorted((run / "checkpoints").glob("step-*"))[-1]
        dcp_to_torch_save(newest, tmp_path / f"{number}.pt")
        states.append(torch.load(tmp_path / f"{number}.pt", weights_only=False))
    flat = [flatten(state) for state in states]
    assert flat[0].keys() == flat[1].keys()
    for name, value in flat[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, flat[1][name]), name
        else:
            assert value == flat[1][name], name


def flatten(value: object, name: str = "") -> dict[str, object]:
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flatten(part, f"{name}/{key}").items()}
    if isinstance(value, list):
        return {k: v for key, part in enumerate(value) for k, v in flatten(part, f"{name}/{key}").items()}
    return {name: value}


def start(tokens: Path, run: Path, flags: list[str], *more: str) -> subprocess.Popen[str]:
    words = ["pretrain", str(tokens), "-o", str(run), "--model", "tiny", *flags, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "igpt", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        path = run / "metrics.jsonl"
        if path.exists() and any(line["step"] >= step for line in read_metrics(path)):
            return
        time.sleep(0.002)
    raise AssertionError(f"no step {step}: {process.communicate()}")


def test_killed_at_any_moment_then_resumed(
    igpt, digits: TokenDataset, short_run: Path, short_flags: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    for step in (3, 7, 12):  # before the first checkpoint, and twice after one (one is written every 6 updates)
        process = start(digits.path, run, short_flags, *(["--resume"] if step > 3 else []))
        wait_for_step(run, step, process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    done = igpt("pretrain", digits.path, "-o", run, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    assert_same_run(short_run, run, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_says_how_to_go_on(
    igpt, digits: TokenDataset, short_run: Path, short_flags: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "stopped"
    process = start(digits.path, run, short_flags)
    wait_for_step(run, 9, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    (line,) = said.strip().splitlines()
    assert "saved after" in line
    assert "continue with: igpt pretrain" in line
    assert line.endswith("--resume")
    done = igpt(*line.partition("continue with: igpt ")[2].split())
    assert done.returncode == 0, done.stderr
    assert_same_run(short_run, run, tmp_path)


def test_bert_and_muon_resume_exactly_too(digits: TokenDataset, short: dict[str, object], tmp_path: Path) -> None:
    changes = {"objective": "bert", "log_every": 5, "optimizer": "muon"}  # a line spans a checkpoint
    config = PretrainConfig.layered({**short, **changes, "tokens": digits.path})
    pretrain(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for folder in sorted((tmp_path / "cut" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(folder)  # as if it had been killed after update 18
    pretrain(config, tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut", tmp_path)


def test_micro_batches_change_nothing_but_rounding(
    digits: TokenDataset, short: dict[str, object], short_run: Path, tmp_path: Path
) -> None:
    pretrain(PretrainConfig.layered({**short, "tokens": digits.path, "micro_batch_size": 5}), tmp_path / "run")
    for step, loss in losses(tmp_path / "run").items():
        assert loss == pytest.approx(losses(short_run)[step], abs=2e-5)


def test_damaged_checkpoint_is_passed_over_and_named(
    igpt, digits: TokenDataset, short_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    newest, older = sorted((run / "checkpoints").iterdir(), reverse=True)
    os.truncate(newest / "__0_0.distcp", 1000)
    done = igpt("pretrain", digits.path, "-o", run, "--resume")
    assert done.returncode == 0, done.stderr
    assert "passed over" in done.stdout
    assert "__0_0.distcp is damaged: 1000 bytes" in done.stdout
    assert f"resumed from {older}" in done.stdout.replace("\n", "")
    assert_same_run(short_run, run, tmp_path)


def test_no_whole_checkpoint_is_an_error(igpt, digits: TokenDataset, short_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    for path in (run / "checkpoints").iterdir():
        (path / "state.json").unlink()
    done = igpt("pretrain", digits.path, "-o", run, "--resume")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "state.json is missing" in done.stderr
    assert "no whole checkpoint" in done.stderr


def test_run_directories_are_not_mixed_up(igpt, digits: TokenDataset, short_run: Path, tmp_path: Path) -> None:
    for words, expected in [
        (["-o", short_run, "--model", "tiny"], "exists already; --resume continues it"),
        (["-o", tmp_path / "none", "--resume"], "there is no run to resume"),
        (["-o", short_run, "--resume", "--learning-rate", "0.1"], "was started with learning_rate = 0.003, not 0.1"),
    ]:
        done = igpt("pretrain", digits.path, *words)
        assert done.returncode == 2
        assert expected in done.stderr


def test_the_interrupted_command_may_say_auto_and_things_may_move(
    igpt, digits: TokenDataset, short_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(short_run, tmp_path / "run")
    shutil.copytree(digits.path, tmp_path / "moved")
    done = igpt("pretrain", tmp_path / "moved", "-o", tmp_path / "run", "--precision", "auto", "--resume")
    assert done.returncode == 0, done.stderr


def test_changed_tokens_are_refused_on_resume(digits: TokenDataset, short: dict[str, object], tmp_path: Path) -> None:
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
    flags = [*short_flags, "--learning-rate", "1e25", "--warmup-steps", "0", "--checkpoint-every", "1"]
    done = igpt("pretrain", digits.path, "-o", run, "--model", "tiny", *flags)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "at update" in line or "after" in line
    reached = int(re.search(r"(?:at update|after) (\d+)", line)[1])
    good = int(re.search(r"the last good checkpoint is \S+step-(\d+)", line)[1]) if "is /" in line else 0
    updates = reached - ("at update" in line)
    assert good < updates, "the newest one holds the very weights that gave this loss"


def test_full_disk_is_one_line_and_loses_nothing(
    igpt_process, igpt, digits: TokenDataset, short_run: Path, short_flags: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def small_files_only() -> None:  # stands for a disk that fills up: no file may grow beyond 150 kB
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    words = ["pretrain", digits.path, "-o", run, "--model", "tiny", *short_flags]
    done = igpt_process(*words, preexec_fn=small_files_only)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "File too large" in done.stderr
    assert not list((run / "checkpoints").glob("*")), "something half-written was left"
    again = igpt("pretrain", digits.path, "-o", run, "--resume")
    assert again.returncode == 0, again.stderr
    assert_same_run(short_run, run, tmp_path)


def test_metrics_survive_a_cut_last_line(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in range(4):
        metrics.write("train", step, loss=1.0)
    with metrics.path.open("a") as file:
        file.write('{"kind": "train", "st')
    assert [line["step"] for line in read_metrics(metrics.path)] == [0, 1, 2, 3]
    metrics.cut_after(2)
    metrics.write("train", 3, loss=2.0)
    assert [line["loss"] for line in read_metrics(metrics.path)] == [1.0, 1.0, 1.0, 2.0]
