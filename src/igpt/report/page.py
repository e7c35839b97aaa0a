"""One self-contained HTML page about a run, made from the run's files alone.

The page contains its figures and styles and has no scripts. For each missing result, it names the
command that makes it.
"""

from pathlib import Path
from typing import Any

from igpt.files import atomic_file
from igpt.report.findings import (
    describe_classifier,
    describe_loss,
    describe_model,
    describe_probe,
    describe_state,
    short_source,
)
from igpt.report.record import Run, read_run
from igpt.report.sections import (
    accuracy_section,
    completions_section,
    confusion_section,
    fact_tables,
    generation_tables,
    key_tables,
    loss_section,
    maps_sections,
    palette_section,
    photographs_section,
    probe_section,
    quality_sections,
    rate_tables,
    samples_section,
    score_tables,
    template,
)


def write_report(run: Path) -> Path:
    """Write `run/report.html` and return its path; replace an existing page.

    Args:
        run: a run directory, finished or not; it needs `config.yaml` and `metrics.jsonl`.

    Raises:
        InputError: `run` is no run directory, or a file in it is damaged.
    """
    text = template("page.html.j2").render(_contents(read_run(run)))
    path = run / "report.html"
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def _contents(run: Run) -> dict[str, Any]:
    """Return the values of the template."""
    probed = [] if run.probe is None or "skipped" in run.probe else [describe_probe(run.probe)]
    sections = [
        probe_section(run),
        confusion_section(run),
        completions_section(run),
        samples_section(run),
        *maps_sections(run),
    ]
    if run.finetuned:  # do not suggest commands that are unusual for classifiers
        sections = [accuracy_section(run), *(section for section in sections if not section.absent)]
    else:  # models without a probe and probes of many classes have no such section
        sections = [one for one in sections if one.name != "confusion" or not one.absent]
    if (run.path / "photographs.png").exists():
        sections.append(photographs_section(run))
    findings = [describe_classifier(run) if run.finetuned else describe_loss(run), *probed]
    version = run.environment.get("igpt")
    return {
        "title": (
            f"Image GPT {'fine-tuned' if run.finetuned else 'trained'} on "
            f"{short_source(run.source)}"
        ),
        "run": run.path.resolve().name,
        "description": describe_model(run),
        "state": describe_state(run),
        "findings": [sentence for sentence in findings if sentence],
        "tables": [
            *key_tables(run),
            *score_tables(run),
            *generation_tables(run),
            *rate_tables(run),
        ],
        "sections": [loss_section(run), *quality_sections(run), *sections, palette_section(run)],
        "details": fact_tables(run),
        "trained_by": "igpt" if version is None else f"igpt {version}",
    }
