"""The whole story at toy length, on digits and on a folder of photographs; interrupted, it goes on."""

from pathlib import Path

import pytest

from igpt import demo
from igpt.data.tokens import TokenDataset
from igpt.files import read_json


@pytest.fixture(autouse=True)
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the demo draws and probes, in small."""
    for name, number in (("_PROBE_IMAGES", 150), ("_COMPLETED", 2), ("_COMPLETIONS", 2), ("_SAMPLES", 4)):
        monkeypatch.setattr(demo, name, number)


def test_the_story_of_digits(igpt, tmp_path: Path) -> None:
    done = igpt("demo", "-o", tmp_path / "run", "--steps", 3)
    assert done.returncode == 0, done.stderr
    for words in (
        "validation loss, nats/pixel",
        "unigram",
        "uniform",
        "raw pixels",
        "untrained",
        "chosen on",
        "report",
    ):
        assert words in done.stdout, words
    assert (tmp_path / "run" / "report.html").exists()
    before = (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns
    again = igpt("demo", "-o", tmp_path / "run", "--steps", 3)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns == before, "done twice"


def test_the_story_of_photographs(igpt, photographs: Path, tmp_path: Path) -> None:
    done = igpt("demo", "--data", photographs, "-o", tmp_path / "run", "--steps", 3)
    assert done.returncode == 0, done.stderr
    data = TokenDataset(tmp_path / "run" / "tokens")
    assert data.class_names == ["across", "down"]
    assert len(read_json(tmp_path / "run" / "probe.json", "probe")["layers"]) > 2
    other = igpt("demo", "-o", tmp_path / "run")
    assert other.returncode == 2
    assert "is a run of" in other.stderr


def test_the_story_without_labels_says_why_there_is_no_probe(
    igpt, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for number, file in enumerate(sorted(photographs.rglob("*.png"))):
        (plain / f"{number}.png").write_bytes(file.read_bytes())
    done = igpt("demo", "--data", plain, "-o", tmp_path / "run", "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert "no probe: a probe needs labels" in done.stdout
    assert "needs labels" in (tmp_path / "run" / "report.html").read_text()
