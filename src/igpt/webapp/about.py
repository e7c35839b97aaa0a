"""What the web page tells of the run its model comes from: the sections of the run's report, without its tables."""

import html
from pathlib import Path

from igpt.report.record import read_run
from igpt.report.sections import (
    Chart,
    Section,
    accuracy_section,
    completions_section,
    loss_section,
    palette_section,
    probe_section,
    samples_section,
)


def about(run: Path) -> str:
    """Probe curve, samples, completions, loss and palette of a run, as far as they are there, as HTML.

    Raises:
        InputError: a file of the run is damaged.
    """
    record = read_run(run)
    makers = [probe_section, samples_section, completions_section, loss_section, palette_section]
    if record.finetuned:
        makers.insert(0, accuracy_section)
    sections = [make(record) for make in makers]
    return f'<div class="igpt-about">{"".join(_markup(section) for section in sections if not section.absent)}</div>'


def _markup(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    if section.lead:
        parts.append(f"<p>{html.escape(section.lead)}</p>")
    if section.chart:
        parts.append(_chart(section.chart))
    if section.picture:
        picture = section.picture
        parts.append(
            f'<img class="pixels" src="{picture.uri}" width="{picture.width}" alt="{html.escape(picture.alt)}">'
        )
    code = f" <code>{html.escape(section.code)}</code>" if section.code else ""
    parts.append(f"<p>{html.escape(section.caption)}{code}</p>")
    if section.table:
        rows = [[f"<th>{html.escape(cell)}</th>" for cell in section.table.head]]
        rows += [[f"<td>{html.escape(cell)}</td>" for cell in row] for row in section.table.rows]
        lines = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
        caption = html.escape(section.table.caption)
        parts.append(f"<details><summary>{caption}</summary><table>{lines}</table></details>")
    return f'<section id="{section.name}">{"".join(parts)}</section>'


def _chart(chart: Chart) -> str:
    """The version that fits the screen's width and the reader's colours, as in the report."""
    dark, narrow = "(prefers-color-scheme: dark)", "(max-width: 600px)"
    return (
        f'<picture><source media="{narrow} and {dark}" srcset="{chart.narrow_dark}">'
        f'<source media="{narrow}" srcset="{chart.narrow_light}"><source media="{dark}" srcset="{chart.dark}">'
        f'<img src="{chart.light}" alt="{html.escape(chart.alt)}"></picture>'
    )
