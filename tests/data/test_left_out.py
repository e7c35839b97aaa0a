"""Images and files of a source that are not used: counted, named, printed, stored, and refused if
there are too many."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from igpt.data.images.palette import Palette
from igpt.data.left_out import Allowance, LeftOut, left_out_of
from igpt.data.prepare import PrepareConfig, prepare
from igpt.data.sources.catalogue import SourceConfig, open_source
from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError

from ..helpers.reading import refusal

Write = Callable[..., Path]
Run = Callable[..., subprocess.CompletedProcess[str]]
Picture = Callable[..., bytes]


def counts(left_out: LeftOut) -> dict[str, tuple[int, str, bool]]:
    return {
        kind: (entry.count, entry.first, entry.possible_images)
        for kind, entry in left_out.entries.items()
    }


def found(source: Path, **settings: str) -> dict[str, tuple[int, str, bool]]:
    return counts(open_source(str(source), SourceConfig(**settings)).left_out)


def test_every_kind_of_file(write_folder: Write, picture: Picture):
    folder = write_folder("all", *(f"{kind}/{number}.png" for kind in "ab" for number in range(9)))
    texts = ("a/labels.txt", "b/labels.TXT", "README", "LICENSE", "README.md", "boxes.json")
    possible = (
        "IMG.HEIC",
        "raw",
        "scan.pdf",
        "x.tar.gz",
        "film.mp4",
        "a/y.zip",
        "frame.0001",
        "a.npy",
    )
    for name in (*texts, *possible, "Thumbs.db", ".DS_Store"):
        (folder / name).write_bytes(picture(0))
    for name in ("@eaDir", "a/__MACOSX", "b/.thumbnails", "lost+found", "#recycle"):
        (folder / name).mkdir()
        (folder / name / "0.png").write_bytes(picture(0))
    os.mkfifo(folder / "a" / "pipe")
    os.mkfifo(folder / "b" / "pipe.png")
    source = open_source(str(folder))
    assert source.class_names == ["a", "b"]
    assert sum(map(len, source.splits.values())) == 18
    assert counts(source.left_out) == {
        "hidden and system files": (7, "#recycle/", False),
        "files named LICENSE, README and the like": (2, "LICENSE", False),
        "files ending in .heic": (1, "IMG.HEIC", True),
        "files ending in .md": (1, "README.md", False),
        "files ending in .txt": (2, "a/labels.txt", False),
        "FIFOs, sockets and devices without an ending": (1, "a/pipe", True),
        "FIFOs, sockets and devices ending in .png": (1, "b/pipe.png", True),
        "files ending in .zip": (1, "a/y.zip", True),
        "files ending in .npy": (1, "a.npy", True),
        "files ending in .json": (1, "boxes.json", False),
        "files ending in .mp4": (1, "film.mp4", True),
        "files ending in .pdf": (1, "scan.pdf", True),
        "files ending in .tar.gz": (1, "x.tar.gz", True),
        "files without an ending": (2, "frame.0001", True),
    }


def test_text_files_never_stop_the_command(write_folder: Write, tmp_path: Path, igpt: Run):
    folder = write_folder("captions", *(f"{number}.png" for number in range(20)))
    for number in range(100):
        (folder / f"{number}.txt").write_text("a caption")
    (folder / "LICENSE").touch()
    done = igpt(
        "prepare",
        folder,
        "-o",
        tmp_path / "t",
        "--size",
        4,
        "--colors",
        4,
        "--max-bad",
        0,
        "--workers",
        1,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1] == (
        "left out: files ending in .txt: 100 (first: 0.txt); files named LICENSE, README and the "
        "like: 1 "
        f"(first: LICENSE); {tmp_path}/t/dataset.json lists it"
    )


def test_images_outside_the_splits_and_splits_that_are_not_used(write_folder: Write):
    files = [
        f"{split}/{number}.png" for split in ("train", "test", "unlabeled") for number in range(10)
    ]
    folder = write_folder("stl", *files, "overview.png", "unlabeled/deep/1.png")
    assert found(folder) == {
        "images outside the folders of the splits": (1, "overview.png", True),
        "images of the split unlabeled": (11, "unlabeled", False),
    }
    assert found(folder, train_split="unlabeled") == {
        "images outside the folders of the splits": (1, "overview.png", True),
        "images of the split train": (10, "train", False),
    }


def test_one_folder_around_the_splits(write_folder: Write):
    """The layout of many unpacked archives: its splits are splits, and not all images are training
    images of one class."""
    files = [
        f"data-1.0/images/{split}/{kind}/{i}.png"
        for split in ("train", "test")
        for kind in "ab"
        for i in range(9)
    ]
    splits, names, left_out, notes = open_source(str(write_folder("unpacked", *files)))
    assert ([len(split) for split in splits.values()], names) == ([16, 2, 18], ["a", "b"])
    assert (counts(left_out), notes) == ({}, [])


@pytest.mark.parametrize(("covers", "labelled"), [(1, True), (2, True), (3, False)])
def test_images_next_to_class_folders(
    write_folder: Write, tmp_path: Path, igpt: Run, covers: int, labelled: bool
):
    """They have no label if they are fewer than one in ten; otherwise there are no classes, and a
    message gives the reason."""
    files = [f"{kind}/{number}.png" for kind in "ab" for number in range(12)]
    folder = write_folder("covers", *files, *(f"cover-{number}.png" for number in range(covers)))
    source = open_source(str(folder))
    note = (
        f"no labels: 3 of 27 images are directly in {folder}, next to its 2 folders (first: "
        f"cover-0.png)"
    )
    assert source.class_names == (["a", "b"] if labelled else None)
    assert source.notes == ([] if labelled else [note])
    done = igpt("prepare", folder, "-o", tmp_path / "t", "--size", 4, "--colors", 4, "--workers", 1)
    assert done.returncode == 0, done.stderr
    message = f"left out: labels (the images are kept without one): {covers} (first: "
    assert (message in done.stdout) == labelled
    assert (f"warning: {note}\n" in done.stdout) != labelled
    data = TokenDataset(tmp_path / "t")
    assert data.manifest["made"]["warnings"] == source.notes
    assert sum(len(data[split]) for split in data) == 24 + covers
    if labelled:
        assert sum(int((data[split].labels < 0).sum()) for split in data) == covers


def test_folders_of_classes_that_only_another_split_has(write_folder: Write):
    folder = write_folder(
        "odd",
        *(f"train/{i}.png" for i in range(9)),
        *(f"test/{k}/{i}.png" for k in "ab" for i in "12"),
    )
    source = open_source(str(folder))
    assert source.class_names is None
    assert source.notes == [
        f"no labels: {folder}/test has folders of classes, and {folder}/train has none"
    ]


def test_images_and_text_files_next_to_parquet(write_parquet: Write, picture: Picture):
    columns = {
        "image": [{"bytes": picture(number), "path": None} for number in range(10)],
        "a": [1] * 10,
        "b": [2] * 10,
    }
    folder = write_parquet("set/data.parquet", columns).parent
    (folder / "preview.png").write_bytes(picture(0))
    (folder / "README.md").write_text("Pictures.")
    assert found(folder) == {
        "files ending in .md": (1, "README.md", False),
        "image files next to the .parquet files": (1, "preview.png", True),
        "columns": (2, "a, b", False),
    }


def test_parquet_and_tars_in_one_folder(write_parquet: Write):
    folder = write_parquet("set/data.parquet", {"image": [b"x"]}).parent
    (folder / "a.tar").touch()
    assert "set holds 1 .parquet and 1 .tar; give one or the other" in refusal(folder)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.tar", "README.md", "metadata.csv"])
def test_fifos_are_never_opened(
    write_parquet: Write, write_folder: Write, picture: Picture, name: str
):
    """Opening one of these would block for ever."""
    if name in ("README.md", "a.parquet"):
        folder = write_parquet(
            "pipes/b.parquet", {"image": [{"bytes": picture(0), "path": None}] * 9}
        ).parent
    else:
        folder = write_folder(
            "pipes", *(["0.png", "1.png", "2.png"] if name == "metadata.csv" else [])
        )
        folder.mkdir(exist_ok=True)
    os.mkfifo(folder / name)
    said = refusal(folder)
    assert f"{folder / name} is a FIFO" in said
    if name != "README.md":
        assert "is a FIFO" in refusal(folder / name)


def test_fifos_in_archives_are_never_opened(tmp_path: Path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for name in ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin", "class_names.txt"):
        (folder / name).touch()
    os.mkfifo(folder / "unlabeled_X.bin")
    assert "unlabeled_X.bin is a FIFO" in refusal(folder)
    np.save(tmp_path / "set_trX.npy", np.zeros((5, 16), np.uint8))
    os.mkfifo(tmp_path / "set_trY.npy")
    assert "set_trY.npy is a FIFO" in refusal(tmp_path / "set")


def test_parquet_in_a_system_folder(write_parquet: Write, picture: Picture):
    columns = {"image": [{"bytes": picture(0), "path": None}] * 9}
    write_parquet("set/@eaDir/b.parquet", columns)
    folder = write_parquet("set/a.parquet", columns).parent
    assert "@eaDir/b.parquet, which is in a system folder; remove it" in refusal(folder)


def test_saved_data_sets_that_are_damaged(tmp_path: Path, picture: Picture):
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": picture(0), "path": None}] * 9}, features=features
    )
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    saved = tmp_path / "saved"
    assert len(open_source(str(saved)).splits["test"]) == 9
    state = json.loads((saved / "test" / "state.json").read_text())
    (arrow,) = [saved / "test" / file["filename"] for file in state["_data_files"]]
    for path, content, message in (
        (saved / "dataset_dict.json", "{", f"{saved}/dataset_dict.json is not readable as JSON"),
        (saved / "dataset_dict.json", "[]", "dataset_dict.json should hold a JSON object"),
        (saved / "dataset_dict.json", '{"splits": 3}', "dataset_dict.json: splits = 3"),
        (saved / "dataset_dict.json", '{"splits": ["../../x"]}', "names the split '../../x'"),
        (saved / "dataset_dict.json", '{"splits": ["dev"]}', f"{saved}/dev: state.json is missing"),
        (
            saved / "test" / "state.json",
            "{}",
            f"{saved}/test/state.json: the key '_data_files' is missing",
        ),
        (
            saved / "test" / "state.json",
            json.dumps({"_data_files": state["_data_files"]}),
            f"{saved}/test is not readable",
        ),
        (
            saved / "test" / "state.json",
            json.dumps(state | {"_data_files": [{"filename": "gone.arrow"}]}),
            "state.json names 'gone.arrow', which is not in",
        ),
        (
            saved / "test" / "dataset_info.json",
            "{}",
            "dataset_info.json: the key 'features' is missing",
        ),
        (
            saved / "test" / "dataset_info.json",
            '{"features": {"image": {"_type": "Hologram"}}}',
            f"{saved}/test is not readable as a saved data set",
        ),
        (arrow, "no arrow", f"{saved}/test is not readable as a saved data set"),
        (arrow, None, f"{arrow} is a FIFO"),
    ):
        before = path.read_bytes()
        path.unlink()
        if content is None:
            os.mkfifo(path)
        else:
            path.write_text(content)
        assert message in refusal(saved)
        path.unlink()
        path.write_bytes(before)


def test_missing_values_of_a_column_are_images_without_a_label(
    write_parquet: Write, picture: Picture, tmp_path: Path
):
    images = [{"bytes": picture(number), "path": f"{number}.png"} for number in range(20)]
    words = [None if number == 7 else ["NA", "01", "1"][number % 3] for number in range(20)]
    numbers = [float("nan") if number == 7 else float(number % 3) for number in range(20)]
    file = write_parquet("a.parquet", {"image": images, "word": words, "number": numbers})
    for column, names in (("word", ["01", "1", "NA"]), ("number", ["0", "1", "2"])):
        config = PrepareConfig(size=4, colors=4, label_column=column, max_bad=0)
        data = prepare(str(file), tmp_path / column, config)
        assert data.class_names == names or sorted(data.class_names or []) == names
        left_out = data.manifest["made"]["left_out"]["labels (the images are kept without one)"]
        assert left_out["count"] == 1
        assert left_out["first"].endswith(" 7.png")


def test_deeply_nested_levels_cause_a_warning(tmp_path: Path, igpt: Run):
    folder = tmp_path / "scans"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(10):
        levels = generator.integers(0, 4000, (8, 8)).astype(np.uint16)
        levels[0, 0] = 4095 if number == 3 else 7
        Image.fromarray(levels).save(folder / f"{number}.png")
    Image.new("L", (8, 8), 200).save(folder / "plain.png")
    words = ("prepare", folder, "--size", 8, "--colors", 8, "--workers", 1)
    done = igpt(*words, "-o", tmp_path / "dark")
    warning = (
        "all 16-bit images (10) use only 12 bits (highest level 4095), so they become nearly "
        "black; multiply 12-bit levels by 16 before you save them as 16-bit images"
    )
    assert done.stdout.splitlines()[1:] == [f"warning: {warning}"]
    assert TokenDataset(tmp_path / "dark").manifest["made"]["warnings"] == [warning]
    assert f"warning: {warning}" in igpt("inspect", tmp_path / "dark").stdout
    Image.fromarray(np.full((8, 8), 4096, np.uint16)).save(folder / "bright.png")
    assert "warning" not in igpt(*words, "-o", tmp_path / "bright").stdout


def test_a_palette_in_0_to_1_causes_a_warning(tmp_path: Path, igpt: Run, photographs: Path):
    centers = np.random.default_rng(0).uniform(0, 1, (8, 3))
    Palette.from_centers(centers).save(tmp_path / "p.npy")
    Palette.from_centers(2 * centers - 1).save(tmp_path / "q.npy")
    words = (photographs, "--size", 8, "--palette")
    message = (
        f"warning: all colours of the palette {tmp_path}/p.npy lie in 0..1, where palettes "
        f"have -1..1"
    )
    for command, out in (("prepare", "tokens"), ("palette", "out.npy")):
        assert message in igpt(command, *words, tmp_path / "p.npy", "-o", tmp_path / out).stdout
        assert (
            "warning"
            not in igpt(command, *words, tmp_path / "q.npy", "-o", tmp_path / f"q-{out}").stdout
        )
    (warning,) = TokenDataset(tmp_path / "tokens").manifest["made"]["warnings"]
    assert json.loads((tmp_path / "out.json").read_text())["warnings"] == [warning]


def test_the_palette_command_counts_and_refuses(tmp_path: Path, igpt: Run, write_folder: Write):
    folder = write_folder("some", *(f"{number}.png" for number in range(18)))
    (folder / "5.png").write_text("no picture")
    (folder / "x.heic").touch()
    words = ("palette", folder, "-o", tmp_path / "p.npy", "--size", 6, "--colors", 4)
    done = igpt(*words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "1 of 19 files or images of" in done.stderr
    assert "--max-bad 0.053 continues without them" in done.stderr
    done = igpt(*words, "--max-bad", 0.053)
    assert done.returncode == 2
    assert "images that do not decode: 1, where --max-bad 0.053 allows 0" in done.stderr
    assert "plus 1 possible images left out before" in done.stderr
    assert not (tmp_path / "p.npy").exists()
    done = igpt(*words, "--max-bad", 0.2)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "p.json").read_text())["left_out"]
    assert {kind: entry["count"] for kind, entry in report.items()} == {
        "files ending in .heic": 1,
        "images that do not decode": 1,
    }
    assert (
        "left out: files ending in .heic: 1 (first: x.heic); images that do not decode: 1 (first: "
        f"{folder}/5.png: " in (done.stdout)
    )


def test_the_value_that_a_refusal_suggests_is_sufficient(
    write_folder: Write, tmp_path: Path, igpt: Run
):
    """Each refusal names a setting that allows the counted images; following it gives a data
    set."""
    folder = write_folder("mixed", *(f"{number:02}.png" for number in range(40)))
    for number in range(3):
        (folder / f"{number}.heic").touch()
        (folder / f"1{number}.png").write_text("no picture")
    words = (
        "prepare",
        folder,
        "-o",
        tmp_path / "t",
        "--size",
        4,
        "--colors",
        4,
        "--workers",
        1,
        "--max-bad",
    )
    allowed = "0"
    for _ in range(6):
        done = igpt(*words, allowed)
        if done.returncode == 0:
            break
        named = re.search(r"--max-bad ([\d.]+) continues|\(([\d.]+) is enough", done.stderr)
        assert named, done.stderr
        allowed = named[1] or named[2]
    assert done.returncode == 0, done.stderr
    assert float(allowed) == pytest.approx(6 / 43, abs=0.005)


def test_left_out_files_do_not_prevent_resuming(write_folder: Write, tmp_path: Path):
    """A text file that is added while the work is interrupted is no reason to start again."""
    folder = write_folder("grows", *(f"{number}.png" for number in range(30)))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(str(folder), tmp_path / "t", PrepareConfig(size=4, colors=4), progress=interrupt)
    (folder / "notes.txt").touch()
    data = prepare(str(folder), tmp_path / "t", PrepareConfig(size=4, colors=4))
    assert data.manifest["made"]["left_out"] == {
        "files ending in .txt": {"count": 1, "first": "notes.txt", "possible_images": False}
    }


def test_a_malformed_entry_of_the_manifest(digits: TokenDataset):
    for value, message in (
        ([], "left_out should be a JSON object"),
        ({"x": {"count": 0, "first": "a", "possible_images": True}}, "d: left_out.x: count = 0"),
        ({"x": {"count": 1, "possible_images": True}}, "d: left_out.x: the key 'first' is missing"),
        ({"x": 3}, "d: left_out.x"),
    ):
        with pytest.raises(InputError, match=message):
            left_out_of({"left_out": value}, "d")
    assert not left_out_of({}, "d")
    assert counts(left_out_of({"skipped": ["train a", "train b"]}, "d")) == {
        "images that do not decode": (2, "train a", True)
    }
    assert digits.manifest["made"]["left_out"] == {}


def test_counts_and_names():
    left_out = LeftOut()
    left_out.add("files", "line\nend")
    left_out.add("files", "b", count=4)
    for number in range(20):
        left_out.add(f"kind {number}", "x", possible_images=True)
    assert left_out.text().startswith("files: 5 (first: line\\nend); kind 0: 1 (first: x); ")
    assert left_out.text().endswith("; and 9 more kinds")
    assert left_out.possible_images == 20
    assert LeftOut.from_json(json.loads(json.dumps(left_out.to_json())), "here") == left_out


@pytest.mark.parametrize(
    ("images", "left_out", "max_bad", "reading", "allowed"),
    [
        (100, 0, 0.01, 100, 1),
        (100, 0, 0.29, 100, 29),
        (99, 1, 0.01, 99, 0),
        (98, 2, 0.05, 98, 3),
        (98, 2, 0.05, 49, 1),
        (100, 0, 1, 100, 100),
        (100, 50, 0.01, 100, 0),
        (100, 0, 0, 100, 0),
    ],
)
def test_how_many_images_may_fail_to_decode(
    images: int, left_out: int, max_bad: float, reading: int, allowed: int
):
    assert Allowance(images, left_out, max_bad).undecoded(reading) == allowed
