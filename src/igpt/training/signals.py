"""Turn Ctrl-C and SIGTERM into a stop request that a loop checks between steps."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

# torchrun forwards a Ctrl-C that its processes have already received from the terminal.
_DUPLICATE_WINDOW = 2.0  # seconds


@dataclass
class StopRequest:
    """The signal that asked to stop.

    A second signal raises `KeyboardInterrupt`, unless it arrives within the duplicate-signal window.

    Attributes:
        number: of the first signal received, or 0.
    """

    number: int = 0
    _received: float = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if not self.number:
            self.number, self._received = number, time.monotonic()
        elif time.monotonic() - self._received > _DUPLICATE_WINDOW:
            raise KeyboardInterrupt


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Record Ctrl-C and SIGTERM in a `StopRequest` instead of raising an exception."""
    stop = StopRequest()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def watch_signals(react: Callable[[int], None]) -> Iterator[None]:
    """Call `react` with the number of every signal, in a thread: also while the main thread is in native code."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        while number := reader.recv(1):
            react(number[0])

    threading.Thread(target=watch, daemon=True).start()
    before = signal.set_wakeup_fd(writer.fileno())
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()


@contextmanager
def exit_if_stuck(seconds: float, message: Callable[[], str]) -> Iterator[None]:
    """End the process if the block has not ended `seconds` after Ctrl-C or SIGTERM.

    The exit code is 128 plus the signal's number.
    """
    done = threading.Event()

    def react(number: int) -> None:
        if number in (signal.SIGINT, signal.SIGTERM) and not done.wait(seconds):
            exit_now(number, message())

    with watch_signals(react):
        try:
            yield
        finally:
            done.set()


def exit_now(number: int, message: str) -> None:
    """Print a message and end the process as the signal would, without cleaning up."""
    with suppress(OSError, ValueError):  # stderr may be closed
        print(f"igpt: {message}", file=sys.stderr, flush=True)
    os._exit(128 + number)
