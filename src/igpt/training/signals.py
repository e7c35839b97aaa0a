"""Turn Ctrl-C and SIGTERM into a stop request that a loop checks between steps."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Self

# torchrun forwards a Ctrl-C that its processes have already received from the terminal.
_DUPLICATE_WINDOW = 2.0  # seconds


class StopRequest:
    """Record Ctrl-C and SIGTERM within a `with` block, instead of raising an exception.

    A second signal raises `KeyboardInterrupt`, unless it comes within the duplicate-signal window.

    Attributes:
        number: of the first signal received, or 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self._received = 0.0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._received = number, time.monotonic()
        elif time.monotonic() - self._received > _DUPLICATE_WINDOW:
            raise KeyboardInterrupt


@contextmanager
def watch_signals(react: Callable[[int], None]) -> Iterator[None]:
    """Call `react` with the number of every signal, in a thread.

    It is called at once, even while the main thread runs native code.
    """
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
