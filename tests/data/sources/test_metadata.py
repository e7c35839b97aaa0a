"""Metadata files: every listed image gets its values, and what a file does not describe is counted
or refused."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from igpt.data.sources.catalogue import Source, SourceConfig, open_source

from ...helpers.reading import refusal

Write = Callable[..., Path]


def labelled(source: Source, folder: Path) -> dict[str, str | None]:
    """Return the class of each image of all splits, by its path below the folder."""
    found: dict[str, str | None] = {}
    for split in source.splits.values():
        for image, label in split.read(np.arange(len(split))):
            name = None if label < 0 else source.class_names[label]
            found[str(Path(image).relative_to(folder))] = name
    return found


def counts(source: Source) -> dict[str, tuple[int, str]]:
    return {kind: (entry.count, entry.first) for kind, entry in source.left_out.entries.items()}


@pytest.fixture
def nine(write_folder: Write) -> Path:
    """Write nine images, without metadata."""
    return write_folder("nine", *(f"{number}.png" for number in range(9)))


def csv(words: list[str]) -> str:
    return "file_name,label\n" + "".join(
        f"{number}.png,{word}\n" for number, word in enumerate(words)
    )


WORDS = ["NA", "01", "1", "nan", "null", "None", "TRUE", "1.0", "2019-01-02"]


def test_values_of_csv_are_strings(nine: Path):
    (nine / "metadata.csv").write_text(csv(WORDS))
    assert labelled(open_source(str(nine)), nine) == {
        f"{number}.png": word for number, word in enumerate(WORDS)
    }


@pytest.mark.parametrize(
    "form", ["bom", "crlf", "quoted", "blank lines", "spaces", "other columns", "dots", "backslash"]
)
def test_csv_dialects(write_folder: Write, form: str):
    parent = "sub/" if form == "backslash" else ""
    folder = write_folder("forms", *(f"{parent}{number}.png" for number in range(9)))
    words = ["a", "b, c", 'd "e"'] * 3
    lines = ["file_name,label"]
    for number, word in enumerate(words):
        quoted = '"' + word.replace('"', '""') + '"'
        lines.append(f"{parent}{number}.png,{quoted}")
    if form == "blank lines":
        lines[3:3] = ["", "  ", "\t"]
    if form == "spaces":
        lines = [line.replace("label", " label ") for line in lines]
    if form == "other columns":
        lines = [f"7,{line}" if number else f"age,{line}" for number, line in enumerate(lines)]
    if form == "dots":
        lines = [line if line.startswith("file_name") else f"./{line}" for line in lines]
    if form == "backslash":
        lines = [line.replace("/", "\\") for line in lines]
    end = "\r\n" if form == "crlf" else "\n"
    text = ("\ufeff" if form == "bom" else "") + end.join(lines) + end
    (folder / "metadata.csv").write_bytes(text.encode())
    source = open_source(str(folder))
    assert labelled(source, folder) == {
        f"{parent}{number}.png": word for number, word in enumerate(words)
    }
    assert counts(source) == (
        {"columns of metadata.csv": (1, "age")} if form == "other columns" else {}
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column 'file_name'; its columns: none"),
        ("file,label\n0.png,a\n", "has no column 'file_name'; its columns: 'file', 'label'"),
        (
            "file_name;label\n0.png;a\n",
            "its columns: 'file_name;label'; is it separated by ';'? commas are needed",
        ),
        ("file_name\tlabel\n0.png\ta\n", r"is it separated by '\t'? commas are needed"),
        ("file_name,label,label\n", "has two columns 'label'"),
        (
            csv(["a"] * 9) + "0.png,b\n",
            "lists '0.png' twice, with the classes 'a' and 'b'; one class for each image is needed",
        ),
        (csv(["a"] * 9) + "10.png,b\n", "lists '10.png', which is not in "),
        (csv(["a"] * 9) + "../nine/0.png,b\n", "lists '../nine/0.png', which is not in "),
        (csv(["a"] * 9) + "/etc/passwd,b\n", "lists '/etc/passwd', which is not in "),
        (csv(["a"] * 9) + f"{'x' * 300}.png,b\n", "which is not in "),
        (
            csv(["a", "b, c"]),
            "line 3: 3 cells where the header has 2; put cells with commas into quotation marks",
        ),
        (csv(["a"]) + "1.png\n", "line 3: 1 cells where the header has 2\n"),
        (csv(["a"]) + ",b\n", "row 3: file_name is ''; the name of one file is needed"),
        (csv(["a"]) + '1.png,"b"c\n', "is not readable as CSV: line 3"),
    ],
)
def test_csv_that_is_refused(nine: Path, text: str, message: str):
    (nine / "metadata.csv").write_text(text)
    assert message in refusal(nine) + "\n"


def test_metadata_that_are_not_utf_8_are_refused(nine: Path):
    for name in ("metadata.csv", "metadata.jsonl"):
        (nine / name).write_bytes(csv(["caf\u00e9"]).encode("latin-1"))
        assert f"{nine / name} is not readable as UTF-8" in refusal(nine)
        (nine / name).unlink()


def test_json_lines(nine: Path):
    values = ["NA", 1, "01", 1.5, True, None, "", "a", 10**20]
    rows = [{"file_name": f"{number}.png", "label": value} for number, value in enumerate(values)]
    (nine / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    words = ["NA", "1", "01", "1.5", "True", None, None, "a", str(10**20)]
    assert labelled(open_source(str(nine)), nine) == {
        f"{number}.png": word for number, word in enumerate(words)
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]\n", "line 1: a JSON object is needed, not '[1]'"),
        ('{"file_name": "0.png"}\n{"file_name": \n', "line 2: not readable as JSON"),
        (
            '{"file_name": "0.png"}\n{"label": "a"}\n',
            "row 2: file_name is None; the name of one file is needed",
        ),
        (
            '{"file_name": "0.png", "label": ["a"]}\n',
            "the column 'label' holds ['a']; one class is needed",
        ),
        (
            '{"file_names": ["0.png"], "label": "a"}\n',
            "has no column 'file_name'; its columns: 'file_names', 'label'",
        ),
        (
            '{"file_name": ["0.png"], "label": "a"}\n',
            "row 1: file_name is ['0.png']; the name of one file is needed",
        ),
    ],
)
def test_json_lines_that_are_refused(nine: Path, text: str, message: str):
    (nine / "metadata.jsonl").write_text(text)
    assert message in refusal(nine)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            ["NA", "01", "1", None, "", "a", "b", "c", "nan"],
            ["NA", "01", "1", None, None, "a", "b", "c", "nan"],
        ),
        ([1, 2, None, 4, 5, 6, 7, 8, 9], ["1", "2", None, "4", "5", "6", "7", "8", "9"]),
        (
            [1.0, 2.0, float("nan"), 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
            ["1", "2", None, "4", "5", "6", "7", "8", "9"],
        ),
    ],
)
def test_parquet(nine: Path, values: list[object], words: list[str | None]):
    names = [f"{number}.png" for number in range(9)]
    pq.write_table(
        pa.table({"file_name": names, "label": values, "box": [[1, 2]] * 9}),
        nine / "metadata.parquet",
    )
    source = open_source(str(nine))
    assert labelled(source, nine) == dict(zip(names, words, strict=True))
    assert counts(source) == {"columns of metadata.parquet": (1, "box")}


def test_parquet_with_named_classes(nine: Path):
    features = datasets.Features(
        {"file_name": datasets.Value("string"), "kind": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = {"file_name": [f"{number}.png" for number in range(9)], "kind": [0, 1, -1] * 3}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(nine / "metadata.parquet")
    found = labelled(open_source(str(nine)), nine)
    assert found == {f"{number}.png": ["cat", "dog", None][number % 3] for number in range(9)}


def test_a_damaged_parquet_file(nine: Path):
    (nine / "metadata.parquet").write_bytes(b"PAR1 and no more")
    assert "metadata.parquet is not readable as Parquet" in refusal(nine)


def test_a_named_column_has_the_classes(nine: Path):
    lines = ["file_name,label,kind,text"] + [
        f"{number}.png,{number},{'ab'[number % 2]},x" for number in range(9)
    ]
    (nine / "metadata.csv").write_text("\n".join(lines))
    source = open_source(str(nine), SourceConfig(label_column="kind"))
    assert labelled(source, nine) == {f"{number}.png": "ab"[number % 2] for number in range(9)}
    assert counts(source) == {"columns of metadata.csv": (2, "label, text")}
    assert "has no column 'kinf'; did you mean 'kind'?" in refusal(nine, label_column="kinf")
    source = open_source(str(nine), SourceConfig(label_column="none"))
    assert (source.class_names, source.notes) == (None, [])


def test_without_a_column_of_classes_there_are_no_classes(write_folder: Write):
    folder = write_folder(
        "captions", *(f"{split}/{number}.png" for split in ("test", "train") for number in range(9))
    )
    rows = "".join(
        f"{split}/{number}.png,hello,7\n" for split in ("test", "train") for number in range(9)
    )
    (folder / "metadata.csv").write_text(f"file_name,text,bbox\n{rows}")
    source = open_source(str(folder))
    assert source.class_names is None
    assert source.notes == [
        "no labels: metadata.csv has the columns text, bbox; --label-column names one"
    ]
    (folder / "metadata.csv").write_text("file_name\n" + rows.replace(",hello,7", ""))
    assert open_source(str(folder)).notes == ["no labels: metadata.csv has no column but file_name"]


def test_the_nearest_metadata_file_above_an_image_applies(write_folder: Write):
    names = [
        f"{parent}{number}.png"
        for parent in ("", "near/", "near/deep/", "far/")
        for number in range(3)
    ]
    folder = write_folder("nested", *names)
    (folder / "metadata.csv").write_text(
        "file_name,label\n" + "".join(f"{name},top\n" for name in names)
    )
    near = ["0.png", "1.png", "2.png", "deep/0.png", "deep/1.png"]
    (folder / "near" / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": name, "label": "near"}) + "\n" for name in near)
    )
    source = open_source(str(folder))
    expected = dict.fromkeys(names, "top") | dict.fromkeys(
        [f"near/{name}" for name in near], "near"
    )
    del expected["near/deep/2.png"]
    assert labelled(source, folder) == expected
    assert counts(source) == {"images that no metadata file lists": (1, "near/deep/2.png")}
    assert source.left_out.possible_images == 1


def test_images_without_metadata_have_no_label(write_folder: Write):
    folder = write_folder(
        "some", *(f"{split}/{number}.png" for split in ("train", "test") for number in range(9))
    )
    (folder / "train" / "metadata.csv").write_text(csv(["a", "b", "c"] * 3))
    found = labelled(open_source(str(folder)), folder)
    assert {name for name, word in found.items() if word is None} == {
        f"test/{number}.png" for number in range(9)
    }


def test_classes_that_training_lacks(write_folder: Write):
    folder = write_folder(
        "lack", *(f"{split}/{number}.png" for split in ("train", "test") for number in range(9))
    )
    (folder / "train" / "metadata.csv").write_text(csv(["a", "b", "c"] * 3))
    (folder / "test" / "metadata.csv").write_text(csv(["a", "b", "d"] * 3))
    assert "test has 1 that train does not have ('d')" in refusal(folder)


def test_two_metadata_files_in_one_folder(nine: Path):
    (nine / "metadata.csv").write_text(csv(["a"] * 9))
    (nine / "metadata.jsonl").write_text("")
    assert "has two metadata files, metadata.csv and metadata.jsonl; keep one" in refusal(nine)


def test_listed_files_that_are_not_images(nine: Path):
    """They are counted by their suffixes, and are not an error of the list."""
    (nine / "9.heic").write_bytes(b"heic")
    (nine / "metadata.csv").write_text(csv(["a"] * 9) + "9.heic,a\n")
    assert counts(open_source(str(nine))) == {"files ending in .heic": (1, "9.heic")}


def test_brackets_in_the_name_of_a_described_folder(write_folder: Write):
    folder = write_folder("a [1] *", *(f"{number}.png" for number in range(9)))
    (folder / "metadata.csv").write_text(csv(["a", "b", "c"] * 3))
    assert open_source(str(folder)).class_names == ["a", "b", "c"]


@pytest.fixture
def tiny(write_folder: Write) -> Path:
    """Write Tiny ImageNet in the layout of its site, with fewer images."""
    names = [
        f"train/{kind}/images/{kind}_{number}.png" for kind in ("n01", "n02") for number in range(6)
    ]
    names += [
        f"{split}/images/{split}_{number}.png" for split in ("val", "test") for number in range(4)
    ]
    folder = write_folder("tiny", *names)
    lines = (f"val_{number}.png\tn0{1 + number % 2}\t0\t32\t44\t62\n" for number in range(4))
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("n01\nn02\n")
    return folder


def test_tiny_imagenet(tiny: Path):
    source = open_source(str(tiny))
    assert source.class_names == ["n01", "n02"]
    found = labelled(source, tiny)
    for number in range(4):
        assert found[f"val/images/val_{number}.png"] == f"n0{1 + number % 2}"
        assert found[f"test/images/test_{number}.png"] is None
    assert all(
        word == name.split("/")[1] for name, word in found.items() if name.startswith("train")
    )
    assert counts(source) == {"files ending in .txt": (1, "wnids.txt")}
    assert source.notes == [
        f"no labels in {tiny}/test: all its images are in one folder, 'images', which is not a "
        "class of the training "
        "images"
    ]


def test_inconsistent_annotations_are_refused(tiny: Path):
    path = tiny / "val" / "val_annotations.txt"
    path.write_text("val_9.png\tn01\n")
    assert f"{path} lists 'val_9.png', which is not among the images" in refusal(tiny)
    path.write_text("val_0.png n01\n")
    assert f"{path}, line 1: a file name, a tab and a class are needed" in refusal(tiny)
    path.write_text("val_0.png\tn01\nval_0.png\tn02\n")
    assert f"{path}, line 2: 'val_0.png' is listed twice" in refusal(tiny)
    path.write_text("val_0.png\tn03\n")
    assert "validation has 1 that train does not have ('n03')" in refusal(tiny)


def test_captions_do_not_replace_class_folders(write_folder: Write):
    files = {f"{kind}/{number}.png": kind for kind in "ab" for number in range(9)}
    folder = write_folder("captions", *files)
    (folder / "metadata.csv").write_text(
        "file_name,text\n" + "".join(f"{file},hello\n" for file in files)
    )
    source = open_source(str(folder))
    assert labelled(source, folder) == files
    assert source.notes == [
        "the classes are the folders: metadata.csv has the columns text; --label-column names a "
        "column of classes"
    ]
    assert counts(source) == {"columns of metadata.csv": (1, "text")}
    assert open_source(str(folder), SourceConfig(label_column="none")).class_names is None


def test_unused_columns_are_named(nine: Path):
    names = [f"c{number}" for number in range(12)]
    rows = "".join(f"{number}.png,{'ab'[number % 2]}{',1' * 12}\n" for number in range(9))
    (nine / "metadata.csv").write_text(f"file_name,label,{','.join(names)}\n{rows}")
    left_out = open_source(str(nine)).left_out
    assert (
        left_out.text()
        == "columns of metadata.csv: 12 (c0, c1, c2, c3, c4, c5, c6, c7, c8, c9 and 2 more)"
    )


@pytest.mark.parametrize("settings", [{}, {"label_column": "none"}])
def test_several_rows_of_an_image(nine: Path, settings: dict[str, str]):
    """One row for each box, for example: they are one row if they have the same class, or if there
    are no classes."""
    last = "8.png,b\n" if settings else "8.png,c\n"
    (nine / "metadata.csv").write_text(csv(["a", "b", "c"] * 3) + "0.png,a\n0.png,a\n" + last)
    source = open_source(str(nine), SourceConfig(**settings))
    expected = dict.fromkeys(f"{number}.png" for number in range(9))
    if not settings:
        expected = {f"{number}.png": "abc"[number % 3] for number in range(9)}
    assert labelled(source, nine) == expected
    assert counts(source)["further rows of metadata.csv"] == (3, "0.png")


def test_a_table_without_names_of_images(nine: Path):
    (nine / "metadata.csv").write_text("camera,year\nx,2019\n")
    advice = (
        "rename the column of file names to file_name, or rename the file if it does not describe "
        "images"
    )
    assert f"has no column 'file_name'; its columns: 'camera', 'year'; {advice}" in refusal(nine)
    source = open_source(str(nine), SourceConfig(label_column="none"))
    assert counts(source) == {"metadata files without a column file_name": (1, "metadata.csv")}
    assert len(labelled(source, nine)) == 9


def test_file_names_that_are_relative_to_another_folder(write_folder: Write):
    folder = write_folder("relative", *(f"sub/deep/{number}.png" for number in range(9)), "top.png")
    path = folder / "sub" / "metadata.csv"
    path.write_text("file_name,label\n0.png,a\n")
    rule = "file_name is relative to the folder of the metadata file, and"
    assert refusal(folder) == (
        f"{path} lists '0.png', which is not in {folder}/sub; {rule} {folder}/sub/deep/0.png has "
        "that name: "
        "write 'deep/0.png'"
    )
    path.write_text("file_name,label\n../top.png,a\n")
    assert refusal(folder) == (
        f"{path} lists '../top.png', which is not in {folder}/sub; {rule} {folder}/top.png has "
        "that name: "
        f"move the metadata file to {folder}"
    )


def test_a_class_in_another_unicode_normalization(write_folder: Write):
    files = [f"{split}/{number}.png" for split in ("train", "test") for number in range(9)]
    folder = write_folder("forms", *files)
    (folder / "train" / "metadata.csv").write_text(csv(["\u00e9", "b", "c"] * 3))
    (folder / "test" / "metadata.csv").write_text(csv(["e\u0301", "b", "c"] * 3))
    assert "is a class of train in another Unicode normalization form" in refusal(folder)
