"""SIGTERM, which ends a process at once, as an exit that removes temporary files and locks first."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_EXIT_CODE = 128 + signal.SIGTERM


@contextmanager
def cleanup_on_termination() -> Iterator[None]:
    """Exit with code 143 on SIGTERM, so that what is open is closed and removed; a second signal ends at once.

    Only the main thread of a process can set this up; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.exit(_EXIT_CODE)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
