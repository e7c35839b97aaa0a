"""The README's commands and its Python code run as written."""

import re
import shlex
from pathlib import Path

import pytest

from igpt.evaluation.results import best_row, read_probe, read_test

README = Path(__file__).parent.parent / "README.md"
ABSENT = (
    "could be loaded|arrays are missing|no such file|no (token data set|model directory|run "
    "directory|checkpoint|parts|built-in model)"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_commands_and_python_run_as_written(
    igpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, steps = blocks("bash")
    assert [shlex.split(line, comments=True) for line in first.splitlines()] == [
        ["make", "demo"],
        ["make", "test"],
    ]
    for line in steps.replace("\\\n", " ").splitlines():
        command, *words = shlex.split(line, comments=True)
        assert command == "igpt"
        done = igpt(*words)
        assert done.returncode == 0, (line, done.stderr)
    for made in (
        "probe.json",
        "samples.png",
        "completions.png",
        "report.html",
        "model/config.json",
    ):
        assert (tmp_path / "runs" / "tiny" / made).exists(), made
    probed = best_row(read_probe(tmp_path / "runs" / "tiny" / "probe.json"))["test_accuracy"]
    tuned = read_test(tmp_path / "runs" / "classes" / "test.json")["test_accuracy"]
    assert min(probed, tuned) > 0.85  # which one is higher depends on rounding
    for code in blocks("python"):
        exec(code, {})


def test_other_commands_parse(igpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that need a download or a GPU: their flags exist, and they stop at the first missing
    input."""
    monkeypatch.chdir(tmp_path)
    for constants in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", True)
    text = "".join(blocks("console")).replace("\\\n", " ")
    for line in text.splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        words = words[words.index("igpt") + 1 :]
        done = igpt(*words)
        assert done.returncode == 2, line
        assert re.search(ABSENT, done.stderr), (
            line,
            done.stderr,
        )


def test_every_file_that_the_readme_names_exists() -> None:
    for path in re.findall(r"`((?:tests|docs)/[\w/.]+)`", README.read_text()):
        assert (README.parent / path).exists(), path
