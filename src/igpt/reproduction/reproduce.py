"""One call that runs what is missing of a reproduction and writes its page."""

import reprlib
import time
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from igpt.config import read_settings
from igpt.data.tokens.dataset import TokenDataset
from igpt.data.tokens.labels import few_of_each, require_classes
from igpt.environment import describe
from igpt.errors import InputError, suggest
from igpt.evaluation.probe import draw_images
from igpt.evaluation.results import Count, Number, Positive
from igpt.files import Stored, require_schema, write_json
from igpt.locks import exclusive_folder
from igpt.report.record import read_metrics
from igpt.report.reproduction import write_page
from igpt.reproduction.evidence import NotDone, Results, question
from igpt.reproduction.questions import QUESTIONS
from igpt.reproduction.runner import Command, StepsFailed, records, run
from igpt.reproduction.scale import Scale
from igpt.reproduction.steps import LABELLED, steps

FORMAT, VERSION = "igpt-reproduction", 1
EVIDENCE, NOTES = "evidence.json", "notes.yaml"
_LONGEST, _MOST_JOBS = 1_000_000, 1024  # minutes; steps side by side


def reproduce(
    out: Path,
    scale: Scale,
    corpus: str,
    labelled: str,
    command: Command,
    *,
    minutes: float | None = None,
    jobs: int | None = None,
    tokens_only: bool = False,
) -> bool:
    """Runs the steps that are not done yet, and writes the page of what has come out so far.

    Args:
        out: folder of the reproduction.
        scale: see `igpt.reproduction.scale.scale`.
        corpus, labelled: sources of unlabelled and of labelled images; see `open_source`.
        command: runs the words of a command line, see `run`.
        minutes: stop after so many; the same call goes on.
        jobs: steps side by side, if not the scale's.
        tokens_only: prepare the tokens; without the images, and elsewhere, the same call then does
            the rest.

    Returns:
        whether all is done.

    Raises:
        InputError: steps failed, `out` holds another reproduction, or the labelled images have too
            few labels.
        Interrupted: on Ctrl-C or SIGTERM.
    """
    if minutes is not None and not 0 < minutes <= _LONGEST:
        raise InputError(f"--minutes is more than 0 and at most {_LONGEST:,}, not {minutes:g}")
    if jobs is not None and not 1 <= jobs <= _MOST_JOBS:
        raise InputError(f"--jobs is 1 to {_MOST_JOBS}, not {jobs}")
    with exclusive_folder(out):
        return _reproduce(out, scale, corpus, labelled, command, minutes, jobs, tokens_only)


def _reproduce(
    out: Path,
    scale: Scale,
    corpus: str,
    labelled: str,
    command: Command,
    minutes: float | None,
    jobs: int | None,
    tokens_only: bool,
) -> bool:
    console = Console(highlight=False, markup=False, emoji=False)
    planned = steps(scale, corpus, labelled)
    tokens = [step for step in planned if step.name.startswith("tokens/")]
    _notes(out)  # a mistake in them is told before the work
    places = {
        source: Path(source).resolve() for source in (corpus, labelled) if Path(source).exists()
    }
    told = partial(console.print, soft_wrap=True, markup=False)
    begin = partial(
        run, folder=out, command=command, places=places, jobs=jobs or scale.jobs, say=told
    )
    end = None if minutes is None else time.monotonic() + 60 * minutes
    failed: StepsFailed | None = None
    try:
        done = begin(tokens, minutes=minutes)
        if done and not tokens_only:
            _require_labels(
                TokenDataset(out / LABELLED.format(scale.resolutions[0])), scale, labelled
            )
            done = begin(planned, minutes=end and max(0.0, end - time.monotonic()) / 60)
    except StepsFailed as failure:  # the page tells of all else
        failed = failure
    evidence = gather(out, scale, corpus, labelled)
    write_json(out / EVIDENCE, evidence)
    told(f"{write_page(out, evidence)}: the answers, with figures")
    if not failed and done:
        told("all tokens are there" if tokens_only else f"all {len(planned)} steps are done")
    if failed:
        raise failed
    return done


def gather(folder: Path, scale: Scale, corpus: str, labelled: str) -> dict[str, Any]:
    """What evidence.json holds: all that can be said of what is done."""
    results, answered = Results(folder, scale), []
    for name, asks, paper, answer in QUESTIONS:
        try:
            answered.append(answer(results, name, asks, paper))
        except NotDone as missing:
            answered.append(
                question(
                    name, asks, paper, "not yet", f"The step {missing} is not done yet.", {}, {}, ""
                )
            )
    notes = _notes(folder)
    known = records(folder)
    return {
        "format": FORMAT,
        "version": VERSION,
        "scale": scale.name,
        "rehearsal": scale.rehearsal,
        "corpus": corpus,
        "labelled": labelled,
        "colors": scale.colors,
        "recipe": dict(scale.recipe),
        "complete": all(one["held"] != "not yet" for one in answered),
        "questions": [{**one, "tried": notes.get(one["name"])} for one in answered],
        "models": _models(results),
        "steps": {name: {"seconds": record["seconds"]} for name, record in known.items()},
        "side_by_side": max((record["side_by_side"] for record in known.values()), default=None),
        "machines": [
            dict(pairs)
            for pairs in dict.fromkeys(tuple(one["machine"].items()) for one in known.values())
        ],
        "environment": describe(),
    }


def _notes(folder: Path) -> dict[str, Any]:
    """Sentences of the user's, by the name of the question."""
    path = folder / NOTES
    notes = read_settings(path) if path.exists() else {}
    known = [name for name, *_ in QUESTIONS]
    for name, note in notes.items():
        if name not in known:
            raise InputError(f"{path}: there is no question {name!r}; {suggest(str(name), known)}")
        if not isinstance(note, str):
            raise InputError(
                f"{path}: {name} = {reprlib.repr(note)}: a note is text; put it into quotes"
            )
    return notes


def _require_labels(data: TokenDataset, scale: Scale, labelled: str) -> None:
    """Refuses images by which not everything can be judged, before anything is trained."""
    if data.class_names is None:
        raise InputError(
            f"{labelled} has no labels, and all is judged by them; name others by --labelled"
        )
    limits = {
        "train": scale.probe_images,
        "validation": scale.probe_images,
        "test": scale.test_images,
    }
    splits = {name: draw_images(data[name], limit, 0)[0] for name, limit in limits.items()}
    require_classes(splits, len(data.class_names), "a reproduction")
    few_of_each(splits["train"].labels, max(scale.few), (0,))


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
    """The lines of `metrics.jsonl` that a table of models has, by kind."""

    start: _Start
    machine: _Machine
    end: _End


def _models(results: Results) -> list[dict[str, Any]]:
    """What was pretrained, at what cost."""
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
