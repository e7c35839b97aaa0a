"""Progress of long work: phases with their counts and the time left, on a terminal and in a log."""

import io
import sys
import time

import pytest

from igpt import progress
from igpt.progress import duration, progress_bar


class Terminal(io.StringIO):
    """Standard output that looks like a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time in seconds that the module sees, to be changed in place."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (3599, "1 h 0 min"),
        (11_100, "3 h 5 min"),
        (187_000, "2 d 4 h"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_line_names_the_phase_its_count_and_the_time_left(clock: list[float]) -> None:
    with progress_bar() as bar:
        bar("pretraining", 200, 1200)  # resumed: the speed is that of the steps since
        assert bar.line() == "pretraining: 200 of 1,200 (0 s)"
        clock[0] += 600
        bar.part("validating", 0, 50)
        clock[0] += 30
        bar.part("validating", 30, 50)
        assert bar.line() == (
            "pretraining: 200 of 1,200 (10 min); validating: 30 of 50 (30 s, about 20 s left)"
        )
        bar.part("validating", 50, 50)
        clock[0] += 60
        bar("pretraining", 300, 1200, "loss 2.345")
        # The validation before the first step does not count.
        assert bar.line() == "pretraining: 300 of 1,200, loss 2.345 (1 min, about 9 min left)"
        clock[0] += 120  # without any news, the time left decreases
        assert bar.line() == "pretraining: 300 of 1,200, loss 2.345 (3 min, about 7 min left)"
        bar("testing", 0, 10)
        assert bar.line() == "testing: 0 of 10 (0 s)"


def test_a_line_is_printed_regularly_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.01)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    end = time.monotonic() + 60
    with progress_bar(on_stdout=True) as bar:
        bar("fitting", 3, 7, "[red]")
        while sys.stdout.getvalue().count("\n") < 2 and time.monotonic() < end:
            time.sleep(0.01)
    lines = sys.stdout.getvalue().splitlines()
    assert len(lines) >= 2
    assert set(lines) == {"fitting: 3 of 7, [red] (0 s)"}


def test_short_work_prints_nothing_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar() as bar:
        bar("fitting", 3, 7)
    assert sys.stderr.getvalue() == ""


def test_a_terminal_shows_a_bar_from_the_first_phase_on(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar() as bar:
        assert sys.stderr.getvalue() == ""
        bar("palette: fitting colours", 0, 30)
        clock[0] += 10
        bar("palette: fitting colours", 10, 30)
        bar.part("validating", 1, 4)
    shown = sys.stderr.getvalue()
    assert "palette: fitting colours" in shown
    assert "10/30" in shown
    assert "20 s left" in shown
    assert "validating" in shown


def test_a_terminal_without_control_codes_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar() as bar:
        bar("fitting", 3, 7)
    assert sys.stderr.getvalue() == ""
