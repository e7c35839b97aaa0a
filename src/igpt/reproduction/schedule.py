"""When steps run: what is finished, what must be made again, and what fits into the time left.

A finished step stays finished if its model or tokens are gone, as in a fresh clone of a folder's
small files (see `keep_small_files`). It is made again only if an unfinished step reads them.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from igpt.data.tokens.manifest import MANIFEST
from igpt.files import atomic_file
from igpt.reproduction.steps import Step

# Git leaves out everything but the small files from which answers are made.
_LARGE = """\
# Tokens, models, checkpoints and logs are left out: `igpt reproduce` makes them again when an
# unfinished step needs them. The other files are the results of the finished steps.
.*
!/.gitignore
/tokens/
/logs/
/runs/*/*
!/runs/*/metrics.jsonl
/finetuned/*/*
!/finetuned/*/test.json
/probes/*
!/probes/*.json
"""


def keep_small_files(folder: Path) -> None:
    """Write a `.gitignore` that leaves out what is large."""
    path = folder / ".gitignore"
    if not path.exists():
        with atomic_file(path) as temporary:
            temporary.write_text(_LARGE)


def to_make_again(steps: Sequence[Step], done: Collection[str], folder: Path) -> set[str]:
    """Return the finished steps that unfinished ones read and whose results are gone.

    Args:
        done: names of the finished steps.
    """
    again: set[str] = set()
    for step in reversed(steps):  # inputs come before their readers
        if step.name not in done or step.name in again:
            again |= {
                name for name in step.after if name in done and not _is_readable(name, folder)
            }
    return again


def _is_readable(name: str, folder: Path) -> bool:
    """Return whether other steps can read the result of a step: tokens, or the model of a run."""
    return any((folder / name / file).exists() for file in (MANIFEST, "model/config.json"))


def wall_seconds(
    steps: Sequence[Step], seconds: Mapping[str, float], jobs: int, running: Collection[str] = ()
) -> float:
    """Return the estimated time of steps in `jobs` processes, started as `run_steps` does.

    Args:
        steps: the unfinished ones; what they read and is not among them is finished.
        seconds: what is left of each, by name.
        running: names of the steps that run already.
    """
    waiting = sorted(steps, key=lambda step: step.name not in running)
    busy: dict[str, float] = {}  # the end of each step that runs
    now = 0.0
    while waiting or busy:
        unfinished = {step.name for step in waiting} | busy.keys()
        for step in [one for one in waiting if unfinished.isdisjoint(one.after)]:
            if len(busy) < jobs:
                waiting.remove(step)
                busy[step.name] = now + seconds[step.name]
        assert busy, "a step waits for one that is not among them"
        first = min(busy, key=lambda name: busy[name])
        now = busy.pop(first)
    return now


def pace(
    steps: Sequence[Step],
    records: Mapping[str, Mapping[str, Any]],
    machine: Mapping[str, Any],
    expected: float = 1.0,
) -> float:
    """Return how long finished steps took on such a machine, relative to their estimates.

    Args:
        machine: as in the records. Its precision is compared too: processors of one name, with and
            without instructions for bf16, differ in speed by a factor of two.
        expected: what is returned before steps of ten minutes are finished: the start of processes
            takes a varying time.
    """
    kind = _kind(machine)
    known = [
        (records[step.name]["seconds"], step.seconds)
        for step in steps
        if step.seconds
        and records.get(step.name, {}).get("ended") == "done"
        and _kind(records[step.name]["machine"]) == kind
    ]
    took, estimated = (sum(each) for each in zip(*known, strict=True)) if known else (0.0, 0.0)
    return took / estimated if estimated > _ENOUGH else expected


_ENOUGH = 600.0  # seconds


def _kind(machine: Mapping[str, Any]) -> tuple[Any, Any]:
    return machine["processor"], machine.get("cpu_precision")


def seconds_left(
    step: Step, records: Mapping[str, Mapping[str, Any]], folder: Path, pace: float
) -> float:
    """Return the estimated seconds of the rest of a step; 0 if there is no estimate."""
    if step.seconds is None:
        return 0.0
    record = records.get(step.name, {})
    begun = step.run and (folder / step.name / "config.yaml").exists()
    spent = record["seconds"] if begun and record.get("ended") == "stopped" else 0.0
    return max(0.0, step.seconds * pace - spent)
