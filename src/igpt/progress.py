"""The progress bar of all long work, and printing to a pipe whose reader may exit early."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress


class ProgressBar:
    """A progress bar with the time left, shown on terminals only. See `progress_bar`."""

    def __init__(self, progress: "Progress") -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None, news="")

    def __call__(self, title: str, done: int, total: int, news: str = "") -> None:
        """Show how much is done; `news` (loss, images/s) follows the numbers."""
        self._progress.update(self._task, description=title, completed=done, total=total, news=news)

    def say(self, line: str) -> None:
        """Print a line above the bar, verbatim."""
        self._progress.console.print(
            line, markup=False, emoji=False, highlight=False, soft_wrap=True
        )


@contextmanager
def progress_bar(*, on_stdout: bool = False, quiet: bool = False) -> Iterator[ProgressBar]:
    """Show a progress bar while the block runs.

    Args:
        on_stdout: where the bar and its lines go; otherwise to standard error, and the bar is
            removed at the end.
        quiet: print nothing, for all ranks except the main one.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[news]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    output: Any = _Output(sys.stdout) if on_stdout else sys.stderr
    console = Console(file=output, quiet=quiet)
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=not on_stdout, disable=hidden) as progress:
        yield ProgressBar(progress)


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
