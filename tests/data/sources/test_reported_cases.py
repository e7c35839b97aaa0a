"""Inputs that public reports about similar tools describe.

The other test files have their own small inputs for the same behaviour.
"""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from igpt.data.images.decode import load, open_image, to_rgb
from igpt.data.tokens.dataset import TokenDataset

from ...helpers import reported_cases

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def case(tmp_path: Path) -> Callable[[str], Path]:
    """Write one of the cases and return its folder."""

    def write(name: str) -> Path:
        getattr(reported_cases, name)(tmp_path / name)
        return tmp_path / name

    return write


def prepared(igpt: Run, source: Path, *flags: object) -> tuple[TokenDataset, str]:
    """Prepare a source, and return the data set and the printed text."""
    out = source.parent / f"{source.name}.tokens"
    done = igpt("prepare", source, "-o", out, "--size", 8, "--colors", 4, "--workers", 1, *flags)
    assert (done.returncode, done.stderr) == (0, "")
    return TokenDataset(out), done.stdout


def refusal(igpt: Run, source: Path, *flags: object) -> str:
    """Return the single line with which `prepare` refuses a source; no files are left."""
    out = source.parent / f"{source.name}.tokens"
    done = igpt("prepare", source, "-o", out, "--size", 8, "--colors", 4, "--workers", 1, *flags)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert not list(source.parent.glob(f"{out.name}*"))
    return done.stderr


def per_class(data: TokenDataset) -> dict[str, int]:
    """Return how many images of all splits each class has."""
    labels = np.concatenate([data[split].labels for split in data])
    assert data.class_names is not None
    return {name: int((labels == number).sum()) for number, name in enumerate(data.class_names)}


def left_out(data: TokenDataset) -> dict[str, Any]:
    return data.manifest["made"]["left_out"]


def test_metadata_above_the_splits(igpt: Run, case: Callable[[str], Path]):
    data, said = prepared(igpt, case("split_names_become_classes"))
    assert per_class(data) == {"a": 20, "b": 20, "c": 20}
    assert {split: len(data[split]) for split in data} == {"train": 36, "validation": 4, "test": 20}
    assert "3 classes" in said
    assert left_out(data) == {}


def test_joined_tars(igpt: Run, case: Callable[[str], Path]):
    data, _ = prepared(igpt, case("joined_tars") / "data")
    assert per_class(data) == {"0": 20, "1": 40}
    assert left_out(data) == {}


def test_files_that_are_left_out(igpt: Run, case: Callable[[str], Path]):
    folder = case("files_left_out")
    said = refusal(igpt, folder / "mixed")
    assert "41 of 61 files or images" in said
    assert "where --max-bad 0.01 allows 0" in said
    assert "--max-bad 0.68 continues without them" in said
    data, said = prepared(igpt, folder / "mixed", "--max-bad", 0.68)
    assert sum(len(data[split]) for split in data) == 20
    assert left_out(data) == {
        "files ending in .zip": {"count": 1, "first": "more.zip", "possible_images": True},
        "files without an ending": {"count": 10, "first": "no-ending-0", "possible_images": True},
        "files ending in .heic": {"count": 30, "first": "p0.heic", "possible_images": True},
    }
    line = said.splitlines()[1]
    assert line.startswith(
        "left out: files ending in .zip: 1 (first: more.zip); files without an ending: 10 (first: "
        "no-ending-0); "
        "files ending in .heic: 30 (first: p0.heic)"
    )
    done = igpt("inspect", data.path)
    assert "left out: files ending in .zip: 1 (first: more.zip); files without" in done.stdout
    assert json.loads(data.path.with_name("mixed.tokens.json").read_text())["left_out"] == left_out(
        data
    )


def test_metadata_that_lists_half_of_the_images(igpt: Run, case: Callable[[str], Path]):
    folder = case("files_left_out") / "half-listed"
    said = refusal(igpt, folder)
    assert "30 of 60 files or images" in said
    assert "images that no metadata file lists: 30 (first: train/30.png)" in said
    assert "--max-bad 0.5 continues without them" in said
    data, _ = prepared(igpt, folder, "--max-bad", 0.5)
    assert per_class(data) == {"a": 10, "b": 10, "c": 10}


def test_heic_alone(igpt: Run, case: Callable[[str], Path]):
    said = refusal(igpt, case("files_left_out") / "heic-only")
    assert "files ending in .heic: 30 (first: p0.heic)" in said
    assert "Pillow cannot decode HEIC here: convert to JPEG or PNG, or install pillow-heif" in said


@pytest.mark.parametrize(
    ("name", "classes"), [("country", ["DE", "NA", "US"]), ("code", ["01", "1", "2"])]
)
def test_values_stay_strings(igpt: Run, case: Callable[[str], Path], name: str, classes: list[str]):
    data, _ = prepared(igpt, case("words_as_classes") / name)
    assert per_class(data) == dict.fromkeys(classes, 20)
    assert left_out(data) == {}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tiny-imagenet-layout", {}),
        ("cover", {"labels (the images are kept without one)": 1}),
        ("thumbnail", {"hidden and system files": 1}),
    ],
)
def test_classes_by_depth(
    igpt: Run, case: Callable[[str], Path], name: str, expected: dict[str, int]
):
    folder = case("classes_by_depth") / name
    data, said = prepared(igpt, folder)
    assert per_class(data) == {"a": 20, "b": 20, "c": 20}
    assert {kind: entry["count"] for kind, entry in left_out(data).items()} == expected
    if name == "cover":
        assert (
            f"labels (the images are kept without one): 1 (first: train {folder}/train/cover.png)"
            in said
        )
        assert sum(len(data[split]) for split in data) == 61
    if name == "thumbnail":
        assert "hidden and system files: 1 (first: train/a/@eaDir/)" in said


def test_a_transparent_level_of_16_bits(case: Callable[[str], Path]):
    folder = case("transparent_grey")
    for name, grey in (
        ("16-bit-level-0-transparent.png", round(40000 / 257)),
        ("8-bit-level-0-transparent.png", 156),
    ):
        pixels = np.asarray(to_rgb(load(open_image(folder / name))))
        assert (pixels[:, :4] == 255).all()
        assert (pixels[:, 4:] == grey).all()


@pytest.mark.parametrize("inside", ["", "data.zip"])
def test_a_zip_of_images(igpt: Run, case: Callable[[str], Path], inside: str):
    data, _ = prepared(igpt, case("zip_of_images") / inside)
    assert per_class(data) == {"class0": 30, "class1": 30}
    assert left_out(data) == {}
