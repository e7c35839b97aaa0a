"""Safe reading of downloaded files (arrays, `.tar.gz` archives, pickles), and a cache of them."""

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
    """An array on disk, memory-mapped on first use: `.npy`, or raw uint8 of a given shape.

    It is pickled as its path.
    """

    path: Path
    shape: tuple[int, ...] | None = None

    @cached_property
    def array(self) -> NDArray[Any]:
        """The array, read-only.

        Raises:
            InputError: the file is not a complete `.npy` file.
        """
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
    """Return the cached folder that `fill` creates from some files, and the index it returns.

    The folder is created again when one of the files has changed, when a part of the folder is
    missing, or when its index violates the schema. Nothing is left behind if `fill` fails.
    """
    import datasets
    from filelock import FileLock

    present = [(str(file.resolve()), file.stat()) for file in files if file.exists()]
    states = [(name, state.st_size, state.st_mtime_ns) for name, state in present]
    key = hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]
    folder = Path(datasets.config.HF_DATASETS_CACHE).expanduser().absolute() / "igpt" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / ".lock"):  # Another process may create it.
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
    """Return the index of a cached archive; None if it or a file is missing or damaged."""
    try:
        index = read_json(folder / _INDEX, "index of a cached archive", schema)
    except InputError:
        return None
    files = [(folder / name, size) for name, size in index["bytes"].items()]
    # Programs that clean caches remove single files.
    return (
        index
        if all(file.is_file() and file.stat().st_size == size for file, size in files)
        else None
    )


def folder_in(path: Path, known: Collection[str]) -> str | None:
    """Return the first known folder among the first members of a `.tar.gz`; None without one.

    Raises:
        InputError: the file is compressed and cut off.
    """
    with path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":  # The magic number of gzip.
            return None
    try:
        with gzip.open(path) as unpacked, tarfile.open(fileobj=unpacked, mode="r:") as tar:
            folders = (
                folder for member in islice(tar, 16) for folder in PurePosixPath(member.name).parts
            )
            return next((folder for folder in folders if folder in known), None)
    except tarfile.TarError:  # Another compressed file.
        return None
    except _BROKEN as error:
        raise _broken(error) from None


def _broken(error: Exception) -> InputError:
    return InputError(f"cut off or damaged ({error}); download it again")


def unpack(path: Path, folder: str, names: Collection[str], out: Path) -> None:
    """Extract the files with some names in one folder of a `.tar.gz` into `out`.

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
            # The checksum is at the end of the file.
            while unpacked.read(2**20):
                pass
    except _BROKEN as error:
        raise _broken(error) from None


def unpickle(path: Path, *keys: str) -> list[Any]:
    """Return some values of a dictionary pickled by Python 2: plain values, byte strings, arrays.

    Raises:
        InputError: the file is not such a pickle, lacks a key, or would run code.
    """
    try:
        with path.open("rb") as file:
            values = _Unpickler(file, encoding="bytes").load()
        return [values[key.encode()] for key in keys]
    except InputError as error:
        raise InputError(f"{path.name} {error}") from None
    except KeyError as error:
        raise InputError(f"{path.name} holds no {error}; is it another file?") from None
    except Exception as error:  # Malformed pickles raise errors of any type.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path.name} is not readable as a pickled dictionary ({reason}); is it cut off?"
        ) from None


class _Unpickler(pickle.Unpickler):
    """An unpickler that allows only the functions and classes of arrays and byte strings."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise InputError(
                f"holds a pickle that would run code ({module}.{name}); it is not used"
            )
        return _ALLOWED[module, name]


def _dtype(name: Any, align: Any, copy: Any) -> Any:
    # The files have 0 and 1 here; some versions of NumPy warn about integers.
    return np.dtype(name, bool(align), bool(copy))


# NumPy has moved this function once, so it is not imported by name.
_reconstruct = np.empty(0).__reduce__()[0]
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): codecs.encode,
}
