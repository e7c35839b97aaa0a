"""The scripts of the manual for batch systems, run as the systems run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from igpt.data.tokens.dataset import TokenDataset
from igpt.evaluation.likelihood import score
from igpt.model.transformer import ImageGPT

PAGE = Path(__file__).parents[2] / "docs" / "many-machines.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(language: str, word: str) -> list[str]:
    """Return the blocks of the page in a language that contain a word."""
    found = BLOCK.findall(PAGE.read_text())
    return [block for kind, block in found if kind == language and word in block]


@pytest.fixture
def folder(
    short_run: Path, digits: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Return a working directory with the run and the tokens of the manual."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(short_run)
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "digits").symlink_to(digits.path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def igpt_in_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "igpt"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m igpt "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def losses(path: Path) -> np.ndarray:
    return np.array([float(line.split(",")[2]) for line in path.read_text().splitlines()[1:]])


def require_scores(folder: Path, digits: TokenDataset) -> None:
    """Check the merged scores against those of this process."""
    model = ImageGPT.from_pretrained(folder / "runs" / "tiny")
    expected = score(model, digits["train"]).round(6)
    np.testing.assert_array_equal(losses(folder / "train.csv"), expected)


@pytest.mark.usefixtures("igpt_in_path")
def test_the_slurm_script(folder: Path, digits: TokenDataset) -> None:
    """Slurm starts the script once per number of the array, and in this test kills the second
    task."""
    (script,) = blocks("bash", "#SBATCH")
    (submission,) = blocks("bash", "--dependency")
    script = script.replace("1-16", "1-2").replace("parts=16", "parts=2")
    first, last = map(int, re.search(r"--array=(\d+)-(\d+)", script).groups())

    def submit(killed: int | None = None) -> None:
        for number in range(first, last + 1):
            task = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_CPUS_PER_TASK": "1"}
            if number != killed:
                subprocess.run(["bash", "-c", script], check=True, env=os.environ | task)

    submit(killed=2)
    assert [path.name for path in folder.glob("train.csv*")] == ["train.csv.1-of-2"]
    submit()
    merge = re.search(r'--wrap "(.*)"', submission)[1]
    subprocess.run(["bash", "-c", merge], check=True)
    require_scores(folder, digits)


@pytest.mark.usefixtures("igpt_in_path")
@pytest.mark.parametrize(
    ("word", "changes"),
    [
        ("submitit", {"parts = 16": "parts = 2", "cpus_per_task=4": "cpus_per_task=1"}),
        ("datatrove", {"tasks=16": "tasks=2", "workers=4": "workers=1"}),
    ],
)
def test_the_python_programs(
    word: str, changes: dict[str, str], folder: Path, digits: TokenDataset
) -> None:
    (program,) = blocks("python", word)
    for before, after in changes.items():
        assert before in program
        program = program.replace(before, after)
    (folder / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    require_scores(folder, digits)
