"""Checks of the paths that results are written to, before any work is done."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from igpt.errors import InputError
from igpt.files import file_to_write, read_json, require_folder_name
from igpt.remote import url_of

# Temporary files, locks and parts have longer names than the output by at most this many bytes.
_ROOM = 40
_USUAL_LENGTH = 255  # bytes of a name on most file systems


def require_writable(path: Path, kind: str | None = None) -> None:
    """Raise if a file cannot be written, or is JSON of another kind than `kind`.

    Raises:
        InputError: `path` is no name of a regular file, its folder cannot be written to, or it
            holds something else.
    """
    with _reasons(path):
        target = file_to_write(path)
        _require_new_name(path, target)
        is_there = target.exists()
    if kind and is_there and read_json(target, kind).get("format") != kind:
        raise InputError(
            f"{path} holds something else already ({kind} would be written there); choose another "
            "-o"
        )


def require_writable_folder(path: Path) -> None:
    """Raise if a folder cannot be created or written to.

    Raises:
        InputError: `path` has no name of its own, it is a file, or it cannot be written to; if it
            has to be made, the folder that it would lie in cannot be written to.
    """
    require_folder_name(path)
    with _reasons(path):
        target = path.resolve()
        if target.exists() and not target.is_dir():
            raise InputError(f"{path} is a file; a folder is to be written there")
        if target.is_dir():  # what it lies in may be read-only, as it is around a mounted folder
            _require_permission(path, target)
        else:
            _require_new_name(path, target)


@contextlib.contextmanager
def _reasons(path: Path) -> Iterator[None]:
    """Raise errors of the system about a path (too long, a loop of links) as `InputError`."""
    if url := url_of(path):
        raise InputError(f"{url}: only igpt prepare writes to a URL; give a path of this machine")
    try:
        yield
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{_short(path)} cannot be written: {reason}") from None


def _require_new_name(path: Path, target: Path) -> None:
    """Raise if `target` cannot be created: permission of its folder, length of its name."""
    # A link that leads nowhere is there, and no folder can be made in its place.
    home = next(parent for parent in target.absolute().parents if os.path.lexists(parent))
    if not home.is_dir():
        raise InputError(f"{path} cannot be written: {home} is not a folder")
    _require_permission(path, home)
    known = os.pathconf(home, "PC_NAME_MAX")
    longest = (known if known > 0 else _USUAL_LENGTH) - _ROOM  # some file systems name no limit
    if any(len(os.fsencode(part)) > longest for part in target.absolute().relative_to(home).parts):
        raise InputError(f"{_short(path)} cannot be written: a name has at most {longest} bytes")


def _require_permission(path: Path, folder: Path) -> None:
    """Refuse the output `path` if nothing can be written in `folder`."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be written: you have no permission to write in {folder}")


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 100 else f"{text[:97]}..."


@contextlib.contextmanager
def passing_folder(target: Path) -> Iterator[Path]:
    """Yield the path of a temporary folder next to a file to be written.

    It is removed at the end, or by the next run if this one is killed.
    """
    folder = target.with_name(f".{target.name}.passing")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
