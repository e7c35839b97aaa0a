"""Small archives, written byte by byte in the formats of their sites, and read back."""

import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pytest
from numpy.typing import NDArray

from igpt.data.sources import archives
from igpt.data.sources.archives import ArrayRows, TokenRows, open_archive, token_palette
from igpt.data.sources.unpacking import unpack
from igpt.errors import InputError

Opened = tuple[dict[str, Any], list[str] | None]
PER_BATCH = 3  # images in each pickle of CIFAR
NAMES = [
    b"airplane",
    b"automobile",
    b"bird",
    b"cat",
    b"deer",
    b"dog",
    b"frog",
    b"horse",
    b"ship",
    b"truck",
]


class Python2Pickler(pickle._Pickler):  # type: ignore[misc]
    """Write what Python 2 and NumPy 1.x wrote: byte strings as such, and NumPy's functions by their
    old names."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value: bytes) -> None:
        size = len(value)
        self.write((b"U" + bytes([size]) if size < 256 else b"T" + struct.pack("<i", size)) + value)
        self.memoize(value)

    def save_str(self, value: str) -> None:
        self.save_bytes(value.encode("ascii"))

    dispatch[bytes] = save_bytes
    dispatch[str] = save_str

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.dtype):
            return np.dtype, (value.str[1:], 0, 1), (3, "|", None, None, None, -1, -1, 0)
        return NotImplemented


def python2_pickle(value: Any) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue().replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")


def pixels(seed: int, count: int = PER_BATCH) -> NDArray[np.uint8]:
    """Return random images, uint8 [count, 32, 32, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def flat(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return CIFAR's order: all red values of an image row by row, then the green, then the
    blue."""
    return np.stack(
        [np.concatenate([image[:, :, channel].ravel() for channel in range(3)]) for image in images]
    )


def write_pickle(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(python2_pickle(value))


def batch(seed: int, **labels: list[int]) -> dict[bytes, Any]:
    columns = {name.encode(): values for name, values in labels.items()}
    files = [b"image_%d.png" % number for number in range(PER_BATCH)]
    return {b"batch_label": b"batch", b"data": flat(pixels(seed)), b"filenames": files, **columns}


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    folder = tmp_path / "shipped" / "cifar-10-batches-py"
    for number in range(1, 6):
        write_pickle(folder / f"data_batch_{number}", batch(number, labels=[number, 0, 9]))
    write_pickle(folder / "test_batch", batch(6, labels=[3, 2, 1]))
    write_pickle(
        folder / "batches.meta",
        {b"num_cases_per_batch": 10000, b"label_names": NAMES, b"num_vis": 3072},
    )
    (folder / "readme.html").write_text("<a>about</a>")
    return folder


@pytest.fixture
def cifar100(tmp_path: Path) -> Path:
    folder = tmp_path / "shipped" / "cifar-100-python"
    write_pickle(folder / "train", batch(1, fine_labels=[99, 0, 42], coarse_labels=[19, 0, 5]))
    write_pickle(folder / "test", batch(2, fine_labels=[7, 8, 9], coarse_labels=[1, 2, 3]))
    fine, coarse = (
        [b"%s_%d" % (kind, number) for number in range(n)]
        for kind, n in ((b"fine", 100), (b"coarse", 20))
    )
    write_pickle(folder / "meta", {b"fine_label_names": fine, b"coarse_label_names": coarse})
    return folder


@pytest.fixture
def stl_images() -> NDArray[np.uint8]:
    """Return four images, uint8 [4, 96, 96, 3], in which all corners and channels differ."""
    images = np.random.default_rng(0).integers(0, 100, (4, 96, 96, 3), dtype=np.uint8)
    for number, image in enumerate(images):
        for channel in range(3):
            corners = 100 + 40 * channel + 5 * number + np.arange(4)
            image[[0, 0, -1, -1], [0, -1, 0, -1], channel] = corners
    return images


@pytest.fixture
def stl10(tmp_path: Path, stl_images: NDArray[np.uint8]) -> Path:
    folder = tmp_path / "shipped" / "stl10_binary"
    folder.mkdir(parents=True)
    splits = {"train": stl_images[:2], "test": stl_images[2:3], "unlabeled": stl_images[1:]}
    for split, images in splits.items():
        # In Matlab's order: down each column, column by column, channel by channel, image by image.
        columns = [
            image[:, column, channel].tobytes()
            for image in images
            for channel in range(3)
            for column in range(96)
        ]
        (folder / f"{split}_X.bin").write_bytes(b"".join(columns))
    (folder / "train_y.bin").write_bytes(bytes([10, 1]))
    (folder / "test_y.bin").write_bytes(bytes([4]))
    (folder / "class_names.txt").write_text(
        "airplane\nbird\ncar\ncat\ndeer\ndog\nhorse\nmonkey\nship\ntruck\n"
    )
    (folder / "fold_indices.txt").write_text("0 1\n")
    return folder


def packed(folder: Path, name: str = "download.bin") -> Path:
    """Pack the folder as a `.tar.gz` whose name does not contain the format."""
    path = folder.parents[1] / name
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.name)
    return path


def write_tokens(prefix: Path, **arrays: NDArray[Any]) -> str:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(f"{prefix}_{name}.npy", array)
    return str(prefix)


def opened(source: Path | str, label_column: str | None = None) -> Opened:
    result = open_archive(str(source), label_column)
    assert result is not None
    return result


def everything(rows: ArrayRows | TokenRows) -> tuple[NDArray[Any], list[int]]:
    items, numbers = zip(*rows.read(np.arange(len(rows))), strict=True)
    return np.stack(items), list(numbers)


def refusal(source: Path | str, label_column: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        open_archive(str(source), label_column)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(source))
    assert ".tmp" not in message
    return message


def cache_entries() -> set[str]:
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "igpt"
    return {path.name for path in folder.glob("*")} - {".lock"} if folder.exists() else set()


# CIFAR


def test_the_written_pickles_are_those_of_python_2():
    """The archives here contain the opcodes of the real ones, and their values are read back."""
    written = python2_pickle(batch(1, labels=[1, 2, 3]))
    assert written.startswith(b"\x80\x02}")
    assert b"U\x06labels" in written  # a byte string, which Python 3 never writes in protocol 2
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in written
    assert b"cnumpy\ndtype\n" in written
    assert b"U\x02u1" in written
    assert b"K\x00K\x01\x87" in written  # align=0, copy=1: integers
    assert b"numpy._core" not in written
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = pickle.loads(written, encoding="bytes")
    np.testing.assert_array_equal(values[b"data"], flat(pixels(1)))


@pytest.mark.parametrize("within", [True, False])
def test_cifar10(cifar10: Path, within: bool):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits, names = opened(cifar10.parent if within else cifar10)
    assert list(splits) == ["train", "test"]
    assert names == [name.decode() for name in NAMES]
    images, labels = everything(splits["train"])
    np.testing.assert_array_equal(
        images, np.concatenate([pixels(number) for number in range(1, 6)])
    )
    assert images.dtype == np.uint8
    assert labels == [1, 0, 9, 2, 0, 9, 3, 0, 9, 4, 0, 9, 5, 0, 9]
    images, labels = everything(splits["test"])
    np.testing.assert_array_equal(images, pixels(6))
    assert labels == [3, 2, 1]
    assert [type(label) for label in labels] == [int] * 3


def test_pickles_written_by_python_3_are_read(cifar10: Path):
    for file in cifar10.iterdir():
        if file.suffix != ".html":
            file.write_bytes(
                pickle.dumps(pickle.loads(file.read_bytes(), encoding="bytes"), protocol=2)
            )
    written = (cifar10 / "test_batch").read_bytes()
    assert b"c_codecs\nencode\n" in written
    images, labels = everything(opened(cifar10)[0]["test"])
    np.testing.assert_array_equal(images, pixels(6))
    assert labels == [3, 2, 1]


def test_selected_rows_and_their_names(cifar10: Path):
    train = opened(cifar10)[0]["train"]
    found = list(train.read(np.array([1, 3, 14])))
    np.testing.assert_array_equal(found[1][0], pixels(2)[0])
    np.testing.assert_array_equal(found[2][0], pixels(5)[2])
    assert [label for _, label in found] == [0, 2, 9]
    assert [train.name_of(row) for row in (0, 3, 14)] == [
        "data_batch_1 row 0",
        "data_batch_2 row 0",
        "data_batch_5 row 2",
    ]
    assert list(train.read(np.array([], dtype=np.int64))) == []


def test_more_rows_than_fit_into_one_block(tmp_path: Path):
    tokens = np.arange(700 * 4, dtype=np.int32).reshape(700, 4)
    train = opened(write_tokens(tmp_path / "set", trX=tokens, trY=np.arange(700) % 7))[0]["train"]
    rows = np.arange(0, 700, 2)
    found, numbers = zip(*train.read(rows), strict=True)
    np.testing.assert_array_equal(np.stack(found), tokens[rows])
    np.testing.assert_array_equal(numbers, rows % 7)


@pytest.mark.parametrize(
    ("column", "prefix", "train", "test"),
    [
        (None, "fine", [99, 0, 42], [7, 8, 9]),
        ("fine_label", "fine", [99, 0, 42], [7, 8, 9]),
        ("coarse_label", "coarse", [19, 0, 5], [1, 2, 3]),
    ],
)
def test_cifar100(
    cifar100: Path, column: str | None, prefix: str, train: list[int], test: list[int]
):
    splits, names = opened(cifar100, column)
    assert names == [f"{prefix}_{number}" for number in range(100 if prefix == "fine" else 20)]
    images, labels = everything(splits["train"])
    np.testing.assert_array_equal(images, pixels(1))
    assert labels == train
    assert everything(splits["test"])[1] == test
    assert splits["train"].name_of(2) == "train row 2"


def test_ignored_labels(cifar10: Path, cifar100: Path, stl10: Path, tmp_path: Path):
    prefix = write_tokens(tmp_path / "set", trX=np.zeros((3, 4), np.uint8), trY=np.arange(3))
    for source in (cifar10, cifar100, stl10, prefix):
        splits, names = opened(source, "none")
        assert names is None
        for rows in splits.values():
            assert set(everything(rows)[1]) == {-1}


def test_missing_columns(cifar10: Path, cifar100: Path, stl10: Path, tmp_path: Path):
    assert "'fine'; choose from: fine_label, coarse_label, none" in refusal(cifar100, "fine")
    for source in (cifar10, stl10):
        assert "'fine_label'; choose from: label, none" in refusal(source, "fine_label")
    tokens = np.zeros((3, 4), np.uint8)
    assert "choose from: label, none" in refusal(
        write_tokens(tmp_path / "with", trX=tokens, trY=np.arange(3)), "classes"
    )
    assert "choose from: none" in refusal(write_tokens(tmp_path / "without", trX=tokens), "label")


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", ["data_batch_2", "batches.meta"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_pickle_that_would_execute_code_is_refused(
    cifar10: Path, tmp_path: Path, file: str, is_packed: bool
):
    values = (
        pickle.loads((cifar10 / file).read_bytes(), encoding="bytes")
        if file == "batches.meta"
        else batch(2, labels=[2, 0, 9])
    )
    executed = tmp_path / "executed"
    (cifar10 / file).write_bytes(pickle.dumps({**values, b"attack": Attack(executed)}, protocol=2))
    before = cache_entries()
    message = refusal(packed(cifar10) if is_packed else cifar10)
    assert file in message
    assert "holds a pickle that would run code (posix.mkdir" in message
    assert not executed.exists()
    assert cache_entries() == before
    pickle.loads((cifar10 / file).read_bytes(), encoding="bytes")
    assert executed.exists()  # the attack works: an ordinary unpickler executes it


@pytest.mark.parametrize(
    "attack",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nscalar\n.",
    ],
)
def test_other_functions_are_refused(cifar100: Path, attack: bytes):
    (cifar100 / "train").write_bytes(attack)
    assert "train holds a pickle that would run code" in refusal(cifar100)


def damage(folder: Path, seed: int = 1, **changes: Any) -> None:
    """Change entries of the first batch; None removes one."""
    values = batch(seed, labels=[1, 0, 9]) | {
        name.encode(): value for name, value in changes.items()
    }
    write_pickle(
        folder / "data_batch_1",
        {name: value for name, value in values.items() if value is not None},
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": [1, 2]}, "labels int64 [2]; one is needed for each of 3 images"),
        ({"labels": [1, 2, 10]}, "label 10; its 10 classes are numbered from 0"),
        ({"labels": [1, 2, -1]}, "label -1; its 10 classes are numbered from 0"),
        ({"labels": [1.0, 2.0, 3.0]}, "labels float64 [3]"),
        ({"labels": [[1], [2, 3], []]}, "one is needed for each of 3 images"),
        ({"labels": None}, "holds no b'labels'"),
        ({"data": None}, "holds no b'data'"),
        ({"data": flat(pixels(1)).astype(np.float32)}, "should hold images, uint8 [N, 3072]"),
        ({"data": flat(pixels(1))[:, :3000]}, "should hold images, uint8 [N, 3072]"),
        ({"data": flat(pixels(1))[:0]}, "should hold images, uint8 [N, 3072]"),
        ({"data": flat(pixels(1))[0]}, "should hold images, uint8 [N, 3072]"),
        ({"data": b"no array"}, "should hold images, uint8 [N, 3072]"),
    ],
)
def test_a_malformed_batch_is_refused(cifar10: Path, changes: dict[str, Any], said: str):
    damage(cifar10, **changes)
    message = refusal(cifar10)
    assert "data_batch_1" in message
    assert said in message


@pytest.mark.parametrize("names", [7, [1, 2], [[b"a"]]])
def test_malformed_class_names_are_refused(cifar10: Path, names: Any):
    write_pickle(cifar10 / "batches.meta", {b"label_names": names})
    assert "batches.meta should hold lists of class names" in refusal(cifar10)


def test_a_truncated_batch_is_refused(cifar10: Path):
    whole = (cifar10 / "data_batch_3").read_bytes()
    before = cache_entries()
    for size in (0, 1, 50, len(whole) // 2, len(whole) - 1):
        (cifar10 / "data_batch_3").write_bytes(whole[:size])
        message = refusal(cifar10)
        assert "data_batch_3 is not readable as a pickled dictionary" in message
        assert "cut off" in message
    (cifar10 / "data_batch_3").write_bytes(b"not a pickle at all")
    assert "data_batch_3 is not readable" in refusal(cifar10)
    (cifar10 / "data_batch_3").write_bytes(python2_pickle([1, 2]))
    assert "data_batch_3 is not readable" in refusal(cifar10)
    assert cache_entries() == before


def test_missing_files_are_named(cifar10: Path, cifar100: Path, stl10: Path):
    (cifar10 / "data_batch_3").unlink()
    (cifar10 / "batches.meta").unlink()
    assert "data_batch_3, batches.meta of cifar-10-batches-py is missing" in refusal(cifar10)
    (cifar100 / "test").unlink()
    assert "test of cifar-100-python is missing" in refusal(packed(cifar100))
    (stl10 / "unlabeled_X.bin").unlink()
    assert "unlabeled_X.bin of stl10_binary is missing" in refusal(stl10)


# STL-10


def test_stl10(stl10: Path, stl_images: NDArray[np.uint8]):
    splits, names = opened(stl10)
    assert list(splits) == ["train", "test", "unlabeled"]
    assert names == [
        "airplane",
        "bird",
        "car",
        "cat",
        "deer",
        "dog",
        "horse",
        "monkey",
        "ship",
        "truck",
    ]
    expected = {
        "train": (stl_images[:2], [9, 0]),
        "test": (stl_images[2:3], [3]),
        "unlabeled": (stl_images[1:], [-1] * 3),
    }
    for split, rows in splits.items():
        images, labels = everything(rows)
        # otherwise a transposition would not be visible
        assert images[0, 0, -1, 0] != images[0, -1, 0, 0]
        np.testing.assert_array_equal(images, expected[split][0])
        assert labels == expected[split][1]
    assert splits["unlabeled"].name_of(2) == "unlabeled_X.bin row 2"


def test_malformed_stl10_is_refused(stl10: Path):
    whole = (stl10 / "train_X.bin").read_bytes()
    (stl10 / "train_X.bin").write_bytes(whole[:-1])
    assert "train_X.bin is cut off: 55295 bytes, not a whole number of images of 27648" in refusal(
        stl10
    )
    (stl10 / "train_X.bin").write_bytes(b"")
    assert "train_X.bin is cut off: 0 bytes" in refusal(stl10)
    (stl10 / "train_X.bin").write_bytes(whole[:27648])
    assert "train_y.bin has labels uint8 [2]; one is needed for each of 1 images" in refusal(stl10)
    (stl10 / "train_X.bin").write_bytes(whole)
    for wrong in (0, 11, 255):
        (stl10 / "train_y.bin").write_bytes(bytes([1, wrong]))
        assert f"train_y.bin has the label {wrong}; its 10 classes are numbered from 1" in refusal(
            stl10
        )
    (stl10 / "train_y.bin").write_bytes(bytes([1, 10]))
    assert everything(opened(stl10)[0]["train"])[1] == [0, 9]


# Packed archives


@pytest.mark.parametrize("kind", ["cifar10", "cifar100", "stl10"])
@pytest.mark.parametrize("column", [None, "none"])
def test_a_packed_archive_gives_the_same_as_its_folder(
    kind: str, column: str | None, request: pytest.FixtureRequest
):
    folder = request.getfixturevalue(kind)
    (expected, expected_names), (found, names) = (
        opened(folder, column),
        opened(packed(folder), column),
    )
    assert names == expected_names
    assert list(found) == list(expected)
    for split, rows in found.items():
        images, labels = everything(rows)
        expected_images, expected_labels = everything(expected[split])
        np.testing.assert_array_equal(images, expected_images)
        assert labels == expected_labels
        assert [rows.name_of(row) for row in range(len(rows))] == [
            expected[split].name_of(row) for row in range(len(rows))
        ]


def states(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


def test_an_archive_is_unpacked_once(cifar10: Path, stl10: Path):
    for folder in (cifar10, stl10):
        archive, cache = packed(folder), Path(datasets.config.HF_DATASETS_CACHE) / "igpt"
        before = cache_entries()
        opened(archive)
        (entry,) = cache_entries() - before
        assert len(entry) == 16
        made = states(cache)
        opened(archive)
        link = archive.with_name(f"link-to-{folder.name}")
        link.symlink_to(archive)
        opened(link)
        assert states(cache) == made


def test_only_the_needed_members_are_unpacked(cifar10: Path, stl10: Path):
    kept = []
    for folder in (cifar10, stl10):
        before = cache_entries()
        opened(packed(folder))
        (entry,) = cache_entries() - before
        root = Path(datasets.config.HF_DATASETS_CACHE) / "igpt" / entry
        kept.append({path.name for path in root.rglob("*") if path.is_file()})
    assert kept[0] == {"index.json", "train.npy", "train.label.npy", "test.npy", "test.label.npy"}
    files = {path.name for path in stl10.iterdir()} - {"fold_indices.txt"}
    assert kept[1] == {"index.json", "train.label.npy", "test.label.npy", *files}


def test_a_changed_archive_is_unpacked_again(cifar10: Path):
    assert everything(opened(cifar10)[0]["train"])[1][0] == 1
    file = cifar10 / "data_batch_1"
    before = file.stat()
    damage(cifar10, seed=77, labels=[8, 8, 8])
    assert file.stat().st_size == before.st_size
    os.utime(
        file, ns=(before.st_atime_ns, before.st_mtime_ns + 1)
    )  # the clocks of file systems are coarse
    images, labels = everything(opened(cifar10)[0]["train"])
    assert labels[:4] == [8, 8, 8, 2]
    np.testing.assert_array_equal(images[:3], pixels(77))


@pytest.mark.parametrize(
    "change",
    [
        "no JSON",
        "[]",
        "{}",
        {"bytes": None},
        {"bytes": {"train.npy": "large"}},
        {"classes": {"label": [1, 2]}},
        {"classes": []},
        {"parts": {"train": [[3, "data_batch_1"]]}},
        {"parts": None},
    ],
)
def test_a_malformed_index_of_the_cache_is_replaced(cifar10: Path, change: str | dict[str, object]):
    before = cache_entries()
    _, names = opened(cifar10)
    (entry,) = cache_entries() - before
    index = Path(datasets.config.HF_DATASETS_CACHE) / "igpt" / entry / "index.json"
    good = index.read_text()
    index.write_text(change if isinstance(change, str) else json.dumps(json.loads(good) | change))
    assert opened(cifar10)[1] == names
    assert index.read_text() == good


@pytest.mark.parametrize("lost", ["train.npy", "test.label.npy", "index.json"])
def test_a_cache_with_missing_files_is_completed(cifar10: Path, lost: str):
    before = cache_entries()
    expected = everything(opened(cifar10)[0]["test"])
    (entry,) = cache_entries() - before
    (Path(datasets.config.HF_DATASETS_CACHE) / "igpt" / entry / lost).unlink()
    splits, _ = opened(cifar10)
    images, labels = everything(splits["test"])
    np.testing.assert_array_equal(images, expected[0])
    assert labels == expected[1]
    assert len(everything(splits["train"])[0]) == 15


@pytest.mark.parametrize("kind", ["cifar10", "stl10"])
def test_a_truncated_archive_is_refused(kind: str, request: pytest.FixtureRequest):
    archive = packed(request.getfixturevalue(kind))
    whole = archive.read_bytes()
    before = cache_entries()
    for size in (12, 100, len(whole) // 2, len(whole) - 4):
        archive.write_bytes(whole[:size])
        assert "cut off or damaged" in refusal(archive)
        assert cache_entries() == before
    damaged = bytearray(whole)
    damaged[-6] ^= 1  # within the checksum at the end
    archive.write_bytes(bytes(damaged))
    assert "cut off or damaged" in refusal(archive)
    assert cache_entries() == before
    stored = gzip.compress(gzip.decompress(whole), compresslevel=0)
    archive.write_bytes(
        stored[: len(stored) // 2] + b"\xff" * (len(stored) // 2)
    )  # not compressed data
    assert "cut off or damaged" in refusal(archive)
    assert cache_entries() == before
    archive.write_bytes(
        gzip.compress(gzip.decompress(whole)[: len(stored) // 2])
    )  # truncated before it was compressed
    assert "download" in refusal(archive)
    assert cache_entries() == before
    archive.write_bytes(whole)
    assert len(opened(archive)[0]["test"]) in (1, PER_BATCH)


def test_members_outside_of_the_archive_are_ignored(cifar100: Path, tmp_path: Path):
    """Links, and files of the same names in other folders, are not selected."""
    archive = tmp_path / "deep" / "er" / "archive"
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("train", "meta"):
            tar.add(cifar100 / name, f"./cifar-100-python/{name}")
        link = tarfile.TarInfo("./cifar-100-python/test")
        link.type, link.linkname = tarfile.SYMTYPE, str(cifar100 / "test")
        tar.addfile(link)
        tar.add(cifar100 / "test", "elsewhere/test")
        tar.add(cifar100 / "test", "../../escaped/cifar-100-python/other")
    assert "test of cifar-100-python is missing" in refusal(archive)
    assert not list(tmp_path.rglob("*escaped*"))


def test_two_processes_that_unpack_the_same_archive(cifar10: Path, monkeypatch: pytest.MonkeyPatch):
    """One of them unpacks; the other waits, and does not take its unfinished work for that of a
    killed process."""
    archive, calls = packed(cifar10), []

    def slowly(*arguments: Any) -> None:
        calls.append(arguments)
        time.sleep(0.3)
        unpack(*arguments)

    monkeypatch.setattr(archives, "unpack", slowly)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(opened, [archive, archive]))
    assert [len(splits["train"]) for splits, _ in both] == [15, 15]
    assert len(calls) == 1


def test_an_archive_is_recognized_by_its_first_members(cifar100: Path, tmp_path: Path):
    """The very first may be `./`; and a large archive of something else is not read to its end."""
    for number, is_found in ((0, True), (1, True), (12, True), (30, False)):
        path = tmp_path / f"{number}-before"
        with tarfile.open(path, "w:gz") as tar:
            for _ in range(number):
                tar.addfile(tarfile.TarInfo("./notes"))
            tar.add(cifar100, f"./{cifar100.name}")
        assert (open_archive(str(path)) is not None) == is_found


# OpenAI's arrays


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_tokens(tmp_path: Path, kind: type):
    generator = np.random.default_rng(0)
    arrays = {
        name: generator.integers(0, 100, (count, 64)).astype(kind)
        for name, count in (("trX", 5), ("vaX", 3), ("teX", 2))
    }
    labels = {
        "trY": np.eye(10, dtype=np.float32)[[4, 0, 9, 1, 1]],
        "vaY": np.array([3, 2, 7]),
        "teY": np.eye(4, dtype=bool)[[1, 3]],
    }
    splits, names = opened(write_tokens(tmp_path / "downloads" / "cifar10", **arrays, **labels))
    assert list(splits) == ["train", "validation", "test"]
    assert names == [str(number) for number in range(10)]
    for (split, rows), short, expected in zip(
        splits.items(), ("tr", "va", "te"), ([4, 0, 9, 1, 1], [3, 2, 7], [1, 3]), strict=True
    ):
        assert isinstance(rows, TokenRows)
        assert (rows.resolution, len(rows)) == (8, len(expected))
        tokens, numbers = everything(rows)
        assert tokens.dtype == kind
        np.testing.assert_array_equal(tokens, arrays[f"{short}X"])
        assert numbers == expected
        assert rows.name_of(1) == f"cifar10_{short}X.npy row 1", split


def test_tokens_without_optional_files(tmp_path: Path):
    tokens = np.arange(8, dtype=np.uint16).reshape(2, 4)
    splits, names = opened(write_tokens(tmp_path / "bare", trX=tokens))
    assert list(splits) == ["train"]
    assert names is None
    assert everything(splits["train"])[1] == [-1, -1]
    splits, names = opened(
        write_tokens(
            tmp_path / "half", trX=tokens, trY=np.array([1, 0]), teX=tokens, vaY=np.array([5])
        )
    )
    assert list(splits) == ["train", "test"]
    assert names == ["0", "1"]
    assert everything(splits["train"])[1] == [1, 0]
    assert everything(splits["test"])[1] == [-1, -1]


def test_one_hot_rows_in_several_blocks(tmp_path: Path):
    numbers = np.random.default_rng(0).integers(0, 3, 9000)
    prefix = write_tokens(
        tmp_path / "long", trX=np.zeros((9000, 1), np.uint8), trY=np.eye(3, dtype=np.uint8)[numbers]
    )
    assert everything(opened(prefix)[0]["train"])[1] == numbers.tolist()


GOOD = np.zeros((3, 4), np.int32)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        (
            {"trX": np.zeros((3, 5), np.int32)},
            "set_trX.npy is int32 [3, 5]; tokens are integers [N, n], n a square",
        ),
        (
            {"trX": np.zeros((3, 4), np.float32)},
            "set_trX.npy is float32 [3, 4]; tokens are integers",
        ),
        ({"trX": np.zeros((3, 4), bool)}, "set_trX.npy is bool [3, 4]; tokens are integers"),
        (
            {"trX": np.zeros((3, 4, 4), np.int32)},
            "set_trX.npy is int32 [3, 4, 4]; tokens are integers [N, n]",
        ),
        ({"trX": np.zeros(4, np.int32)}, "set_trX.npy is int32 [4]; tokens are integers [N, n]"),
        ({"trX": np.zeros((0, 4), np.int32)}, "set_trX.npy is int32 [0, 4]"),
        ({"trX": np.zeros((3, 0), np.int32)}, "set_trX.npy is int32 [3, 0]"),
        (
            {"trX": GOOD, "teX": np.zeros((3, 9), np.int32)},
            "different numbers of tokens per image: [4, 9]",
        ),
        (
            {"trX": GOOD, "trY": np.arange(2)},
            "set_trY.npy has labels int64 [2]; one is needed for each of 3 images",
        ),
        (
            {"trX": GOOD, "trY": np.eye(2)},
            "set_trY.npy has labels float64 [2, 2]; one is needed for each of 3 images",
        ),
        ({"trX": GOOD, "trY": np.zeros((0, 2))}, "one is needed for each of 3 images"),
        (
            {"trX": GOOD, "trY": np.zeros((3, 2))},
            "set_trY.npy should hold class numbers [N] or one-hot rows [N,",
        ),
        ({"trX": GOOD, "trY": np.full((3, 2), 0.5)}, "one-hot rows"),
        ({"trX": GOOD, "trY": np.ones((3, 2))}, "one-hot rows"),
        ({"trX": GOOD, "trY": np.full((3, 2), "1")}, "one-hot rows"),
        ({"trX": GOOD, "trY": np.zeros((3, 2), [("class", "i4")])}, "one-hot rows"),
        ({"trX": GOOD, "trY": np.array([0.0, 1.0, 2.0])}, "labels float64 [3]"),
        ({"trX": GOOD, "trY": np.array([0, -1, 2])}, "label -1"),
        ({"trX": GOOD, "trY": np.array([0, 70000, 2])}, "label 70000"),
        ({"trX": GOOD, "trY": np.array([0, 2**63, 2], dtype=np.uint64)}, f"label {2**63}"),
    ],
)  # fmt: skip
def test_inconsistent_tokens_are_refused(
    tmp_path: Path, arrays: dict[str, NDArray[Any]], said: str
):
    before = cache_entries()
    assert said in refusal(write_tokens(tmp_path / "set", **arrays))
    assert cache_entries() == before


def test_tokens_that_are_not_an_array_are_refused(tmp_path: Path):
    prefix = write_tokens(tmp_path / "set", trX=np.zeros((300, 4), np.int32))
    file = tmp_path / "set_trX.npy"
    whole = file.read_bytes()
    for broken in (
        b"",
        whole[:60],
        whole[:-1],
        b"not an array",
        b"PK\x03\x04 and so on",
        pickle.dumps(Attack(tmp_path / "executed")),
    ):
        file.write_bytes(broken)
        assert "set_trX.npy is not readable as a .npy array" in refusal(prefix)
    np.save(file, np.array([Attack(tmp_path / "executed")], dtype=object), allow_pickle=True)
    assert "set_trX.npy is not readable as a .npy array" in refusal(prefix)
    assert not (tmp_path / "executed").exists()


def test_the_palette_next_to_tokens_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prefix = write_tokens(tmp_path / "cifar10", trX=GOOD)
    assert token_palette(prefix) is None
    np.save(tmp_path / "kmeans_centers.npy", np.zeros((4, 3), np.float32))
    assert token_palette(prefix) == tmp_path / "kmeans_centers.npy"
    assert token_palette(str(tmp_path / "imagenet")) is None
    assert token_palette("digits") is None
    monkeypatch.chdir(tmp_path)
    assert token_palette("cifar10") == Path("kmeans_centers.npy")
    assert len(opened("cifar10")[0]["train"]) == 3


def test_an_existing_path_is_not_taken_for_a_prefix(tmp_path: Path):
    prefix = write_tokens(tmp_path / "cifar10", trX=GOOD)
    Path(prefix).mkdir()
    assert open_archive(prefix) is None
    assert token_palette(prefix) is None


# Readers


@pytest.mark.parametrize("kind", ["cifar10", "cifar100", "stl10", "tokens"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_readers_are_pickled_as_paths(
    kind: str, is_packed: bool, request: pytest.FixtureRequest, tmp_path: Path
):
    if kind == "tokens":
        source: Any = write_tokens(
            tmp_path / "set", trX=np.arange(40000).reshape(-1, 4), trY=np.arange(10000) % 5
        )
    else:
        source = request.getfixturevalue(kind)
        source = packed(source) if is_packed else source
    for rows in opened(source)[0].values():
        expected, labels = everything(rows)  # memory-mapped: its contents must not be pickled
        sent = pickle.dumps(rows)
        assert len(sent) < 2000
        copy = pickle.loads(sent)
        found, numbers = everything(copy)
        np.testing.assert_array_equal(found, expected)
        assert numbers == labels
        assert copy == rows


@pytest.mark.parametrize("kind", ["cifar10", "stl10", "tokens"])
def test_readers_work_in_another_process(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Including those of sources that were opened by a relative path."""
    if kind == "tokens":
        source = Path(
            write_tokens(tmp_path / "set", trX=np.arange(12).reshape(3, 4), trY=np.arange(3))
        )
    else:
        source = request.getfixturevalue(kind)
    monkeypatch.chdir(source.parent)
    train = opened(source.name)[0]["train"]
    sent = pickle.dumps(train)
    row, label = next(train.read(np.array([1])))
    monkeypatch.chdir("/")
    code = (
        "import pickle, sys; row, label = next(pickle.load(sys.stdin.buffer).read([1])); "
        "print(label, row.sum())"
    )
    done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True)
    assert done.stdout.split() == [str(label).encode(), str(row.sum()).encode()], done.stderr


# Other sources


def test_other_sources_are_not_recognized(
    tmp_path: Path, write_folder: Callable[..., Path], picture: Callable[..., bytes]
):
    before = cache_entries()
    for name in (
        "uoft-cs/cifar10",
        "digits",
        "uoft-cs/cifar100:fine",
        str(tmp_path / "nothing"),
        "",
    ):
        assert open_archive(name) is None
    folders = write_folder("images", "train/cat/1.png", "test/dog/2.png", "meta/3.png")
    (folders / "train_X.bin").write_bytes(b"one file of a name makes no archive")
    assert open_archive(str(folders)) is None
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "short").write_bytes(b"\x1f")
    assert open_archive(str(tmp_path / "a.parquet")) is None
    assert open_archive(str(tmp_path / "short")) is None
    with tarfile.open(tmp_path / "web.tar.gz", "w:gz") as tar:
        tar.add(folders, "train")
    assert open_archive(str(tmp_path / "web.tar.gz")) is None
    (tmp_path / "text.gz").write_bytes(gzip.compress(b"no tar" * 1000))
    assert open_archive(str(tmp_path / "text.gz")) is None
    assert cache_entries() == before


def test_other_folders_are_rejected_without_listing_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("a folder of a million images would be listed")

    for name in ("listdir", "scandir", "walk"):
        monkeypatch.setattr(os, name, forbidden)
    assert open_archive(str(tmp_path)) is None


def test_several_data_sets_in_a_folder(cifar10: Path, cifar100: Path):
    assert cifar10.parent == cifar100.parent
    message = refusal(cifar10.parent)
    assert "there are several data sets; give one: " in message
    assert str(cifar10) in message
    assert str(cifar100) in message
