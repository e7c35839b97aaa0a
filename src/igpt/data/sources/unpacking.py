"""Files made elsewhere, opened without trust: arrays, `.tar.gz` archives and pickles; and a cache of what they hold."""

import codecs
import gzip
import hashlib
import json
import pickle
import tarfile
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igpt.data.arrays import map_array
from igpt.errors import InputError
from igpt.files import Stored, atomic_folder, read_json, write_json

_INDEX = "index.json"
_BROKEN = (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError)


@dataclass(frozen=True)
class Mapped:
    """An array on disk, mapped when first used: `.npy`, or raw uint8 of a given shape. Pickles as its path."""

    path: Path
    shape: tuple[int, ...] | None = None

    @cached_property
    def array(self) -> NDArray[Any]:
        """The array, read-only; an `InputError` if it is no `.npy`, or not all of one."""
        if self.shape:
            return np.memmap(self.path, np.uint8, "r", shape=self.shape)
        return map_array(self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        return Mapped, (self.path, self.shape)


class CacheIndex(Stored):
    """Schema of the index of a cached archive; `fill` returns the rest of it.

    Attributes:
        bytes: the size of every file in the folder.
    """

    bytes: dict[str, int]


def cached(
    files: list[Path], fill: Callable[[Path], dict[str, Any]], schema: type[CacheIndex]
) -> tuple[Path, dict[str, Any]]:
    """The folder that `fill` makes of these files, and the index it returns.

    It is made again when one of the files has changed, when some of the folder was removed, and
    when its index violates the schema. Nothing stays behind if `fill` fails.
    """
    import datasets
    from filelock import FileLock

    present = [(str(file.resolve()), file.stat()) for file in files if file.exists()]
    states = [(name, state.st_size, state.st_mtime_ns) for name, state in present]
    key = hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]
    folder = Path(datasets.config.HF_DATASETS_CACHE).expanduser().absolute() / "igpt" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / ".lock"):  # another process may be making the same
        index = _index_of(folder, schema)
        if index is None:
            with atomic_folder(folder) as temporary:
                filled = fill(temporary)
                made = [path for path in temporary.rglob("*") if path.is_file()]
                sizes = {
                    path.relative_to(temporary).as_posix(): path.stat().st_size for path in made
                }
                index = {**filled, "bytes": sizes}
                write_json(temporary / _INDEX, index)
    return folder, index


def _index_of(folder: Path, schema: type[CacheIndex]) -> dict[str, Any] | None:
    """Return the index of a cached archive; None where it or one of the files is missing or damaged."""
    try:
        index = read_json(folder / _INDEX, "index of a cached archive", schema)
    except InputError:
        return None
    files = [(folder / name, size) for name, size in index["bytes"].items()]
    # What cleans caches removes single files.
    return (
        index
        if all(file.is_file() and file.stat().st_size == size for file, size in files)
        else None
    )


def folder_in(path: Path, known: Collection[str]) -> str | None:
    """The first of some known folders that a `.tar.gz` has among its first members; None for any other file.

    Raises:
        InputError: the file is compressed and cut off.
    """
    with path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":  # of gzip
            return None
    try:
        with gzip.open(path) as unpacked, tarfile.open(fileobj=unpacked, mode="r:") as tar:
            folders = (
                folder for member in islice(tar, 16) for folder in PurePosixPath(member.name).parts
            )
            return next((folder for folder in folders if folder in known), None)
    except tarfile.TarError:  # some other compressed file
        return None
    except _BROKEN as error:
        raise _broken(error) from None


def _broken(error: Exception) -> InputError:
    return InputError(f"cut off or damaged ({error}); download it anew")


def unpack(path: Path, folder: str, names: Collection[str], out: Path) -> None:
    """Unpacks the files of these names in the folder of a `.tar.gz`, and nothing else, into `out`.

    Raises:
        InputError: the archive is cut off or damaged.
    """
    try:
        with gzip.open(path) as unpacked:
            with tarfile.open(fileobj=unpacked, mode="r:") as tar:
                for member in tar:
                    name = PurePosixPath(member.name)
                    if member.isfile() and name.name in names and name.parent.name == folder:
                        tar.extract(member.replace(name=name.name, deep=False), out, filter="data")
            while unpacked.read(2**20):  # to the end, where the checksum stands
                pass
    except _BROKEN as error:
        raise _broken(error) from None


def unpickle(path: Path, *keys: str) -> list[Any]:
    """What a dictionary pickled by Python 2 has under these keys: plain values, byte strings and arrays.

    Raises:
        InputError: it is no such file, lacks a key, or asks for anything but arrays.
    """
    try:
        with path.open("rb") as file:
            values = _Unpickler(file, encoding="bytes").load()
        return [values[key.encode()] for key in keys]
    except InputError as error:
        raise InputError(f"{path.name} {error}") from None
    except KeyError as error:
        raise InputError(f"{path.name} holds no {error}; is it another file?") from None
    except Exception as error:  # of any type: malformed pickles fail wherever they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path.name} is not readable as a pickled dictionary ({reason}); is it cut off?"
        ) from None


class _Unpickler(pickle.Unpickler):
    """Admits what arrays and byte strings need, and no other function or class."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise InputError(
                f"holds a pickle that would run code ({module}.{name}); it is not used"
            )
        return _ADMITTED[module, name]


def _dtype(name: Any, align: Any, copy: Any) -> Any:
    return np.dtype(
        name, bool(align), bool(copy)
    )  # the files have 0 and 1 here, of which some NumPy warn


_reconstruct = np.empty(0).__reduce__()[0]  # asked for by what it does: NumPy has moved it once
_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): codecs.encode,
}
