"""Files and folders that are either whole or absent, whatever interrupts their writing."""

import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from igpt.errors import InputError


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def sync(path: Path) -> None:
    """Returns when a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write to; on success it becomes `path`, on any error it is removed.

    Raises:
        InputError: `path` is a folder.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; the name of a file to write is needed")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder to fill; on success it replaces `path`, on any error it is removed.

    The files in it reach the disk before the rename. A folder cannot be exchanged in one step everywhere: an existing
    one is moved aside first, and `recover_folder` puts it back if a kill fell between the two renames.

    Raises:
        InputError: `path` is a file.
    """
    path = path.resolve()  # of a link, the folder it names is replaced
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; a folder is to be written there")
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    temporary, old = _temporary(path), _old(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _settle_exchange(path)


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _settle_exchange(path: Path) -> None:
    old = _old(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(path)


def recover_folder(path: Path) -> None:
    """Finishes or undoes an exchange of folders that `atomic_folder` had begun, and clears what it left behind."""
    path = path.resolve()
    _settle_exchange(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def folder_to_read(path: Path) -> Path:
    """`path`, or the folder that stands for it while an exchange is under way or was cut off; nothing is changed."""
    old = _old(path.resolve())
    return old if old.exists() and not path.exists() else path


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `path`; `what` names it in errors.

    Raises:
        InputError: there is no such file, or it is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"no {what} at {path.parent}: {path.name} is missing") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; a JSON file ({what}) is needed there") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable as JSON ({error}); is it cut off?") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} should hold a JSON object ({what})")
    return value


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
