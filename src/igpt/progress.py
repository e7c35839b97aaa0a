"""Showing how far long work is, and printing to a pipe whose reader may exit early."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

PLAIN_SECONDS = 30.0  # between lines where there is no terminal


class ProgressBar:
    """The current phase of long work with its count and the time left. See `progress_bar`.

    On a terminal it is a bar, which appears with the first phase. Elsewhere (a log file, a batch
    system) a line is printed every half minute.
    """

    def __init__(self, console: "Console", transient: bool) -> None:
        self._console, self._transient = console, transient
        self._on_terminal = console.is_terminal and not console.is_dumb_terminal
        self._progress: Progress | None = None
        self._phase: _Phase | None = None
        self._part: _Phase | None = None
        self._closed = threading.Event()
        self._printing: threading.Thread | None = None  # prints lines where there is no terminal

    def __call__(self, title: str, done: int, total: int, news: str = "") -> None:
        """Show how much of a phase is done; another title is another phase.

        Args:
            news: loss, images/s, or the like; follows the numbers.
        """
        if self._phase is None or self._phase.title != title:
            self._hide(self._phase)
            self._phase = _Phase(title, done)
        self._show(self._phase, done, total, news)

    def part(self, title: str, done: int, total: int) -> None:
        """Show how much of some work within the phase is done, such as a validation.

        It is shown in addition to the phase, and ends when `done` is `total`.
        """
        if self._part is None or self._part.title != title:
            self._hide(self._part)
            self._part = _Phase(title, done)
        self._show(self._part, done, total)
        if done >= total:
            self._hide(self._part)
            self._part = None
            if self._phase:
                self._phase.begin_if_nothing_is_done()

    def say(self, line: str) -> None:
        """Print a line above the bar, verbatim."""
        self._console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def line(self) -> str:
        """Return the state of the phase, and of the part of it if there is one."""
        return "; ".join(phase.line() for phase in (self._phase, self._part) if phase)

    def close(self) -> None:
        """Stop the bar, or the lines."""
        self._closed.set()
        if self._progress:
            self._progress.stop()
        if self._printing:
            self._printing.join()

    def _show(self, phase: "_Phase", done: int, total: int, news: str = "") -> None:
        phase.update(done, total, news)
        if self._on_terminal:
            if self._progress is None:
                self._progress = _bar(self._console, self._transient)
            shown: dict[str, Any] = {
                "description": phase.title,
                "completed": done,
                "total": total,
                "news": news,
            }
            if phase.task is None:
                phase.task = self._progress.add_task(**shown, left=phase)
                self._progress.start()
            self._progress.update(phase.task, **shown)
        elif self._printing is None:
            self._printing = threading.Thread(target=self._print_lines, daemon=True)
            self._printing.start()

    def _print_lines(self) -> None:
        while not self._closed.wait(PLAIN_SECONDS):
            self.say(self.line())

    def _hide(self, phase: "_Phase | None") -> None:
        if phase and phase.task is not None and self._progress:
            self._progress.remove_task(phase.task)


class _Phase:
    """The count of a phase, and when it will end at its average speed.

    Args:
        first: what was done already when the phase began.
    """

    def __init__(self, title: str, first: int) -> None:
        self.title, self.first = title, first
        self.done = self.total = first
        self.news = ""
        self.began = self.updated = time.monotonic()
        self.task: Any = None  # of rich

    def update(self, done: int, total: int, news: str) -> None:
        if done != self.done:
            self.updated = time.monotonic()
        self.done, self.total, self.news = done, total, news

    def begin_if_nothing_is_done(self) -> None:
        """Do not count the work before the first step, such as a validation."""
        if self.done == self.first:
            self.began = time.monotonic()

    def __str__(self) -> str:
        """The time left, which decreases between two updates, or nothing if it is unknown."""
        if self.done <= self.first or self.done >= self.total:
            return ""
        pace = (self.updated - self.began) / (self.done - self.first)
        left = pace * (self.total - self.done) - (time.monotonic() - self.updated)
        return f"{duration(max(0.0, left))} left"

    def line(self) -> str:
        """Return the count, the time so far and the time left."""
        count = f"{self.title}: {self.done:,} of {self.total:,}"
        left = str(self)
        times = duration(time.monotonic() - self.began) + (f", about {left}" if left else "")
        return f"{count}{', ' if self.news else ''}{self.news} ({times})"


def duration(seconds: float) -> str:
    """Return a time in the two largest units that matter: 40 s, 12 min, 3 h 5 min, 2 d 4 h."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


def _bar(console: "Console", transient: bool) -> "Progress":
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[news]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
    )
    return Progress(*columns, console=console, transient=transient)


@contextmanager
def progress_bar(*, on_stdout: bool = False, quiet: bool = False) -> Iterator[ProgressBar]:
    """Show progress while the block runs.

    Args:
        on_stdout: where the bar and its lines go; otherwise to standard error, and the bar is
            removed at the end.
        quiet: print nothing, for all ranks except the main one.
    """
    from rich.console import Console

    output: Any = _Output(sys.stdout) if on_stdout else sys.stderr
    in_notebook = Console(file=output).is_jupyter
    # Its output claims to be a terminal. Lines are printed as text, not as HTML.
    console = Console(
        file=output,
        quiet=quiet,
        force_jupyter=False,
        force_terminal=False if in_notebook else None,
    )
    bar = ProgressBar(console, transient=not on_stdout)
    try:
        yield bar
    finally:
        bar.close()


def print_line(line: str) -> None:
    """Print a line, if standard output still has a reader."""
    output = _Output(sys.stdout)
    output.write(f"{line}\n")
    output.flush()


class _Output:
    """A stream that ignores a closed pipe: `igpt pretrain ... | head -1` keeps training."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._discarding():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._discarding():
            self._stream.flush()

    @contextmanager
    def _discarding(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # a broken pipe, or a terminal that was closed
            null = os.open(os.devnull, os.O_WRONLY)
            with suppress(OSError, ValueError):
                os.dup2(null, self._stream.fileno())  # also for what is still buffered
            os.close(null)
