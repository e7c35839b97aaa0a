"""A pool of `igpt` commands, each in its own process, for the reproduction and the speedrun."""

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

IGPT = (sys.executable, "-P", "-m", "igpt")
_POLL = 0.05  # seconds
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


@dataclass
class Process:
    """A running or finished command."""

    name: str
    log: Path
    popen: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    @property
    def exit_code(self) -> int | None:
        """The exit code, or None while the command runs."""
        return self.popen.returncode

    @property
    def last_line(self) -> str:
        """The last line of the log: after a failure, its reason."""
        return self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]


class ProcessPool:
    """Run commands in at most `jobs` processes at a time.

    Commands are in sessions of their own, so that Ctrl-C in a terminal reaches them only through
    `stop`. On Linux they receive SIGTERM if this process is killed.

    Args:
        folder: working directory of the commands.
        threads: OpenMP threads of each command.
        program: the words before the command's own.
    """

    def __init__(
        self, folder: Path, jobs: int, threads: int, program: Sequence[str] = IGPT
    ) -> None:
        self.folder, self.jobs, self.program = folder, jobs, program
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.running: list[Process] = []

    @property
    def is_full(self) -> bool:
        """True if no further command may start now."""
        return len(self.running) >= self.jobs

    def start(self, name: str, words: Sequence[str], log: Path) -> None:
        """Start a command; append its output to `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as output:
            # The lock belongs to the open file that the command inherits. It makes the same command
            # wait for one that a killed process left behind and that is still saving.
            fcntl.flock(output, fcntl.LOCK_EX)
            print(f"$ igpt {' '.join(words)}", file=output, flush=True)
            popen = subprocess.Popen(
                [*self.program, *words],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_end_with_parent(),
            )
        self.running.append(Process(name, log, popen))

    def wait(self, timeout: float) -> list[Process]:
        """Return the commands that have ended, as soon as there are any or after `timeout`."""
        end = time.monotonic() + timeout
        while not (ended := [one for one in self.running if one.popen.poll() is not None]):
            if time.monotonic() >= end:
                break
            time.sleep(_POLL)
        return self._remove(ended)

    def stop(self) -> list[Process]:
        """Interrupt all commands, wait until they have saved their work, and return them."""
        for one in self.running:
            one.popen.send_signal(signal.SIGINT)
        for one in self.running:
            one.popen.wait()
        return self._remove(list(self.running))

    def _remove(self, ended: list[Process]) -> list[Process]:
        for one in ended:
            one.seconds = time.monotonic() - one.started
            self.running.remove(one)
        return ended


def _end_with_parent() -> Callable[[], None] | None:
    """Return a function that a new process calls to receive SIGTERM when its parent dies."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def end_with_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return end_with_parent
