"""Read and write files: atomic writes, and reading of untrusted files with limits and schemas."""

import glob
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from igpt.errors import InputError

_LARGEST_TEXT = 256 << 20  # bytes of JSON or YAML; larger files are something else
# levels of lists and objects; deeper ones would exhaust the stack of what works through them
_DEEPEST = 64
_KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_regular(path: Path) -> None:
    """Raise if a path is a FIFO, a socket or a device, whose reading may block or never end.

    Files that do not exist pass: whoever opens them reports that.

    Raises:
        InputError: `path` is none of a regular file, a folder, or nothing.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    for is_kind, kind in _KINDS:
        if is_kind(mode):
            raise InputError(f"{path} is {kind}; a regular file is needed")


def resolved(path: Path) -> Path:
    """Return the absolute path with all symbolic links resolved.

    Raises:
        InputError: links lead back to themselves.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # RuntimeError: Python 3.11 and 3.12
        raise InputError(f"{path} is a symbolic link that leads back to itself") from None


def expanded(name: str | Path) -> Path:
    """Return a path with `~` and `~user` replaced by home folders.

    Raises:
        InputError: there is no such user.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise InputError(f"{name}: there is no such user's home folder") from None


def require_folder_name(path: Path) -> None:
    """Raise if the name of a folder to create is `/`, `.`, `..` or empty.

    Raises:
        InputError: `path` has no name of its own.
    """
    if path.name in ("", ".."):
        raise InputError(
            f"{str(path)!r} cannot be the output; give the name of a folder to make, such as -o "
            "runs/one"
        )


def file_to_write(path: Path) -> Path:
    """Return the file that writing to `path` replaces: `path`, or the target of a symbolic link.

    Raises:
        InputError: `path` is a folder, a FIFO, a socket or a device.
    """
    target = resolved(path) if path.is_symlink() else path
    if target.is_dir() or not target.name:
        raise InputError(f"{path} is a folder; the name of a file to write is needed")
    require_regular(target)
    return target


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it is renamed to `path` on success, removed on an error.

    Raises:
        InputError: see `file_to_write`.
    """
    path = file_to_write(path)
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
    """Yield a temporary folder to fill; it replaces `path` on success and is removed on an error.

    The files in it reach the disk before the rename. A folder cannot be exchanged in one step
    everywhere: an existing one is moved aside first, and `recover_folder` puts it back if a kill
        fell between the two renames.

    Raises:
        InputError: `path` is a file.
    """
    path = resolved(path)  # of a link, the folder it names is replaced
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
    """Finish or undo an interrupted replacement by `atomic_folder`, and remove its leftovers."""
    path = resolved(path)
    _settle_exchange(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def folder_to_read(path: Path) -> Path:
    """Return `path`, or the folder that holds its content during a replacement; change nothing."""
    target = resolved(path)
    if path.exists() or not target.name:
        return path
    old = _old(target)
    return old if old.exists() else path


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity raise: they are not JSON."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


class Stored(BaseModel):
    """Base of the schemas of JSON files: unknown keys are ignored, other types refused."""

    model_config = ConfigDict(extra="allow", strict=True)


def read_text(path: Path, what: str, largest: int = _LARGEST_TEXT) -> str:
    """Return the text of a file; `what` names its content in errors.

    Raises:
        InputError: there is no such file, it is not a regular one, it is larger than `largest`
            bytes, or it is not UTF-8.
    """
    require_regular(path)
    try:
        if path.stat().st_size > largest:
            raise InputError(f"{path} has {path.stat().st_size:,} bytes; that is no {what}")
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"no {what} at {path.parent}: {path.name} is missing") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; a file ({what}) is needed there") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not readable as text ({error}); is it cut off?") from None


class _DuplicateKeyError(Exception):
    """A JSON object has a duplicate key, of which a reader would silently use the last one."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKeyError(next(key for index, key in enumerate(keys) if key in keys[:index]))
    return found


def read_json(path: Path, what: str, schema: type[Stored] | None = None) -> dict[str, Any]:
    """Return the JSON object in `path`; `what` names it in errors.

    Args:
        schema: what the object must look like; the first violation is reported with its key.

    Raises:
        InputError: see `read_text`; or it is not a JSON object, has a key twice, is nested too
            deeply, or violates the schema.
    """
    text = read_text(path, what)
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except _DuplicateKeyError as error:
        raise InputError(f"{path}: the key {error.args[0]!r} occurs twice") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply to be a {what}") from None
    except ValueError as error:  # malformed, or a number of thousands of digits
        raise InputError(f"{path} is not readable as JSON ({error}); is it cut off?") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} should hold a JSON object ({what})")
    require_shallow(value, path)
    if schema is not None:
        require_schema(value, schema, path)
    return value


def require_shallow(value: Any, where: Path | str) -> None:
    """Raise if lists and mappings are nested deeper than 64 levels.

    Raises:
        InputError: names `where`.
    """
    level = [value]
    for _ in range(_DEEPEST):
        nested = {
            id(one): one for one in level if isinstance(one, dict | list)
        }  # YAML may repeat one
        if not nested:
            return
        level = [
            part
            for one in nested.values()
            for part in (one.values() if isinstance(one, dict) else one)
        ]
    raise InputError(f"{where} is nested too deeply; more than {_DEEPEST} levels are not read")


def require_schema(value: Any, schema: type[Stored], where: Path | str) -> None:
    """Raise if a value violates a schema.

    Raises:
        InputError: names `where`, the key and what is expected there.
    """
    try:
        schema.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "missing":
            raise InputError(f"{where}: the key {key!r} is missing") from None
        found = repr(first["input"])
        shown = found if len(found) <= 60 else f"{found[:57]}..."
        raise InputError(f"{where}: {key} = {shown}: {reason}") from None
    except RecursionError:
        raise InputError(f"{where} is nested too deeply") from None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
