"""Run the steps of a reproduction: side by side, each once, and resumed where they were stopped.

steps.json       command, end, seconds (all runs together) and machine of every step that ran
logs/NAME.log    output of a step
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from igpt.data.tokens.manifest import MANIFEST
from igpt.environment import describe
from igpt.errors import InputError, Interrupted
from igpt.evaluation.results import Count, Positive
from igpt.files import Stored, read_json, require_schema, write_json
from igpt.locks import exclusive_folder
from igpt.model.precision import Precision, resolve_precision
from igpt.reproduction.processes import IGPT, Process, ProcessPool
from igpt.reproduction.schedule import pace, seconds_left, to_make_again, wall_seconds
from igpt.reproduction.steps import Step
from igpt.training.signals import StopRequest

RECORD, LOGS = "steps.json", "logs"
FORMAT, VERSION = "igpt-reproduction-steps", 1
_USER_ERROR = 2  # exit code
Records = dict[str, dict[str, Any]]  # by the step's name, as in steps.json


class StepsFailed(InputError):  # noqa: N818  as its siblings in errors.py
    """Steps of a reproduction failed; the message names the first one and its reason."""


class _Machine(Stored):
    """The machine that a step ran on; further entries are shown as they are."""

    igpt: str
    torch: str
    processor: str
    cores: Count | None
    gpu: str | None
    cpu_precision: Precision | None = None  # of "auto" on the CPU; igpt 0.1.0 did not record it

    __pydantic_extra__: dict[str, str | int | float | None] = Field(init=False)


class _Record(Stored):
    """The record of a step."""

    command: Annotated[list[str], Field(min_length=1)]
    ended: Literal["done", "skipped", "stopped", "failed"]
    seconds: Annotated[float, Field(ge=0, le=1e12)]
    side_by_side: Positive
    machine: _Machine


class _Steps(Stored):
    """`steps.json`."""

    steps: dict[str, _Record]


def read_records(folder: Path) -> Records:
    """Return the records of the steps that ran, by name.

    Raises:
        InputError: the file is damaged, or of another version.
    """
    path = folder / RECORD
    if not path.exists():
        return {}
    found = read_json(path, "reproduction")
    if (found.get("format"), found.get("version")) != (FORMAT, VERSION):
        raise InputError(
            f"{path} is not {FORMAT} of version {VERSION}, which this igpt reads; choose another -o"
        )
    require_schema(found, _Steps, path)
    return dict(found["steps"])


def this_machine() -> dict[str, Any]:
    """Return what the records say of this machine and its software."""
    about = {key: value for key, value in describe().items() if key not in ("command", "started")}
    return {**about, "cpu_precision": resolve_precision("auto", torch.device("cpu"))}


def run_steps(
    steps: Sequence[Step],
    folder: Path,
    records: Records,
    *,
    jobs: int,
    say: Callable[[str], None],
    only: Collection[str] | None = None,
    minutes: float | None = None,
    sources: Mapping[str, Path] | None = None,
    replace: bool = False,
    expected_pace: float = 1.0,
    program: Sequence[str] = IGPT,
) -> bool:
    """Run the steps that are not done yet; return True if all are done.

    Args:
        folder: the reproduction's folder, in which the commands run.
        records: from `read_records`; updated with every step that ends.
        jobs: number of steps side by side; they share the cores equally.
        say: prints a line of progress.
        only: names of the steps to run; all by default.
        minutes: time limit, after which running steps are stopped; the next call resumes. Steps
            and groups of steps that are estimated to take longer are not started, except trainings
            of a group that was started, which resume.
        sources: absolute paths of the sources of `igpt prepare` that are relative paths.
        replace: whether results of other commands, and of the steps that read them, are removed;
            other tokens are an error in any case.
        expected_pace: duration of steps on this machine relative to their estimates, before it is
            known from finished steps.
        program: the words before those of a step.

    Raises:
        StepsFailed: steps failed; all steps that do not depend on them are done.
        InputError: the folder holds results of other commands, or another process works in it.
        Interrupted: on Ctrl-C or SIGTERM, after the running steps have been stopped.
    """
    others = of_other_commands(steps, records)
    tokens = {step.name for step in steps if step.words[0] == "prepare"}
    kept = [name for name in others if not replace or name in tokens]
    if kept:
        name = kept[0]
        raise InputError(
            f"{folder} holds {name} made by another command "
            f"(igpt {' '.join(records[name]['command'])}); choose another -o"
        )
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    machine = this_machine()
    by_name = {step.name: step for step in steps}
    wanted = by_name.keys() if only is None else set(only)
    failures: list[str] = []

    def record(name: str, ended: str, seconds: float) -> None:
        if ended in ("done", "skipped"):
            done.add(name)
        before = records.get(name, {}).get("seconds", 0.0)
        records[name] = {
            "command": list(by_name[name].words),
            "ended": ended,
            "seconds": round(before + seconds, 1),
            "side_by_side": jobs,
            "machine": machine,
        }
        _write_records(folder, records)

    def settle(process: Process, *, stopping: bool) -> None:
        """Record the end of a step, and print it."""
        name, code, seconds = process.name, process.exit_code, process.seconds
        if code == 0:
            record(name, "done", seconds)
            say(f"{len(done)}/{len(steps)} {name}: {seconds:.0f} s")
        elif stopping:
            record(name, "stopped", seconds)
        elif by_name[name].optional and code == _USER_ERROR:
            record(name, "skipped", seconds)
            say(f"{name}: skipped ({process.last_line})")
        else:
            record(name, "failed", seconds)
            failures.append(
                f"the step {name} failed (exit code {code}): {process.last_line}; "
                f"its complete output is in {process.log}"
            )
            say(failures[-1])

    with exclusive_folder(folder), StopRequest() as stop:
        for name in reversed(others):  # readers first: after a kill, the next call goes on
            _remove(records, name, folder)
            _write_records(folder, records)
        done = {name for name in by_name if _is_done(records, name)}
        if done and len(done) < len(steps):
            say(f"{len(done)} of {len(steps)} steps are done already")
        for step in steps:
            # A kill may fall between the end of a step and its record.
            if step.name not in done and _is_prepared(step, folder):
                record(step.name, "done", 0.0)
        again = to_make_again(steps, done, folder)
        done -= again
        if not again.isdisjoint(wanted):
            say(f"made again, since unfinished steps read them: {', '.join(sorted(again))}")
        waiting = [step for step in steps if step.name not in done and step.name in wanted]
        pool = ProcessPool(folder, jobs, max(1, _cores() // jobs), program)
        gate = _Gate(steps, records, folder, jobs, machine, expected_pace)
        try:
            while not stop.number and time.monotonic() < end:
                running = [process.name for process in pool.running]
                for step in [one for one in waiting if done.issuperset(one.after)]:
                    if pool.is_full or not gate.opens(step, done, running, end - time.monotonic()):
                        continue
                    waiting.remove(step)
                    if step.name in again:
                        # Its files are replaced: if that is interrupted, it is not done.
                        del records[step.name]
                        record(step.name, "stopped", 0.0)
                    if step.run and not (folder / step.name / "config.yaml").exists():
                        # The metrics of a run whose model is gone would be taken for a run.
                        shutil.rmtree(folder / step.name, ignore_errors=True)
                    pool.start(step.name, _words(step, folder, sources or {}), _log(step, folder))
                    running.append(step.name)
                if not pool.running:
                    break  # all steps are done, or nothing else may start
                for process in pool.wait(min(0.5, end - time.monotonic())):
                    settle(process, stopping=bool(stop.number))
        finally:
            for process in pool.stop():
                record(process.name, "stopped" if process.exit_code else "done", process.seconds)
    reached = f"{len(done)} of {len(steps)} steps are done"
    if stop.number:
        raise Interrupted(stop.number, reached)
    if failures:
        several = f"{len(failures)} steps failed; " if len(failures) > 1 else ""
        raise StepsFailed(f"{failures[0]} ({several}{reached})")
    if minutes is not None and not done.issuperset(wanted):
        reason = "stopped at the time limit"
        if time.monotonic() < end:
            reason = f"nothing else fits into the time limit ({gate.refusal})"
        say(f"{reason}: {reached}; run the same command again to resume")
    return done.issuperset(wanted)


@dataclass
class _Gate:
    """Decides whether a step may start in the time that is left.

    Attributes:
        begun: groups of which a step was started in this call.
        refused: number of finished steps when a group or step was refused, by its name: the answer
            changes only when another step is finished.
        refusal: why a step was not started, or "".
    """

    steps: Sequence[Step]
    records: Records
    folder: Path
    jobs: int
    machine: Mapping[str, Any]
    expected_pace: float
    begun: set[str] = field(default_factory=set)
    refused: dict[str, int] = field(default_factory=dict)
    refusal: str = ""

    def opens(self, step: Step, done: Collection[str], running: Sequence[str], left: float) -> bool:
        """Return whether a step may start.

        Args:
            done, running: names of steps.
            left: seconds.
        """
        if step.seconds is None or math.isinf(left):
            return True
        key = step.name if step.group in self.begun else step.group or step.name
        if self.refused.get(key) == len(done):
            return False
        refusal = self._refusal(step, done, running, left)
        if refusal:
            self.refused[key], self.refusal = len(done), refusal
        return not refusal

    def _refusal(
        self, step: Step, done: Collection[str], running: Sequence[str], left: float
    ) -> str:
        """Return why a step may not start, or ""; note its group as begun if it may."""
        speed = pace(self.steps, self.records, self.machine, self.expected_pace)
        if step.group in self.begun or not step.group:
            rest = seconds_left(step, self.records, self.folder, speed)
            if not step.run and rest > left:
                return f"{step.name} takes about {rest / 60:.0f} minutes"
            return ""
        groups = self.begun | {step.group}
        unfinished = [
            one
            for one in self.steps
            if one.name not in done and (one.group in groups or one.name in running)
        ]
        seconds = {
            one.name: seconds_left(one, self.records, self.folder, speed) for one in unfinished
        }
        needed = wall_seconds(unfinished, seconds, self.jobs, running)
        if needed > left:
            return (
                f"the steps of {step.group} take about {needed / 60:.0f} minutes, "
                f"and {left / 60:.0f} were left"
            )
        self.begun.add(step.group)
        return ""


def _is_done(records: Records, name: str) -> bool:
    return records.get(name, {}).get("ended") in ("done", "skipped")


def of_other_commands(steps: Sequence[Step], records: Records) -> list[str]:
    """Return the steps that other commands made, and those that read their results."""
    found: list[str] = []
    for step in steps:
        known = records.get(step.name)
        if known and known["ended"] != "failed":
            differs = tuple(known["command"]) != step.words
            if differs or not set(found).isdisjoint(step.after):
                found.append(step.name)
    return found


def _remove(records: Records, name: str, folder: Path) -> None:
    """Remove the results of a step, and forget it."""
    shutil.rmtree(folder / name, ignore_errors=True)
    for suffix in (".json", ".safetensors", ".png"):
        (folder / f"{name}{suffix}").unlink(missing_ok=True)
    del records[name]


def _write_records(folder: Path, records: Records) -> None:
    write_json(folder / RECORD, {"format": FORMAT, "version": VERSION, "steps": records})


def _is_prepared(step: Step, folder: Path) -> bool:
    return step.words[0] == "prepare" and (folder / step.name / MANIFEST).exists()


def _words(step: Step, folder: Path, sources: Mapping[str, Path]) -> list[str]:
    """Return the words of a step's command, with absolute sources, and `--resume` if it resumes."""
    words = list(step.words)
    if words[0] == "prepare":
        words[1] = str(sources.get(words[1], words[1]))
    if step.run and (folder / step.name / "config.yaml").exists():
        words.append("--resume")
    return words


def _log(step: Step, folder: Path) -> Path:
    return folder / LOGS / f"{step.name.replace('/', '-')}.log"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
