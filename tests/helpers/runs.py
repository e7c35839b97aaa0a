"""Runs of `igpt` in processes that start quickly and may be killed; comparison of two runs.

A server process has imported all that a run needs, with one thread, and forks for every command.
"""

import contextlib
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from itertools import count
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from igpt.cli import main
from igpt.training.checkpoints import checkpoints
from igpt.training.metrics import read_metrics


class Command:
    """A command of `igpt` in its own process, with its output in two files in `folder`."""

    def __init__(
        self,
        folder: Path,
        *words: object,
        environment: Mapping[str, str] | None = None,
        largest_file: int | None = None,
    ) -> None:
        self._out, self._err = folder / "out", folder / "err"
        folder.mkdir(parents=True, exist_ok=True)
        for path in (self._out, self._err):
            path.write_text("")
        written = [str(word) for word in words]
        self._process = _server().Process(
            target=_child,
            args=(written, self._out, self._err, dict(environment or {}), largest_file),
        )
        self._process.start()

    @property
    def runs(self) -> bool:
        return self._process.is_alive()

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    @property
    def complaint(self) -> str:
        """Return the only line on stderr."""
        (line,) = self.err.splitlines()
        return line

    def send(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def code(self, seconds: float = 120) -> int:
        """Return the exit code, or minus the signal that ended the process; it must end in time."""
        self._process.join(seconds)
        if self.runs:
            self._process.kill()
            raise AssertionError(f"still running after {seconds} seconds: {self.out}{self.err}")
        return self._process.exitcode

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Wait until a condition holds, which must happen while the process runs."""
        deadline = time.monotonic() + 120
        while self.runs and time.monotonic() < deadline:
            if happened():
                return
            time.sleep(0.002)
        raise AssertionError(f"it did not happen: {self.out}{self.err}")


@cache
def _server() -> ForkServerContext:
    context = get_context("forkserver")
    context.set_forkserver_preload(
        ["igpt.training.pretrain", "igpt.cli", "igpt.training.presets", "torch._dynamo"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


def _child(
    words: list[str], out: Path, err: Path, environment: dict[str, str], largest_file: int | None
) -> None:
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        os.dup2(os.open(path, os.O_WRONLY), stream.fileno())
    os.environ.update(environment)
    if largest_file is not None:  # simulates a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    torch.set_num_threads(1)  # the server may have been started for something else
    sys.exit(main(words))


# Below the ports that the system assigns itself, and different for every test process.
_PORTS = count(
    20_000 + 1_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
)


def free_port() -> str:
    """Return a free port for a rendezvous."""
    for port in _PORTS:
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return str(port)
    raise AssertionError("there is no port left")


class Pair:
    """Two ranks of a run. Rank 0 hosts their store, or this process, as torchrun does."""

    def __init__(self, folder: Path, *words: object, store: TCPStore | None = None) -> None:
        self._folder, self._words = folder, words
        self._place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
        if store:
            self._place |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}

    def start(
        self, *more: object, largest_files: tuple[int | None, int | None] = (None, None)
    ) -> list[Command]:
        return [
            self.start_rank(rank, *more, largest_file=largest)
            for rank, largest in enumerate(largest_files)
        ]

    def start_rank(self, rank: int, *more: object, largest_file: int | None = None) -> Command:
        environment = {**self._place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        words = (*self._words, *more)
        return Command(
            self._folder / str(rank), *words, environment=environment, largest_file=largest_file
        )


def end_well(ranks: list[Command]) -> None:
    for rank in ranks:
        assert rank.code() == 0, rank.err


def has_logged(run: Path, step: int, kind: str = "train") -> bool:
    """Return whether metrics.jsonl has a line of a kind for a step or a later one."""
    path = run / "metrics.jsonl"
    return path.exists() and any(
        line["kind"] == kind and line["step"] >= step for line in read_metrics(path)
    )


def losses(run: Path, kind: str = "train") -> dict[int, float]:
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == kind]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)), "a step occurs twice"
    return {line["step"]: line["loss"] for line in lines}


def assert_same_run(one: Path, other: Path, tmp_path: Path) -> None:
    """Compare losses, the best model, and the newest checkpoint, bit for bit."""
    for kind in ("train", "validation"):
        assert losses(one, kind) == losses(other, kind)
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (one, other)]
    assert weights[0] == weights[1]
    newest = [checkpoints(run / "checkpoints")[0] for run in (one, other)]
    assert newest[0].name == newest[1].name
    assert_same_tensors(
        *(saved(path, tmp_path / f"{number}.pt") for number, path in enumerate(newest))
    )


def saved(checkpoint: Path, scratch: Path) -> object:
    """Return all tensors and numbers of a checkpoint."""
    dcp_to_torch_save(checkpoint, scratch)
    return torch.load(scratch, weights_only=False)


def assert_same_tensors(one: object, other: object) -> None:
    flat = [_flatten(state) for state in (one, other)]
    assert flat[0].keys() == flat[1].keys()
    for name, value in flat[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, flat[1][name]), name
        else:
            assert value == flat[1][name], name


def _flatten(value: object, name: str = "") -> dict[str, object]:
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in parts for k, v in _flatten(part, f"{name}/{key}").items()}
    return {name: value}
