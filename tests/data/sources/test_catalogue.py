"""Any source: how it is recognized, which splits it has, and how images are held out."""

import io
import os
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from igpt.data.images.decode import open_image
from igpt.data.sources.catalogue import SourceConfig, Split, open_source
from igpt.errors import InputError

from ...helpers.reading import connections, counts, labels

Write = Callable[..., Path]


def test_digits():
    splits, names, *_ = open_source("digits")
    assert counts(splits) == [1437, 180, 180]
    assert names == list("0123456789")
    image, _ = next(splits["train"].read(np.array([0])))
    assert (open_image(image).mode, open_image(image).size) == ("L", (8, 8))
    found = [label for split in splits.values() for label in labels(split)]
    assert np.bincount(found).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_existing_splits_are_kept(three_splits: Path):
    splits, *_ = open_source(str(three_splits))
    assert counts(splits) == [600, 100, 300]
    for split in splits.values():
        np.testing.assert_array_equal(split.indices, np.arange(len(split)))


def test_held_out_splits_are_seeded_disjoint_and_complete():
    first, again, other = (
        open_source("digits", SourceConfig(seed=seed, held_out=0.2))[0] for seed in (3, 3, 4)
    )
    assert counts(first) == [1079, 359, 359]
    for name, split in first.items():
        np.testing.assert_array_equal(split.indices, again[name].indices)
        assert labels(split) == labels(again[name])
        assert set(labels(split)) == set(range(10))
    assert set(first["test"].indices) != set(other["test"].indices)
    together = np.concatenate([split.indices for split in first.values()])
    np.testing.assert_array_equal(np.sort(together), np.arange(1797))


def test_the_share_of_imagenet_is_held_out():
    """Hold out 4 % for validation (paper, section 3.1), and as many if there is no test split."""
    splits, *_ = open_source("digits", SourceConfig(held_out=0.04))
    assert counts(splits) == [1797 - 2 * 72, 72, 72]
    again, *_ = open_source("digits", SourceConfig(held_out=0.04))
    for name, split in splits.items():
        assert (np.diff(split.indices) > 0).all()
        np.testing.assert_array_equal(split.indices, again[name].indices)


def test_labels_and_images_stay_together():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    for split in open_source("digits")[0].values():
        assert labels(split) == bunch.target[split.indices].tolist()
        chosen = np.array([0, 5, 179])
        for position, (image, label) in zip(chosen, split.read(chosen), strict=True):
            row = split.indices[position]
            np.testing.assert_array_equal(
                np.asarray(open_image(image)), np.round(bunch.images[row] * (255 / 16))
            )
            assert label == bunch.target[row]


def test_images_are_read_in_order_across_slices():
    train = open_source("digits")[0]["train"]
    positions = np.sort(np.random.default_rng(0).permutation(len(train))[:600])
    for position, read in zip(positions, train.read(positions), strict=True):
        assert read == next(train.read(np.array([position])))


@pytest.fixture(params=["parquet", "images", "tars"])
def imagenet(request: pytest.FixtureRequest, tmp_path: Path, picture: Callable[..., bytes]) -> str:
    """Return 50 training and 20 validation images of two classes, and 30 unlabelled ones; there is
    no test split.

    The least significant byte of an image's first pixel is its number.
    """

    def numbered(number: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (2, 2), (number, 0, 0)).save(buffer, "PNG")
        return buffer.getvalue()

    for split, first, last in (("train", 0, 50), ("validation", 50, 70), ("unlabeled", 70, 100)):
        numbers = range(first, last)
        if request.param == "parquet":
            features = datasets.Features(
                {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
            )
            rows = {
                "image": [{"bytes": numbered(number), "path": None} for number in numbers],
                "label": [-1 if split == "unlabeled" else number % 2 for number in numbers],
            }
            (tmp_path / "set" / "data").mkdir(parents=True, exist_ok=True)
            file = tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet"
            datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
        elif request.param == "images":
            for number in numbers:
                folder = (
                    tmp_path / "set" / split / ("" if split == "unlabeled" else "ab"[number % 2])
                )
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{number}.png").write_bytes(numbered(number))
        else:
            (tmp_path / "set").mkdir(exist_ok=True)
            with tarfile.open(tmp_path / "set" / f"{split}-0000.tar", "w") as tar:
                for number in numbers:
                    members = [("png", numbered(number))]
                    members += [] if split == "unlabeled" else [("cls", b"ab"[number % 2 :][:1])]
                    for ending, content in members:
                        entry = tarfile.TarInfo(f"{number:03d}.{ending}")
                        entry.size = len(content)
                        tar.addfile(entry, io.BytesIO(content))
    return str(tmp_path / "set")


def read(split: Split) -> dict[int, int]:
    """Return the label of each image, by the image's number."""
    return {
        open_image(image).getpixel((0, 0))[0]: label
        for image, label in split.read(np.arange(len(split)))
    }


def test_the_validation_split_may_also_be_the_test_split(imagenet: str):
    splits, names, *_ = open_source(imagenet, SourceConfig(test_split="validation", held_out=0.04))
    assert counts(splits) == [48, 2, 20]
    assert names == ["a", "b"]
    assert read(splits["test"]) == {number: number % 2 for number in range(50, 70)}
    train, validation = read(splits["train"]), read(splits["validation"])
    assert train | validation == {number: number % 2 for number in range(50)}
    assert not train.keys() & validation.keys()


def test_splits_may_be_chosen_by_the_names_of_the_source(imagenet: str):
    splits, *_ = open_source(imagenet)
    assert counts(splits) == [45, 20, 5]
    assert read(splits["validation"]).keys() == set(range(50, 70))
    splits, *_ = open_source(imagenet, SourceConfig(train_split="unlabeled", label_column="none"))
    assert counts(splits) == [27, 20, 3]
    assert read(splits["train"]) | read(splits["test"]) == dict.fromkeys(range(70, 100), -1)
    splits, *_ = open_source(
        imagenet,
        SourceConfig(train_split="validation", validation_split="train", label_column="none"),
    )
    assert counts(splits) == [18, 50, 2]
    assert read(splits["validation"]).keys() == set(range(50))


def test_missing_splits_are_refused(imagenet: str):
    for settings, message in (
        ({"test_split": "valdiation"}, "has no split 'valdiation'; did you mean 'validation'?"),
        (
            {"train_split": "photos"},
            "has no split 'photos'; choose from: train, unlabeled, validation",
        ),
        (
            {"test_split": "train", "train_split": "train"},
            "one split cannot be used twice: --train-split train, --test-split",
        ),
    ):
        with pytest.raises(InputError) as caught:
            open_source(imagenet, SourceConfig(**settings))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("nowhere", {}, "no folder or file"),
        ("", {}, "is an empty folder; there are no images in it"),
        ("", {"sub/sub/": None}, "is an empty folder; there are no images in it"),
        (
            "",
            {"a.txt": "x"},
            "holds no images that can be read, but files ending in .txt: 1 (first: a.txt)",
        ),
        (
            "a.csv",
            {"a.csv": "x"},
            "is a .csv file; give a folder of images or a .parquet, .arrow, .tar or .zip",
        ),
        (
            "a",
            {"a": "x"},
            "is a nameless file; give a folder of images or a .parquet, .arrow, .tar or .zip",
        ),
        (
            "a.tar.gz",
            {"a.tar.gz": "x"},
            "is not one of the archives that can be read directly; unpack a.tar.gz first",
        ),
        ("a.tar", {"a.tar": "x"}, "is not readable as an uncompressed tar"),
        ("a.parquet", {"a.parquet": "x"}, "is not readable as Parquet"),
        ("a.arrow", {"a.arrow": "x"}, "a.arrow is not readable as Arrow"),
        ("a[1]", {"a[1]/a.parquet": "x"}, "rename it"),
    ],
)
def test_paths_that_are_not_sources_are_refused(
    tmp_path: Path, source: str, content: dict[str, str | None], message: str
):
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
    with pytest.raises(
        InputError, match="2 training images: too few to hold 1 out for validation and test"
    ):
        open_source(str(folder))
    Image.new("RGB", (2, 2)).save(folder / "3.png")
    assert counts(open_source(str(folder))[0]) == [1, 1, 1]


def test_an_empty_set(write_parquet: Write):
    features = datasets.Features({"image": datasets.Image()})
    with pytest.raises(InputError, match="is empty: there is no image in its training split"):
        open_source(str(write_parquet("a.parquet", {"image": []}, features)))


def test_a_source_without_a_training_split(write_parquet: Write):
    features = datasets.Features({"image": datasets.Image()})
    folder = write_parquet("sets/test.parquet", {"image": [None] * 20}, features).parent
    write_parquet("sets/validation.parquet", {"image": [None] * 20}, features)
    with pytest.raises(
        InputError, match=r"has no training split, only: .*; --train-split names one"
    ):
        open_source(str(folder))
    assert counts(open_source(str(folder), SourceConfig(train_split="test"))[0]) == [18, 20, 2]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "source", ["no-such-set", "nobody/no-such-set", "nobody/no-such-set:plain", "my photographs"]
)
def test_a_hub_id_without_the_hub(monkeypatch: pytest.MonkeyPatch, source: str, stream: bool):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match="is neither a folder nor a data set that could be loaded from the Hub"
    ) as caught:
        open_source(source, SourceConfig(stream=stream))
    assert "\n" not in str(caught.value)


def test_a_name_that_is_neither_a_path_nor_a_hub_id():
    with pytest.raises(InputError, match="no folder or file"):
        open_source("a/b/c")


def test_a_network_without_answers_is_given_up_soon():
    """Use a server that accepts connections and never answers: `load_dataset` alone would retry six
    times."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
        environment = {key: value for key, value in os.environ.items() if key not in offline}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_ETAG_TIMEOUT": "1"}
        program = (
            "from igpt.data.sources.catalogue import open_source\n"
            "try: open_source('nobody/no-such-set')\n"
            "except ValueError as error: print(error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert 1 <= connections(server) <= 2
    assert "could be loaded from the Hub" in done.stdout
