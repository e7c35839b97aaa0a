import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from igpt.data.images.palette import Palette
from igpt.data.tokens.batches import Batches
from igpt.data.tokens.dataset import TokenDataset, TokenSplit
from igpt.data.tokens.labels import require_classes
from igpt.data.tokens.manifest import write_manifest, write_shard
from igpt.data.tokens.shards import StoredArray
from igpt.errors import InputError

Run = Callable[..., "subprocess.CompletedProcess[str]"]
SIZES = {"train": [5, 0, 3, 1, 4], "validation": [2], "test": []}
PALETTE = Palette.from_centers(np.random.default_rng(0).uniform(-1, 1, (50, 3)))


def written(folder: Path) -> dict[str, tuple[NDArray[np.uint16], NDArray[np.int32]]]:
    """Write a data set of 4 x 4 tokens in shards of these sizes; return all tokens and labels."""
    generator = np.random.default_rng(0)
    shards, content = {}, {}
    folder.mkdir(parents=True, exist_ok=True)
    for split, sizes in SIZES.items():
        tokens = generator.integers(0, 50, (sum(sizes), 16), dtype=np.uint16)
        labels = generator.integers(0, 3, sum(sizes), dtype=np.int32)
        content[split] = tokens, labels
        parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]) if sizes else []
        named = {f"{split}-{number:05d}": part for number, part in enumerate(parts)}
        shards[split] = [
            write_shard(folder, name, tokens[part], labels[part]) for name, part in named.items()
        ]
    write_manifest(
        folder,
        resolution=4,
        palette=PALETTE,
        class_names=["a", "b", "é"],
        splits=shards,
        source="a test",
        made={"seed": 0},
    )
    return content


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    written(tmp_path / "tokens")
    return tmp_path / "tokens"


def edit(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(manifest | changes))


def test_round_trip(tmp_path: Path):
    content = written(tmp_path)
    dataset = TokenDataset(tmp_path)
    assert dataset.resolution == 4
    assert dataset.class_names == ["a", "b", "é"]
    assert dataset.manifest["source"] == "a test"
    assert dataset.manifest["made"] == {"seed": 0}
    assert dataset.palette.fingerprint == PALETTE.fingerprint
    assert list(dataset) == ["train", "validation", "test"]
    assert [len(dataset[split]) for split in dataset] == [13, 2, 0]
    dataset.verify()
    for split, (tokens, labels) in content.items():
        np.testing.assert_array_equal(dataset[split].labels, labels)
        if len(tokens):
            rows = dataset[split].rows(np.arange(len(tokens)))
            assert rows.dtype == np.uint16
            np.testing.assert_array_equal(rows, tokens)


def test_shards_are_plain_numpy_files(folder: Path):
    tokens = np.load(folder / "train-00002.tokens.npy")
    labels = np.load(folder / "train-00002.labels.npy")
    assert (tokens.shape, tokens.dtype, labels.shape, labels.dtype) == (
        (3, 16),
        np.uint16,
        (3,),
        np.int32,
    )


def test_rows_of_several_shards_in_any_order(tmp_path: Path):
    tokens, labels = written(tmp_path)["train"]
    split = TokenDataset(tmp_path)["train"]
    for wanted in (
        [12, 0, 5, 4, 5, 8, 7, 9, 12],
        [3],
        np.random.default_rng(0).permutation(13),
        [8, 8, 8],
    ):
        np.testing.assert_array_equal(split.rows(wanted), tokens[wanted])
        np.testing.assert_array_equal(split.labels_of(wanted), labels[wanted])
    assert split.rows([]).shape == (0, 16)
    assert TokenDataset(tmp_path)["validation"].rows([]).shape == (0, 16)


@pytest.mark.parametrize("wanted", [[13], [0, 100], [-14]])
def test_rows_out_of_range(folder: Path, wanted: list[int]):
    with pytest.raises(IndexError):
        TokenDataset(folder)["train"].rows(wanted)


def test_tokens_are_memory_mapped(folder: Path):
    split = TokenDataset(folder)["train"]
    before = split.rows([8]).copy()
    file = folder / "train-00003.tokens.npy"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1  # the last token of row 8, changed while the split is open
    with file.open("r+b") as opened:
        opened.write(content)
    assert (split.rows([8]) != before).tolist() == [[False] * 15 + [True]]
    rows = split.rows([8])
    rows[:] = 0  # a copy: the file is not written
    assert split.rows([8]).any()


def test_distant_rows_of_a_shard(tmp_path: Path):
    tokens = np.random.default_rng(0).integers(
        0, 2**16, (3000, 1000), dtype=np.uint16
    )  # rows end within pages
    write_shard(tmp_path, "big", tokens, np.arange(3000, dtype=np.int32))
    stored = StoredArray(tmp_path / "big.tokens.npy", tokens.dtype, tokens.shape)
    split = TokenSplit("train", [tokens[:7], stored], [])
    assert split.nbytes == (7 + 3000) * 2000
    for wanted in (
        [3006, 7, 1500],
        [3006],
        [2, 3006, 2, 8],
        np.arange(3007),
        np.arange(3007)[::-300],
    ):
        np.testing.assert_array_equal(
            split.rows(wanted), np.concatenate([tokens[:7], tokens])[wanted]
        )


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the kernel's list of mappings is Linux's"
)
def test_no_file_stays_mapped_or_open(folder: Path):
    split = TokenDataset(folder)["train"]
    before = len(list(Path("/proc/self/fd").iterdir()))
    split.rows([12, 0, 5])
    split.labels_of([12, 0, 5])
    assert len(split.labels) == 13
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_more_shards_than_a_process_may_have_open(tmp_path: Path):
    tokens = np.arange(1500 * 4, dtype=np.uint16).reshape(1500, 4)
    shards = []
    for number, part in enumerate(np.split(tokens, 500)):
        np.save(tmp_path / f"{number}.npy", part)
        shards.append(StoredArray(tmp_path / f"{number}.npy", tokens.dtype, part.shape))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        order = np.random.default_rng(0).permutation(1500)
        np.testing.assert_array_equal(TokenSplit("train", shards, []).rows(order), tokens[order])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_shard_that_changes_after_opening(folder: Path):
    dataset = TokenDataset(folder)
    file = folder / "train-00002.tokens.npy"
    split = dataset["train"]
    split.rows([5])
    content = file.read_bytes()
    file.write_bytes(content[:100])
    with pytest.raises(InputError, match=r"train-00002\.tokens\.npy can no longer be read"):
        split.rows([0, 7])
    file.unlink()
    with pytest.raises(InputError, match=r"train-00002\.tokens\.npy can no longer be read"):
        split.rows([7])
    with pytest.raises(InputError, match=r"train-00002\.tokens\.npy cannot be read"):
        dataset["train"].rows([7])
    np.save(file, np.zeros((3, 16), np.int64))
    with pytest.raises(InputError, match=r"does not hold \(3, 16\) uint16"):
        dataset["train"].rows([7])
    assert split.rows([0, 12]).shape == (2, 16)


def test_required_labels(folder: Path):
    dataset = TokenDataset(folder)
    dataset["train"].require_labels("a probe")
    partly = TokenSplit("train", [np.zeros((3, 4), np.uint16)], [np.array([0, -1, -1], np.int32)])
    with pytest.raises(
        InputError, match="a probe needs labels, and 2 of 3 images of 'train' have none"
    ):
        partly.require_labels("a probe")


def test_concatenated_splits(folder: Path):
    dataset = TokenDataset(folder)
    train, validation = dataset["train"], dataset["validation"]
    both = TokenSplit.joined("both", [train, validation])
    assert (both.name, len(both), both.nbytes) == ("both", 15, train.nbytes + validation.nbytes)
    assert np.array_equal(both.labels, np.concatenate([train.labels, validation.labels]))
    rows = np.concatenate([validation.rows([1]), train.rows([0]), validation.rows([0])])
    assert np.array_equal(both.rows([14, 0, 13]), rows)


def of_classes(name: str, *labels: int) -> TokenSplit:
    return TokenSplit(name, [np.zeros((len(labels), 4), np.uint16)], [np.array(labels, np.int32)])


@pytest.mark.parametrize(
    ("classes", "train", "test", "said"),
    [
        (3, [0, 1, 2], [2, 0], None),
        (2, [], [0], "a test needs images, and the split 'train' is empty"),
        (2, [0, 1], [], "a test needs images, and the split 'test' is empty"),
        (2, [0, 1], [0, -1], "a test needs labels, and 1 of 2 images of 'test' have none"),
        (2, [1, 1], [1], "a test needs at least two classes among the training images"),
        (3, [0, 1], [0], "a test needs a training image of every class; there are 2 for 3"),
        (3, [0, 1, 3], [0], "there are 3 classes .from 0., and a training image has the label 3"),
        (
            3,
            [0, 2, 2],
            [1, 0, 3, 3],
            "2 classes of the test images have no training image; a test needs every class",
        ),
    ],
)
def test_classes_required_by_a_classifier(
    classes: int, train: list[int], test: list[int], said: str | None
):
    splits = {"train": of_classes("train", *train), "test": of_classes("test", *test)}
    if said is None:
        require_classes(splits, classes, "a test")
        return
    with pytest.raises(InputError, match=said):
        require_classes(splits, classes, "a test")


def test_a_missing_split(folder: Path):
    dataset = TokenDataset(folder)
    with pytest.raises(InputError, match="has no split 'trian'; did you mean 'train'"):
        dataset["trian"]
    assert "train" in dataset
    assert "trian" not in dataset


def test_a_truncated_shard(folder: Path):
    file = folder / "train-00002.tokens.npy"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(
        InputError, match=rf"{file.name} is damaged: {size - 10} bytes, {size} were written"
    ):
        TokenDataset(folder)


@pytest.mark.parametrize("name", ["train-00000.tokens.npy", "validation-00000.labels.npy"])
def test_a_missing_shard(folder: Path, name: str):
    (folder / name).unlink()
    with pytest.raises(InputError, match=rf"{name} is missing; prepare the data set again"):
        TokenDataset(folder)


@pytest.mark.parametrize("name", ["train-00004.tokens.npy", "validation-00000.labels.npy"])
def test_an_edited_shard_is_found_by_verifying(folder: Path, name: str):
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    dataset = TokenDataset(folder)
    with pytest.raises(
        InputError, match=rf"1 of 12 files of .* have changed since they were written \({name}\)"
    ):
        dataset.verify()


def test_an_edited_palette(folder: Path):
    centers = PALETTE.centers_.tolist()
    centers[3][1] += 0.25 if centers[3][1] < 0.5 else -0.25
    edit(folder, palette={"fingerprint": PALETTE.fingerprint, "centers": centers})
    dataset = TokenDataset(folder)
    for look in (lambda: dataset.palette, dataset.verify):
        with pytest.raises(InputError, match="does not match its fingerprint"):
            look()


@pytest.mark.parametrize("version", [3, "1", None])
def test_a_later_version(folder: Path, version: object):
    edit(folder, version=version)
    with pytest.raises(InputError, match=f"has format version {version}; this igpt reads 1 and 2"):
        TokenDataset(folder)


def test_paths_that_are_not_data_sets(tmp_path: Path):
    with pytest.raises(InputError, match=r"no token data set at .*: dataset\.json is missing"):
        TokenDataset(tmp_path / "nowhere")
    (tmp_path / "dataset.json").write_text(
        '{"builder_name": "parquet"}'
    )  # as `datasets` may write one
    with pytest.raises(InputError, match="is not a token data set; `igpt prepare` makes one"):
        TokenDataset(tmp_path)
    (tmp_path / "dataset.json").write_text('{"format": "igpt-to')
    with pytest.raises(InputError, match="is it cut off"):
        TokenDataset(tmp_path)


def test_a_folder_without_its_manifest_is_refused(folder: Path):
    (folder / "dataset.json").unlink()
    with pytest.raises(InputError, match=r"dataset\.json is missing"):
        TokenDataset(folder)


def changed(folder: Path, key: str, value: object) -> None:
    """Set a key of the manifest, such as "splits.train.count"; a number is an index in a list."""
    manifest = json.loads((folder / "dataset.json").read_text())
    *path, last = [int(word) if word.isdecimal() else word for word in key.split(".")]
    inner = manifest
    for word in path:
        inner = inner[word]
    inner[last] = value
    (folder / "dataset.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("resolution", "4", "resolution = '4': Input should be a valid integer"),
        ("resolution", 0, "resolution = 0: Input should be greater than or equal to 1"),
        ("resolution", 10**9, "resolution = 1000000000: Input should be less than 65536"),
        ("resolution", 4.5, "resolution = 4.5: Input should be a valid integer"),
        ("source", None, "source = None: Input should be a valid string"),
        ("class_names", "abc", "class_names = 'abc': Input should be a valid list"),
        ("class_names", ["a", "b", 3], "class_names.2 = 3: Input should be a valid string"),
        (
            "class_names",
            ["a", "b", "a"],
            "class_names = ['a', 'b', 'a']: 'a' is there more than once",
        ),
        ("splits", ["train"], "splits = ['train']: Input should be a valid dictionary"),
        ("splits.train", [], "splits.train = []: Input should be a valid dictionary"),
        ("splits.train.count", 14, "the count is 14, and that of its shards 13"),
        (
            "splits.train.count",
            -1,
            "splits.train.count = -1: Input should be greater than or equal to 0",
        ),
        ("splits.train.shards", None, "splits.train.shards = None: Input should be a valid list"),
        (
            "splits.train.shards.0",
            "a",
            "splits.train.shards.0 = 'a': Input should be a valid dictionary",
        ),
        ("splits.train.shards.0", {}, "the key 'splits.train.shards.0.tokens' is missing"),
        (
            "splits.train.shards.2.count",
            -3,
            "splits.train.shards.2.count = -3: Input should be greater",
        ),
        ("splits.train.shards.2.count", 10**30, "splits.train.shards.2.count = 1000"),
        (
            "splits.train.shards.2.count",
            True,
            "splits.train.shards.2.count = True: Input should be a valid integer",
        ),
        (
            "splits.train.shards.2.tokens",
            "../a.npy",
            "splits.train.shards.2.tokens = '../a.npy': the plain name of a file",
        ),
        (
            "splits.train.shards.2.labels",
            "/dev/zero",
            "splits.train.shards.2.labels = '/dev/zero': the plain name",
        ),
        (
            "splits.train.shards.2.tokens",
            "..",
            "splits.train.shards.2.tokens = '..': the plain name",
        ),
        ("splits.train.shards.2.tokens", "", "splits.train.shards.2.tokens = '': the plain name"),
        (
            "splits.train.shards.2.tokens",
            "train-00000.tokens.npy",
            "'train-00000.tokens.npy' is there more than once",
        ),
        (
            "splits.train.shards.2.bytes",
            {"../a": 3},
            "splits.train.shards.2.bytes.../a.[key] = '../a': the plain name",
        ),
        (
            "splits.train.shards.2.sha256",
            5,
            "splits.train.shards.2.sha256 = 5: Input should be a valid dictionary",
        ),
        ("made", None, "made = None: Input should be a valid dictionary"),
        (
            "made.images",
            {"train": "13"},
            "made.images.train = '13': Input should be a valid integer",
        ),
        ("made.skipped", "none", "made.skipped = 'none': Input should be a valid list"),
        ("made.config", 3, "made.config = 3: Input should be a valid dictionary"),
        ("made.config", {"views": -1}, "made.config.views = -1: Input should be greater"),
        ("made.palette_error", {"mse": 3.0}, "psnr_db is missing"),
        (
            "made.palette_error",
            {"mse": "3", "psnr_db": 4.0},
            "made.palette_error.mse = '3': Input should be a valid number",
        ),
        ("palette", None, "palette = None: Input should be a valid dictionary"),
        ("palette.centers", [], "palette.centers = []: List should have at least 1 item"),
        (
            "palette.centers.3",
            [0, 0],
            "palette.centers.3 = [0, 0]: List should have at least 3 items",
        ),
        ("palette.fingerprint", 3, "palette.fingerprint = 3: Input should be a valid string"),
    ],
)
def test_a_malformed_manifest_is_refused_with_its_key(
    folder: Path, key: str, value: object, message: str
):
    changed(folder, key, value)
    with pytest.raises(InputError) as caught:
        TokenDataset(folder)
    assert f"{folder / 'dataset.json'}: " in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["resolution", "source", "class_names", "splits", "made", "palette"]
)
def test_a_missing_key_is_named(folder: Path, key: str):
    manifest = json.loads((folder / "dataset.json").read_text())
    del manifest[key]
    (folder / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=rf"dataset\.json: the key '{key}' is missing"):
        TokenDataset(folder)


def test_unknown_keys_of_a_later_minor_version_are_accepted(folder: Path):
    changed(folder, "note", [1])
    changed(folder, "made.left_out", {"files": {".txt": 3}})
    changed(folder, "splits.train.note", "x")
    changed(folder, "splits.train.shards.0.note", "x")
    changed(folder, "palette.note", "x")
    TokenDataset(folder).verify()


@pytest.mark.parametrize("resolution", [3, 5, 65535])
def test_a_resolution_that_differs_from_the_shards(folder: Path, resolution: int):
    changed(folder, "resolution", resolution)
    with pytest.raises(
        InputError,
        match=rf"train-00000\.tokens\.npy does not hold \(5, {resolution**2}\) uint16 but \(5, "
        r"16\) uint16: "
        r"the count or the resolution in dataset\.json is wrong",
    ):
        TokenDataset(folder)


def test_duplicate_class_names_are_refused(tmp_path: Path):
    with pytest.raises(
        InputError, match=r"class_names = \['a', 'a'\]: 'a' is there more than once"
    ):
        write_manifest(
            tmp_path,
            resolution=4,
            palette=PALETTE,
            class_names=["a", "a"],
            splits={},
            source="a test",
            made={},
        )
    assert list(tmp_path.iterdir()) == []


def replaced(
    folder: Path, split: str, tokens: NDArray[np.uint16], labels: NDArray[np.int32]
) -> None:
    """Replace all images of a split, with correct checksums."""
    shard = write_shard(folder, f"{split}-00000", tokens, labels)
    changed(folder, f"splits.{split}", {"count": len(tokens), "shards": [vars(shard)]})


@pytest.mark.parametrize(
    "token", [50, 65535]
)  # 50 colours: in the model, token 50 is the start of a sequence
def test_tokens_beyond_the_palette_are_refused_wherever_they_are_read(folder: Path, token: int):
    tokens = np.zeros((3, 16), np.uint16)
    tokens[2, 7] = token
    replaced(folder, "validation", tokens, np.zeros(3, np.int32))
    split = TokenDataset(folder)["validation"]
    assert split.rows([0, 1]).shape == (2, 16)
    said = (
        rf"validation-00000\.tokens\.npy holds the token {token}, and the palette has 50 "
        rf"colours \(tokens 0 to 49\)"
    )
    joined = TokenSplit.joined("both", [TokenDataset(folder)["train"], split])
    for read in (
        lambda: split.rows([2]),
        lambda: split.subset([0, 2]),
        lambda: joined.rows([15]),
        lambda: Batches(split, 4, 3).tokens(0),
        lambda: Batches(split, 4, 3, held_bytes=0).tokens(0),
    ):
        with pytest.raises(InputError, match=said):
            read()


@pytest.mark.parametrize("label", [3, -2, 2**31 - 1])
def test_labels_beyond_the_classes_are_refused_wherever_they_are_read(folder: Path, label: int):
    replaced(folder, "validation", np.zeros((3, 16), np.uint16), np.array([0, -1, label], np.int32))
    split = TokenDataset(folder)["validation"]
    assert split.labels_of([0, 1]).tolist() == [0, -1]
    said = (
        rf"validation-00000\.labels\.npy holds the label {label}, and there are 3 classes "
        rf"\(labels -1 to 2\)"
    )
    for read in (
        lambda: split.labels,
        lambda: split.labels_of([2]),
        lambda: split.require_labels("a test"),
        lambda: Batches(split, 4, 3).labels(0),
        lambda: Batches(split, 4, 3, held_bytes=0).labels(0),
    ):
        with pytest.raises(InputError, match=said):
            read()


def saved(file: Path, array: NDArray[np.generic]) -> None:
    """Replace a shard by an array, and set its size in the manifest."""
    np.save(file, array)
    changed(file.parent, "splits.train.shards.2.bytes", {file.name: file.stat().st_size})


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((3, 16), None), "is not readable as a .npy array"),  # pickled objects
        (np.zeros((3, 16), ">u2"), "does not hold"),
        (np.zeros((3, 16), np.float16), "does not hold"),
        (np.zeros((16, 3), np.uint16), "does not hold"),
        (np.zeros((3, 16), np.uint16, order="F"), "is in Fortran order"),
        (np.zeros((), np.uint16), "does not hold"),
    ],
)
def test_a_shard_of_another_type_shape_or_order(
    folder: Path, array: NDArray[np.generic], message: str
):
    saved(folder / "train-00002.tokens.npy", array)
    with pytest.raises(InputError, match=rf"train-00002\.tokens\.npy .*{message}") as caught:
        TokenDataset(folder)["train"].rows([6])
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(2**40, 16), (2**62, 2**62)])
def test_a_shard_that_claims_more_than_it_holds(folder: Path, shape: tuple[int, ...]):
    file = folder / "train-00002.tokens.npy"
    with file.open("wb") as opened:
        np.lib.format.write_array_header_1_0(
            opened, {"descr": "<u2", "fortran_order": False, "shape": shape}
        )
        opened.write(bytes(96))
    changed(folder, "splits.train.shards.2.bytes", {file.name: file.stat().st_size})
    with pytest.raises(InputError, match=r"train-00002\.tokens\.npy cannot be read"):
        TokenDataset(folder)["train"].rows([6])


@pytest.mark.parametrize(
    "name", ["dataset.json", "train-00000.tokens.npy", "validation-00000.labels.npy"]
)
def test_a_fifo_instead_of_a_file_is_refused_without_blocking(folder: Path, name: str):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=rf"{name} is a FIFO; a regular file is needed"):
        TokenDataset(folder)


def test_a_device_instead_of_a_shard_is_refused(folder: Path):
    (folder / "train-00000.tokens.npy").unlink()
    (folder / "train-00000.tokens.npy").symlink_to("/dev/zero")
    with pytest.raises(
        InputError, match=r"train-00000\.tokens\.npy is a device; a regular file is needed"
    ):
        TokenDataset(folder)


def test_all_missing_shards_are_counted_and_the_first_are_named(folder: Path):
    for file in folder.glob("train-*.tokens.npy"):
        file.unlink()
    (folder / "validation-00000.labels.npy").unlink()
    with pytest.raises(
        InputError,
        match=r"6 files of .* are missing \(train-00000.*, train-00004.tokens.npy and 1 more\)",
    ):
        TokenDataset(folder)


def test_files_without_a_size_in_the_manifest_must_exist(folder: Path):
    changed(folder, "splits.train.shards.2.bytes", {})
    TokenDataset(folder)
    (folder / "train-00002.labels.npy").unlink()
    with pytest.raises(InputError, match=r"train-00002\.labels\.npy is missing"):
        TokenDataset(folder)


def test_files_without_a_checksum_are_not_reported_as_complete(folder: Path):
    changed(folder, "splits.train.shards.2.sha256", {})
    with pytest.raises(
        InputError,
        match=r"dataset\.json has no checksum of train-00002\.tokens\.npy, train-00002\.labels",
    ):
        TokenDataset(folder).verify()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"images": {"train": 13, "validation": 2, "test": 0}, "skipped": []}, None),
        (
            {
                "images": {"train": 15, "validation": 2, "test": 1},
                "skipped": ["train a: b", "test c", "train d: e"],
            },
            None,
        ),
        (
            {"images": {"train": 5, "validation": 2, "test": 0}, "config": {"views": 3}},
            None,
        ),  # some are small
        ({"seed": 0}, None),
        ({"skipped": ["train a: b"]}, None),
        (
            {"images": {"train": 14, "validation": 2, "test": 0}},
            "has 13 images of 'train', and there should be 14 ",
        ),
        (
            {"images": {"train": 13, "validation": 2, "test": 0}, "skipped": ["validation x: y"]},
            r"has 2 images of 'validation', and there should be 1 \(2 planned, 1 skipped\)",
        ),
        (
            {"images": {"train": 13, "test": 0}},
            "has 2 images of 'validation', and there should be 0 ",
        ),
        (
            {"images": {"train": 3, "validation": 2, "test": 0}, "config": {"views": 4}},
            "has 13 images of 'train', and there should be 3 to 12 ",
        ),
    ],
)
def test_missing_images_are_reported(folder: Path, made: object, message: str | None):
    changed(folder, "made", made)
    data = TokenDataset(folder)
    if message is None:
        data.verify()
        return
    with pytest.raises(InputError, match=rf"dataset\.json {message}"):
        data.verify()


@pytest.fixture
def digits_copy(digits: TokenDataset, tmp_path: Path) -> Path:
    """Return a copy of the digits in a palette of 17 colours, in which shards may be changed."""
    shutil.copytree(digits.path, tmp_path / "digits")
    return tmp_path / "digits"


def poked(folder: Path, split: str, kind: str, value: int) -> str:
    """Write a value into the first shard of a split, and return the shard's name."""
    file = sorted(folder.glob(f"{split}-*.{kind}.npy"))[0]
    array = np.load(file)
    array.flat[array.size // 2] = value
    np.save(file, array)
    return file.name


@pytest.mark.parametrize("token", [17, 65535])
@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("train", ["pretrain", "TOKENS", "-o", "OUT", "--model", "tiny"]),
        ("validation", ["pretrain", "TOKENS", "-o", "OUT", "--model", "tiny"]),
        (
            "train",
            ["finetune", "MODEL", "TOKENS", "-o", "OUT", "--steps", "400", "--batch-size", "64"],
        ),
        ("train", ["probe", "MODEL", "TOKENS", "-o", "OUT.json"]),
        ("test", ["probe", "MODEL", "TOKENS", "-o", "OUT.json"]),
        ("test", ["score", "MODEL", "TOKENS", "-o", "OUT.csv"]),
        ("test", ["features", "MODEL", "TOKENS", "-o", "OUT.npz", "--layer", "1"]),
    ],
)
def test_commands_refuse_tokens_beyond_the_palette(
    igpt: Run,
    short_run: Path,
    short_flags: list[str],
    digits_copy: Path,
    split: str,
    words: list[str],
    token: int,
):
    name = poked(digits_copy, split, "tokens", token)
    out = digits_copy.parent / "out"
    named = {"TOKENS": digits_copy, "MODEL": short_run}
    command = [named.get(word, word.replace("OUT", str(out))) for word in words]
    done = igpt(*command, *(short_flags if words[0] == "pretrain" else []))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert (
        f"{name} holds the token {token}, and the palette has 17 colours (tokens 0 to 16)"
        in done.stderr
    )
    assert not list(digits_copy.parent.glob("out.*"))


@pytest.mark.parametrize("command", ["probe", "finetune"])
def test_commands_refuse_labels_beyond_the_classes(
    igpt: Run, short_run: Path, digits_copy: Path, command: str
):
    name = poked(digits_copy, "train", "labels", 10)
    done = igpt(command, short_run, digits_copy, "-o", digits_copy.parent / "out.json")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"{name} holds the label 10, and there are 10 classes (labels -1 to 9)" in done.stderr
    assert not (digits_copy.parent / "out.json").exists()
