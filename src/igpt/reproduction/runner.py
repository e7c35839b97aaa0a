"""Runs the steps of a reproduction: side by side, each once, and from where they were stopped.

steps.json       of every step that ran: its command, how it ended, the seconds of all its runs
together logs/NAME.log    what it said

Steps run in processes forked from one that has imported all that they need.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

from filelock import FileLock
from pydantic import Field

from igpt.data.tokens.dataset import MANIFEST
from igpt.environment import describe
from igpt.errors import InputError, Interrupted
from igpt.evaluation.results import Count, Positive
from igpt.files import Stored, read_json, require_schema, write_json
from igpt.locks import exclusive_folder
from igpt.reproduction.steps import Step

RECORD, LOGS = "steps.json", "logs"
_IMPORTED = [
    "igpt.cli",
    "igpt.training.pretrain",
    "igpt.training.finetune",
    "igpt.evaluation.probe",
    "igpt.sampling.grids",
]
FORMAT, VERSION = "igpt-reproduction-steps", 1
_REFUSED = 2  # exit code of a mistake
Command = Callable[[list[str]], int]  # the words of a command line -> its exit code
Say = Callable[[str], None]


class StepsFailed(InputError):  # noqa: N818  as its siblings in errors.py
    """Steps of a reproduction have failed; the message says which, and why the first did."""


@dataclass
class _Running:
    step: Step
    process: ForkServerProcess
    ready: Connection  # closed at the other end when signals are heard there
    began: float = field(default_factory=time.monotonic)


def run(
    steps: Sequence[Step],
    folder: Path,
    command: Command,
    *,
    places: Mapping[str, Path] | None = None,
    jobs: int,
    minutes: float | None = None,
    say: Say,
) -> bool:
    """Runs what is not done yet.

    Args:
        folder: of the reproduction; commands run in it.
        command: runs one; a function of a module, that a process of its own can import.
        places: sources of `igpt prepare` that are paths from here, with the absolute ones.
        jobs: steps side by side; the cores are shared out among them.
        minutes: after so many the steps that run are stopped; the next call goes on.
        say: is told what begins and ends.

    Returns:
        whether all steps are done.

    Raises:
        StepsFailed: some failed; all that does not need them is done.
        InputError: the folder holds results of other commands, or another process works in it.
        Interrupted: on Ctrl-C or SIGTERM, when the steps that ran have been stopped.
    """
    with exclusive_folder(folder), _signals() as stop:
        return _Runner(steps, folder, command, places or {}, jobs, say, stop).run(minutes)


class _Machine(Stored):
    """The machine that a step ran on; all else in it is shown as it is."""

    igpt: str
    torch: str
    processor: str
    cores: Count | None
    gpu: str | None

    __pydantic_extra__: dict[str, str | int | float | None] = Field(init=False)


class _Record(Stored):
    """What is recorded of a step that ran."""

    command: Annotated[list[str], Field(min_length=1)]
    ended: Literal["done", "skipped", "stopped", "failed"]
    seconds: Annotated[float, Field(ge=0, le=1e12)]
    side_by_side: Positive
    machine: _Machine


class _Steps(Stored):
    """`steps.json`."""

    steps: dict[str, _Record]


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what is recorded of the steps that ran, by name.

    Raises:
        InputError: the record is damaged, or of another version.
    """
    path = folder / RECORD
    if not path.exists():
        return {}
    found = read_json(path, "reproduction")
    if (found.get("format"), found.get("version")) != (FORMAT, VERSION):
        raise InputError(
            f"{path} is not {FORMAT} of version {VERSION}, which this igpt reads; choose another -o"
        )
    require_schema(found, _Steps, path)
    return dict(found["steps"])


def settled(record: Mapping[str, Any] | None) -> bool:
    """Whether nothing is left to do of a step."""
    return record is not None and record["ended"] in ("done", "skipped")


@dataclass
class _Stop:
    number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:  # asked a second time
            raise KeyboardInterrupt
        self.number = number


@contextmanager
def _signals() -> Iterator[_Stop]:
    """Turns Ctrl-C and SIGTERM into a wish."""
    stop = _Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Runner:
    def __init__(
        self,
        steps: Sequence[Step],
        folder: Path,
        command: Command,
        places: Mapping[str, Path],
        jobs: int,
        say: Say,
        stop: _Stop,
    ) -> None:
        self.folder, self.command, self.places = folder, command, places
        self.jobs, self.say, self.stop = jobs, say, stop
        self.threads = max(1, _cores() // jobs)
        self.machine = {
            key: value for key, value in describe().items() if key not in ("command", "started")
        }
        self.records = records(folder)
        for step in steps:
            known = self.records.get(step.name)
            if known and known["ended"] != "failed" and tuple(known["command"]) != step.words:
                raise InputError(
                    f"{folder} holds {step.name} by another command (igpt {' '.join(known['command'])}); "
                    f"choose another -o"
                )
        self.total = len(steps)
        self.done = {step.name for step in steps if settled(self.records.get(step.name))}
        self.waiting = [step for step in steps if step.name not in self.done]
        self.running: list[_Running] = []
        self.failures: list[str] = []

    def run(self, minutes: float | None) -> bool:
        end = None if minutes is None else time.monotonic() + 60 * minutes
        if self.done and self.waiting:
            self.say(f"{len(self.done)} of {self.total} steps are done already")
        try:
            with _threads(self.threads):
                late = self._work(end)
        finally:  # whatever went wrong here, nothing runs on behind our back
            self._stop_all()
        reached = f"{len(self.done)} of {self.total} steps are done"
        if self.stop.number is not None:
            raise Interrupted(self.stop.number, reached)
        if self.failures:
            several = (
                f" ({len(self.failures)} steps failed; {reached})"
                if len(self.failures) > 1
                else f" ({reached})"
            )
            raise StepsFailed(self.failures[0] + several)
        if late:
            self.say(f"stopped after {minutes:g} minutes: {reached}; the same command goes on")
        return not late

    def _work(self, end: float | None) -> bool:
        """Runs steps until none is left whose inputs are there, a stop is wished for, or time is up (then True)."""
        while self._begin() or self.running:
            left = 0.5 if end is None else min(0.5, max(0.0, end - time.monotonic()))
            wait([one.process.sentinel for one in self.running], timeout=left)
            self._collect()
            if self.stop.number is not None:
                return False
            if end is not None and time.monotonic() >= end and (self.waiting or self.running):
                return True
        return False

    def _begin(self) -> bool:
        """Starts the next steps whose inputs are there, as many as may run side by side; whether it settled any."""
        began = False
        for step in list(self.waiting):
            if len(self.running) >= self.jobs:
                break
            if not self.done.issuperset(step.after):
                continue
            self.waiting.remove(step)
            began = True
            if step.words[0] == "prepare" and (self.folder / step.name / MANIFEST).exists():
                self._record(
                    step, "done", 0.0
                )  # it ended together with whoever should have recorded it
            else:
                self._start(step)
        return began

    def _start(self, step: Step) -> None:
        words = list(step.words)
        if words[0] == "prepare":
            words[1] = str(self.places.get(words[1], words[1]))
        words += (
            ["--resume"] if step.run and (self.folder / step.name / "config.yaml").exists() else []
        )
        (self.folder / LOGS).mkdir(exist_ok=True, parents=True)
        context = get_context("forkserver")
        ready, begun = context.Pipe(duplex=False)
        process = context.Process(
            target=_child, args=(self.command, words, self.folder, _log(step), self.threads, begun)
        )
        process.start()
        begun.close()
        self.running.append(_Running(step, process, ready))

    def _collect(self) -> None:
        """Records the steps that have ended."""
        for one in [one for one in self.running if not one.process.is_alive()]:
            self.running.remove(one)
            seconds = time.monotonic() - one.began
            if one.process.exitcode == 0:
                self._record(one.step, "done", seconds)
                self.say(f"{len(self.done)}/{self.total} {one.step.name}: {seconds:.0f} s")
                continue
            if self.stop.number is not None:  # Ctrl-C reaches all that were begun from a terminal
                self._record(one.step, "stopped", seconds)
                continue
            log = self.folder / _log(one.step)
            lines = (
                log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                if log.exists()
                else []
            )
            reason = lines[-1] if lines else "it said nothing"
            if one.step.optional and one.process.exitcode == _REFUSED:
                self._record(one.step, "skipped", seconds)
                self.say(f"{one.step.name}: skipped ({reason})")
                continue
            self._record(one.step, "failed", seconds)
            failure = (
                f"the step {one.step.name} failed (exit code {one.process.exitcode}): {reason}; all that it said is in "
                f"{log}"
            )
            self.failures.append(failure)
            self.say(failure)

    def _stop_all(self) -> None:
        """Asks what runs to save and end, and waits for it."""
        for one in self.running:
            wait([one.ready, one.process.sentinel])
            if one.process.pid is not None and one.process.is_alive():
                os.kill(one.process.pid, signal.SIGINT)
        for one in self.running:
            one.process.join()
            seconds = time.monotonic() - one.began
            self._record(one.step, "done" if one.process.exitcode == 0 else "stopped", seconds)
        self.running.clear()

    def _record(self, step: Step, ended: str, seconds: float) -> None:
        if ended in ("done", "skipped"):
            self.done.add(step.name)
        before = self.records.get(step.name, {}).get("seconds", 0.0)
        self.records[step.name] = {
            "command": step.words,
            "ended": ended,
            "seconds": round(before + seconds, 1),
            "side_by_side": self.jobs,
            "machine": self.machine,
        }
        write_json(
            self.folder / RECORD, {"format": FORMAT, "version": VERSION, "steps": self.records}
        )


def _log(step: Step) -> Path:
    return Path(LOGS, f"{step.name.replace('/', '-')}.log")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """What the process that all steps are forked from imports has so many threads, where it asks only then."""
    context = get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _child(
    command: Command, words: list[str], folder: Path, log: Path, threads: int, begun: Connection
) -> None:
    """A command in a process of its own, that ends when the one that began it does."""
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs begin without it
    begun.close()
    import torch

    torch.set_num_threads(threads)
    os.chdir(folder)
    with log.open("a", encoding="utf-8") as said:
        print(f"$ igpt {' '.join(words)}", file=said, flush=True)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(said.fileno(), stream.fileno())
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    with FileLock(log.with_suffix(".lock")):  # one whose parent was killed may still be saving
        sys.exit(command(words))


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
