"""Columns of classes: their choice, the numbering of their values, and agreement of the splits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from igpt.data.sources.catalogue import SourceConfig, open_source

from ...helpers.reading import counts, labels, refusal, whole

Write = Callable[..., Path]
Picture = Callable[..., bytes]


@pytest.fixture
def columns(picture: Picture) -> dict[str, list[Any]]:
    """Return twenty images, whose number is in the other columns."""
    return {
        "image": [{"bytes": picture(number), "path": None} for number in range(20)],
        "word": [f"kind {number % 3}" for number in range(20)],
        "number": [10 * (number % 3) for number in range(20)],
    }


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["b", "a", "c"], ["a", "b", "c"]),
        ([10, 9, -1], ["-1", "9", "10"]),
        (["10", "9", "100"], ["9", "10", "100"]),
        (["10", "9", "x"], ["10", "9", "x"]),
        (["1", "01", "001"], ["001", "01", "1"]),
        ([True, False, True], ["False", "True"]),
    ],
)
def test_plain_values_as_labels(
    write_parquet: Write,
    columns: dict[str, list[Any]],
    tmp_path: Path,
    values: list[Any],
    expected: list[str],
):
    columns["kind"] = [None if row % 5 == 4 else values[row % 3] for row in range(20)]
    file = write_parquet("a.parquet", columns)
    datasets.Dataset.from_dict({"image": columns["image"], "kind": columns["kind"]}).save_to_disk(
        tmp_path / "saved"
    )
    for source in (file, tmp_path / "saved"):
        found, names = whole(source, label_column="kind")
        assert names == expected
        assert [None if label < 0 else names[label] for _, label in found] == [
            None if value is None else str(value) for value in columns["kind"]
        ]
    assert whole(file)[1] is None  # not found by type: they may be anything


def test_typed_labels_are_found_and_can_be_ignored(
    write_parquet: Write, columns: dict[str, list[Any]]
):
    features = datasets.Features(
        {"image": datasets.Image(), "kind": datasets.ClassLabel(names=["b", "a", "c"])}
    )
    rows = {"image": columns["image"], "kind": [*([0, 1, 2] * 6), None, -1]}
    source = write_parquet("a.parquet", rows, features)
    found, names = whole(source)
    assert names == ["b", "a", "c"]
    assert [label for _, label in found] == [*([0, 1, 2] * 6), -1, -1]
    found, names = whole(source, label_column="none")
    assert names is None
    assert [label for _, label in found] == [-1] * 20


def test_fine_and_coarse_labels(write_parquet: Write, columns: dict[str, list[Any]]):
    """In the columns of CIFAR-100 on the Hub."""
    fine, coarse = (
        datasets.ClassLabel(names=list("abcde")),
        datasets.ClassLabel(names=["vowel", "consonant"]),
    )
    features = datasets.Features(
        {"img": datasets.Image(), "coarse_label": coarse, "fine_label": fine}
    )
    numbers = [row % 5 for row in range(20)]
    coarser = [int(number not in (0, 4)) for number in numbers]
    rows = {"img": columns["image"], "fine_label": numbers, "coarse_label": coarser}
    source = write_parquet("a.parquet", rows, features)
    for column, names, expected in (
        (None, list("abcde"), numbers),
        ("fine_label", list("abcde"), numbers),
        ("coarse_label", ["vowel", "consonant"], coarser),
    ):
        found, found_names = whole(source, label_column=column)
        assert found_names == names
        assert [label for _, label in found] == expected
    features["third"] = fine
    source = write_parquet("b.parquet", rows | {"third": numbers}, features)
    assert (
        "several label columns; name one with --label-column from: fine_label, coarse_label"
        in refusal(source)
    )


def splits_of(
    write_parquet: Write, train: dict[str, Any], test: dict[str, Any], *features: datasets.Features
) -> Path:
    write_parquet("sets/train.parquet", train, *features[:1])
    return write_parquet("sets/test.parquet", test, *features[1:]).parent


def test_labels_that_differ_between_splits(write_parquet: Write, columns: dict[str, list[Any]]):
    folder = splits_of(write_parquet, columns, columns | {"word": ["kind 1", "new"] * 10})
    message = refusal(folder, label_column="word")
    assert "labels disagree between splits: test has 1 that train does not have ('new')" in message
    assert counts(open_source(str(folder), SourceConfig(label_column="number"))[0]) == [18, 2, 20]
    # Fewer classes are no disagreement.
    folder = splits_of(write_parquet, columns, columns | {"word": ["kind 1"] * 20})
    splits, names, *_ = open_source(str(folder), SourceConfig(label_column="word"))
    assert names == ["kind 0", "kind 1", "kind 2"]
    assert labels(splits["test"]) == [1] * 20


def test_class_names_that_differ_between_splits(
    write_parquet: Write, columns: dict[str, list[Any]]
):
    def typed(*names: str) -> datasets.Features:
        return datasets.Features(
            {"image": datasets.Image(), "kind": datasets.ClassLabel(names=list(names))}
        )

    rows = {"image": columns["image"], "kind": [0, 1] * 10}
    folder = splits_of(write_parquet, rows, rows, typed("a", "b"), typed("b", "a"))
    assert "labels disagree between splits: test numbers the classes differently" in refusal(folder)
    assert counts(open_source(str(folder), SourceConfig(label_column="none"))[0]) == [18, 2, 20]
    folder = splits_of(write_parquet, rows, rows, typed("a", "b"), typed("a", "b", "c"))
    assert "labels disagree between splits: test has 1 that train does not have ('c')" in refusal(
        folder
    )
    folder = splits_of(
        write_parquet, rows, {"image": rows["image"], "kind": [1, 0] * 10}, typed("a", "b")
    )
    assert "labels disagree between splits: test numbers the classes differently" in refusal(folder)


def test_a_split_without_the_column(write_parquet: Write, columns: dict[str, list[Any]]):
    folder = splits_of(write_parquet, columns, {"image": columns["image"]})
    assert "split 'test' lacks the columns of the training split (image, word)" in refusal(
        folder, label_column="word"
    )
    assert counts(open_source(str(folder))[0]) == [18, 2, 20]
