"""Ctrl-C and SIGTERM: end the process during start-up, raise an exception once the command runs."""

import os
import sys
import time

# Importing `signal` would import other modules, and Ctrl-C during that would show a traceback.
from _signal import SIG_IGN, SIGINT, SIGTERM, getsignal, raise_signal, signal  # type: ignore[import-not-found]
from _thread import start_new_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

_RETRY = 0.02  # seconds
# Signals that arrived during an import and wait for its end, and those that were sent again since.
_waiting = set[int]()
_repeated = set[int]()


class Terminated(KeyboardInterrupt):
    """SIGTERM was received. Code that handles Ctrl-C handles it as well."""


def exit_at_once() -> None:
    """End the process silently on Ctrl-C (exit code 130) and SIGTERM (143), unless ignored."""
    for number in (SIGINT, SIGTERM):
        if getsignal(number) != SIG_IGN:
            signal(number, _exit)


def stop_in_order() -> None:
    """Raise `KeyboardInterrupt` or `Terminated` from now on, if `exit_at_once` was called."""
    for number in (SIGINT, SIGTERM):
        if getsignal(number) is _exit:
            signal(number, _stop)


def _exit(number: int, frame: "FrameType | None") -> None:
    os._exit(128 + number)


def _stop(number: int, frame: "FrameType | None") -> None:
    is_new = number not in _repeated
    _repeated.discard(number)
    if _is_importing(frame):
        # Python prints and drops exceptions in the callbacks of its import locks, and extension
        # modules turn them into other errors. So the signal waits until the import is over; a
        # second signal ends the process.
        if is_new and number in _waiting:
            os._exit(128 + number)
        _waiting.add(number)
        start_new_thread(_send_again, (number,))
        return
    _waiting.discard(number)
    raise Terminated if number == SIGTERM else KeyboardInterrupt


def _is_importing(frame: "FrameType | None") -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _send_again(number: int) -> None:
    time.sleep(_RETRY)
    if not sys.is_finalizing():
        _repeated.add(number)
        raise_signal(number)
