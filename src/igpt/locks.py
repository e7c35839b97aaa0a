"""Locks that keep two processes from writing the same folder or file.

The lock of a file or new folder `DIR/NAME` is the file `DIR/.NAME.lock`, that of a folder to work
in is `FOLDER/.lock`. It holds the host, process id and command of its owner as JSON, is locked by
the kernel as long as that process lives, and is removed at the end. What a killed process leaves is
taken over. Where a file system has no locks between hosts, a lock of another host counts only if
its owner is seen to touch it.
"""

import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

from igpt.errors import InputError
from igpt.files import resolved

_TOUCHED_EVERY = 30.0  # seconds
_STALE_AFTER = 300.0
_TRIES = 1000  # to open a lock file in a folder that other processes make and remove

_held = set[
    Path
]()  # by this process: the demo runs other commands in the folder that it has locked


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock of a file or folder to be written; a process may acquire it more than once.

    Folders that are made for the lock are removed again if nothing was written to them.

    Raises:
        InputError: another process holds it; its host, process id and command are named.
    """
    target = resolved(path)
    with _holding(path, target.with_name(f".{target.name}.lock")):
        yield


@contextmanager
def exclusive_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder to work in; see `exclusive`.

    Raises:
        InputError: another process holds it; its host, process id and command are named.
    """
    with _holding(folder, resolved(folder) / ".lock"):
        yield


@contextmanager
def _holding(path: Path, file: Path) -> Iterator[None]:
    if file in _held:
        yield
        return
    absent = [folder for folder in file.parents if not folder.exists()]  # the innermost first
    try:
        with _held_by_us(file, path):
            yield
    finally:
        with suppress(OSError):  # something was written there
            for folder in absent:
                folder.rmdir()


@contextmanager
def _held_by_us(file: Path, path: Path) -> Iterator[None]:
    released = Event()
    descriptor = _acquire(file, path)
    try:
        _held.add(file)
        Thread(target=_keep_fresh, args=(file, released), daemon=True).start()
        yield
    finally:
        released.set()
        _held.discard(file)
        if _is_same(
            descriptor, file
        ):  # another host may have taken it over while this one was suspended
            file.unlink(missing_ok=True)  # before it is unlocked
        os.close(descriptor)


def _acquire(file: Path, path: Path) -> int:
    """Return the descriptor of the lock file, locked and with this process as its owner."""
    for _ in range(_TRIES):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # another process has just removed the empty folder
            continue
        locked = False
        try:
            locked = _try_lock(descriptor)
            if _is_same(descriptor, file):
                owner = _owner(descriptor)
                here = owner.get("host") == socket.gethostname()
                if not locked or (owner and not here and _is_touched(file)):
                    raise InputError(_refusal(path, owner))
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_myself()).encode(), 0)
                return descriptor
        except InputError:
            os.close(descriptor)
            raise
        except BaseException:  # Ctrl-C
            if locked and _is_same(descriptor, file):
                file.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner removed the file after it was opened here
    raise InputError(f"{path} cannot be locked: {file} cannot be made")


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: the owner's process id decides
        owner = _owner(descriptor)
        return owner.get("host") != socket.gethostname() or not _is_alive(owner.get("pid"))
    return True


def _owner(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 1 << 16, 0))
    except ValueError:  # empty, or cut off by a kill
        return {}
    return found if isinstance(found, dict) else {}


def _is_same(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _is_alive(pid: object) -> bool:
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _is_touched(file: Path) -> bool:
    """Return whether the owner of a lock, on another host, touches it; that takes a while to see.

    File systems differ in whether their locks hold between hosts. Where they do, the owner is dead
    already.
    """
    before = _touched(file)
    if before is None or time.time() - before > _STALE_AFTER:
        return False
    end = time.monotonic() + 2.5 * _TOUCHED_EVERY
    while time.monotonic() < end:
        time.sleep(_TOUCHED_EVERY / 30)
        if _touched(file) != before:
            return True
    return False


def _touched(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:
        return None


def _myself() -> dict[str, Any]:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"host": socket.gethostname(), "pid": os.getpid(), "command": command[:4096]}


def _refusal(path: Path, owner: dict[str, Any]) -> str:
    who = (
        f"process {owner['pid']} on {owner['host']}"
        if {"pid", "host"} <= owner.keys()
        else "another process"
    )
    command = f" ({owner['command']})" if owner.get("command") else ""
    advice = "wait until it has ended, or choose another output"
    return f"{path} is being written by {who}{command}; {advice}"


def _keep_fresh(file: Path, released: Event) -> None:
    while not released.wait(_TOUCHED_EVERY):
        try:
            os.utime(file)
        except FileNotFoundError:
            return
        except OSError:  # a file system of the network has its moments
            continue
