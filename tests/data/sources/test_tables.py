"""Parquet, Arrow and data sets saved by `datasets`: every row has its image and label, and only the
needed bytes are read."""

import io
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from igpt.data.images.decode import open_image
from igpt.data.sources.catalogue import SourceConfig, open_source
from igpt.data.sources.readers import ParquetRows
from igpt.errors import InputError

from ...helpers.reading import counts, labels, refusal, whole
from ...helpers.sample_images import CIFAR10_CLASSES, ImageSets

Write = Callable[..., Path]
Picture = Callable[..., bytes]


def test_cifar10(image_sets: ImageSets):
    """The columns `img` and `label` are found by their types."""
    train, test = (50000, 10000) if image_sets.real else (200, 1000)
    splits, names, *_ = open_source(str(image_sets.cifar10))
    assert counts(splits) == [train * 9 // 10, train // 10, test]
    assert names == CIFAR10_CLASSES
    assert np.bincount(labels(splits["test"])).tolist() == [test // 10] * 10
    assert (
        np.bincount(labels(splits["train"]) + labels(splits["validation"])).tolist()
        == [train // 10] * 10
    )
    image, _ = next(splits["test"].read(np.array([test - 1])))
    assert open_image(image).size == (32, 32)
    both = np.concatenate([splits["train"].indices, splits["validation"].indices])
    np.testing.assert_array_equal(np.sort(both), np.arange(train))


def test_tiny_imagenet_in_two_shards(image_sets: ImageSets):
    """There is only a training split: validation and test images are held out of it, from both
    files."""
    images, classes = (100000, 200) if image_sets.real else (100, 20)
    splits, names, *_ = open_source(str(image_sets.tiny_imagenet))
    assert counts(splits) == [images * 8 // 10, images // 10, images // 10]
    assert names is not None
    assert len(names) == classes
    shards = sorted(image_sets.tiny_imagenet.rglob("*.parquet"))
    expected = [label for shard in shards for label in pq.read_table(shard)["label"].to_pylist()]
    for split in splits.values():
        assert labels(split) == [expected[row] for row in split.indices]
    reader = splits["train"].reader
    first_of_second = pq.read_metadata(shards[0]).num_rows
    (image, _), (other, _) = reader.read(np.array([first_of_second - 1, first_of_second]))
    assert open_image(image).size == open_image(other).size == (32, 32)
    assert reader.name_of(first_of_second) == "train-00001-of-00002.parquet row 0"


@pytest.fixture
def columns(picture: Picture) -> dict[str, list[Any]]:
    """Return twenty images, whose number is in all other columns."""
    return {
        "image": [{"bytes": picture(number), "path": None} for number in range(20)],
        "word": [f"kind {number % 3}" for number in range(20)],
        "number": [10 * (number % 3) for number in range(20)],
        "half": [number % 3 / 2 for number in range(20)],
        "list": [[number] for number in range(20)],
    }


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    """Write 90 + 1 + 0 + 409 rows in four files, in row groups of 7 and of 300; the images are only
    recognizable by their type."""
    rows = [
        {"bytes": random.Random(row).randbytes(row % 5 * 300), "path": f"{row}.png"}
        for row in range(500)
    ]
    table = pa.table(
        {
            "image": rows,
            "other": [b"x" * 100] * 500,
            "kind": [None if row % 7 == 3 else row % 13 for row in range(500)],
        }
    )
    (tmp_path / "set" / "data").mkdir(parents=True)
    for number, (first, last, group) in enumerate(
        ((0, 90, 7), (90, 91, 7), (91, 91, 7), (91, 500, 300))
    ):
        part = table.slice(first, last - first)
        pq.write_table(
            part,
            tmp_path / "set" / "data" / f"train-{number:05d}-of-00004.parquet",
            row_group_size=group,
        )
    return tmp_path / "set"


def test_any_rows_across_files_and_row_groups(pieces: Path):
    expected = pa.concat_tables(
        pq.read_table(file) for file in sorted(pieces.rglob("*.parquet"))
    ).to_pylist()
    splits, names, *_ = open_source(str(pieces), SourceConfig(label_column="kind"))
    reader = splits["train"].reader
    assert isinstance(reader, ParquetRows)
    assert len(reader) == 500
    assert names == [str(number) for number in range(13)]
    generator = np.random.default_rng(0)
    choices = [
        np.flatnonzero(generator.random(500) < share)
        for share in (0.01, 0.05, 0.3, 0.7, 1)
        for _ in range(6)
    ]
    for rows in [
        *choices,
        np.array([0]),
        np.array([499]),
        np.array([6, 7]),
        np.array([89, 90, 91]),
        np.array([], int),
    ]:
        found = list(reader.read(rows))
        assert [image for image, _ in found] == [expected[row]["image"] for row in rows]
        assert [None if label < 0 else label for _, label in found] == [
            expected[row]["kind"] for row in rows
        ]
    assert reader.name_of(89) == "train-00000-of-00004.parquet row 89 (89.png)"
    assert reader.name_of(93) == "train-00003-of-00004.parquet row 2 (93.png)"
    for split in splits.values():
        assert [image["path"] for image, _ in split.read(np.arange(len(split)))] == [
            f"{row}.png" for row in split.indices
        ]


def test_parquet_is_read_in_place(pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for source in (pieces, pieces / "data", pieces / "data" / "train-00000-of-00004.parquet"):
        assert whole(source, label_column="kind")[0]
    assert sum(path.stat().st_size for path in tmp_path.rglob("cache/**/*") if path.is_file()) == 0


def test_only_the_row_groups_with_wanted_rows_are_read(pieces: Path):
    """Damaged or missing bytes elsewhere are not noticed."""
    reader = open_source(str(pieces))[0]["train"].reader
    first, *_, last = sorted(pieces.rglob("*.parquet"))
    wanted = np.array([14, 20, 84, 89])
    expected = list(reader.read(wanted))
    last.unlink()
    data = bytearray(first.read_bytes())
    chunks = [pq.ParquetFile(first).metadata.row_group(group).column(0) for group in (5, 12)]
    begin, end = (chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks)
    data[begin:end] = bytes(end - begin)
    first.write_bytes(data)
    assert list(reader.read(wanted)) == expected
    with pytest.raises(InputError, match="is not readable as Parquet") as caught:
        list(reader.read(np.array([14, 40])))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="is not readable as Parquet"):
        list(reader.read(np.array([14, 400])))


def test_a_large_row_group_is_not_read_into_memory(tmp_path: Path):
    rows = [{"bytes": random.Random(row).randbytes(50_000), "path": None} for row in range(1500)]
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": rows}), file, row_group_size=1500)
    assert file.stat().st_size > 70e6
    reader = open_source(str(file))[0]["train"].reader
    tracemalloc.start()
    for row, (image, _) in enumerate(reader.read(np.arange(1500))):
        assert image == rows[row]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 45e6  # 256 rows, and twice the buffer


def test_images_as_bytes_records_and_paths(tmp_path: Path, write_parquet: Write, picture: Picture):
    contents = [picture(number) for number in range(20)]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.png").write_bytes(content)
    kinds = {
        "plain": pa.array(contents, pa.binary()),
        "large": pa.array(contents, pa.large_binary()),
        "record": pa.array([{"bytes": content, "path": None} for content in contents]),
        "turned": pa.array([{"path": "a.png", "bytes": content} for content in contents]),
        "elsewhere": pa.array(
            [{"bytes": None, "path": str(tmp_path / f"{number}.png")} for number in range(20)]
        ),
        "path": pa.array([str(tmp_path / f"{number}.png") for number in range(20)]),
    }
    file = write_parquet("a.parquet", kinds)
    arrow = datasets.Dataset.from_parquet(str(file))
    arrow.save_to_disk(tmp_path / "saved")
    for source in (file, tmp_path / "saved"):
        for column in kinds:
            found, _ = whole(source, image_column=column)
            for content, (image, label) in zip(contents, found, strict=True):
                assert open_image(image).tobytes() == Image.open(io.BytesIO(content)).tobytes()
                assert label == -1


def test_columns_without_labels(write_parquet: Write, columns: dict[str, list[Any]]):
    """Records of encoded images are recognized without the Hub's types."""
    file = write_parquet("plain/data.parquet", {"image": columns["image"]})
    for source in (file, file.parent):
        assert counts(open_source(str(source))[0]) == [16, 2, 2]
        found, names = whole(source)
        assert names is None
        assert found == [(image, -1) for image in columns["image"]]


def test_files_of_one_split_with_different_columns(
    write_parquet: Write, columns: dict[str, list[Any]]
):
    def typed(*names: str) -> datasets.Features:
        return datasets.Features(
            {"image": datasets.Image(), "kind": datasets.ClassLabel(names=list(names))}
        )

    rows = {"image": columns["image"], "kind": [0, 1] * 10}
    write_parquet("set/a.parquet", rows, typed("x", "y"))
    folder = write_parquet("set/b.parquet", rows, typed("x", "y")).parent
    assert [label for _, label in whole(folder)[0]] == [0, 1] * 20
    for file, features in (
        ({"image": columns["image"]}, None),
        (rows, typed("y", "x")),
        (columns, None),
    ):
        write_parquet("set/b.parquet", file, features)
        message = refusal(folder)
        assert "b.parquet has other columns than" in message
        assert "or other class names: image" in message


@pytest.fixture
def two_images(write_parquet: Write, columns: dict[str, list[Any]]) -> str:
    """Return an image column and one of masks that do not decode; the last image is missing."""
    rows = {
        "photo": [*columns["image"][:-1], None],
        "mask": [{"bytes": b"damaged", "path": None}] * 20,
    }
    features = datasets.Features({"photo": datasets.Image(), "mask": datasets.Image()})
    return str(write_parquet("two.parquet", rows, features))


def test_two_image_columns_are_named(two_images: str):
    assert "several image columns (photo, mask); name one with --image-column" in refusal(
        two_images
    )


def test_a_missing_image_is_a_bad_image(two_images: str):
    splits, *_ = open_source(two_images, SourceConfig(image_column="photo"))
    for split in splits.values():
        for row, (image, _) in zip(split.indices, split.read(np.arange(len(split))), strict=True):
            assert split.reader.name_of(row) == f"two.parquet row {row}"
            if row == 19:
                with pytest.raises(InputError, match="no image here"):
                    open_image(image)
            else:
                assert open_image(image).size == (6, 6)


def test_misspelled_columns_and_columns_of_the_wrong_type(
    write_parquet: Write, columns: dict[str, list[Any]]
):
    source = write_parquet("a.parquet", columns)
    for settings, message in (
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
        assert message in refusal(source, **settings)
    source = write_parquet("b.parquet", {"jpeg": [b"x"], "word": ["a"]})
    assert "has no image column; name one with --image-column from: jpeg, word" in refusal(source)


def test_a_damaged_parquet_file(pieces: Path):
    last = sorted(pieces.rglob("*.parquet"))[-1]
    content = last.read_bytes()
    for damaged in (
        content[:-1],
        content[: len(content) // 2],
        b"",
        b"PAR1",
        content[:-100] + bytes(92) + content[-8:],
    ):
        last.write_bytes(damaged)
        for source in (last, pieces):
            assert f"{last} is not readable as Parquet" in refusal(source)


def test_names_with_brackets(write_parquet: Write, columns: dict[str, list[Any]]):
    assert len(whole(write_parquet("a [1] *.parquet", {"image": columns["image"]}))[0]) == 20


def test_data_sets_saved_by_datasets(tmp_path: Path, columns: dict[str, list[Any]]):
    features = datasets.Features(
        {"image": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = datasets.Dataset.from_dict(
        {"image": columns["image"], "kind": [0, 1] * 10}, features=features
    )
    rows.save_to_disk(tmp_path / "one", num_shards=3)
    found, names = whole(tmp_path / "one")
    assert names == ["a", "b"]
    assert found == [(image, row % 2) for row, image in enumerate(columns["image"])]
    parts = {"train": rows.select(range(12)), "test": rows.select(range(12, 20))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "several")
    splits, names, *_ = open_source(str(tmp_path / "several"))
    assert names == ["a", "b"]
    assert counts(splits) == [11, 1, 8]
    assert list(splits["test"].read(np.arange(8))) == found[12:]
    (arrow, *_) = sorted((tmp_path / "several" / "train").glob("*.arrow"))
    assert whole(arrow) == (found[:12], ["a", "b"])


@pytest.mark.parametrize(
    ("values", "names"),
    [(["cat", "dog"], ["cat", "dog"]), ([10, 9], ["9", "10"]), ([True, False], ["False", "True"])],
)
def test_a_column_called_label_has_the_classes(
    write_parquet: Write, columns: dict[str, list[Any]], values: list[object], names: list[str]
):
    rows = {"image": columns["image"], "label": values * 10, "text": ["hello"] * 20}
    source = write_parquet("labelled.parquet", rows)
    found, classes = whole(source)
    assert classes == names
    assert [classes[label] for _, label in found] == list(map(str, values)) * 10
    opened = open_source(str(source))
    assert (opened.notes, opened.left_out.text()) == ([], "columns: 1 (text)")


def test_columns_of_which_none_has_classes_are_named(
    write_parquet: Write, columns: dict[str, list[Any]]
):
    source = write_parquet("others.parquet", columns)
    note = f"no labels: {source} has the columns word, number, half, list; --label-column names one"
    assert open_source(str(source)).notes == [note]
    assert open_source(str(source), SourceConfig(label_column="none")).notes == []
    rows = {"image": columns["image"], "label": columns["half"]}
    opened = open_source(str(write_parquet("fractions.parquet", rows)))
    assert opened.class_names is None
    assert opened.notes[0].endswith(
        "fractions.parquet has the columns label; --label-column names one"
    )
