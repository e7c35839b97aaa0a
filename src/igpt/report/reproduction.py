"""The page of a reproduction: self-contained HTML, and Markdown with figures in files."""

import io
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from igpt.files import atomic_file, atomic_folder
from igpt.report import comparison, figures
from igpt.report.findings import duration, number, plural
from igpt.report.sections import Picture, Section, Table, chart, read_picture, template

FIGURES = "figures"
_GAP = 12  # pixels between pictures
_HELD = {
    "yes": "reproduced",
    "in part": "partly reproduced",
    "no": "not reproduced",
    "undecided": "inconclusive",
    "shown": "shown, not measured",
    "not yet": "not done yet",
}
_CONCLUDED = {
    "yes": "Reproduced",
    "in part": "Partly reproduced, so not to be relied on without the numbers below",
    "no": "Not reproduced",
    "undecided": "Undecided, the differences are within the intervals",
    "not yet": "Not measured yet",
}
# Chen et al. 2020, sections 3 and 4; FLOPs are 6 x parameters x positions x images
_PAPER = {
    "pretraining images": "1.28 M (ImageNet)",
    "images seen per model": "128 M",
    "parameters": "76 M to 6.8 B",
    "FLOPs of the largest run": "2.1e22 (XL at 64 px)",
    "resolution, colours": "32, 48 and 64 px, 512",
    "positions": "learned embeddings",
    "optimizer": "Adam",
}


def write_page(folder: Path, evidence: Mapping[str, Any]) -> Path:
    """Write `report.html`, and `report.md` with `figures/`; return the path of the former.

    Args:
        folder: the reproduction's folder, with its `pictures/`.
        evidence: the content of `evidence.json`.
    """
    sections = [section for asked in evidence["questions"] for section in _sections(asked, folder)]
    page = {
        "title": "Generative Pretraining from Pixels: which findings are reproduced",
        "run": folder.resolve().name,
        "description": _description(evidence),
        "findings": [],
        "state": _cost(evidence),
        "tables": [_verdicts(evidence), _compared_with_paper(evidence)],
        "sections": sections,
        "details": [_models(evidence), _machines(evidence), _steps(evidence)],
        "trained_by": f"igpt {evidence['environment']['igpt']}",
    }
    with atomic_folder(folder / FIGURES) as temporary:
        for asked in evidence["questions"]:
            for name, content in _figure_files(asked, folder).items():
                (temporary / name).write_bytes(content)
    texts = {
        "report.html": template("page.html.j2").render(page),
        "report.md": _markdown(page),
    }
    for name, text in texts.items():
        with atomic_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return folder / "report.html"


def _description(evidence: Mapping[str, Any]) -> str:
    models = evidence["models"]
    if not models:
        return "Nothing has been trained yet."
    smallest, largest = _extremes(models)
    side = round(models[0]["places"] ** 0.5)
    train, seen = models[0]["train_images"], max(model["images_seen"] for model in models)
    part = f"{number(seen)} of " if seen < train else ""
    rehearsal = ""
    if evidence["rehearsal"]:
        rehearsal = " This is a rehearsal with runs of toy length: its numbers mean nothing."
    return (
        f"{_conclusions(evidence)}"
        f"Transformers of {_millions(smallest)} to {_millions(largest)} parameters, pretrained "
        f"without labels on {part}{number(train)} images of "
        f"{_short(evidence['corpus'])} at {side} \N{MULTIPLICATION SIGN} {side} pixels, and "
        f"evaluated on {_short(evidence['labelled'])}.{rehearsal}"
    )


def _conclusions(evidence: Mapping[str, Any]) -> str:
    """Return what a reader may conclude, from the verdicts."""
    if evidence["rehearsal"]:
        return ""
    parts = []
    for held, words in _CONCLUDED.items():
        found = [
            asked["finding"]
            for asked in evidence["questions"]
            if asked["held"] == held and asked.get("finding")
        ]
        if found:
            parts.append(f"{words}: {'; '.join(found)}.")
    if not parts:
        return ""
    return (
        f"What may be concluded, for models of this size and images of this resolution only. "
        f"{' '.join(parts)} "
    )


def _extremes(models: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the smallest and the largest model."""
    ordered = sorted(models, key=lambda model: int(model["parameters"]))
    return ordered[0], ordered[-1]


def _millions(model: Mapping[str, Any]) -> str:
    return f"{model['parameters'] / 1e6:.2g} M"


def _short(source: str) -> str:
    return Path(source).name if Path(source).is_absolute() else source


def _cost(evidence: Mapping[str, Any]) -> str:
    seconds = [step["seconds"] for step in evidence["steps"].values()]
    side_by_side = evidence["side_by_side"] or 1
    machines = list(dict.fromkeys(map(_where, evidence["machines"])))
    where = f" on {machines[0]}" if machines else ""
    elsewhere = f", and on {' and '.join(machines[1:])}" if machines[1:] else ""
    return (
        f"{plural(len(seconds), 'step')} took {duration(sum(seconds))} in total, {side_by_side} "
        f"side by side (at least {duration(sum(seconds) / side_by_side)} of wall time)"
        f"{where}{elsewhere}."
    )


def _where(machine: Mapping[str, Any]) -> str:
    processor = machine["gpu"] or f"{plural(machine['cores'], 'core')} of {machine['processor']}"
    if not machine["gpu"] and machine.get("cpu_precision"):
        processor += f", in {machine['cpu_precision']}"
    return f"{processor} (igpt {machine['igpt']}, torch {machine['torch']})"


def _verdicts(evidence: Mapping[str, Any]) -> Table:
    rows = [(asked["asks"], _HELD[asked["held"]]) for asked in evidence["questions"]]
    return Table("The paper's findings", ("question", "here"), rows)


def _compared_with_paper(evidence: Mapping[str, Any]) -> Table:
    models = evidence["models"]
    here = dict.fromkeys(_PAPER, "not yet")
    if models:
        small, largest = _extremes(models)
        rotary = evidence["recipe"].get("positions") == "rotary"
        muon = evidence["recipe"].get("optimizer") == "muon"
        second = "; second recipe: {}" if evidence.get("second_recipe") else ""
        sides = sorted({round(model["places"] ** 0.5) for model in models})
        here = {
            "pretraining images": number(largest["train_images"]),
            "images seen per model": number(max(model["images_seen"] for model in models)),
            "parameters": f"{_millions(small)} to {_millions(largest)}",
            "FLOPs of the largest run": f"{max(model['flops'] for model in models):.1e}",
            "resolution, colours": f"{', '.join(map(str, sides))} px, {evidence['colors']}",
            "positions": ("2-D RoPE" if rotary else _PAPER["positions"])
            + second.format("2-D RoPE"),
            "optimizer": ("Muon" if muon else "AdamW without weight decay") + second.format("Muon"),
        }
    rows = [(name, _PAPER[name], here[name]) for name in _PAPER]
    return Table("Data and compute", ("", "paper", "here"), rows)


def _sections(asked: Mapping[str, Any], folder: Path) -> list[Section]:
    title, name = asked["asks"], asked["name"]
    lead = f"Paper: {asked['paper']} Here: {_HELD[asked['held']]}. {asked['verdict']}"
    if asked.get("tried"):
        lead += f" Tried: {asked['tried']}"
    if asked["held"] == "not yet":
        absent = f"{asked['verdict']} Run the same `igpt reproduce` command to continue."
        return [Section(title, name, absent=absent)]
    rows = [tuple(row) for row in asked["table"]["rows"]]
    table = Table("Numbers of the figure", tuple(asked["table"]["head"]), rows)
    if asked["plot"]["kind"] != "pictures":
        plot = partial(comparison.plot_comparison, asked["plot"])
        caption = f"{asked['how']} Bands and bars: 95 % intervals."
        if name.startswith("layers"):
            caption += " Ring: best layer by validation accuracy."
        alt = f"Figure: {asked['plot']['y']} by {asked['plot']['x'] or 'protocol'}."
        return [Section(title, name, lead, chart(plot, alt), caption=caption, table=table)]
    samples, completions = (
        _stacked(folder, kind, asked["plot"]["steps"]) for kind in ("samples", "completions")
    )
    steps = ", ".join(map(number, asked["plot"]["steps"]))
    return [
        Section(
            title,
            name,
            lead,
            picture=_picture(samples, f"Rows of samples after {steps} steps."),
            caption=f"Samples; from top to bottom after {steps} steps. {asked['how']}",
            table=table,
        ),
        Section(
            "How do completions change during training?",
            "completions",
            picture=_picture(completions, f"Completions after {steps} steps."),
            caption=(
                f"Original, visible part, two completions; from left to right after {steps} steps."
            ),
        ),
    ]


def _picture(image: Image.Image, alt: str) -> Picture:
    return Picture(figures.encode(image), *image.size, alt)


def _stacked(folder: Path, kind: str, steps: list[int]) -> Image.Image:
    """Join the pictures of all steps: samples below each other, completions side by side."""
    folder = folder / "pictures"
    found = [read_picture(folder / f"{kind}-{step}.png").convert("RGB") for step in steps]
    if kind == "samples":
        size = max(one.width for one in found), sum(one.height for one in found)
    else:
        size = sum(one.width + _GAP for one in found) - _GAP, max(one.height for one in found)
    sheet, left, top = Image.new("RGBA", size), 0, 0
    for one in found:
        sheet.paste(one, (left, top))
        if kind == "samples":
            top += one.height
        else:
            left += one.width + _GAP
    return _of_few_colors(sheet)


def _of_few_colors(picture: Image.Image) -> Image.Image:
    """Store pixels of at most 256 colours with a palette, for a smaller PNG."""
    pixels = np.asarray(picture)
    colors, numbers = np.unique(pixels.reshape(-1, 4), axis=0, return_inverse=True)
    if len(colors) > 256:
        return picture
    small = Image.fromarray(numbers.reshape(pixels.shape[:2]).astype(np.uint8))
    small.putpalette(colors.tobytes(), "RGBA")
    return small


def _figure_files(asked: Mapping[str, Any], folder: Path) -> dict[str, bytes]:
    """Return the picture files for the Markdown, on white."""
    if asked["held"] == "not yet":
        return {}
    if asked["plot"]["kind"] != "pictures":
        figure = comparison.plot_comparison(asked["plot"])
        return {f"{asked['name']}.svg": figures.svg(figure, transparent=False)}
    found = {}
    for kind in ("samples", "completions"):
        buffer = io.BytesIO()
        _stacked(folder, kind, asked["plot"]["steps"]).save(buffer, format="PNG", optimize=True)
        found[f"{kind}.png"] = buffer.getvalue()
    return found


def _models(evidence: Mapping[str, Any]) -> Table:
    rows = []
    for model in evidence["models"]:
        layers, width, heads = model["shape"]
        side = round(model["places"] ** 0.5)
        text = (
            f"{layers} layers, width {width}, {plural(heads, 'head')}, "
            f"{number(model['parameters'])} parameters, {side} px; {number(model['images_seen'])} "
            f"images in {duration(model['seconds'])}; validation loss "
            f"{model['validation_loss']:.3f} (colour frequencies {model['unigram_loss']:.3f})"
        )
        rows.append((model["name"], text))
    return Table("Pretrained models", (), rows)


def _machines(evidence: Mapping[str, Any]) -> Table:
    """Return a table with a column for each machine, or state of one, that steps ran on."""
    machines = evidence["machines"]
    keys = dict.fromkeys(key for machine in machines for key, value in machine.items() if value)
    rows = [(key, *(str(machine.get(key) or "") for machine in machines)) for key in keys]
    rows.append(("written", evidence["environment"]["started"], *[""] * (len(machines) - 1)))
    columns = " (a column for each that steps ran on)" if len(machines) > 1 else ""
    return Table(f"Machine and software{columns}", (), rows)


def _steps(evidence: Mapping[str, Any]) -> Table:
    rows = [(name, duration(step["seconds"])) for name, step in evidence["steps"].items()]
    return Table("Steps", (), rows)


def _markdown(page: Mapping[str, Any]) -> str:
    lines = [f"# {page['title']}", "", page["description"], "", page["state"], ""]
    for table in page["tables"]:
        lines += _markdown_table(table)
    for section in page["sections"]:
        lines += [f"## {section.title}", ""]
        if section.absent:
            lines += [section.absent, ""]
            continue
        lines += [section.lead, ""] if section.lead else []
        name = "samples" if section.name == "pictures" else section.name
        file = f"{name}.{'svg' if section.chart else 'png'}"
        alt = section.chart.alt if section.chart else section.picture.alt
        lines += [f"![{alt}]({FIGURES}/{file})", "", section.caption, ""]
        lines += _markdown_table(section.table) if section.table else []
    lines += ["## Data, configuration, machine", ""]
    for table in page["details"]:
        width = len(table.rows[0]) if table.rows else 2
        lines += _markdown_table(replace(table, head=("",) * width))
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(table: Table) -> list[str]:
    def line(cells: tuple[str, ...]) -> str:
        return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"

    return [
        f"{table.caption}:",
        "",
        line(table.head),
        "|" + "---|" * len(table.head),
        *map(line, table.rows),
        "",
    ]
