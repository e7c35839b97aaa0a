"""Archives in the formats of their sites: CIFAR-10, CIFAR-100, STL-10, and OpenAI's token arrays.

All arrays are memory-mapped. Files that cannot be mapped (compressed archives, pickles, labels) are
converted once, in the cache of `datasets`. Shapes: N images, H x W pixels, n = resolution^2
tokens.
"""

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from igpt.data.sources.readers import digest
from igpt.data.sources.unpacking import CacheIndex, Mapped, cached, folder_in, unpack, unpickle
from igpt.errors import InputError
from igpt.files import require_regular

# Images in memory.
_CHUNK = 256
# Larger numbers are not class numbers, and each class gets a name.
_MOST_CLASSES = 65536
_CIFAR_SHAPE, _STL10_SHAPE = (3, 32, 32), (3, 96, 96)


@dataclass(frozen=True)
class _Rows:
    """The rows [N, ...] of one split.

    Args:
        labels: int32 [N]; None where there are no classes.
        parts: the original files in order, and the number of rows of each.
    """

    data: Mapped
    labels: Mapped | None
    parts: tuple[tuple[str, int], ...]

    def __len__(self) -> int:
        return sum(count for _, count in self.parts)

    def read(self, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[Any], int]]:
        """See `Reader`."""
        for first in range(0, len(rows), _CHUNK):
            chosen = rows[first : first + _CHUNK]
            numbers = self.labels.array[chosen].tolist() if self.labels else [-1] * len(chosen)
            yield from zip(self._arranged(self.data.array[chosen]), numbers, strict=True)

    def _arranged(self, block: NDArray[Any]) -> NDArray[Any]:
        return block

    def name_of(self, row: int) -> str:
        """Return the file of a row and its number there."""
        for name, count in self.parts:
            if row < count:
                return f"{name} row {row}"
            row -= count
        raise IndexError(f"{row} rows beyond the last one")

    def fingerprint(self) -> str:
        """See `Reader`."""
        return digest([self.data.array.shape, *self.parts])


@dataclass(frozen=True)
class TokenRows(_Rows):
    """Tokens: integers [N, n] of any type; a row is [n]."""

    @property
    def resolution(self) -> int:
        """The square root of n."""
        return math.isqrt(self.data.array.shape[1])


@dataclass(frozen=True)
class ArrayRows(_Rows):
    """Images: uint8 [N, 3, H, W], or [N, 3, W, H] if `transposed`; a row is [H, W, 3]."""

    transposed: bool = False

    def _arranged(self, block: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(
            block.transpose((0, 3, 2, 1) if self.transposed else (0, 2, 3, 1))
        )


class _Layout(NamedTuple):
    """Folder of an archive, files of each split and of the class names, and columns of labels."""

    folder: str
    splits: dict[str, tuple[str, ...]]
    names: str
    columns: tuple[str, ...] = ("label",)

    @property
    def files(self) -> list[str]:
        return [name for names in (*self.splits.values(), (self.names,)) for name in names]


_CIFAR10 = _Layout(
    "cifar-10-batches-py",
    {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
    "batches.meta",
)
_CIFAR100 = _Layout(
    "cifar-100-python",
    {"train": ("train",), "test": ("test",)},
    "meta",
    ("fine_label", "coarse_label"),
)
_STL10 = _Layout(
    "stl10_binary",
    {
        "train": ("train_X.bin", "train_y.bin"),
        "test": ("test_X.bin", "test_y.bin"),
        "unlabeled": ("unlabeled_X.bin",),
    },
    "class_names.txt",
)


class _LabelIndex(CacheIndex):
    """Index of the labels of tokens: the class names by column."""

    classes: dict[str, list[str]]


class _ImageIndex(_LabelIndex):
    """Index of images: the files of each split, in order, and the number of images in each."""

    parts: dict[str, dict[str, int]]


_LAYOUTS = _CIFAR10, _CIFAR100, _STL10
_TOKEN_FILES = {"train": "tr", "validation": "va", "test": "te"}
_Opened = tuple[dict[str, ArrayRows | TokenRows], list[str] | None]


def open_archive(source: str, label_column: str | None = None) -> _Opened | None:
    """Return the splits and class names of an archive in the format of its site; None for others.

    Args:
        source: the folder of CIFAR-10 or CIFAR-100 (Python version) or of STL-10 (binary), a folder
            that contains one of these, one of these as a `.tar.gz` of any name, or the common start
            of the names of OpenAI's arrays: `downloads/cifar10` for `downloads/cifar10_trX.npy` and
            so on, unless there is a file or folder `downloads/cifar10`.
        label_column: "fine_label" (also when None) or "coarse_label" of CIFAR-100, "label" of the
            others. "none" ignores the labels.

    Returns:
        The splits by the archive's own names, and the class names (None without labels).

    Raises:
        InputError: a damaged archive, a missing file, or no such label column.
    """
    path = Path(source).expanduser()
    try:
        if prefix := _token_prefix(source):
            return _open_tokens(prefix, label_column)
        found = _find(path) if path.exists() else None
        return _open_images(*found, label_column) if found else None
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def token_palette(source: str) -> Path | None:
    """Return the palette (`kmeans_centers.npy`) next to OpenAI's arrays; None without one."""
    prefix = _token_prefix(source)
    palette = prefix.with_name("kmeans_centers.npy") if prefix else None
    return palette if palette and palette.is_file() else None


def _token_prefix(source: str) -> Path | None:
    path = Path(source).expanduser()
    files = [Path(f"{path}_{short}{kind}.npy") for short in _TOKEN_FILES.values() for kind in "XY"]
    for file in files:
        require_regular(file)
    stored = any(file.is_file() for file in files[::2])
    return path if stored and not path.exists() else None


def _find(path: Path) -> tuple[_Layout, Path] | None:
    if path.is_file():
        folder = folder_in(path, [layout.folder for layout in _LAYOUTS])
        return next(((layout, path) for layout in _LAYOUTS if layout.folder == folder), None)
    for layout in _LAYOUTS:
        # Two files identify an archive: one alone may have the name by chance, and a missing one
        # is reported later.
        if sum((path / name).is_file() for name in layout.files) >= 2:
            return layout, path
    inner = [(layout, path / layout.folder) for layout in _LAYOUTS]
    inner = [(layout, folder) for layout, folder in inner if folder.is_dir()]
    if len(inner) > 1:
        folders = ", ".join(str(folder) for _, folder in inner)
        raise InputError(f"there are several data sets; give one: {folders}")
    return inner[0] if inner else None


def _column(columns: tuple[str, ...], wanted: str | None) -> str | None:
    if wanted is not None and wanted not in (*columns, "none"):
        choices = ", ".join([*columns, "none"])
        raise InputError(f"no label column {wanted!r}; choose from: {choices}")
    return None if wanted == "none" else wanted or next(iter(columns), None)


def _open_images(layout: _Layout, path: Path, label_column: str | None) -> _Opened:
    column = _column(layout.columns, label_column)
    packed, raw = path.is_file(), layout is _STL10

    def fill(cache: Path) -> dict[str, Any]:
        folder = cache / layout.folder if packed else path
        if packed:
            unpack(path, layout.folder, layout.files, folder)
        for name in layout.files:
            require_regular(folder / name)
        if missing := [name for name in layout.files if not (folder / name).is_file()]:
            raise InputError(
                f"{', '.join(missing)} of {layout.folder} is missing; download and unpack it again"
            )
        index = _store_stl10(folder, cache) if raw else _store_cifar(layout, folder, cache)
        if packed and not raw:
            shutil.rmtree(folder)  # The pickles are stored as arrays now.
        return index

    cache, index = cached(
        [path] if packed else [path / name for name in layout.files], fill, _ImageIndex
    )
    folder = cache / layout.folder if packed else path.absolute()
    splits: dict[str, ArrayRows | TokenRows] = {}
    for split, held in index["parts"].items():
        parts = tuple(held.items())
        data = Mapped(cache / f"{split}.npy")
        if raw:
            file, count = parts[0]
            data = Mapped(folder / file, (count, *_STL10_SHAPE))
        splits[split] = ArrayRows(data, _labels(cache, split, column), parts, transposed=raw)
    return splits, index["classes"][column] if column else None


def _labels(cache: Path, split: str, column: str | None) -> Mapped | None:
    path = cache / f"{split}.{column}.npy"
    return Mapped(path) if path.is_file() else None


def _store_cifar(layout: _Layout, folder: Path, cache: Path) -> dict[str, Any]:
    """Store the images of each split, uint8 [N, 3, 32, 32], and the labels, int32 [N]."""
    named = unpickle(folder / layout.names, *(f"{column}_names" for column in layout.columns))
    if not all(
        isinstance(names, list) and all(isinstance(name, bytes) for name in names)
        for names in named
    ):
        raise InputError(f"{layout.names} should hold lists of class names")
    classes = {
        column: [name.decode(errors="replace") for name in names]
        for column, names in zip(layout.columns, named, strict=True)
    }
    parts: dict[str, dict[str, int]] = {split: {} for split in layout.splits}
    for split, files in layout.splits.items():
        arrays: dict[str, list[NDArray[Any]]] = {}
        for file in files:
            images, *labels = unpickle(
                folder / file, "data", *(f"{column}s" for column in layout.columns)
            )
            if (
                getattr(images, "dtype", None) != np.uint8
                or images.shape[1:] != (3072,)
                or not len(images)
            ):
                raise InputError(f"{file} should hold images, uint8 [N, 3072]")
            arrays.setdefault(split, []).append(images.reshape(-1, *_CIFAR_SHAPE))
            for (column, names), values in zip(classes.items(), labels, strict=True):
                numbers = _class_numbers(values, len(images), len(names), file)
                arrays.setdefault(f"{split}.{column}", []).append(numbers)
            parts[split][file] = len(images)
        for name, pieces in arrays.items():
            np.save(cache / f"{name}.npy", np.concatenate(pieces))
    return {"classes": classes, "parts": parts}


def _store_stl10(folder: Path, cache: Path) -> dict[str, Any]:
    """Store the labels, int32 [N]; the original images are memory-mapped."""
    classes = (folder / _STL10.names).read_text(encoding="utf-8", errors="replace").split()
    parts = {}
    for split, (file, *label_files) in _STL10.splits.items():
        size, each = (folder / file).stat().st_size, math.prod(_STL10_SHAPE)
        if size % each or not size:
            raise InputError(
                f"{file} is cut off: {size} bytes, not a whole number of images of {each} bytes"
            )
        parts[split] = {file: size // each}
        for label_file in label_files:
            values = np.fromfile(folder / label_file, np.uint8)
            numbers = _class_numbers(values, size // each, len(classes), label_file, first=1)
            np.save(cache / f"{split}.label.npy", numbers)
    return {"classes": {"label": classes}, "parts": parts}


def _open_tokens(prefix: Path, label_column: str | None) -> _Opened:
    tokens, label_files = dict[str, Mapped](), dict[str, Path]()
    for split, short in _TOKEN_FILES.items():
        file, label_file = Path(f"{prefix}_{short}X.npy"), Path(f"{prefix}_{short}Y.npy")
        if file.is_file():
            tokens[split] = Mapped(file.absolute())
            if label_file.is_file():
                label_files[split] = label_file
    column = _column(("label",) if label_files else (), label_column)
    for data in tokens.values():
        kind, shape = data.array.dtype, data.array.shape
        is_square = len(shape) == 2 and math.isqrt(shape[1]) ** 2 == shape[1]
        if kind.kind not in "iu" or 0 in shape or not is_square:
            raise InputError(
                f"{data.path.name} is {kind} {list(shape)}; tokens are integers [N, n], n a square "
                "number"
            )
    widths = {data.array.shape[1] for data in tokens.values()}
    if len(widths) > 1:
        raise InputError(f"the splits have different numbers of tokens per image: {sorted(widths)}")

    def fill(cache: Path) -> dict[str, Any]:
        most = 0
        for split, file in label_files.items():
            numbers = _plain_labels(Mapped(file).array, len(tokens[split].array), file.name)
            np.save(cache / f"{split}.label.npy", numbers)
            most = max(most, int(numbers.max()))
        return {"classes": {"label": [str(number) for number in range(most + 1)]}}

    labels: dict[str, Mapped | None] = {}
    class_names = None
    if column:
        files = [*(data.path for data in tokens.values()), *label_files.values()]
        cache, index = cached(files, fill, _LabelIndex)
        labels = {split: _labels(cache, split, column) for split in tokens}
        class_names = index["classes"][column]
    splits: dict[str, ArrayRows | TokenRows] = {}
    for split, data in tokens.items():
        parts = ((data.path.name, len(data.array)),)
        splits[split] = TokenRows(data, labels.get(split), parts)
    return splits, class_names


def _plain_labels(labels: NDArray[Any], images: int, file: str) -> NDArray[np.int32]:
    """Return labels, int32 [N], from class numbers [N] or one-hot rows [N, classes]."""
    if labels.ndim != 2 or len(labels) != images:
        return _class_numbers(labels, images, _MOST_CLASSES, file)
    numbers = []
    for first in range(0, images, 4096):  # Those of ImageNet are gigabytes.
        rows = labels[first : first + 4096]
        if rows.dtype.kind not in "biuf" or not (
            ((rows == 0) | (rows == 1)).all() and (rows.sum(axis=1) == 1).all()
        ):
            raise InputError(f"{file} should hold class numbers [N] or one-hot rows [N, classes]")
        numbers.append(rows.argmax(axis=1))
    return _class_numbers(np.concatenate(numbers), images, _MOST_CLASSES, file)


def _class_numbers(
    values: Any, images: int, classes: int, file: str, first: int = 0
) -> NDArray[np.int32]:
    """Return checked labels, int32 [N]; `first` is the file's number of its first class."""
    try:
        numbers = np.asarray(values)
    except ValueError:  # Lists of different lengths.
        numbers = np.empty((), dtype=object)
    if numbers.dtype.kind not in "iu" or numbers.shape != (images,):
        raise InputError(
            f"{file} has labels {numbers.dtype} {list(numbers.shape)}; one is needed for each of "
            f"{images} images"
        )
    wrong = numbers[(numbers < first) | (numbers >= first + classes)]
    if len(wrong):
        raise InputError(
            f"{file} has the label {wrong[0]}; its {classes} classes are numbered from {first}"
        )
    return numbers.astype(np.int32) - first
