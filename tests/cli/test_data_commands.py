"""`igpt palette` and `igpt prepare` on the command line; parts and `inspect` have their own tests
in `data/`."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt.data.images.palette import Palette
from igpt.data.tokens.dataset import TokenDataset

Run = Callable[..., object]


def test_a_palette_is_fitted_reported_and_used(igpt: Run, photographs: Path, tmp_path: Path):
    done = igpt("palette", photographs, "-o", tmp_path / "p.npy", "--size", 8, "--colors", 16)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "p.json").read_text())
    palette = Palette.load(tmp_path / "p.npy")
    assert report["fingerprint"] == palette.fingerprint
    assert (
        f"16 colours (mean squared error {report['mse']:.1f} per channel, {report['psnr_db']:.1f} "
        "dB PSNR)" in done.stdout
    )
    assert report["psnr_db"] == pytest.approx(10 * np.log10(255**2 / report["mse"]))
    assert sum(report["share"]) == pytest.approx(1, abs=1e-4)
    assert Image.open(tmp_path / "p.png").width == 12 * 66 + 2
    done = igpt(
        "prepare",
        photographs,
        "-o",
        tmp_path / "t",
        "--size",
        8,
        "--palette",
        tmp_path / "p.npy",
        "--views",
        2,
    )
    assert done.returncode == 0, done.stderr
    data = TokenDataset(tmp_path / "t")
    assert data.palette.fingerprint == palette.fingerprint
    assert done.stdout == (
        f"{tmp_path}/t: {len(data['train'])} train, 5 validation, 5 test; 8 px, 2 classes, 16 "
        "colours "
        f"(mean squared error {report['mse']:.1f} per channel, {report['psnr_db']:.1f} dB PSNR)\n"
    )


def test_the_error_of_a_given_palette(igpt: Run, photographs: Path, tmp_path: Path):
    Palette.from_centers([[-1, -1, -1], [1, 1, 1]]).save(tmp_path / "two.npy")
    words = ("palette", photographs, "-o", tmp_path / "p.npy", "--size", 8)
    done = igpt(*words, "--palette", tmp_path / "two.npy")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p.npy").read_bytes() == (tmp_path / "two.npy").read_bytes()
    assert json.loads((tmp_path / "p.json").read_text())["mse"] > 1000


def test_a_palette_is_written_to_the_current_folder_by_default(
    igpt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    done = igpt("palette", "digits", "--size", 8)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        "palette.npy",
        "palette.json",
        "palette.png",
    }
    assert len(Palette.load(tmp_path / "palette.npy")) == 17


def test_files_that_are_not_palettes_are_refused(igpt: Run, photographs: Path, tmp_path: Path):
    for words, message in (
        (
            ("palette", photographs, "-o", tmp_path / "p.png"),
            "a palette is written to a .npy file, not to p.png",
        ),
        (("palette", tmp_path / "nowhere", "-o", tmp_path / "p.npy"), "no folder or file"),
        (
            ("palette", photographs, "-o", tmp_path / "p.npy", "--palette", tmp_path / "x.npy"),
            "no palette at",
        ),
        (("palette", photographs, "-o", tmp_path / "p.npy", "--colors", 1), "colors = 1"),
        (("prepare", photographs, "-o", photographs / "t"), "t is inside "),
        (("prepare", photographs, "-o", "."), "'.' cannot be the output"),
        (("prepare", photographs, "-o", ".", "--shard", "1/2"), "'.' cannot be the output"),
        (("prepare", "--merge", "-o", tmp_path / "t", "--shard", "1/2"), "give one of them"),
    ):
        done = igpt(*words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """Write OpenAI's arrays of 4 px in a palette of 6 colours, with one-hot classes; there are no
    test images."""
    generator = np.random.default_rng(0)
    np.save(tmp_path / "kmeans_centers.npy", generator.uniform(-1, 1, (6, 3)).astype(np.float32))
    for name, count in (("tr", 30), ("va", 6)):
        np.save(
            tmp_path / f"set_{name}X.npy", generator.integers(0, 6, (count, 16)).astype(np.uint8)
        )
        np.save(tmp_path / f"set_{name}Y.npy", np.eye(3)[np.arange(count) % 3])
    return tmp_path / "set"


def test_released_tokens_are_kept_as_they_are(
    igpt: Run, released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done = igpt("prepare", released, "-o", tmp_path / "t", "--size", 4)
    assert done.returncode == 0, done.stderr
    data = TokenDataset(tmp_path / "t")
    assert [len(data[split]) for split in data] == [27, 6, 3]
    np.testing.assert_array_equal(
        data["validation"].rows(np.arange(6)), np.load(f"{released}_vaX.npy")
    )
    np.testing.assert_array_equal(data["validation"].labels, np.arange(6) % 3)
    assert data.palette.fingerprint == Palette.load(tmp_path / "kmeans_centers.npy").fingerprint
    given = {tuple(row) for row in np.load(f"{released}_trX.npy").tolist()}
    assert {
        tuple(row)
        for split in ("train", "test")
        for row in data[split].rows(np.arange(len(data[split]))).tolist()
    } == given
    assert "4 px, 3 classes, 6 colours (tokens as they were given)" in done.stdout
    assert igpt("inspect", tmp_path / "t").returncode == 0
    monkeypatch.chdir(tmp_path)
    relative = igpt("inspect", "t").stdout.splitlines()
    assert relative[0].startswith("t: 4 px, ")
    assert relative[-1].startswith("t.png: a sheet of training images; t.json: ")


def test_inconsistent_released_tokens_are_refused(igpt: Run, released: Path, tmp_path: Path):
    done = igpt("prepare", released, "-o", tmp_path / "t")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "holds tokens of 4 px; --size 4" in done.stderr
    done = igpt("prepare", released, "-o", tmp_path / "t", "--size", 4, "--views", 1)
    assert "which cannot be cropped at random; leave --views out" in done.stderr
    tokens = np.load(f"{released}_trX.npy")
    tokens[3, 3] = 6
    np.save(f"{released}_trX.npy", tokens)
    done = igpt("prepare", released, "-o", tmp_path / "t", "--size", 4)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "tokens 0 to 6 in a palette of 6 colours" in done.stderr
    (tmp_path / "kmeans_centers.npy").unlink()
    done = igpt("prepare", released, "-o", tmp_path / "u", "--size", 4)
    assert "holds tokens; name their palette: --palette kmeans_centers.npy" in done.stderr
    assert not (tmp_path / "t").exists()
