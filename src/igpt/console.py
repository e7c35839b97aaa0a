"""Standard streams and cache folders of a command, usable in any environment.

Letters that a stream cannot encode are escaped. Output whose reader has gone (`| head -1`) is
discarded, and the work goes on. A stream that was closed before the start is the null device.
Libraries that keep caches in a home folder that cannot be written to get a temporary folder, which
is removed at the end.
"""

import errno
import io
import os
import sys
from pathlib import Path
from typing import Any, TextIO


class _Output(io.FileIO):
    """The bytes of a stream, which are discarded as soon as nobody reads them any more."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._gone = (
            (errno.EPIPE, errno.EIO) if self.isatty() else (errno.EPIPE,)
        )  # EIO: the terminal was closed

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in self._gone:
                raise
            _discard(self.fileno())
            return memoryview(data).nbytes


def open_streams() -> None:
    """Replace standard output and standard error, and open standard streams that are closed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(
                os.open(os.devnull, os.O_RDWR), True
            )  # it gets the lowest free number, this one
    sys.stdin = sys.stdin or open(0, closefd=False, encoding="utf-8")  # noqa: SIM115  it stays open
    sys.stdout = _stream(1, sys.stdout)
    sys.stderr = _stream(2, sys.stderr)


def _stream(descriptor: int, before: TextIO | None) -> TextIO:
    encoding = "utf-8" if before is None else before.encoding
    if before is not None:
        before.flush()
    at_once = descriptor == 2 or (
        before is not None and (before.isatty() or getattr(before, "write_through", False))
    )
    buffer = io.BufferedWriter(_Output(descriptor))
    return io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=at_once)


def close_streams() -> bool:
    """Flush the streams, or discard their buffers; return whether everything was written.

    Python would complain at its exit about what cannot be written.
    """
    complete = True
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _discard(stream.fileno())
            complete = False
    return complete


def _discard(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def settle_caches() -> None:
    """Set temporary cache folders for matplotlib and Hugging Face if theirs are read-only."""
    hub = _folder("XDG_CACHE_HOME", ".cache", "huggingface")
    fonts = _folder("XDG_CACHE_HOME", ".cache", "matplotlib")
    settings = _folder("XDG_CONFIG_HOME", ".config", "matplotlib")
    needed = []
    if not os.environ.get("HF_HOME") and not (_is_writable(hub) or _is_filled(hub)):
        needed.append("HF_HOME")
    if not os.environ.get("MPLCONFIGDIR") and not (_is_writable(fonts) and _is_writable(settings)):
        needed.append("MPLCONFIGDIR")
    if not needed:
        return
    import atexit
    import shutil
    import tempfile

    try:
        made = Path(tempfile.mkdtemp(prefix="igpt-cache-"))
    except OSError:  # nothing can be written anywhere: whoever needs a cache says so
        return
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    for name in needed:
        (made / name).mkdir()
        os.environ[name] = str(made / name)


def _folder(variable: str, default: str, library: str) -> Path | None:
    """Return a folder of a library, from an environment variable or in the home folder.

    It is None if there is no home folder.
    """
    try:
        return Path(os.environ.get(variable) or Path.home() / default) / library
    except RuntimeError:
        return None


def _is_writable(path: Path | None) -> bool:
    """Return whether a folder can be written to, after creating it if necessary."""
    if path is None or not path.is_absolute():
        return False
    there = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    return os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)  # noqa: PTH112  Path.is_dir may raise


def _is_filled(path: Path | None) -> bool:
    """Return whether a folder can be read and is not empty: a cache may be read-only."""
    if path is None or not path.is_absolute():
        return False
    try:
        return any(path.iterdir())
    except OSError:
        return False
