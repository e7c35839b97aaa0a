import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt.data.images.palette import Palette
from igpt.data.prepare import PrepareConfig, prepare
from igpt.data.tokens.dataset import TokenDataset
from igpt.data.tokens.inspect import inspect, sheet
from igpt.data.tokens.manifest import write_manifest, write_shard
from igpt.errors import InputError

Run = Callable[..., object]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Write images of 2 px in a palette of four colours: 5 + 2 + 1, one of them without a label."""
    folder = tmp_path / "small"
    folder.mkdir()
    tokens = {
        "train": [[0, 0, 0, 1], [1, 1, 1, 1], [2, 2, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]],
        "validation": [[3, 3, 3, 3], [0, 0, 0, 0]],
        "test": [[1, 2, 3, 0]],
    }
    labels = {"train": [0, 1, 1, -1, 1], "validation": [0, 1], "test": [0]}
    shards = {}
    for split, rows in tokens.items():
        cut = 3 if split == "train" else len(rows)  # two shards of training images
        parts = [slice(0, cut), slice(cut, None)] if cut < len(rows) else [slice(0, None)]
        shards[split] = [
            write_shard(
                folder,
                f"{split}-{number:05d}",
                np.array(rows[part], np.uint16),
                np.array(labels[split][part], np.int32),
            )
            for number, part in enumerate(parts)
        ]
    write_manifest(
        folder,
        resolution=2,
        palette=Palette.from_centers([[-1, -1, -1], [1, -1, -1], [-1, 1, -1], [1, 1, 1]]),
        class_names=["cat", "dog"],
        splits=shards,
        source="somewhere",
        made={"config": {"size": 2}, "palette_error": {}, "skipped": ["train row 9: empty"]},
    )
    return folder


def test_the_statistics_of_a_data_set(small: Path):
    steps: list[tuple[int, int]] = []
    found = inspect(TokenDataset(small), lambda *counts: steps.append(counts))
    assert found["splits"] == {
        "train": {"images": 5, "unlabelled": 1, "per_class": {"cat": 1, "dog": 3}},
        "validation": {"images": 2, "unlabelled": 0, "per_class": {"cat": 1, "dog": 1}},
        "test": {"images": 1, "unlabelled": 0, "per_class": {"cat": 1, "dog": 0}},
    }
    assert found["color_share"] == [0.55, 0.35, 0.1, 0.0]  # of the twenty training pixels
    assert (found["resolution"], found["colors"], found["shards"], found["source"]) == (
        2,
        4,
        4,
        "somewhere",
    )
    assert found["bytes"] == sum(file.stat().st_size for file in small.glob("*.npy"))
    assert steps[-1] == (8, 8)


def test_every_damaged_file_is_named(small: Path):
    for name in ("train-00001.tokens.npy", "test-00000.labels.npy"):
        good = (small / name).read_bytes()
        (small / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(
        InputError,
        match=r"2 of 8 files of .* \(train-00001\.tokens\.npy, test-00000\.labels\.npy\)",
    ):
        inspect(TokenDataset(small))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "tokens",
            4,
            r"validation-00000\.tokens\.npy holds the token 4, and the palette has 4 colours",
        ),
        ("tokens", 65535, r"validation-00000\.tokens\.npy holds the token 65535"),
        ("labels", 2, r"validation-00000\.labels\.npy holds the label 2, and there are 2 classes"),
        ("labels", -2, r"validation-00000\.labels\.npy holds the label -2"),
    ],
)
def test_impossible_values_are_refused(small: Path, name: str, value: int, message: str):
    """Files with correct checksums and invalid contents, as another tool might have written
    them."""
    manifest = json.loads((small / "dataset.json").read_text())
    tokens, labels = (
        np.load(small / f"validation-00000.{kind}.npy") for kind in ("tokens", "labels")
    )
    {"tokens": tokens, "labels": labels}[name].flat[0] = value
    manifest["splits"]["validation"]["shards"] = [
        vars(write_shard(small, "validation-00000", tokens, labels))
    ]
    (small / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=message):
        inspect(TokenDataset(small))


def test_the_sheet_has_a_row_for_each_class(small: Path):
    picture = np.asarray(sheet(TokenDataset(small)))
    height = 64 + 2
    margin = picture.shape[1] - (3 * height + 2)  # three dogs are the longest row
    assert picture.shape[0] == 2 * height + 2
    row = picture[
        2 + 16 :: height, margin + 2 + 16 :: height
    ]  # the upper left pixel of each picture
    assert row[0, 0].tolist() == [0, 0, 0]
    assert row[1].tolist() == [[255, 0, 0], [0, 255, 0], [255, 0, 0]]
    assert (picture[: 2 * height, : margin - 8] < 128).any()  # class names are drawn


def test_without_labels_the_sheet_is_a_random_selection(tmp_path: Path):
    data = prepare("digits", tmp_path / "digits", PrepareConfig(size=8, label_column="none"))
    picture = sheet(data)
    assert picture.size == (12 * 66 + 2, 10 * 66 + 2)
    assert inspect(data)["splits"]["train"] == {"images": 1437, "unlabelled": 1437, "per_class": {}}


def test_the_command(igpt: Run, small: Path, tmp_path: Path):
    done = igpt("inspect", small)
    assert done.returncode == 0, done.stderr
    for line in (
        "2 px, 4 colours",
        "in 4 shards, all intact",
        "train: 5 images, 1 without a label",
        "  dog: 3, 1, 0",
        "3 of 4 colours occur in training, the most frequent in 55.0% of the pixels",
        "left out: images that do not decode: 1 (first: train row 9: empty)",
    ):
        assert line in done.stdout
    assert Image.open(tmp_path / "small.png").size[1] == 2 * 66 + 2
    assert json.loads((tmp_path / "small.json").read_text())["splits"]["train"]["per_class"] == {
        "cat": 1,
        "dog": 3,
    }
    done = igpt("inspect", small, "-o", tmp_path / "sheet.jpg")
    assert (done.returncode, done.stderr) == (
        2,
        "igpt inspect: images are written as .png, not as sheet.jpg\n",
    )
    (small / "train-00000.tokens.npy").unlink()
    done = igpt("inspect", small, "-o", tmp_path / "other.png")
    assert done.returncode == 2
    assert "train-00000.tokens.npy is missing" in done.stderr
    assert not (tmp_path / "other.png").exists()
