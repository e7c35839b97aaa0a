"""Run a reproduction, or resume it, and write its page."""

import reprlib
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from igpt.config import read_settings
from igpt.data.tokens.dataset import TokenDataset
from igpt.data.tokens.labels import require_classes, subset_per_class
from igpt.environment import describe
from igpt.errors import InputError, suggest
from igpt.evaluation.probe import subset_images
from igpt.evaluation.results import Count, Number, Positive
from igpt.files import Stored, require_schema, write_json
from igpt.locks import exclusive_folder
from igpt.model.precision import multiplies_bf16
from igpt.report.findings import duration
from igpt.report.record import read_metrics
from igpt.report.reproduction import write_page
from igpt.reproduction.evidence import Answer, NotDone, Results
from igpt.reproduction.questions import QUESTIONS, questions
from igpt.reproduction.runner import (
    StepsFailed,
    of_other_commands,
    read_records,
    run_steps,
    this_machine,
)
from igpt.reproduction.scale import Scale
from igpt.reproduction.schedule import (
    keep_small_files,
    pace,
    seconds_left,
    to_make_again,
    wall_seconds,
)
from igpt.reproduction.steps import LABELLED, Step, runs, steps

FORMAT, VERSION = "igpt-reproduction", 1
EVIDENCE, NOTES = "evidence.json", "notes.yaml"
_MAX_MINUTES, _MAX_JOBS = 1_000_000, 1024


def reproduce(
    out: Path,
    scale: Scale,
    corpus: str,
    labelled: str,
    *,
    minutes: float | None = None,
    jobs: int | None = None,
    tokens_only: bool = False,
    replace: bool = False,
) -> bool:
    """Run the steps that are not done yet, and write the page of the results so far.

    Args:
        out: folder of the reproduction.
        scale: see `igpt.reproduction.scale.scale`.
        corpus, labelled: sources of unlabelled and of labelled images; see `open_source`.
        minutes: time limit; the next call resumes; see `run_steps`.
        jobs: number of steps side by side; by default the scale's.
        tokens_only: only prepare the tokens; the same call without this flag then does the rest,
            and does not need the images.
        replace: whether results of other lengths are replaced.

    Returns:
        True if all steps are done.

    Raises:
        InputError: steps failed, `out` holds another reproduction, or the labelled images have too
            few labels.
        Interrupted: on Ctrl-C or SIGTERM.
    """
    if minutes is not None and not 0 < minutes <= _MAX_MINUTES:
        raise InputError(f"--minutes is more than 0 and at most {_MAX_MINUTES:,}, not {minutes:g}")
    if jobs is not None and not 1 <= jobs <= _MAX_JOBS:
        raise InputError(f"--jobs is 1 to {_MAX_JOBS}, not {jobs}")
    console = Console(highlight=False, markup=False, emoji=False)
    say = partial(console.print, soft_wrap=True, markup=False)
    with exclusive_folder(out):
        _notes(out)  # report a mistake in them before the work
        records = read_records(out)
        planned = steps(scale, corpus, labelled)
        tokens = {step.name for step in planned if step.name.startswith("tokens/")}
        start = partial(
            run_steps,
            planned,
            folder=out,
            replace=replace,
            expected_pace=_expected_pace(scale),
            records=records,
            jobs=jobs or scale.jobs,
            say=say,
            sources={one: Path(one).resolve() for one in (corpus, labelled) if Path(one).exists()},
        )
        end = None if minutes is None else time.monotonic() + 60 * minutes
        failed: StepsFailed | None = None
        done = False
        try:
            done = start(only=tokens, minutes=minutes)
            keep_small_files(out)
            if done and not tokens_only:
                path = out / LABELLED.format(scale.resolutions[0])
                if path.exists():  # otherwise all steps that read it are done
                    _require_labels(TokenDataset(path), scale, labelled)
                done = start(minutes=end and max(0.0, end - time.monotonic()) / 60)
        except StepsFailed as failure:
            failed = failure  # raised after the page of all other results is written
        evidence = gather(Results(out, scale, records), corpus, labelled)
        write_json(out / EVIDENCE, evidence)
        say(f"{write_page(out, evidence)}: the answers, with figures")
        if failed:
            raise failed
        if done:
            say("all tokens are prepared" if tokens_only else f"all {len(planned)} steps are done")
        return done


def describe_plan(
    out: Path, scale: Scale, corpus: str, labelled: str, *, jobs: int | None = None
) -> str:
    """Return the steps as text: those that are done, and estimates of the time of the others.

    Nothing is written.

    Args:
        out, scale, corpus, labelled, jobs: see `reproduce`.
    """
    records, planned = read_records(out), steps(scale, corpus, labelled)
    for name in of_other_commands(planned, records):  # they would be replaced
        del records[name]
    done = {name for name, one in records.items() if one["ended"] in ("done", "skipped")}
    again = to_make_again(planned, done, out)
    speed = pace(planned, records, this_machine(), _expected_pace(scale))
    left = {
        step.name: 0.0
        if step.name in done - again
        else seconds_left(step, {} if step.name in again else records, out, speed)
        for step in planned
    }
    lines, count = [], jobs or scale.jobs
    for group in dict.fromkeys(step.group for step in planned):
        of_group = [step for step in planned if step.group == group]
        lines.append(f"{group or 'first'}: {_estimate(of_group, left, done - again, count)}")
        for step in of_group:
            state = "again" if step.name in again else "done" if step.name in done else "to do"
            seconds = "" if step.seconds is None else duration(step.seconds)
            lines.append(f"  {state:5}  {seconds:>12}  {step.name}: igpt {' '.join(step.words)}")
    lines.append(f"all steps: {_estimate(planned, left, done - again, count)}")
    if scale.speed is None:
        lines.append(f"the times of the scale {scale.name} are not estimated")
    return "\n".join(lines)


def _expected_pace(scale: Scale) -> float:
    """Return how long the steps take here, relative to the estimates, which are for bf16."""
    if scale.speed is None or multiplies_bf16("cpu"):
        return 1.0
    return scale.speed.without_bf16


def _estimate(
    planned: Sequence[Step], left: Mapping[str, float], done: Collection[str], jobs: int
) -> str:
    unfinished = [step for step in planned if step.name not in done]
    text = f"{len(unfinished)} of {len(planned)} steps to do"
    if not unfinished or any(step.seconds is None for step in planned):
        return text
    wall = wall_seconds(unfinished, left, jobs)
    return f"{text}, about {duration(wall)}, {jobs} side by side"


def gather(results: Results, corpus: str, labelled: str) -> dict[str, Any]:
    """Return the content of evidence.json: the answers and the cost of all steps that are done."""
    scale, records, notes = results.scale, results.records, _notes(results.folder)
    answered = []
    for asked in questions(scale):
        try:
            answer = asked.answer(results)
        except NotDone as missing:
            answer = Answer("not yet", f"The step {missing} is not done yet.", {}, {}, "")
        about = {
            "name": asked.name,
            "asks": asked.asks,
            "paper": asked.paper,
            "finding": asked.finding,
        }
        answered.append({**about, **vars(answer), "tried": notes.get(asked.name)})
    machines = [record["machine"] for record in records.values()]
    return {
        "format": FORMAT,
        "version": VERSION,
        "scale": scale.name,
        "rehearsal": scale.rehearsal,
        "corpus": corpus,
        "labelled": labelled,
        "colors": scale.colors,
        "recipe": dict(scale.recipe),
        "second_recipe": dict(scale.second.recipe) if scale.second else None,
        "complete": all(one["held"] != "not yet" for one in answered),
        "questions": answered,
        "models": _models(results),
        "steps": {name: {"seconds": record["seconds"]} for name, record in records.items()},
        "side_by_side": max((record["side_by_side"] for record in records.values()), default=None),
        "machines": [one for at, one in enumerate(machines) if one not in machines[:at]],
        "environment": describe(),
    }


def _notes(folder: Path) -> dict[str, Any]:
    """Return the user's notes on questions, from notes.yaml, by the name of the question."""
    path = folder / NOTES
    notes = read_settings(path) if path.exists() else {}
    known = [asked.name for asked in QUESTIONS]
    for name, note in notes.items():
        if name not in known:
            raise InputError(f"{path}: there is no question {name!r}; {suggest(str(name), known)}")
        if not isinstance(note, str):
            raise InputError(
                f"{path}: {name} = {reprlib.repr(note)}: a note is text; put it in quotes"
            )
    return notes


def _require_labels(data: TokenDataset, scale: Scale, labelled: str) -> None:
    """Raise if the labelled images do not suffice for all probes and fine-tuning."""
    if data.class_names is None:
        raise InputError(
            f"{labelled} has no labels, and probes and fine-tuning need them; "
            "give another source with --labelled"
        )
    limits = {
        "train": scale.probe_images,
        "validation": scale.probe_images,
        "test": scale.test_images,
    }
    splits = {name: subset_images(data[name], limit, 0)[0] for name, limit in limits.items()}
    require_classes(splits, len(data.class_names), "a reproduction")
    subset_per_class(splits["train"].labels, max(scale.few), (0,))


class _Start(Stored):
    places: Positive
    parameters: Positive
    train_images: Count
    unigram_loss: Number


class _Machine(Stored):
    flops_per_image: Number


class _End(Stored):
    step: Count
    seconds: Number
    best: Number


class _Lines(Stored):
    """The lines of `metrics.jsonl` that the table of models needs, by kind."""

    start: _Start
    machine: _Machine
    end: _End


def _models(results: Results) -> list[dict[str, Any]]:
    """Return the pretrained models with their cost."""
    scale, found = results.scale, []
    for run in sorted(runs(scale), key=lambda run: _place(run.name, scale)):
        if not results.has(f"runs/{run.name}"):
            continue
        path = results.folder / "runs" / run.name / "metrics.jsonl"
        kinds = {line["kind"]: line for line in read_metrics(path)[0]}
        require_schema(kinds, _Lines, path)
        start, end, machine = kinds["start"], kinds["end"], kinds["machine"]
        images = end["step"] * run.number("batch-size")
        found.append(
            {
                "name": run.name,
                "shape": list(scale.sizes[run.size]),
                "places": start["places"],
                "parameters": start["parameters"],
                "train_images": start["train_images"],
                "images_seen": images,
                "flops": images * machine["flops_per_image"],
                "seconds": end["seconds"],
                "validation_loss": end["best"],
                "unigram_loss": start["unigram_loss"],
            }
        )
    return found


def _place(name: str, scale: Scale) -> int:
    """Return the place of a run in the table: the sizes from the smallest, then the others."""
    sizes = list(scale.sizes)
    return sizes.index(name) if name in sizes else len(sizes)
