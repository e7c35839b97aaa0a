"""What a run reports while it runs: metrics.jsonl (the only source of figures), and a progress bar.

Every line of metrics.jsonl is one JSON object with "kind" (start, machine, train, validation,
resume, end) and "step"; `Record` has the other keys. A kill may leave the last line cut off.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, Self

from pydantic import ConfigDict, Field, model_validator

from igpt.errors import InputError
from igpt.files import Stored, atomic_file, require_regular, require_schema

_LONGEST_LINE = 1 << 20  # bytes
_REQUIRED = {"train": ("loss",), "end": ("best", "best_step")}


class Record(Stored):
    """The schema of a line of metrics.jsonl; other kinds and keys pass, values of another type do not."""

    model_config = ConfigDict(allow_inf_nan=False)

    kind: str
    step: int = Field(ge=0)
    loss: float | None = None
    error: float | None = None
    error_on_trained: float | None = None
    best: bool | float | None = (
        None  # of a validation, whether it was the best so far; at the end, the best value
    )
    best_step: int | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    skipped: int | None = None
    images_per_second: float | None = None
    utilisation: float | None = None
    seconds: float | None = None
    source: str | None = None
    parameters: int | None = None
    train_images: int | None = None
    validation_images: int | None = None
    classes: int | None = None
    places: int | None = None
    n_colors: int | None = None
    resolution: int | None = None
    pretrained_resolution: int | None = None
    uniform_loss: float | None = None
    unigram_loss: float | None = None
    ranks: int | None = None
    shard: int | None = None
    device: str | None = None
    flops_per_image: float | None = None
    matmul_flops_per_second: float | None = None

    @model_validator(mode="after")
    def _has_what_its_kind_has(self) -> Self:
        for key in _REQUIRED.get(self.kind, ()):
            if key not in self.model_fields_set:
                raise ValueError(f"a line of kind {self.kind!r} has the key {key!r}")
        return self


class Metrics:
    """Appends lines to a run's metrics.jsonl; a process that does not lead writes none."""

    def __init__(self, path: Path, is_main: bool = True) -> None:
        self.path = path
        self.is_main = is_main

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line."""
        if self.is_main:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")

    def cut_after(self, step: int, validated: int) -> None:
        """Drop what a killed run had written beyond the checkpoint it resumes from, and a half-written last line.

        Args:
            step, validated: updates done, and those after which it was last validated, by that
                checkpoint.

        Raises:
            InputError: see `read_metrics`.
        """
        if not self.is_main or not self.path.exists():
            return
        last = {"validation": validated, "end": -1}
        kept = [
            line for line in read_metrics(self.path) if line["step"] <= last.get(line["kind"], step)
        ]
        with atomic_file(self.path) as temporary:
            temporary.write_text(
                "".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8"
            )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl, each as `Record` describes it; a cut-off last line is left out.

    Raises:
        InputError: there is no such file, or a line is no record: the line and the key are named.
    """
    records = []
    for where, line, is_cut in _lines(path):
        try:
            records.append(_record(line, where))
        except InputError:
            if not is_cut:
                raise
    return records


def readable_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the records of a metrics.jsonl that are readable, and how many lines are not, for reports.

    Empty lines and a cut-off last line do not count.

    Raises:
        InputError: there is no such file.
    """
    records, unreadable = [], 0
    for where, line, is_cut in _lines(path):
        try:
            records.append(_record(line, where))
        except InputError:
            unreadable += bool(line.strip()) and not is_cut
    return records, unreadable


def _lines(path: Path) -> Iterator[tuple[str, bytes, bool]]:
    """Yield where a line stands, its bytes, and whether it is the last one and has no end."""
    require_regular(path)
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_LONGEST_LINE):
                number += 1
                ended = line.endswith(b"\n")
                yield f"{path}, line {number}", line, not ended and len(line) < _LONGEST_LINE
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"no metrics at {path.parent}: {path.name} is missing") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; a file (metrics) is needed there") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line, parse_constant=_refuse_constant)
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None
    except ValueError as error:  # not UTF-8, malformed, or a number of thousands of digits
        raise InputError(f"{where}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: a JSON object is needed")
    require_schema(value, Record, where)
    return value
