"""Ctrl-C and SIGTERM: they end the process at once before the work begins, and stop the work in order after that."""

import os
import signal
import sys
import time
from _thread import start_new_thread
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_RETRY = 0.02  # seconds


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived; everything that handles Ctrl-C handles it as well."""


def exit_at_once() -> None:
    """End this process on Ctrl-C (exit code 130) and SIGTERM (143), silently. A signal that is ignored stays so."""
    for number in _NUMBERS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _exit)


def stop_in_order() -> None:
    """Raise `KeyboardInterrupt` or `Terminated` from now on, where `exit_at_once` was called; else change nothing."""
    for number in _NUMBERS:
        if signal.getsignal(number) is _exit:
            signal.signal(number, _stop)


def _exit(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def _stop(number: int, frame: FrameType | None) -> None:
    if _is_importing(frame):
        # Python prints and drops exceptions in the callbacks of its import locks, and extension modules turn them into
        # other errors: wait until the import is over.
        start_new_thread(_send_again, (number,))
    elif number == signal.SIGTERM:
        raise Terminated
    else:
        raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _send_again(number: int) -> None:
    time.sleep(_RETRY)
    if not sys.is_finalizing():
        signal.raise_signal(number)
