import io
import os
import socket
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from igpt.data.images import decode
from igpt.data.sources import Source, open_source
from igpt.errors import InputError

Write = Callable[..., Path]


def counts(splits: dict[str, Source]) -> list[int]:
    assert list(splits) == ["train", "validation", "test"]
    return [len(split) for split in splits.values()]


def paths(split: Source) -> set[str]:
    return {Path(record["path"]).name for record in split.images(np.arange(len(split)))}


def test_digits():
    splits, names = open_source("digits")
    assert counts(splits) == [1437, 180, 180]
    assert names == list("0123456789")
    image = decode(splits["train"].image(0))
    assert (image.mode, image.size) == ("L", (8, 8))
    labels = np.concatenate([split.labels for split in splits.values()])
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_cifar10(cifar: Path):
    """The columns `img` and `label` are found by their types."""
    splits, names = open_source(str(cifar))
    assert counts(splits) == [45000, 5000, 10000]
    assert names is not None
    assert len(names) == 10
    assert np.bincount(splits["test"].labels).tolist() == [1000] * 10
    both = np.bincount(splits["train"].labels) + np.bincount(splits["validation"].labels)
    assert both.tolist() == [5000] * 10
    assert decode(splits["test"].image(9999)).size == (32, 32)
    both = np.concatenate([splits["train"].indices, splits["validation"].indices])
    np.testing.assert_array_equal(np.sort(both), np.arange(50000))


def test_photographs_in_class_folders(shared_data: Path):
    splits, names = open_source(str(shared_data / "imagenet-sample"))
    assert counts(splits) == [80, 10, 10]
    assert names is not None
    assert len(names) == 100
    modes = Counter(decode(image).mode for split in splits.values() for image in split.images(np.arange(len(split))))
    assert modes == {"RGB": 98, "L": 2}
    train = splits["train"]
    for position in (0, 40, 79):  # the label is that of the folder the image lies in
        assert names[train.labels[position]] == Path(train.image(position)["path"]).parent.name


def test_images_in_a_flat_folder(write_folder: Write):
    splits, names = open_source(str(write_folder("flat", *(f"{number}.png" for number in range(20)))))
    assert counts(splits) == [16, 2, 2]
    assert names is None
    assert set(splits["train"].labels) == {-1}
    assert set.union(*map(paths, splits.values())) == {f"{number}.png" for number in range(20)}


def test_images_in_class_folders(write_folder: Write):
    files = [f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(10)]
    splits, names = open_source(str(write_folder("animals", *files)))
    assert counts(splits) == [16, 2, 2]
    assert names == ["cat", "dog"]
    assert Counter(np.concatenate([split.labels for split in splits.values()]).tolist()) == {0: 10, 1: 10}


@pytest.mark.parametrize("validation", ["val", "valid", "validation", "dev", "Validation"])
def test_split_folders(write_folder: Write, validation: str):
    files = [f"{split}/{kind}/{split}{i}.png" for split in ("train", validation) for kind in "ab" for i in range(10)]
    splits, names = open_source(str(write_folder("splits", *files)))
    assert counts(splits) == [18, 20, 2]
    assert names == ["a", "b"]
    assert paths(splits["validation"]) == {f"{validation}{number}.png" for number in range(10)}


def test_names_of_splits_within_names_of_images_hide_no_image(write_folder: Write):
    """`datasets` alone would take the one file whose name has the word, and silently leave the others out."""
    files = [f"{number}.png" for number in range(17)] + ["train-station.png", "test_1.png", "my val 2.png"]
    splits, _ = open_source(str(write_folder("named", *files)))
    assert sum(counts(splits)) == 20
    assert set.union(*map(paths, splits.values())) == set(files)


def test_a_class_may_be_called_train(write_folder: Write):
    files = [f"{kind}/{number}.png" for kind in ("bus", "car", "train") for number in range(10)]
    splits, names = open_source(str(write_folder("vehicles", *files)))
    assert sum(counts(splits)) == 30
    assert names == ["bus", "car", "train"]


def test_other_splits_are_left_aside(write_folder: Write):
    files = [f"{split}/{number}.png" for split in ("train", "test", "unlabeled") for number in range(10)]
    splits, _ = open_source(str(write_folder("stl", *files)))
    assert counts(splits) == [9, 1, 10]


def test_other_files_between_the_images(write_folder: Write):
    folder = write_folder("mixed", *(f"{number}.PNG" for number in range(10)))
    (folder / "readme.txt").write_text("my images")
    (folder / ".hidden").write_text("")
    assert counts(open_source(str(folder))[0]) == [8, 1, 1]


def test_changes_in_a_folder_are_seen(write_folder: Write, picture: Callable[..., bytes]):
    folder = write_folder("growing", *(f"{number}.png" for number in range(10)))
    assert sum(counts(open_source(str(folder))[0])) == 10
    (folder / "10.png").write_bytes(picture(10))
    assert sum(counts(open_source(str(folder))[0])) == 11


def test_metadata_beside_the_images(write_folder: Write):
    folder = write_folder("described", *(f"{number}.png" for number in range(10)))
    lines = "".join(f"{number}.png,{'odd' if number % 2 else 'even'}\n" for number in range(10))
    (folder / "metadata.csv").write_text("file_name,kind\n" + lines)
    splits, names = open_source(str(folder), label_column="kind")
    assert names == ["even", "odd"]
    for split in splits.values():
        for position, label in enumerate(split.labels):
            assert int(Path(split.image(position)["path"]).stem) % 2 == label


def test_tars_of_images(tmp_path: Path, picture: Callable[..., bytes]):
    with tarfile.open(tmp_path / "images-0000.tar", "w") as tar:
        for number in range(10):
            for name, content in ((f"{number}.png", picture(number)), (f"{number}.cls", str(number % 2).encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    splits, names = open_source(str(tmp_path), label_column="cls")
    assert counts(splits) == [8, 1, 1]
    assert names == ["0", "1"]


@pytest.fixture
def columns(picture: Callable[..., bytes]) -> dict[str, list[object]]:
    """Twenty images, whose number is in all other columns."""
    return {
        "image": [{"bytes": picture(number), "path": None} for number in range(20)],
        "word": [f"kind {number % 3}" for number in range(20)],
        "number": [10 * (number % 3) for number in range(20)],
        "half": [number % 3 / 2 for number in range(20)],
        "list": [[number] for number in range(20)],
    }


def test_parquet_without_labels(write_parquet: Write, columns: dict[str, list[object]]):
    """Records of encoded images are known as such without the Hub's types."""
    file = write_parquet("plain/data.parquet", {"image": columns["image"]})
    for source in (file, file.parent):
        splits, names = open_source(str(source))
        assert counts(splits) == [16, 2, 2]
        assert names is None
        np.testing.assert_array_equal(splits["train"].labels, [-1] * 16)


@pytest.mark.parametrize(
    ("column", "expected"), [("word", ["kind 0", "kind 1", "kind 2"]), ("number", ["0", "10", "20"])]
)
def test_words_and_numbers_as_labels(
    write_parquet: Write, columns: dict[str, list[object]], column: str, expected: list[str]
):
    columns[column][5] = None
    source = str(write_parquet("a.parquet", columns))
    splits, names = open_source(source, label_column=column)
    assert names == expected
    for split in splits.values():
        for row, label in zip(split.indices, split.labels, strict=True):
            assert label == (-1 if row == 5 else row % 3)
    splits, names = open_source(source)  # not found by type: they may be anything
    assert names is None


def test_numbers_are_sorted_as_numbers(write_parquet: Write, columns: dict[str, list[object]]):
    columns["number"] = [(9, 10, 100, -1)[row % 4] for row in range(20)]
    _, names = open_source(str(write_parquet("a.parquet", columns)), label_column="number")
    assert names == ["-1", "9", "10", "100"]


def test_a_class_that_only_the_test_split_has(write_parquet: Write, columns: dict[str, list[object]]):
    file = write_parquet("sets/train.parquet", columns)
    columns["word"] = ["a new kind"] * 20
    write_parquet("sets/test.parquet", columns)
    splits, names = open_source(str(file.parent), label_column="word")
    assert names == ["a new kind", "kind 0", "kind 1", "kind 2"]
    assert counts(splits) == [18, 2, 20]
    assert set(splits["test"].labels) == {0}


def test_typed_labels_are_found_and_can_be_ignored(write_parquet: Write, columns: dict[str, list[object]]):
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = {"image": columns["image"], "kind": [*([0, 1, 2] * 6), None, -1]}
    source = str(write_parquet("a.parquet", rows, features))
    splits, names = open_source(source)
    assert names == ["a", "b", "c"]
    for split in splits.values():
        np.testing.assert_array_equal(split.labels, np.where(split.indices < 18, split.indices % 3, -1))
    splits, names = open_source(source, label_column="none")
    assert names is None
    assert set(splits["train"].labels) == {-1}


@pytest.fixture
def two_images(write_parquet: Write, columns: dict[str, list[object]], picture: Callable[..., bytes]) -> str:
    """An image column and one of masks that do not decode; the last image is missing."""
    rows = {"photo": [*columns["image"][:-1], None], "mask": [{"bytes": b"damaged", "path": None}] * 20}
    features = datasets.Features({"photo": datasets.Image(), "mask": datasets.Image()})
    return str(write_parquet("two.parquet", rows, features))


def test_two_image_columns_are_named(two_images: str):
    with pytest.raises(InputError, match=r"several image columns \(photo, mask\); name one with --image-column"):
        open_source(two_images)


def test_the_other_image_column_is_not_even_read(two_images: str):
    splits, _ = open_source(two_images, image_column="photo")
    for split in splits.values():
        for position, image in enumerate(split.images(np.arange(len(split)))):
            last = split.indices[position] == 19
            assert split.name_of(position) == f"row {split.indices[position]}"
            assert (image is None) == last
            if last:
                with pytest.raises(InputError, match="no image here"):
                    decode(image)
            else:
                assert decode(image).size == (6, 6)


def test_named_columns(write_parquet: Write, columns: dict[str, list[object]], picture: Callable[..., bytes]):
    encoded = {"jpeg": [picture(number) for number in range(20)], "word": columns["word"]}
    source = str(write_parquet("a.parquet", encoded))
    with pytest.raises(InputError, match="has no image column; name one with --image-column from: jpeg, word"):
        open_source(source)
    splits, names = open_source(source, image_column="jpeg", label_column="word")
    assert decode(splits["test"].image(0)).size == (6, 6)
    assert names == ["kind 0", "kind 1", "kind 2"]


def test_near_misses_and_columns_of_the_wrong_kind(write_parquet: Write, columns: dict[str, list[object]]):
    source = str(write_parquet("a.parquet", columns))
    for arguments, message in (
        ({"image_column": "imgae"}, "has no column 'imgae'; did you mean 'image'?"),
        ({"image_column": "photo"}, "choose from: half, image, list, number, word"),
        ({"label_column": "wrod"}, "has no column 'wrod'; did you mean 'word'?"),
        ({"label_column": "nonne"}, "did you mean 'none'?"),
        ({"image_column": "number"}, "column 'number' of"),
        ({"image_column": "list"}, "not images"),
        ({"label_column": "half"}, "classes are integers or strings"),
        ({"label_column": "list"}, "classes are integers or strings"),
        ({"label_column": "image"}, "classes are integers or strings"),
    ):
        with pytest.raises(InputError) as caught:
            open_source(source, **arguments)
        assert message in str(caught.value)


def test_a_split_without_the_labels(write_parquet: Write, columns: dict[str, list[object]]):
    write_parquet("sets/train.parquet", {"image": columns["image"], "word": columns["word"]})
    folder = write_parquet("sets/test.parquet", {"image": columns["image"]}).parent
    splits, names = open_source(str(folder), label_column="word")
    assert names == ["kind 0", "kind 1", "kind 2"]
    assert set(splits["train"].labels) == {0, 1, 2}
    assert set(splits["test"].labels) == {-1}


def test_existing_splits_are_kept(cifar_subset: Path):
    splits, _ = open_source(str(cifar_subset))
    assert counts(splits) == [600, 100, 300]
    for split in splits.values():
        np.testing.assert_array_equal(split.indices, np.arange(len(split)))


def test_splits_are_drawn_by_seed_disjoint_and_complete():
    first, again, other = (open_source("digits", seed=seed, held_out=0.2)[0] for seed in (3, 3, 4))
    assert counts(first) == [1079, 359, 359]
    for name, split in first.items():
        np.testing.assert_array_equal(split.indices, again[name].indices)
        np.testing.assert_array_equal(split.labels, again[name].labels)
    assert set(first["test"].indices) != set(other["test"].indices)
    together = np.concatenate([split.indices for split in first.values()])
    np.testing.assert_array_equal(np.sort(together), np.arange(1797))
    for split in first.values():
        assert len(np.unique(split.labels)) == 10


def test_labels_and_images_stay_together():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    for split in open_source("digits")[0].values():
        np.testing.assert_array_equal(split.labels, bunch.target[split.indices])
        chosen = np.array([5, 0, 179])
        for position, image in zip(chosen, split.images(chosen), strict=True):
            expected = np.round(bunch.images[split.indices[position]] * (255 / 16))
            np.testing.assert_array_equal(np.asarray(decode(image)), expected)
            np.testing.assert_array_equal(np.asarray(decode(split.image(position))), expected)


def test_images_are_read_in_order_across_slices():
    train = open_source("digits")[0]["train"]
    positions = np.random.default_rng(0).permutation(len(train))[:600]
    for position, image in zip(positions, train.images(positions), strict=True):
        assert image == train.image(position)


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("nowhere", {}, "no folder or file"),
        ("", {}, "is an empty folder; there are no images in it"),
        ("", {"sub/sub/": None}, "its files are not readable as images"),
        ("", {"a.txt": "x"}, "has no image column"),
        ("a.csv", {"a.csv": "x"}, "is a .csv file; give a folder of images or a .parquet"),
        ("a", {"a": "x"}, "is a nameless file; give a folder of images or a .parquet"),
        ("a.parquet", {"a.parquet": "x"}, "its files are not readable as images (Parquet"),
        ("a[1]", {"a[1]/a.png": "x"}, "rename it"),
    ],
)
def test_sources_that_are_none(tmp_path: Path, source: str, content: dict[str, str | None], message: str):
    for name, text in content.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        open_source(str(tmp_path / source))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_few_images_to_hold_some_out(write_folder: Write):
    folder = write_folder("few", "1.png", "2.png")
    with pytest.raises(InputError, match="2 training images: too few to hold 1 out for validation and test"):
        open_source(str(folder))
    Image.new("RGB", (2, 2)).save(folder / "3.png")
    assert counts(open_source(str(folder))[0]) == [1, 1, 1]


def test_an_empty_set(write_parquet: Write):
    features = datasets.Features({"image": datasets.Image()})
    with pytest.raises(InputError, match=r"is empty|not readable as images"):
        open_source(str(write_parquet("a.parquet", {"image": []}, features)))


def test_no_training_split(write_parquet: Write, columns: dict[str, list[object]]):
    write_parquet("sets/test.parquet", columns)
    folder = write_parquet("sets/validation.parquet", columns).parent
    with pytest.raises(InputError, match="has no training split, only: "):
        open_source(str(folder))


@pytest.mark.parametrize("source", ["no-such-set", "nobody/no-such-set", "nobody/no-such-set:plain", "my photographs"])
def test_a_hub_id_without_the_hub(monkeypatch: pytest.MonkeyPatch, source: str):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="no such folder here and no such data set within reach of the Hub") as caught:
        open_source(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["a/b/c", "https://example.org/images"])
def test_what_is_neither_a_path_nor_a_hub_id(source: str):
    with pytest.raises(InputError, match="no folder or file"):
        open_source(source)


def test_a_silent_network_is_given_up_soon():
    """A server that takes connections and never answers: `load_dataset` alone tries it six times."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
        environment = {key: value for key, value in os.environ.items() if key not in offline}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_ETAG_TIMEOUT": "1"}
        program = (
            "import time, datasets, huggingface_hub\n"
            "from igpt.data.sources import open_source\n"
            "start = time.monotonic()\n"
            "try: open_source('nobody/no-such-set')\n"
            "except ValueError as error: print(time.monotonic() - start, error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True
        )
    seconds, message = done.stdout.split(" ", 1)
    assert "within reach of the Hub" in message
    assert 0.9 < float(seconds) < 15
