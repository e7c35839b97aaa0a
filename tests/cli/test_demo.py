"""The complete demonstration, with few steps, on digits and on a folder of photographs;
interrupted, it is resumed."""

import json
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from igpt import builtin_models
from igpt.data.images.grid import grid_counts
from igpt.data.images.photographs import photographs
from igpt.data.tokens.dataset import TokenDataset
from igpt.evaluation.probe_classifier import ProbeClassifier
from igpt.files import read_json
from igpt.model.transformer import ImageGPT


@pytest.fixture(autouse=True)
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce what the demonstration samples and probes."""
    for name, number in (
        ("_PROBE_IMAGES", 150),
        ("_COMPLETED", 2),
        ("_COMPLETIONS", 2),
        ("_SAMPLES", 4),
    ):
        monkeypatch.setattr(import_module("igpt.cli.pipeline"), name, number)
    monkeypatch.setattr(builtin_models, "FOLDER", Path("no-built-in-models"))


def test_photographs_are_completed_with_the_built_in_model(
    igpt, builtin_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = igpt("demo", "-o", run, "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert "5. Complete photographs with a built-in model\n" in done.stdout
    assert {file.stem for file in (run / "photographs").iterdir()} == photographs().keys()
    picture = Image.open(run / "photographs.png")
    counts = grid_counts(picture, ImageGPT.from_pretrained(builtin_model).config.resolution)
    assert counts == [6] * 8  # original, given pixels, four completions
    assert "Photographs, completed by a built-in model" in (run / "report.html").read_text()


def test_the_demo_of_digits(igpt, tmp_path: Path) -> None:
    done = igpt("demo", "-o", tmp_path / "run", "--steps", 3)
    assert done.returncode == 0, done.stderr
    for words in (
        "validation loss, nats/pixel",
        "unigram",
        "uniform",
        "raw pixels",
        "untrained",
        "selected by validation",
        "report",
    ):
        assert words in done.stdout, words
    assert "   left out: this build of igpt has no built-in model\n" in done.stdout
    assert "built-in model" not in (tmp_path / "run" / "report.html").read_text()
    before = (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns
    again = igpt("demo", "-o", tmp_path / "run", "--steps", 3)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns == before, (
        "repeated"
    )
    for words in (["--steps", 4], []):
        other = igpt("demo", "-o", tmp_path / "run", *words)
        assert (other.returncode, other.stderr.count("\n")) == (2, 1)
        assert re.search(
            r"run was trained with steps = 3, not \d+; give --steps 3, or choose another -o",
            other.stderr,
        )
    assert ProbeClassifier.of_probe(tmp_path / "run" / "probe.json") is not None
    assert not list((tmp_path / "run").glob(".*")), "no lock and nothing hidden is left"


def test_the_demo_of_photographs(igpt, photographs: Path, tmp_path: Path) -> None:
    done = igpt("demo", "--data", photographs, "-o", tmp_path / "run", "--steps", 3)
    assert done.returncode == 0, done.stderr
    data = TokenDataset(tmp_path / "run" / "tokens")
    assert data.class_names == ["across", "down"]
    assert len(read_json(tmp_path / "run" / "probe.json", "probe")["layers"]) > 2
    other = igpt("demo", "-o", tmp_path / "run")
    assert other.returncode == 2
    assert "is a run of" in other.stderr
    more = tmp_path / "more"
    shutil.copytree(photographs, more)
    manifest = json.loads((tmp_path / "run" / "tokens" / "dataset.json").read_text())
    manifest["source"] = str(more)
    (tmp_path / "run" / "tokens" / "dataset.json").write_text(json.dumps(manifest))
    shutil.copy(more / "train" / "down" / "00.png", more / "train" / "down" / "100.png")
    other = igpt("demo", "--data", more, "-o", tmp_path / "run", "--steps", 3)
    assert other.returncode == 2
    assert f"is a run of 48 images, and {more} has 49 now; choose another -o" in other.stderr


def test_square_brackets_and_colons_in_names_have_no_effect(
    igpt, photographs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "q[" / "old]" / "run [red] :smile: [x]"
    source = folder / "images [bold]"
    shutil.copytree(photographs, source)
    done = igpt("demo", "--data", source, "-o", folder / "run", "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert f"1. Palette and tokens of {source}\n" in done.stdout
    assert f"The report, with pictures: {folder / 'run' / 'report.html'}\n" in done.stdout
    record = {"format": "igpt-probe", "version": 2, "skipped": "no [/labels] in [x]"}
    (folder / "run" / "probe.json").write_text(json.dumps(record))
    again = igpt("demo", "--data", source, "-o", folder / "run", "--steps", 2)
    assert again.returncode == 0, again.stderr
    assert "no probe: no [/labels] in [x]" in again.stdout


def test_a_probe_without_baselines_is_shown(igpt, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert igpt("demo", "-o", run, "--steps", 2).returncode == 0
    assert igpt("probe", run, run / "tokens", "--limit", 150, "--no-baselines").returncode == 0
    done = igpt("demo", "-o", run, "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert "(selected by validation accuracy)" in done.stdout
    assert "raw pixels" not in done.stdout.partition("Results")[2]
    for name, content in (("probe.json", "[]"), ("metrics.jsonl", ""), ("config.yaml", "- a")):
        whole = (run / name).read_bytes()
        (run / name).write_text(content)
        done = igpt("demo", "-o", run, "--steps", 2)
        assert done.returncode in (0, 2), done.stderr
        assert done.stderr.count("\n") == done.returncode / 2, done.stderr
        (run / name).write_bytes(whole)


def test_two_demos_in_one_folder_are_refused(igpt, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from igpt.locks import exclusive_folder\n"
        "with exclusive_folder(Path(sys.argv[1])): print(flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        first.stdout.readline()
        done = igpt("demo", "-o", tmp_path / "run")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"is being written by process {first.pid} on " in done.stderr
        first.communicate(b"\n")
    assert not (tmp_path / "run").exists()
