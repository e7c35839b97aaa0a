"""Steps run once, in order, in parallel, and are resumed after every kind of end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from igpt.errors import InputError, Interrupted
from igpt.reproduction.runner import LOGS, RECORD, StepsFailed, read_records, run_steps
from igpt.reproduction.steps import Step

from ..helpers.commands import PROGRAM

# A program that runs one slow step in the given folder.
_SLOW_STEP = f"""
import sys
from pathlib import Path
from igpt.reproduction.runner import run_steps
from igpt.reproduction.steps import Step
step = Step("slow", ("slow", "pid"))
run_steps([step], Path(sys.argv[1]), {{}}, jobs=1, say=print, program={PROGRAM!r})
"""


def go(
    steps: list[Step], folder: Path, jobs: int = 2, minutes: float | None = None
) -> tuple[bool, list[str]]:
    lines: list[str] = []
    done = run_steps(
        steps,
        folder,
        read_records(folder),
        jobs=jobs,
        minutes=minutes,
        say=lines.append,
        program=PROGRAM,
    )
    return done, lines


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def test_steps_run_once_and_after_their_inputs(tmp_path: Path) -> None:
    steps = [
        Step("last", ("need", "b"), after=("second",)),
        Step("second", ("write", "b"), after=("first",)),
        Step("first", ("write", "a")),
    ]
    assert go(steps, tmp_path)[0]
    assert go(steps, tmp_path)[0]
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == "once\n"
    assert [record["ended"] for record in read_records(tmp_path).values()] == ["done"] * 3
    assert (tmp_path / LOGS / "first.log").read_text() == "$ igpt write a\n"


def test_steps_in_parallel_and_in_sequence(tmp_path: Path) -> None:
    """The first step waits for a file of the second one."""
    steps = [Step("waits", ("wait", "made")), Step("makes", ("write", "made"))]
    assert go(steps, tmp_path / "two", jobs=2)[0]
    done, said = go(steps, tmp_path / "one", jobs=1, minutes=0.02)
    assert not done
    assert "0 of 2 steps are done; run the same command again to resume" in said[-1]
    assert read_records(tmp_path / "one")["waits"]["ended"] == "stopped"


def test_the_cores_are_divided_among_steps(tmp_path: Path) -> None:
    before = os.environ.get("OMP_NUM_THREADS")
    for jobs in (1, 2, 64):
        go([Step(f"{jobs}", ("threads", f"{jobs}"))], tmp_path, jobs=jobs)
        assert int((tmp_path / f"{jobs}").read_text()) == max(
            1, len(os.sched_getaffinity(0)) // jobs
        )
    assert os.environ.get("OMP_NUM_THREADS") == before


def test_a_failure_is_reported_and_independent_steps_run(tmp_path: Path) -> None:
    steps = [
        Step("bad", ("fail", "no", "such", "file")),
        Step("after it", ("write", "never"), after=("bad",)),
        Step("apart", ("write", "a")),
        Step("later", ("need", "a"), after=("apart",)),
    ]
    told = r"step bad failed \(exit code 2\): no such file; .*bad\.log \(2 of 4 steps are done\)"
    with pytest.raises(StepsFailed, match=told):
        go(steps, tmp_path, jobs=1)
    ended = {name: record["ended"] for name, record in read_records(tmp_path).items()}
    assert ended == {"bad": "failed", "apart": "done", "later": "done"}
    assert not (tmp_path / "never").exists()
    steps[0] = Step("bad", ("write", "mended"))
    assert go(steps, tmp_path)[0]
    assert (tmp_path / "a").read_text() == "once\n"


def test_an_optional_step_is_skipped_on_a_user_error(tmp_path: Path) -> None:
    steps = [Step("own", ("fail", "no labels"), optional=True), Step("else", ("write", "a"))]
    done, said = go(steps, tmp_path, jobs=1)
    assert done
    assert said[0] == "own: skipped (no labels)"
    assert {name: record["ended"] for name, record in read_records(tmp_path).items()} == {
        "own": "skipped",
        "else": "done",
    }
    with pytest.raises(InputError, match="step own failed"):
        go([Step("own", ("kill", "me"), optional=True)], tmp_path / "other")


def test_an_exception_leaves_nothing_running(tmp_path: Path) -> None:
    """Printing the end of a step fails while another step runs."""
    steps = [Step("slow", ("slow", "pid")), Step("first", ("wait", "pid"))]

    def say(line: str) -> None:
        raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="the terminal is gone"):
        run_steps(steps, tmp_path, {}, jobs=2, say=say, program=PROGRAM)
    assert (tmp_path / "pid.stopped").exists()
    assert read_records(tmp_path)["slow"]["ended"] == "stopped"


def test_a_folder_that_prepare_has_finished_is_accepted(tmp_path: Path) -> None:
    """A kill may happen between the end of a step and its record."""
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "dataset.json").touch()
    assert go([Step("tokens", ("prepare", "source", "-o", "tokens"))], tmp_path)[0]


def test_a_killed_step_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"step dies failed \(exit code -9\): \$ igpt kill me"):
        go([Step("dies", ("kill", "me"))], tmp_path)


def test_what_does_not_fit_into_the_time_left_is_not_started(tmp_path: Path) -> None:
    """A group starts only if all of it fits; of a group that was started, trainings start, since
    they resume, and other steps only if they fit."""
    steps = [
        Step("long", ("write", "long"), group="first", seconds=100.0),
        Step("reader", ("write", "reader"), after=("long",), group="first", seconds=100.0),
        Step("short", ("write", "short"), group="second", seconds=20.0),
        Step("single", ("write", "single"), seconds=1000.0),
        Step("unknown", ("write", "unknown")),
    ]
    done, said = go(steps, tmp_path, minutes=2)
    assert not done
    assert read_records(tmp_path).keys() == {"short", "unknown"}
    assert "2 of 5 steps are done; run the same command again to resume" in said[-1]
    assert go(steps, tmp_path, minutes=30)[0], "together 200 s, and alone 1000 s"
    assert (tmp_path / "short").read_text() == "once\n"


def test_the_refusal_names_the_group_and_its_time(tmp_path: Path) -> None:
    steps = [Step("a", ("write", "a"), group="first", seconds=600.0)]
    _, said = go(steps, tmp_path, minutes=5)
    assert "the steps of first take about 10 minutes, and 5 were left" in said[-1]


def test_results_of_other_commands_are_replaced_on_request(tmp_path: Path) -> None:
    """What reads them is repeated too; other tokens are refused in any case."""
    before = [
        Step("tokens", ("prepare", "source", "-o", "tokens")),
        Step("run", ("write", "a"), after=("tokens",)),
        Step("probe", ("write", "b"), after=("run",)),
        Step("other", ("write", "c"), after=("tokens",)),
    ]
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "dataset.json").touch()
    assert go(before, tmp_path)[0]
    after = [before[0], Step("run", ("write", "d"), after=("tokens",)), *before[2:]]
    assert run_steps(
        after,
        tmp_path,
        read_records(tmp_path),
        jobs=2,
        say=print,
        replace=True,
        program=PROGRAM,
    )
    read = {name: (tmp_path / name).read_text() for name in "abcd"}
    assert read == {"a": "once\n", "b": "once\nagain\n", "c": "once\n", "d": "once\n"}
    after[0] = Step("tokens", ("prepare", "another", "-o", "tokens"))
    with pytest.raises(InputError, match="holds tokens made by another command"):
        run_steps(
            after,
            tmp_path,
            read_records(tmp_path),
            jobs=2,
            say=print,
            replace=True,
            program=PROGRAM,
        )


def stopped(steps: list[Step], folder: Path, when: Path) -> str:
    """Run steps until a file exists, then send SIGTERM; return the message of the interruption."""

    def send() -> None:
        until(when.exists)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(Interrupted) as stop:
        go(steps, folder)
    thread.join()
    when.unlink()
    return str(stop.value)


def test_ctrl_c_in_a_terminal_is_not_a_failure(tmp_path: Path) -> None:
    """The signal may reach all processes of the group at once."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW_STEP, tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    os.killpg(process.pid, signal.SIGINT)
    said, wrong = process.communicate(timeout=60)
    assert "failed" not in said
    assert "Interrupted" in wrong.splitlines()[-1]
    assert read_records(tmp_path)["slow"]["ended"] == "stopped"


def test_a_run_directory_is_resumed(tmp_path: Path) -> None:
    step = Step("run", ("slow", "run/pid"), run=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    stopped([step], tmp_path, tmp_path / "run" / "pid")
    assert (tmp_path / "run" / "pid.stopped").read_text() == "slow run/pid --resume"


def test_other_commands_are_refused(tmp_path: Path) -> None:
    go([Step("a", ("write", "a"))], tmp_path)
    with pytest.raises(
        InputError, match=r"holds a made by another command \(igpt write a\); choose another -o"
    ):
        go([Step("a", ("write", "b"))], tmp_path)


def test_a_failed_step_may_change_its_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the step a failed"):
        go([Step("a", ("fail", "wrong"))], tmp_path)
    assert go([Step("a", ("write", "a"))], tmp_path)[0]


def test_sources_are_relative_to_the_folder_of_the_user(tmp_path: Path) -> None:
    """Records contain the source as given; prepare, which runs in the folder, gets its path."""
    step = Step("a", ("prepare", "here", "here"))
    sources = {"here": tmp_path / "there"}
    out = tmp_path / "out"
    assert run_steps([step], out, {}, jobs=1, say=print, sources=sources, program=PROGRAM)
    assert (tmp_path / "there").read_text() == "here"
    assert read_records(tmp_path / "out")["a"]["command"] == ["prepare", "here", "here"]


def test_seconds_add_up(tmp_path: Path) -> None:
    step = Step("a", ("slow", "a"))
    stopped([step], tmp_path, tmp_path / "a")
    first = read_records(tmp_path)["a"]["seconds"]
    stopped([step], tmp_path, tmp_path / "a")
    assert read_records(tmp_path)["a"]["seconds"] > first > 0


def test_a_signal_stops_all(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert (
        stopped([Step("slow", ("slow", "pid"))], tmp_path, tmp_path / "pid")
        == "0 of 1 steps are done"
    )
    assert (tmp_path / "pid.stopped").exists()
    assert read_records(tmp_path)["slow"]["ended"] == "stopped"
    assert signal.getsignal(signal.SIGTERM) == before


def test_kill_9_ends_the_steps_and_a_second_process_is_refused(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", _SLOW_STEP, tmp_path])
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    child = int((tmp_path / "pid").read_text())
    with pytest.raises(
        InputError, match=rf"is being written by process {process.pid} on {socket.gethostname()}"
    ):
        go([Step("slow", ("slow", "pid"))], tmp_path)
    process.kill()
    process.wait()
    until(lambda: not Path(f"/proc/{child}").exists() or _is_zombie(child))
    assert not (tmp_path / RECORD).exists()
    assert go([Step("slow", ("write", "pid"))], tmp_path)[0], "the lock ended with its owner"


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_the_record_is_versioned(tmp_path: Path) -> None:
    go([Step("a", ("write", "a"))], tmp_path)
    written = json.loads((tmp_path / RECORD).read_text())
    assert (written["format"], written["version"]) == ("igpt-reproduction-steps", 1)
    written["version"] = 2
    (tmp_path / RECORD).write_text(json.dumps(written))
    with pytest.raises(InputError, match=r"steps.json is not igpt-reproduction-steps of version 1"):
        go([Step("a", ("write", "a"))], tmp_path)
