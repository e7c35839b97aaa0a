"""metrics.jsonl: what a run reports while it trains, and the only source of its figures.

Every line is a JSON object with "kind" (start, machine, train, validation, probe, resume, end) and
"step"; `Record` has the other keys. A killed process may leave the last line incomplete.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

from pydantic import ConfigDict, Field, model_validator

from igpt.errors import InputError
from igpt.files import Stored, atomic_file, require_regular, require_schema

_LONGEST_LINE = 1 << 20  # bytes
_REQUIRED = {"train": ("loss",), "end": ("best", "best_step")}


class Record(Stored):
    """Schema of a line of metrics.jsonl; other kinds and keys are accepted."""

    model_config = ConfigDict(allow_inf_nan=False)

    kind: str
    step: int = Field(ge=0)
    loss: float | None = None
    error: float | None = None
    error_on_trained: float | None = None
    # In a validation line, whether it was the best so far; in the end line, the best value.
    best: bool | float | None = None
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
    # Of a probe line, see `igpt.evaluation.feature_quality.FeatureQuality`.
    layer: int | None = None
    linear_accuracy: float | None = None
    knn_accuracy: float | None = None
    k: int | None = None
    effective_rank: float | None = None

    @model_validator(mode="after")
    def _has_required_keys(self) -> Self:
        for key in _REQUIRED.get(self.kind, ()):
            if key not in self.model_fields_set:
                raise ValueError(f"a line of kind {self.kind!r} has the key {key!r}")
        return self


class Metrics:
    """Appends lines to metrics.jsonl, on the main rank only.

    Attributes:
        listener: is called with every line that is written.
    """

    def __init__(self, path: Path, is_main: bool = True) -> None:
        self.path, self.is_main = path, is_main
        self.listener: Callable[[Mapping[str, Any]], None] | None = None

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append a line."""
        if self.is_main:
            line = {"kind": kind, "step": step, **values}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if self.listener:
                self.listener(line)

    def last_steps(self) -> dict[str, int]:
        """Return the last step of each kind of line; nothing on other ranks than the main one."""
        lines = read_metrics(self.path) if self.is_main and self.path.exists() else []
        return {line["kind"]: line["step"] for line in lines}

    def cut_after(self, step: int, validated: int, probed: int = -1) -> None:
        """Remove the lines that a killed process wrote after the checkpoint that is resumed.

        Args:
            step: step of the checkpoint.
            validated: step of its last validation.
            probed: step of its last probe; -1 if there is none.

        Raises:
            InputError: see `read_metrics`.
        """
        if not self.is_main or not self.path.exists():
            return
        last = {"validation": validated, "probe": probed, "end": -1}
        kept = [
            line for line in read_metrics(self.path) if line["step"] <= last.get(line["kind"], step)
        ]
        with atomic_file(self.path) as temporary:
            temporary.write_text(
                "".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8"
            )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl that satisfy `Record`, without an incomplete last one.

    Raises:
        InputError: there is no such file, or a line is invalid; the line and the key are named.
    """
    return [_parse(*line) for line in _lines(path) if not _is_incomplete(*line)]


def readable_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the valid lines of a metrics.jsonl, and the number of invalid ones, for reports.

    Empty lines and an incomplete last line are not counted.

    Raises:
        InputError: there is no such file.
    """
    records, invalid = [], 0
    for where, line in _lines(path):
        try:
            records.append(_parse(where, line))
        except InputError:
            invalid += bool(line.strip()) and not _is_incomplete(where, line)
    return records, invalid


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the lines and where they are, for error messages. Longer lines are split."""
    require_regular(path)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), 1):
                yield f"{path}, line {number}", line
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"no metrics at {path.parent}: {path.name} is missing") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; a file (metrics) is needed there") from None


def _is_incomplete(where: str, line: bytes) -> bool:
    """Return whether a line has no end, so that it is the last one, and is not valid by itself."""
    if line.endswith(b"\n") or len(line) == _LONGEST_LINE:
        return False
    try:
        _parse(where, line)
    except InputError:
        return True
    return False


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _parse(where: str, line: bytes) -> dict[str, Any]:
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
