import json
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from igpt.data.labels import require_classes
from igpt.data.palette import Palette
from igpt.data.tokens import StoredArray, TokenDataset, TokenSplit, write_manifest, write_shard
from igpt.errors import InputError

SIZES = {"train": [5, 0, 3, 1, 4], "validation": [2], "test": []}
PALETTE = Palette.from_centers(np.random.default_rng(0).uniform(-1, 1, (50, 3)))


def written(folder: Path) -> dict[str, tuple[NDArray[np.uint16], NDArray[np.int32]]]:
    """Writes a data set of 4 x 4 tokens in shards of the sizes above; returns all tokens and labels."""
    generator = np.random.default_rng(0)
    shards, content = {}, {}
    folder.mkdir(parents=True, exist_ok=True)
    for split, sizes in SIZES.items():
        tokens = generator.integers(0, 50, (sum(sizes), 16), dtype=np.uint16)
        labels = generator.integers(0, 3, sum(sizes), dtype=np.int32)
        content[split] = tokens, labels
        parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]) if sizes else []
        named = {f"{split}-{number:05d}": part for number, part in enumerate(parts)}
        shards[split] = [write_shard(folder, name, tokens[part], labels[part]) for name, part in named.items()]
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
    assert (tokens.shape, tokens.dtype, labels.shape, labels.dtype) == ((3, 16), np.uint16, (3,), np.int32)


def test_rows_of_several_shards_in_any_order(tmp_path: Path):
    tokens, labels = written(tmp_path)["train"]
    split = TokenDataset(tmp_path)["train"]
    for wanted in ([12, 0, 5, 4, 5, 8, 7, 9, 12], [3], np.random.default_rng(0).permutation(13), [8, 8, 8]):
        np.testing.assert_array_equal(split.rows(wanted), tokens[wanted])
        np.testing.assert_array_equal(split.labels_of(wanted), labels[wanted])
    assert split.rows([]).shape == (0, 16)
    assert TokenDataset(tmp_path)["validation"].rows([]).shape == (0, 16)


@pytest.mark.parametrize("wanted", [[13], [0, 100], [-14]])
def test_rows_that_are_not_there(folder: Path, wanted: list[int]):
    with pytest.raises(IndexError):
        TokenDataset(folder)["train"].rows(wanted)


def test_tokens_are_mapped_and_not_read(folder: Path):
    split = TokenDataset(folder)["train"]
    before = split.rows([8]).copy()
    file = folder / "train-00003.tokens.npy"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1  # the last token of row 8, changed under the open split
    with file.open("r+b") as opened:
        opened.write(content)
    assert (split.rows([8]) != before).tolist() == [[False] * 15 + [True]]
    rows = split.rows([8])
    rows[:] = 0  # a copy: the file is not written
    assert split.rows([8]).any()


def test_rows_far_apart_in_a_shard(tmp_path: Path):
    tokens = np.random.default_rng(0).integers(0, 2**16, (3000, 1000), dtype=np.uint16)  # rows end within pages
    write_shard(tmp_path, "big", tokens, np.arange(3000, dtype=np.int32))
    stored = StoredArray(tmp_path / "big.tokens.npy", tokens.dtype, tokens.shape)
    split = TokenSplit("train", [tokens[:7], stored], [])
    assert split.nbytes == (7 + 3000) * 2000
    for wanted in ([3006, 7, 1500], [3006], [2, 3006, 2, 8], np.arange(3007), np.arange(3007)[::-300]):
        np.testing.assert_array_equal(split.rows(wanted), np.concatenate([tokens[:7], tokens])[wanted])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's list of mappings is Linux's")
def test_nothing_stays_mapped_or_open(folder: Path):
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


def test_labels_that_are_needed(folder: Path):
    dataset = TokenDataset(folder)
    dataset["train"].require_labels("a probe")
    partly = TokenSplit("train", [np.zeros((3, 4), np.uint16)], [np.array([0, -1, -1], np.int32)])
    with pytest.raises(InputError, match="a probe needs labels, and 2 of 3 images of 'train' have none"):
        partly.require_labels("a probe")


def test_splits_laid_end_to_end(folder: Path):
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
        (3, [0, 2, 2], [1, 0, 3, 3], "2 classes of the test images have no training image; a test needs every class"),
    ],
)
def test_classes_that_a_classifier_needs(classes: int, train: list[int], test: list[int], said: str | None):
    splits = {"train": of_classes("train", *train), "test": of_classes("test", *test)}
    if said is None:
        require_classes(splits, classes, "a test")
        return
    with pytest.raises(InputError, match=said):
        require_classes(splits, classes, "a test")


def test_a_split_that_is_not_there(folder: Path):
    dataset = TokenDataset(folder)
    with pytest.raises(InputError, match="has no split 'trian'; did you mean 'train'"):
        dataset["trian"]
    assert "train" in dataset
    assert "trian" not in dataset


def test_a_cut_off_shard(folder: Path):
    file = folder / "train-00002.tokens.npy"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match=rf"{file.name} is damaged: {size - 10} bytes, {size} were written"):
        TokenDataset(folder)


@pytest.mark.parametrize("name", ["train-00000.tokens.npy", "validation-00000.labels.npy"])
def test_a_missing_shard(folder: Path, name: str):
    (folder / name).unlink()
    with pytest.raises(InputError, match=rf"{name} is missing; prepare the data set anew"):
        TokenDataset(folder)


@pytest.mark.parametrize("name", ["train-00004.tokens.npy", "validation-00000.labels.npy"])
def test_an_edited_shard_is_found_by_verifying(folder: Path, name: str):
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    dataset = TokenDataset(folder)
    with pytest.raises(InputError, match=rf"1 of 12 files of .* have changed since they were written \({name}\)"):
        dataset.verify()


def test_an_edited_palette(folder: Path):
    centers = PALETTE.centers_.tolist()
    centers[3][1] += 0.25 if centers[3][1] < 0.5 else -0.25
    edit(folder, palette={"fingerprint": PALETTE.fingerprint, "centers": centers})
    dataset = TokenDataset(folder)
    for look in (lambda: dataset.palette, dataset.verify):
        with pytest.raises(InputError, match="does not match its fingerprint"):
            look()


@pytest.mark.parametrize("version", [2, "1", None])
def test_a_later_version(folder: Path, version: object):
    edit(folder, version=version)
    with pytest.raises(InputError, match=f"has format version {version}; this igpt reads 1"):
        TokenDataset(folder)


def test_what_is_no_data_set(tmp_path: Path):
    with pytest.raises(InputError, match=r"no token data set at .*: dataset\.json is missing"):
        TokenDataset(tmp_path / "nowhere")
    (tmp_path / "dataset.json").write_text('{"builder_name": "parquet"}')  # as `datasets` may write one
    with pytest.raises(InputError, match="is not a token data set; `igpt prepare` makes one"):
        TokenDataset(tmp_path)
    (tmp_path / "dataset.json").write_text('{"format": "igpt-to')
    with pytest.raises(InputError, match="is it cut off"):
        TokenDataset(tmp_path)


def test_a_folder_without_its_manifest_is_no_data_set(folder: Path):
    (folder / "dataset.json").unlink()
    with pytest.raises(InputError, match=r"dataset\.json is missing"):
        TokenDataset(folder)
