"""What a run says while it runs: metrics.jsonl (the only source of figures), and a progress bar.

Every line of metrics.jsonl is one JSON object with "kind" (start, train, validation, resume, end) and "step".
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from igpt.files import atomic_file


class Metrics:
    """Appends lines to a run's metrics.jsonl; a process that does not lead writes none."""

    def __init__(self, path: Path, leads: bool = True) -> None:
        self.path = path
        self.leads = leads

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Appends one line."""
        if self.leads:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")

    def cut_after(self, step: int, validated: int) -> None:
        """Drops what a killed run had written beyond the checkpoint it resumes from, and a half-written last line.

        Args:
            step, validated: updates done, and those after which it was last validated, by that checkpoint.
        """
        if not self.leads or not self.path.exists():
            return
        last = {"validation": validated, "end": -1}
        kept = [line for line in read_metrics(self.path) if line["step"] <= last.get(line["kind"], step)]
        with atomic_file(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # cut off by a kill
            break
    return lines


class Bar:
    """A progress bar over the updates of a run, with lines of news above it."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress, self._task = progress, task

    def update(self, step: int, news: str) -> None:
        """Moves to a step; `news` (loss, images/s) stands behind the bar."""
        self._progress.update(self._task, completed=step, news=news)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def bar(title: str, step: int, steps: int, leads: bool = True) -> Iterator[Bar]:
    """A bar that starts at `step`; silent on processes that do not lead."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[news]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(quiet=not leads)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Bar(progress, progress.add_task(title, total=steps, completed=step, news=""))
