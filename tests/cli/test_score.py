"""`igpt score` on the command line: every image, the summary, maps, and the comparison of two
sources."""

import base64
import csv
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from igpt.data.images.transform import load_square
from igpt.data.tokens.dataset import TokenDataset
from igpt.evaluation.likelihood import losses_of, score
from igpt.evaluation.results import score_files
from igpt.model.config import ModelConfig
from igpt.model.transformer import ImageGPT
from igpt.report import record
from igpt.report.sections import maps_sections

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def model(short_run: Path) -> ImageGPT:
    return ImageGPT.from_pretrained(short_run / "model")


@pytest.fixture
def run(short_run: Path, tmp_path: Path) -> Path:
    """Return a copy of the run to write into."""
    shutil.copytree(short_run / "model", tmp_path / "run" / "model")
    return tmp_path / "run"


def read(path: Path) -> dict[str, object]:
    return json.loads(path.read_text())


def test_every_image_and_a_summary(
    igpt: Run, run: Path, model: ImageGPT, digits: TokenDataset, tmp_path: Path
) -> None:
    losses = score(model, digits["test"])
    for ending in ("csv", "jsonl"):
        done = igpt("score", run, digits.path, "-o", tmp_path / f"scores.{ending}")
        assert done.returncode == 0, done.stderr
    assert f"{losses.mean():.4f} nats/pixel +- " in done.stdout
    assert "over 180 test images of" in done.stdout
    assert "the palette represents the training images without error" in done.stdout
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert list(rows[0]) == list(lines[0]) == ["index", "image", "nats_per_pixel", "label", "class"]
    for index, (row, line, loss) in enumerate(zip(rows, lines, losses, strict=True)):
        assert (
            line["nats_per_pixel"] == float(row["nats_per_pixel"]) == pytest.approx(loss, abs=1e-6)
        )
        label = int(digits["test"].labels[index])
        assert (line["index"], line["image"], line["label"], line["class"]) == (
            index,
            f"row {index}",
            label,
            str(label),
        )
    result = read(tmp_path / "scores.json")
    assert (result["format"], result["version"], result["images"], result["split"]) == (
        "igpt-score",
        1,
        180,
        "test",
    )
    assert result["nats_per_pixel"] == pytest.approx(losses.mean(), abs=1e-12)
    assert result["standard_error"] == pytest.approx(losses.std(ddof=1) / np.sqrt(180))
    assert result["bits_per_pixel"] == pytest.approx(losses.mean() / np.log(2))
    assert result["palette"] == {"colors": 17, "fingerprint": digits.palette.fingerprint}
    assert result["palette_error"] == {
        "mse": 0.0,
        "psnr_db": None,
        "measured_on": "training images",
    }
    assert (result["precision"], result["source"]) == ("fp32", str(digits.path))
    assert result["environment"].keys() >= {"command", "igpt", "torch", "commit"}
    assert not (run / "score-digits.json").exists()


def test_two_runs_agree_exactly(igpt: Run, run: Path, tmp_path: Path, photographs: Path) -> None:
    for name in ("a", "b"):
        done = igpt(
            "score", run, photographs, "-o", tmp_path / f"{name}.csv", "--limit", 20, "--seed", 4
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    first, second = read(tmp_path / "a.json"), read(tmp_path / "b.json")
    for result in (first, second):
        del result["environment"]
    assert first == second
    assert (first["limit"], first["seed"], first["images"]) == (20, 4, 20)


def test_folders_of_images_are_scored(
    igpt: Run, run: Path, model: ImageGPT, photographs: Path
) -> None:
    done = igpt("score", run, photographs, "-o", run / "here" / "s.csv")
    assert done.returncode == 0, done.stderr
    result = read(run / "here" / "s.json")
    assert f"over 48 images of {photographs}" in done.stdout
    error = result["palette_error"]
    assert error["mse"] > 100, "seventeen greys"
    assert (
        f"the palette's mean squared error on these images is {error['mse']:.1f} per channel"
        in done.stdout
    )
    with (run / "here" / "s.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["class"] for row in rows} == {"across", "down"}
    assert [Path(row["image"]).parent.name for row in rows] == [row["class"] for row in rows]
    tokens = model.palette.transform(load_square(rows[7]["image"], 8)).reshape(1, -1)
    assert float(rows[7]["nats_per_pixel"]) == pytest.approx(
        losses_of(model, tokens).mean(), abs=2e-6
    )


def test_the_summary_is_written_to_the_run_or_the_current_folder(
    igpt: Run, run: Path, digits: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert igpt("score", run, digits.path, "--limit", 3).returncode == 0
    assert read(run / "score-digits.json")["images"] == 3
    assert igpt("score", run, digits.path, "--limit", 4).returncode == 0
    assert read(run / "score-digits.json")["images"] == 4, "it may be overwritten"
    shutil.copytree(run / "model", tmp_path / "bare")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert igpt("score", tmp_path / "bare", digits.path, "--limit", 3).returncode == 0
    assert [path.name for path in here.iterdir()] == ["score-digits.json"]


def test_the_results_of_several_sources_are_kept(
    igpt: Run, run: Path, digits: TokenDataset, photographs: Path, tmp_path: Path
) -> None:
    for words in ([digits.path], [digits.path, "--split", "validation"], [f"{photographs}/train"]):
        assert igpt("score", run, *words, "--limit", 3).returncode == 0
    names = ["score-digits-validation.json", "score-digits.json", "score-train.json"]
    assert [path.name for path in score_files(run)] == names
    before = [path.read_bytes() for path in score_files(run)]
    shutil.copytree(photographs / "train", tmp_path / "train")
    done = igpt("score", run, tmp_path / "train")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"has the result of {photographs}/train; choose another -o for" in done.stderr
    assert [path.read_bytes() for path in score_files(run)] == before


def test_a_relative_source_is_the_same_one_in_other_folders(
    igpt: Run, run: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another folder that the same words name is refused; a copy of both folders is not."""
    places = [tmp_path / name for name in ("one", "two", "moved")]
    shutil.copytree(photographs / "train" / "down", places[0] / "some")
    shutil.copytree(places[0], places[1])
    own = places[0] / "run"
    shutil.copytree(run, own, ignore=shutil.ignore_patterns("score*"))
    words = ["score", own, "--limit", "2"]
    monkeypatch.chdir(places[0])
    assert igpt(*words, "some").returncode == 0
    monkeypatch.chdir(tmp_path)
    assert igpt(*words, "one/some").returncode == 0
    monkeypatch.chdir(places[1])
    done = igpt(*words, "some")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"has the result of {places[0] / 'some'}; choose another -o for some" in done.stderr
    monkeypatch.chdir(places[0])
    assert igpt(*words, "some").returncode == 0
    places[0].rename(places[2])
    monkeypatch.chdir(places[2])
    assert igpt("score", "run", "--limit", "2", "some").returncode == 0


def test_a_single_image_is_a_source(
    igpt: Run, run: Path, photographs: Path, tmp_path: Path
) -> None:
    image = photographs / "train" / "down" / "00.png"
    done = igpt("score", run, image, "-o", tmp_path / "one.csv")
    assert done.returncode == 0, done.stderr
    assert "over 1 images" in done.stdout
    done = igpt("prepare", image, "-o", tmp_path / "tokens", "--size", 8)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_maps_are_drawn_and_reported(
    igpt: Run, run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    done = igpt("score", run, digits.path, "--maps", tmp_path / "maps.png", "--count", 3)
    assert done.returncode == 0, done.stderr
    maps = read(run / "score-digits.json")["maps"]
    assert (maps["file"], maps["rows"]) == (str(tmp_path / "maps.png"), [0, 60, 120])
    section, *others = maps_sections(record.Run(run))
    assert not others
    shown = base64.b64decode(section.picture.uri.partition(",")[2])
    assert (shown, section.code) == ((tmp_path / "maps.png").read_bytes(), "maps.png")
    pixels = np.asarray(Image.open(tmp_path / "maps.png").convert("RGB")).astype(int)
    first = digits.palette.inverse_transform(digits["test"].rows([0])).reshape(8, 8, 3)
    tops = np.flatnonzero(
        pixels[:, 24:100].max(axis=(1, 2)) < 5
    )  # of the first picture, whose corner is black
    shown = pixels[tops[0] + 14 : tops[0] + 8 * 29 : 29, 24 + 14 : 24 + 8 * 29 : 29]
    np.testing.assert_allclose(shown, first, atol=2)


def test_two_sources_are_compared(
    igpt: Run, run: Path, model: ImageGPT, digits: TokenDataset, photographs: Path
) -> None:
    done = igpt("score", run, digits.path, "--against", photographs)
    assert done.returncode == 0, done.stderr
    others = read(run / "score-digits.json")["against"]
    told = others["told_apart"]
    assert (others["images"], others["split"], others["source"]) == (48, "all", str(photographs))
    assert igpt("score", run, photographs, "-o", run / "other.csv").returncode == 0
    with (run / "other.csv").open(newline="") as file:
        theirs = [float(row["nats_per_pixel"]) for row in csv.DictReader(file)]
    ours = score(model, digits["test"])
    expected = roc_auc_score([0] * 180 + [1] * 48, np.concatenate([ours, theirs]))
    assert told["auroc"] == pytest.approx(expected, abs=1e-4)
    assert others["nats_per_pixel"] == pytest.approx(np.mean(theirs), abs=1e-5)
    assert others["standard_error"] == pytest.approx(np.std(theirs, ddof=1) / 48**0.5, abs=1e-5)
    low, high = told["interval_95"]
    assert f"nats/pixel: {told['auroc']:.4f} (95 % interval {low:.4f} to {high:.4f})" in done.stdout
    assert done.stdout.count("palette") == 2, "in addition to the two likelihoods"
    # The split is that of the first source; the second has no split with this name.
    done = igpt("score", run, digits.path, "--split", "validation", "--against", photographs)
    assert done.returncode == 0, done.stderr
    backwards = igpt("score", run, photographs, "--label-column", "none", "--against", digits.path)
    assert backwards.returncode == 0, backwards.stderr
    assert read(next(run.glob("score-photographs*.json")))["against"]["told_apart"][
        "auroc"
    ] == pytest.approx(1 - told["auroc"], abs=1e-9)


def test_bad_images_are_reported(igpt: Run, run: Path, photographs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(photographs / "train" / "down", folder)
    (folder / "04.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    done = igpt("score", run, folder)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "images that do not decode: 1, where --max-bad 0.01 allows 0" in done.stderr
    assert "04.png" in done.stderr
    assert not list(run.glob("*.json"))
    done = igpt("score", run, folder, "--max-bad", 0.1, "-o", tmp_path / "s.csv")
    assert done.returncode == 0, done.stderr
    assert f"left out: images that do not decode: 1 (first: {folder / '04.png'}: " in done.stdout
    assert [str(folder / "04.png") in line for line in read(tmp_path / "s.json")["skipped"]] == [
        True
    ]
    lines = (tmp_path / "s.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:4]] == ["0", "1", "3"], "rows keep their numbers"


def test_a_folder_of_images_may_have_a_dataset_json(
    igpt: Run, run: Path, photographs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(photographs / "train" / "down", folder)
    (folder / "dataset.json").write_text('{"labels": null}')
    assert igpt("score", run, folder).returncode == 0


def test_mistakes_are_one_line_and_leave_nothing(
    igpt: Run, run: Path, digits: TokenDataset, photographs: Path, tmp_path: Path
) -> None:
    shape = {"resolution": 8, "n_colors": 17, "n_layer": 1, "n_embd": 16, "n_head": 2}
    bert, bare = tmp_path / "bert", tmp_path / "bare"
    ImageGPT(ModelConfig.layered(shape, {"objective": "bert"}), digits.palette).save_pretrained(
        bert
    )
    ImageGPT(ModelConfig.layered(shape)).save_pretrained(bare)
    broken = ImageGPT(ModelConfig.layered(shape), digits.palette)
    torch.nn.init.constant_(broken.wpe.weight, torch.nan)
    broken.save_pretrained(tmp_path / "broken")
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.csv").mkdir()
    for words, message in (
        ((run, tmp_path / "nowhere"), "no folder or file"),
        ((run, digits.path, "--split", "tests"), "has no split 'tests'; did you mean 'test'?"),
        ((run, photographs, "--split", "test"), "has no split 'test'; choose from: train"),
        ((run, digits.path, "--limit", 0), "limit = 0"),
        (
            (run, digits.path, "-o", tmp_path / "s.tsv"),
            "scores are written to a .csv or .jsonl file, not to s.tsv",
        ),
        (
            (run, digits.path, "-o", tmp_path / "notes.csv"),
            "notes.json holds something else already",
        ),
        ((run, digits.path, "-o", tmp_path / "file" / "s.csv"), "s.csv cannot be written"),
        ((run, digits.path, "-o", tmp_path / "folder.csv"), "folder.csv is a folder"),
        (
            (run, digits.path, "--maps", tmp_path / "m.jpg"),
            "images are written as .png, not as m.jpg",
        ),
        (
            (run, digits.path, "--maps", tmp_path / "m.png", "--count", 181),
            "181 images are asked for",
        ),
        ((run, digits.path, "--maps", tmp_path / "m.png", "--count", 0), "maps of 1 to 200 images"),
        ((run, digits.path, "--against", tmp_path / "nowhere"), "no folder or file"),
        (
            (run, digits.path, "--against", photographs, "--limit", 1),
            "two or more images of each, not 1 and 1",
        ),
        ((bert, digits.path), "trained as 'autoregressive'; this one is 'bert'"),
        ((bare, photographs), "holds no palette"),
        ((tmp_path / "broken", digits.path), "likelihoods are not finite"),
    ):
        before = sorted(path for path in tmp_path.rglob("*"))
        done = igpt("score", *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), (words, done.stderr)
        assert message in done.stderr, words
        assert sorted(path for path in tmp_path.rglob("*")) == before, words
    assert (tmp_path / "notes.json").read_text() == '{"mine": 1}'


def test_a_read_only_folder() -> None:
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "import igpt.files\n"  # before the user changes, who may not be able to read it
        "from igpt.outputs import require_writable\n"
        "if os.getuid() == 0: os.setuid(65534)\n"  # root may write everywhere
        "for name in sys.argv[1:]:\n"
        "    try: require_writable(Path(name))\n"
        "    except ValueError as error: print(error)\n"
        "    else: print('fine')\n"
    )
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        locked, free = Path(folder) / "locked", Path(folder) / "free"
        locked.mkdir()
        free.mkdir()
        Path(folder).chmod(0o755)
        locked.chmod(0o555)
        free.chmod(0o777)
        command = [sys.executable, "-c", program, str(locked / "s.csv"), str(free / "s.csv")]
        done = subprocess.run(command, capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert (
        first
        == f"{locked / 's.csv'} cannot be written: you have no permission to write in {locked}"
    ), done
    assert second == "fine"
