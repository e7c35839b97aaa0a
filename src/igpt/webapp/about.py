"""The description of a model on the web page: sections of its run's report, or its card."""

import re
from pathlib import Path

from igpt.report.figures import data_uri
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


_METADATA = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_PICTURE = re.compile(r"(!\[[^]]*\])\((\w+\.png)\)")


def about_card(card: Path) -> str:
    """Return a model card as Markdown, without its metadata; its PNG pictures are data URIs."""

    def embedded(link: re.Match[str]) -> str:
        picture = (card.parent / link[2]).read_bytes()
        return f"{link[1]}({data_uri(picture, 'image/png')})"

    return _PICTURE.sub(embedded, _METADATA.sub("", card.read_text(encoding="utf-8")))
