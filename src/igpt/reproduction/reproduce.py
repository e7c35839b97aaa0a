"""Run a reproduction, or resume it, and write its page."""

import reprlib
import time
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
from igpt.report.record import read_metrics
from igpt.report.reproduction import write_page
from igpt.reproduction.evidence import Answer, NotDone, Results
from igpt.reproduction.questions import QUESTIONS
from igpt.reproduction.runner import StepsFailed, read_records, run_steps
from igpt.reproduction.scale import Scale
from igpt.reproduction.steps import LABELLED, steps

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
) -> bool:
    """Run the steps that are not done yet, and write the page of the results so far.

    Args:
        out: folder of the reproduction.
        scale: see `igpt.reproduction.scale.scale`.
        corpus, labelled: sources of unlabelled and of labelled images; see `open_source`.
        minutes: time limit; the next call resumes.
        jobs: number of steps side by side; by default the scale's.
        tokens_only: only prepare the tokens; the same call without this flag then does the rest,
            and does not need the images.

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
        tokens = [step for step in planned if step.name.startswith("tokens/")]
        start = partial(
            run_steps,
            folder=out,
            records=records,
            jobs=jobs or scale.jobs,
            say=say,
            sources={one: Path(one).resolve() for one in (corpus, labelled) if Path(one).exists()},
        )
        end = None if minutes is None else time.monotonic() + 60 * minutes
        failed: StepsFailed | None = None
        done = False
        try:
            done = start(tokens, minutes=minutes)
            if done and not tokens_only:
                labels = TokenDataset(out / LABELLED.format(scale.resolutions[0]))
                _require_labels(labels, scale, labelled)
                done = start(planned, minutes=end and max(0.0, end - time.monotonic()) / 60)
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


def gather(results: Results, corpus: str, labelled: str) -> dict[str, Any]:
    """Return the content of evidence.json: the answers and the cost of all steps that are done."""
    scale, records, notes = results.scale, results.records, _notes(results.folder)
    questions = []
    for asked in QUESTIONS:
        try:
            answer = asked.answer(results)
        except NotDone as missing:
            answer = Answer("not yet", f"The step {missing} is not done yet.", {}, {}, "")
        about = {"name": asked.name, "asks": asked.asks, "paper": asked.paper}
        questions.append({**about, **vars(answer), "tried": notes.get(asked.name)})
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
        "complete": all(one["held"] != "not yet" for one in questions),
        "questions": questions,
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
    names = [*scale.sizes, "bert", *(f"at-{side}" for side in scale.resolutions)]
    for name in names:
        if not results.has(f"runs/{name}"):
            continue
        path = results.folder / "runs" / name / "metrics.jsonl"
        kinds = {line["kind"]: line for line in read_metrics(path)[0]}
        require_schema(kinds, _Lines, path)
        start, end, machine = kinds["start"], kinds["end"], kinds["machine"]
        size = (
            scale.main
            if name == "bert"
            else scale.resolution_size
            if name.startswith("at-")
            else name
        )
        images = end["step"] * int(str(scale.recipe["batch-size"]))
        found.append(
            {
                "name": name,
                "shape": list(scale.sizes[size]),
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
