"""The description of a model's run on the web page: the sections of the run's report."""

from pathlib import Path

from igpt.report.record import read_run
from igpt.report.sections import (
    accuracy_section,
    completions_section,
    loss_section,
    palette_section,
    probe_section,
    samples_section,
    template,
)


def about(run: Path) -> str:
    """Return the sections of a run's report that exist, as HTML.

    Raises:
        InputError: a file of the run is damaged.
    """
    record = read_run(run)
    makers = [probe_section, samples_section, completions_section, loss_section, palette_section]
    if record.finetuned:
        makers.insert(0, accuracy_section)
    section = template("macros.html.j2").module.section  # type: ignore[attr-defined]
    parts = [section(one) for one in (make(record) for make in makers) if not one.absent]
    return f'<div class="igpt-about">{"".join(parts)}</div>'
