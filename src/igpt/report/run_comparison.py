"""One page that compares several runs, made from their files alone.

It has the settings that differ, the losses and accuracies during training, and the probe accuracies
by layer; runs share a figure if their losses have the same unit.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from igpt.errors import InputError
from igpt.evaluation.results import best_row
from igpt.files import atomic_file, file_to_write
from igpt.report.comparison import MOST_SERIES, plot_comparison
from igpt.report.findings import number, percent, plural, short_source
from igpt.report.record import Run, best_validation, flat, history, read_run, standard_error
from igpt.report.sections import Section, Table, chart, shareable, template

_LONGEST = 18  # letters of a run's name that fit at the end of its line
_NONE = "\N{EN DASH}"


def write_comparison(runs: Sequence[Path], path: Path) -> Path:
    """Write a page that compares runs, and return its path; replace an existing page.

    Args:
        runs: 2 to 4 run directories, finished or not.
        path: HTML file to write.

    Raises:
        InputError: too many runs, a run that is given twice, no run directory, a damaged file, or
            another name than one of an HTML file.
    """
    if path.suffix.lower() != ".html":
        raise InputError(f"a comparison is written as .html, not as {path.name}")
    file_to_write(path)
    if not 2 <= len(runs) <= MOST_SERIES:
        raise InputError(f"a page compares 2 to {MOST_SERIES} runs, not {len(runs)}")
    places = [run.resolve() for run in runs]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise InputError(f"{runs[index]} is given twice; name different runs to compare them")
    names = _distinct_names(places)
    named = dict(zip(names, map(read_run, runs), strict=True))
    text = template("page.html.j2").render(_contents(named))
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def _distinct_names(places: Sequence[Path]) -> list[str]:
    """Return the last parts of paths: as many as are needed to distinguish them."""
    for count in range(1, max(len(place.parts) for place in places)):
        names = ["/".join(place.parts[-count:]) for place in places]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]


def _contents(runs: Mapping[str, Run]) -> dict[str, Any]:
    """Return the values of the template."""
    sections = [*_loss_sections(runs), _accuracy_section(runs), _probe_section(runs)]
    versions = dict.fromkeys(run.environment.get("igpt") for run in runs.values())
    return {
        "title": f"Comparison of {len(runs)} runs",
        "run": ", ".join(runs),
        "description": _description(runs),
        "findings": [],
        "state": "",
        "tables": [_settings_table(runs), _results_table(runs)],
        "sections": [section for section in sections if section],
        "details": [],
        "trained_by": " and ".join(
            f"igpt {version}" if version else "igpt" for version in versions
        ),
    }


def _description(runs: Mapping[str, Run]) -> str:
    sources = list(dict.fromkeys(short_source(run.source) for run in runs.values()))
    text = f"Trained on {sources[0]}." if len(sources) == 1 else "Trained on different images: "
    if len(sources) > 1:
        text += "; ".join(f"{name} on {short_source(run.source)}" for name, run in runs.items())
        text += ". Differences of the results may come from the images."
    palettes = {run.palette.fingerprint for run in runs.values() if run.palette is not None}
    if len(palettes) > 1:
        text += " The palettes differ, so losses in nats/pixel cannot be compared with each other."
    return text


def _settings_table(runs: Mapping[str, Run]) -> Table:
    """Return the settings of which at least two runs have different values."""
    settings = [flat(run.config) for run in runs.values()]
    keys = dict.fromkeys(key for one in settings for key in one)
    rows = []
    for key in keys:
        values = [shareable(one[key]) if key in one else _NONE for one in settings]
        if len(set(values)) > 1:
            rows.append((key, *values))
    caption = "Settings that differ" if rows else "All settings are the same"
    return Table(caption, ("setting", *runs), rows, wide=True)


def _results_table(runs: Mapping[str, Run]) -> Table:
    """Return the sizes and the results of the runs; results that no run has are left out."""
    columns = [_results(run) for run in runs.values()]
    rows = [
        (key, *(one.get(key, _NONE) for one in columns))
        for key in dict.fromkeys(key for one in columns for key in one)
    ]
    return Table("Results", ("", *runs), rows, wide=True)


def _results(run: Run) -> dict[str, str]:
    found = {}
    for key, name in (("parameters", "parameters"), ("train_images", "training images")):
        if isinstance(count := run.start.get(key), int):
            found[name] = number(count)
    steps = [record["step"] for record in run.metrics if isinstance(record.get("step"), int)]
    found["steps done"] = number(max(steps, default=0))
    if best := best_validation(run.metrics):
        found[f"lowest validation loss, {run.unit}"] = f"{best[1]:.4f} (step {number(best[0])})"
    if best := best_validation(run.metrics, "error"):
        found["best validation accuracy"] = f"{percent(1 - best[1])} (step {number(best[0])})"
    if run.test:
        found["test accuracy"] = _accuracy(run.test["test_accuracy"], run.test["test_images"])
    if probe := _probe(run):
        row = best_row(probe)
        accuracy = _accuracy(row["test_accuracy"], probe["images"]["test"])
        found["linear probe, test accuracy"] = f"{accuracy}, layer {row['layer']}"
    return found


def _accuracy(share: float, count: int) -> str:
    return f"{percent(share)} ±\N{NO-BREAK SPACE}{100 * standard_error(share, count):.1f}"


def _probe(run: Run) -> dict[str, Any] | None:
    return None if run.probe is None or "skipped" in run.probe else run.probe


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"\N{HORIZONTAL ELLIPSIS}{name[1 - _LONGEST :]}"


def _loss_sections(runs: Mapping[str, Run]) -> list[Section]:
    """Return a section for each unit of losses."""
    by_unit: dict[str, dict[str, Run]] = {}
    for name, run in runs.items():
        by_unit.setdefault(run.unit, {})[name] = run
    sections = []
    for index, (unit, some) in enumerate(by_unit.items()):
        series = []
        for name, run in some.items():
            kind = "train" if run.finetuned else "validation"
            found = [one for one in history(run.metrics, kind) if math.isfinite(one["loss"])]
            if found:
                losses = [one["loss"] for one in found]
                series.append(_exact(runs, name, [one["step"] for one in found], losses))
        kind = "training" if unit == "nats" else "validation"
        caption = f"{kind.capitalize()} loss by step, in {unit}."
        title, name = f"Loss during training, {unit}", f"loss-{index}"
        plot = {"kind": "lines", "x": "training step", "y": f"loss, {unit}", "series": series}
        absent = "" if series else "No loss is recorded yet."
        sections.append(_section(title, name, plot, caption, "{:.4f}", absent))
    return sections


def _accuracy_section(runs: Mapping[str, Run]) -> Section | None:
    """Return the section on the accuracies of classifiers during fine-tuning, if there are any."""
    series = []
    for name, run in runs.items():
        if found := history(run.metrics, "validation", "error"):
            accuracies = [100 * (1 - one["error"]) for one in found]
            series.append(_exact(runs, name, [one["step"] for one in found], accuracies))
    if not series:
        return None
    y = "validation accuracy, %"
    plot = {"kind": "lines", "x": "training step", "y": y, "series": series}
    caption = "Accuracy on the validation images by step."
    return _section("Accuracy during fine-tuning", "accuracy", plot, caption, "{:.1f}")


def _probe_section(runs: Mapping[str, Run]) -> Section | None:
    """Return the section on probe accuracies by layer, if a run has been probed."""
    series, counts = [], []
    for number_of_run, (name, run) in enumerate(runs.items()):
        probe = _probe(run)
        if probe is None:
            continue
        count, rows = probe["images"]["test"], probe["layers"]
        values = [100 * row["test_accuracy"] for row in rows]
        errors = [100 * standard_error(row["test_accuracy"], count) for row in rows]
        series.append(
            {
                "name": _short(name),
                "number": number_of_run,
                "x": [row["layer"] for row in rows],
                "y": values,
                "low": [value - error for value, error in zip(values, errors, strict=True)],
                "high": [value + error for value, error in zip(values, errors, strict=True)],
                "ring": [row["layer"] for row in rows].index(probe["best_layer"]),
            }
        )
        tested = f" of {short_source(probe['source'])}" if probe.get("source") else ""
        counts.append(f"{name}: {plural(count, 'test image')}{tested}")
    if not series:
        return None
    caption = (
        "Test accuracy of a linear classifier of each layer's features; the band is one standard "
        f"error, the ring the layer selected by validation accuracy. {'; '.join(counts)}."
    )
    plot = {"kind": "lines", "x": "layer", "y": "test accuracy, %", "series": series}
    return _section("Linear probe of every layer", "probe", plot, caption, "{:.1f}")


def _exact(runs: Mapping[str, Run], name: str, x: list[int], y: list[float]) -> dict[str, Any]:
    """Return a series without intervals; a run has the same colour in all figures."""
    number = list(runs).index(name)
    return {"name": _short(name), "number": number, "x": x, "y": y, "low": y, "high": y}


def _section(
    title: str, name: str, plot: Mapping[str, Any], caption: str, form: str, absent: str = ""
) -> Section:
    """Return a section with a figure and the table of its numbers."""
    if absent:
        return Section(title, name, absent=absent)
    series = plot["series"]
    known = [dict(zip(one["x"], one["y"], strict=True)) for one in series]
    rows = [
        (number(x), *(form.format(one[x]) if x in one else _NONE for one in known))
        for x in sorted({x for one in known for x in one})
    ]
    head = (plot["x"].removeprefix("training "), *(one["name"] for one in series))
    alt = f"Line chart of {plot['y']} by {plot['x']} of {', '.join(head[1:])}."
    shown = chart(partial(plot_comparison, plot), alt)
    table = Table("Numbers of the figure", head, rows)
    return Section(title, name, chart=shown, caption=caption, table=table)
