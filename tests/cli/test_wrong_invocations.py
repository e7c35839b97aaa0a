"""A small part of `benchmarks/wrong_invocations.py`: mistakes are refused in one line, and nothing
is left behind."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from igpt.cli import COMMANDS

from ..helpers.invocations.execution import Case, Limits, Outcome, run_cases

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the harness reads /proc")
PROGRAM = Path(__file__).parents[2] / "benchmarks" / "wrong_invocations.py"
LIMITS = Limits(seconds=1, idle=0.5)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what the program records for a few dozen cases, with every command."""
    folder = tmp_path_factory.mktemp("wrong")
    flags = ["--every", 60, "--most", 5, "--programs", 1, "--jobs", 2, "--quick"]
    words = [sys.executable, PROGRAM, *flags, "--folder", folder, "--out", folder / "result.json"]
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


@pytest.mark.parametrize("verb", [*COMMANDS])
def test_mistakes_are_refused_in_one_line_and_leave_nothing(
    result: dict[str, Any], verb: str
) -> None:
    assert result["by_command"][verb]["cases"] > 0
    faulty = [one for one in result["faulty"] if one["verb"] == verb]
    assert not faulty, json.dumps(faulty, indent=2)


def test_every_group_of_mistakes_is_covered(result: dict[str, Any]) -> None:
    assert set(result["by_group"]) == {"flags", "paths", "files", "environment"}
    assert result["generated"] > 600
    assert result["n"] > 100


def outcome(words: list[str], folder: Path) -> Outcome:
    """Return what the harness reports about a program that does what its first word says."""
    (folder / "samples").mkdir()
    (folder / "samples" / "file").write_text("as it was")
    case = Case("flags", "kind", "name", tuple(words), needs=("file",))
    # The processes are forked from this one, which has already run tests of all kinds.
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    limits = replace(LIMITS, memory=resident + (1 << 30))
    if "memory" in words[0]:
        limits = replace(limits, seconds=60)
    return next(run_cases([case], folder / "samples", folder / "cases", program, limits, 1))


def program(words: list[str]) -> int:
    """End as the first word says."""
    print("the reason" if words[0] != "two lines" else "a line\nanother", file=sys.stderr)
    if words[0] == "traceback":
        raise KeyError("no such key")
    if words[0] == "a wait without an end":
        os.read(os.pipe()[0], 1)
    if words[0] == "work without an end":
        while True:
            pass
    if words[0] == "memory without an end":
        held = []
        while True:
            held.append(bytearray(64 << 20))
    if words[0] == "a new file":
        Path("new").touch()
    if words[0] == "a changed file":
        Path("file").write_text("otherwise")
    if words[0] == "a missing file":
        Path("file").unlink()
    if words[0] == "a file in a temporary folder":
        Path(os.environ["TMPDIR"], "left").touch()
    if words[0] == "a process" and os.fork() == 0:
        time.sleep(100)
    if words[0] == "a signal":
        os.kill(os.getpid(), 9)
    return {"accepted": 0, "another exit code": 1}.get(words[0], 2)


@pytest.mark.parametrize(
    ("ending", "faults"),
    [
        ("refused", []),
        ("accepted", []),
        ("traceback", ["traceback", "exit code"]),
        ("a wait without an end", ["hang"]),
        ("work without an end", ["hang"]),
        ("memory without an end", ["memory"]),
        ("a new file", ["left behind"]),
        ("a changed file", ["left behind"]),
        ("a missing file", ["left behind"]),
        ("a file in a temporary folder", ["left behind"]),
        ("a process", ["processes"]),
        ("a signal", ["killed"]),
        ("another exit code", ["exit code"]),
        ("two lines", ["lines"]),
    ],
)
def test_the_harness_detects_faults(ending: str, faults: list[str], tmp_path: Path) -> None:
    found = outcome([ending], tmp_path)
    assert found.faults == faults
    assert found.verdict == (faults[0] if faults else ending)


def test_the_harness_names_leftovers_and_the_failing_frame(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert outcome(["a changed file"], tmp_path / "one").left == ["~ file"]
    found = outcome(["traceback"], tmp_path / "two")
    assert found.message == "KeyError: 'no such key'"
    assert found.frames[-1].endswith("program")
