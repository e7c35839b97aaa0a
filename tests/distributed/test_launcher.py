"""torchrun and its environment variables: killed, wrong, or missing."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError
from igpt.training.distributed import distributed_world

from ..helpers.runs import Command, Pair, assert_same_run, end_well, free_port, has_logged


def wait_until(
    happened: Callable[[], bool], process: subprocess.Popen[str] | None = None, seconds: float = 240
) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Return whether a process runs; zombies do not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start two ranks with torchrun, and kill what is left of them after the test."""
    started: list[int] = []

    def start(*words: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += ["--master-port", free_port(), "-m", "igpt", *map(str, words)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (tmp_path / "out").open("w") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, text=True, env=environment
            )
        started.append(process.pid)
        return process

    yield start
    for pid in started:
        for child in children(pid):
            if is_alive(child):
                os.kill(child, signal.SIGKILL)
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_ranks_stop_when_torchrun_is_killed_and_can_be_resumed(
    launched, digits: TokenDataset, short_flags: list[str], tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    long = ["--steps", 120, "--n-embd", 64, "--n-layer", 4, "--log-every", 2]
    long += ["--validate-every", 120, "--checkpoint-every", 120]
    words = ["pretrain", digits.path, "--model", "tiny", *short_flags, *long]
    torchrun = launched(*words, "-o", run)
    wait_until(lambda: has_logged(run, 2), torchrun)
    ranks = children(torchrun.pid)
    assert len(ranks) == 2
    torchrun.kill()
    torchrun.wait()
    wait_until(lambda: not any(map(is_alive, ranks)), seconds=60)
    assert not has_logged(run, 120), "it trained to its end"
    assert len(list((run / "checkpoints").glob("step-*"))) == 1, "it saved when it stopped"
    assert not (run / ".lock").exists()
    end_well(Pair(tmp_path / "again", *words).start("-o", run, "--resume"))
    end_well(Pair(tmp_path / "other", *words).start("-o", whole))
    assert_same_run(whole, run, tmp_path)


HANGING = """
import os, sys, time
from igpt.training.distributed import distributed_world
os.environ["TORCHELASTIC_RUN_ID"] = "a test"
import signal
# as while a collective hangs, and Python's handlers do not run
signal.signal(signal.SIGTERM, lambda *_: None)
with distributed_world("cpu", stop_seconds=0.1):
    print(os.getpid(), flush=True)
    while True:
        time.sleep(60)
"""


def test_a_rank_that_hangs_is_ended_too(tmp_path: Path) -> None:
    """The launcher here is a shell that is killed."""
    script = tmp_path / "hanging.py"
    script.write_text(HANGING)
    shell = subprocess.Popen(
        ["bash", "-c", f"{sys.executable} {script}; true"], stdout=subprocess.PIPE, text=True
    )
    pid = int(shell.stdout.readline())
    shell.kill()
    shell.wait()
    wait_until(lambda: not is_alive(pid), seconds=60)


def test_two_groups_in_one_directory(
    digits: TokenDataset, short_flags: list[str], tmp_path: Path
) -> None:
    words = ["pretrain", digits.path, "-o", tmp_path / "run", "--model", "tiny", *short_flags]
    words += ["--steps", 96]  # the first group must still be training when the second one starts
    first = Pair(tmp_path / "first", *words).start()
    first[0].wait_until(lambda: has_logged(tmp_path / "run", 1))
    second = Pair(tmp_path / "second", *words).start("--resume")
    for rank in second:
        assert rank.code() == 2, rank.err
        assert "is being written by process" in rank.complaint
    end_well(first)
    whole = Pair(tmp_path / "whole", *words).start("-o", tmp_path / "alone")
    end_well(whole)
    assert_same_run(tmp_path / "alone", tmp_path / "run", tmp_path)


def joined(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name in (
        "WORLD_SIZE",
        "RANK",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with distributed_world("cpu"):
        pass


MEETING = {
    "WORLD_SIZE": "2",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29555",
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(
            ({name: None}, f"has WORLD_SIZE but not {name}; torchrun")
            for name in ("RANK", "MASTER_ADDR", "MASTER_PORT")
        ),
        *(
            ({name: value}, f"{name}={value!r}, and a number from")
            for name, values in {
                "WORLD_SIZE": ("0", "abc", "", "-1", "2.0", "²", "9" * 40),
                "RANK": ("x", "-1", "2", "7"),
                "LOCAL_RANK": ("x", "-1"),
                "LOCAL_WORLD_SIZE": ("0", "x"),
                "MASTER_PORT": ("x", "0", "65536", "-1"),
            }.items()
            for value in values
        ),
    ],
)
def test_an_environment_that_torchrun_cannot_have_made(
    changes: dict[str, str | None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {
        name: value for name, value in {**MEETING, **changes}.items() if value is not None
    }
    with pytest.raises(InputError) as caught:
        joined(monkeypatch, environment)
    assert said in str(caught.value)
    assert "torchrun" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "environment", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}]
)
def test_a_single_process_needs_no_rendezvous(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    joined(monkeypatch, environment)


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            InputError, match=rf"MASTER_PORT={port} is in use on this machine.*--master-port"
        ):
            joined(monkeypatch, {**MEETING, "MASTER_PORT": str(port)})


def test_wrong_environments_are_one_line_on_the_command_line(
    igpt, digits: TokenDataset, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    for device in ("cpu", "auto"):
        done = igpt(
            "pretrain", digits.path, "-o", tmp_path / "run", "--model", "tiny", "--device", device
        )
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "has WORLD_SIZE but not RANK" in done.stderr
    assert not (tmp_path / "run").exists()


def test_control_c_while_waiting_for_other_ranks_ends_at_once(
    digits: TokenDataset, tmp_path: Path
) -> None:
    environment = {**MEETING, "MASTER_PORT": free_port()}
    words = ["pretrain", digits.path, "-o", tmp_path / "run", "--model", "tiny"]
    command = Command(tmp_path, *words, environment=environment)

    def listens() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", int(environment["MASTER_PORT"]))) == 0

    command.wait_until(listens)
    command.send(signal.SIGINT)
    assert command.code(30) == 130
    assert command.complaint == "igpt: interrupted while waiting for the other ranks"
    assert not (tmp_path / "run").exists()
