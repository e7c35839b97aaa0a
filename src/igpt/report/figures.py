"""Figures and picture grids of the recorded results of a run; nothing is recomputed here.

Lines can be distinguished by colour-blind readers, and by their style in black and white. Figures
have no background, and colours for light and for dark pages. Lines have labels ("training", "best",
...) by which programs find their data.
"""

import base64
import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from igpt.evaluation.results import best_row
from igpt.report.record import baselines, best_validation, history, qualities, standard_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 8.4, 3.7  # widths in inches: a text column, and a phone held upright
# Inches; the labels of lines are on the right.
_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 3.3, 0.68, 1.4, 0.12, 0.52
FONT = 9.5  # points
_LONGEST_CLASS = 22  # letters in a line of a class's name


@dataclass(frozen=True)
class Look:
    """Colours: background, text, secondary text, grid, the trained model, its comparison."""

    paper: str
    ink: str
    muted: str
    grid: str
    main: str
    other: str


LIGHT = Look(
    paper="#ffffff", ink="#1f2328", muted="#59636e", grid="#e1e5ea", main="#0a62a9", other="#b34700"
)
DARK = Look(
    paper="#15181c", ink="#e8eaed", muted="#a3adb8", grid="#353c45", main="#6cb8f0", other="#f0a04b"
)


def loss_curve(
    metrics: list[dict[str, Any]],
    *,
    unit: str = "nats/pixel",
    look: Look = LIGHT,
    width: float = WIDE,
) -> "Figure":
    """Plot training and validation loss by step, with the baselines.

    A ring marks the lowest validation loss.

    Args:
        metrics: the records of `metrics.jsonl`.
        unit: unit of the losses, for the label of the axis.
    """
    figure, axes = canvas(look, width)
    train, validation = history(metrics, "train"), history(metrics, "validation")
    labels: list[tuple[float, str, str]] = []
    for name, value in baselines(metrics).items():
        dashes = "--" if name == "uniform" else (0, (1, 1.5))
        axes.axhline(value, color=look.muted, linewidth=1.2, linestyle=dashes, label=name)
        text = "uniform" if name == "uniform" else "colour\nfrequencies"
        labels.append((value, f"{text} {value:.2f}", look.muted))
    if train:
        # A path with every step of a long run would make the page large: rasterize it. Axes and
        # text remain vector graphics.
        many = len(train) > 3000
        style: dict[str, Any] = {"linewidth": 0.5, "alpha": 0.7} if many else {"linewidth": 1}
        if len(train) == 1:
            style["marker"] = "o"
        _, losses = _line(axes, train, "loss", "training", look.other, rasterized=many, **style)
        labels.append((_last(losses), "training", look.other))
    if validation:
        style = {"linewidth": 2, "marker": _marker(validation), "markersize": 3.5}
        _, losses = _line(axes, validation, "loss", "validation", look.main, **style)
        labels.append((_last(losses), "validation", look.main))
    best = best_validation(metrics)
    if best is not None:
        ring(axes, *best, look)
    steps = [record["step"] for record in train + validation]
    axes.set_xlim(0, max(steps, default=1) or 1)
    low, high = span([line.get_ydata() for line in axes.get_lines()])
    # Leave space below the curve for the label of the best step.
    axes.set_ylim(low - 0.16 * (high - low), high + 0.05 * (high - low))
    if best is not None:
        _note(axes, *best, f"best {best[1]:.3f}, step {best[0]:,}", look, above=False)
    axes.set(xlabel="training step", ylabel=f"loss, {unit}")
    label_ends(axes, labels, width)
    return figure


def accuracy_curve(
    metrics: list[dict[str, Any]], *, look: Look = LIGHT, width: float = WIDE
) -> "Figure":
    """Plot a classifier's validation accuracy by step, in percent; a ring marks the best."""
    figure, axes = canvas(look, width)
    shown = [
        {"step": record["step"], "accuracy": 100 * (1 - record["error"])}
        for record in history(metrics, "validation", "error")
    ]
    _, values = _line(
        axes, shown, "accuracy", "validation", look.main, linewidth=2, marker="o", markersize=3.5
    )
    low, high = span([values])
    axes.set_ylim(low - 0.08 * (high - low), high + 0.16 * (high - low))
    axes.set_xlim(0, shown[-1]["step"])
    best = best_validation(metrics, "error")
    if best is not None:
        top = 100 * (1 - best[1])
        ring(axes, best[0], top, look)
        _note(axes, best[0], top, f"best {top:.1f} %, step {best[0]:,}", look, above=True)
    axes.set(xlabel="training step", ylabel="validation accuracy, %")
    label_ends(axes, [(_last(values), "validation", look.main)], width)
    return figure


def quality_curve(
    metrics: list[dict[str, Any]], *, look: Look = LIGHT, width: float = WIDE
) -> "Figure":
    """Plot the accuracies of one layer's features by step, in percent.

    Lines are the linear probe and the nearest neighbours.
    """
    figure, axes = canvas(look, width)
    records = qualities(metrics)
    shown = [
        {"step": record["step"], "linear": 100 * record["linear_accuracy"]}
        | {"knn": 100 * record["knn_accuracy"]}
        for record in records
    ]
    style = {"linewidth": 2, "marker": _marker(shown), "markersize": 3.5}
    _, linear = _line(axes, shown, "linear", "linear probe", look.main, **style)
    name, style = f"{records[-1]['k']}-NN", style | {"linewidth": 1.4, "linestyle": "--"}
    _, nearest = _line(axes, shown, "knn", name, look.other, **style)
    low, high = span([linear, nearest])
    axes.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    axes.set_xlim(0, records[-1]["step"] or 1)
    axes.set(xlabel="training step", ylabel="validation accuracy, %")
    labels = [(linear[-1], "linear probe", look.main), (nearest[-1], name, look.other)]
    label_ends(axes, [(float(value), text, color) for value, text, color in labels], width)
    return figure


def rank_curve(
    metrics: list[dict[str, Any]], *, look: Look = LIGHT, width: float = WIDE
) -> "Figure":
    """Plot the effective rank of one layer's features by step."""
    figure, axes = canvas(look, width)
    records = qualities(metrics)
    style: dict[str, Any] = {"linewidth": 2, "marker": _marker(records), "markersize": 3.5}
    _, values = _line(axes, records, "effective_rank", "effective rank", look.main, **style)
    axes.set_ylim(0, 1.08 * float(values.max()) or 1)
    axes.set_xlim(0, records[-1]["step"] or 1)
    axes.set(xlabel="training step", ylabel="effective rank")
    label_ends(axes, [(float(values[-1]), f"{values[-1]:.1f}", look.main)], width)
    return figure


def _marker(records: Sequence[Any]) -> str:
    return "o" if len(records) <= 60 else ""


def probe_by_layer(probe: dict[str, Any], *, look: Look = LIGHT, width: float = WIDE) -> "Figure":
    """Plot linear probe accuracy by layer, in percent, with the baselines.

    The baselines are raw pixels and an untrained network; the test accuracy by nearest neighbours
    is another line if the probe has it. The band is one standard error,
    sqrt(p (1 - p) / n), around the test accuracy; a ring marks the best layer by validation
    accuracy.

    Args:
        probe: the content of `probe.json`.
    """
    figure, axes = canvas(look, width)
    layers, count = probe["layers"], probe["images"]["test"]
    known = probe.get("baselines") or {}
    labels: list[tuple[float, str, str]] = []
    if pixels := known.get("raw_pixels"):
        value = 100 * pixels["test_accuracy"]
        axes.axhline(value, color=look.muted, linewidth=1.2, linestyle="--", label="raw pixels")
        labels.append((value, f"raw pixels {value:.1f}", look.muted))
    if untrained := known.get("untrained"):
        style = {"linestyle": "-.", "linewidth": 1.4}
        rows = untrained["layers"]
        _, values = _line(axes, rows, "test_accuracy", "untrained", look.other, **style)
        labels.append((values[-1], "untrained\nnetwork", look.other))
    _, values = _line(
        axes, layers, "validation_accuracy", "validation", look.main, linestyle=":", linewidth=1.4
    )
    labels.append((values[-1], "validation", look.main))
    if near := [{"layer": row["layer"], **row["knn"]} for row in layers if row.get("knn")]:
        name, style = f"{near[0]['k']}-NN", {"linestyle": "--", "linewidth": 1.4}
        _, values = _line(axes, near, "test_accuracy", name, look.main, **style)
        labels.append((values[-1], name, look.main))
    steps, values = _line(
        axes, layers, "test_accuracy", "test", look.main, linewidth=2, marker="o", markersize=4
    )
    labels.append((values[-1], "test", look.main))
    error = np.array([100 * standard_error(value / 100, count) for value in values])
    axes.fill_between(
        steps, values - error, values + error, color=look.main, alpha=0.14, linewidth=0
    )
    chosen = best_row(probe)
    layer, accuracy = chosen["layer"], 100 * chosen["test_accuracy"]
    ring(axes, layer, accuracy, look)
    low, high = span(
        [*(line.get_ydata() for line in axes.get_lines()), values - error, values + error]
    )
    axes.set_ylim(low - 0.12 * (high - low), high + 0.12 * (high - low))
    axes.set_xlim(min(steps), max(steps) if len(steps) > 1 else min(steps) + 1)
    neighbours = values[abs(steps - layer) == 1]
    # Keep the label away from the line.
    above = not len(neighbours) or accuracy >= neighbours.mean()
    _note(axes, layer, accuracy, f"layer {layer}: {accuracy:.1f} %", look, above=above)
    axes.set(xlabel="layer", ylabel="accuracy, %")
    label_ends(axes, labels, width)
    return figure


def confusion_matrix(
    counts: list[list[int]], names: list[str], *, look: Look = LIGHT, width: float = WIDE
) -> "Figure":
    """Plot how often each class (row) was predicted as each class (column).

    Colours are shares of the images of a row. Up to 20 classes have names and, on wide figures,
    numbers in the cells. If a name is long, columns are labelled with the numbers of the rows.

    Args:
        counts: numbers of images, [C][C].
        names: of the classes.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    table = np.array(counts, dtype=np.float64)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    few, size = len(names) <= 20, FONT if width >= WIDE else min(7, 130 / len(names))
    has_two_lines = 40 * width / len(names) > 2.5 * size  # room for them in the height of a row
    short = max(map(len, names)) <= 10
    rows, columns = names, names
    if few and not short:
        wrapped = [_wrapped(name, 2 if has_two_lines else 1) for name in names]
        rows = [f"{name}  {number}" for number, name in enumerate(wrapped, 1)]
        columns = [str(number) for number in range(1, len(names) + 1)]
    widest = max(len(line) for row in rows for line in row.split("\n")) if few else 3
    letter = 0.6 * size / 72  # inches, of a letter
    left, below = 0.35 + letter * widest, 0.35 + letter * (max(map(len, columns)) if few else 3)
    side = min(width - left - 0.1, 5.4)
    height = side + below + 0.1
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes(
        (left / width, below / height, side / width, side / height), facecolor="none"
    )
    # The background's colour is none, the main colour all images of the class.
    colors = LinearSegmentedColormap.from_list("shares", [look.paper, look.main])
    axes.imshow(shares, cmap=colors, vmin=0, vmax=1)
    if few:
        places = range(len(names))
        turned = 90 if max(map(len, columns)) > 2 else 0
        axes.set_xticks(places, columns, rotation=turned, fontsize=size, color=look.ink)
        axes.set_yticks(places, rows, fontsize=size, color=look.ink)
    if few and (width >= WIDE or len(names) <= 10):
        for (row, column), count in np.ndenumerate(table):
            if count:
                color = look.paper if shares[row, column] > 0.5 else look.ink
                axes.text(
                    column,
                    row,
                    f"{count:.0f}",
                    ha="center",
                    va="center",
                    fontsize=size,
                    color=color,
                )
    axes.tick_params(length=0, colors=look.ink, labelsize=size)
    for spine in axes.spines.values():
        spine.set_color(look.grid)
    axes.set_xlabel("predicted class", fontsize=FONT, color=look.ink)
    axes.set_ylabel("class", fontsize=FONT, color=look.ink)
    return figure


def _wrapped(name: str, lines: int) -> str:
    """Return the name of a class in at most one or two lines; the rest of a long one is cut off."""
    dots = "\N{HORIZONTAL ELLIPSIS}"
    if lines == 1:
        return name if len(name) <= _LONGEST_CLASS else name[: _LONGEST_CLASS - 1] + dots
    return "\n".join(textwrap.wrap(name, _LONGEST_CLASS, max_lines=lines, placeholder=dots))


def encode(figure: "Figure | Image.Image") -> str:
    """Return a data URI, deterministically: SVG with text for a figure, PNG for a picture."""
    if isinstance(figure, Image.Image):
        buffer = io.BytesIO()
        figure.save(buffer, format="PNG", optimize=True)
        return data_uri(buffer.getvalue(), "image/png")
    return data_uri(svg(figure), "image/svg+xml")


def svg(figure: "Figure", *, transparent: bool = True) -> bytes:
    """Return a figure as SVG with text, deterministically; transparent, or on white."""
    import matplotlib

    buffer = io.BytesIO()
    fonts = ["Helvetica Neue", "Segoe UI", "Roboto", "Arial", "Liberation Sans", "DejaVu Sans"]
    # matplotlib has no arguments for these three settings.
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "igpt", "font.sans-serif": fonts}
    ):
        figure.savefig(
            buffer,
            format="svg",
            transparent=transparent,
            dpi=200,
            metadata={"Date": None, "Creator": None},
        )
    return buffer.getvalue()


def data_uri(content: bytes, media_type: str) -> str:
    """Return `content` as a data URI."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def canvas(look: Look, width: float) -> "tuple[Figure, Axes]":
    """Return an empty figure with fixed margins, with space for labels at the ends of lines."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    figure = Figure(figsize=(width, _HEIGHT))
    figure.subplots_adjust(_LEFT / width, _BOTTOM / _HEIGHT, 1 - _RIGHT / width, 1 - _TOP / _HEIGHT)
    axes = figure.add_subplot(facecolor="none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(look.muted)
    axes.tick_params(colors=look.ink, labelsize=FONT, length=0, pad=5)
    axes.tick_params(axis="x", length=3, color=look.muted)
    axes.tick_params(axis="y", pad=9)  # a ring around the first point covers no number
    axes.grid(axis="y", color=look.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(
        MaxNLocator(nbins=8 if width >= WIDE else 4, integer=True, steps=[1, 2, 2.5, 5, 10])
    )
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(fontsize=FONT, color=look.ink)
    return figure, axes


def _line(
    axes: "Axes", records: list[dict[str, Any]], key: str, label: str, color: str, **style: Any
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Plot `key` of the records by step or layer; accuracies in percent."""
    by = "step" if "step" in records[0] else "layer"
    x = np.array([record[by] for record in records], dtype=np.float64)
    y = np.array([record[key] for record in records], dtype=np.float64)
    if by == "layer":
        y *= 100
    axes.plot(x, y, color=color, label=label, clip_on=False, **style)
    return x, y


def ring(axes: "Axes", x: float, y: float, look: Look, color: str | None = None) -> None:
    """Mark the best point with a ring."""
    axes.plot(
        x,
        y,
        "o",
        color=color or look.main,
        label="best",
        markersize=11,
        markerfacecolor="none",
        markeredgewidth=1.6,
        clip_on=False,
        zorder=4,
    )


def _note(axes: "Axes", x: float, y: float, text: str, look: Look, *, above: bool) -> None:
    """Label the point with the ring, on a patch of the background, right of the axis's labels."""
    low, high = axes.get_xlim()
    across = axes.bbox.width * 72 / axes.figure.dpi  # points
    point, half = (x - low) / (high - low) * across, 0.3 * FONT * len(text)
    middle = max(min(point, across + 6 - half), half + 2)
    axes.annotate(
        text,
        (x, y),
        (middle - point, 11 if above else -11),
        textcoords="offset points",
        ha="center",
        va="bottom" if above else "top",
        color=look.main,
        fontsize=FONT,
        fontweight="bold",
        annotation_clip=False,
        bbox={"facecolor": look.paper, "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
        zorder=5,
    )


def _last(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else math.nan


def span(values: Iterable[Any]) -> tuple[float, float]:
    """Return limits of an axis: the lowest and highest finite value, or around it if equal."""
    every = np.concatenate([np.empty(0), *(np.asarray(some, dtype=np.float64) for some in values)])
    finite = every[np.isfinite(every)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def label_ends(axes: "Axes", labels: list[tuple[float, str, str]], width: float) -> None:
    """Label lines at their right ends; move labels apart where they would overlap."""
    low, high = axes.get_ylim()
    points = 72 * (_HEIGHT - _TOP - _BOTTOM)
    labels = sorted(label for label in labels if math.isfinite(label[0]))
    heights = [1.18 * FONT * (1 + text.count("\n")) for _, text, _ in labels]
    middles = spread([(value - low) / (high - low) * points for value, *_ in labels], heights)
    for middle, (_, text, color) in zip(middles, labels, strict=True):
        axes.annotate(
            text,
            (1, middle / points),
            (9, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=FONT,
            linespacing=1.1,
        )


def spread(middles: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Move intervals, sorted by their middles, apart until none overlap, as little as possible.

    After subtracting the minimum distances, the middles must not decrease. Isotonic regression
    finds the nearest such values by least squares.
    """
    from sklearn.isotonic import isotonic_regression

    if not len(middles):
        return []
    distances = [(first + second) / 2 for first, second in pairwise(heights)]
    offsets = np.cumsum([0.0, *distances])
    moved: list[float] = (isotonic_regression(middles - offsets) + offsets).tolist()
    return moved
