"""Figures that compare models, from the plot data of an answer: lines, and groups of points.

Every point has an interval, such as that of 95 %. Series differ in colour, marker and line style.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from igpt.report.figures import FONT, LIGHT, WIDE, Look, canvas, label_ends, ring, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS, _DASHES = "osD^", ("-", "--", "-.", ":")
MOST_SERIES = len(_MARKERS)
_MOST_MARKERS = 60  # points of a line; more would hide it
_GREEN = {LIGHT.paper: "#1a7f37", "other": "#5fd07f"}


def plot_comparison(
    plot: Mapping[str, Any], *, look: Look = LIGHT, width: float = WIDE
) -> "Figure":
    """Plot the data of kind "lines" or "groups".

    Args:
        plot: "x", "y": labels of the axes; "series": lists "x", "y", "low", "high", a "name" and
            optionally a "ring" (index of a point) and a "number" (of its colour and marker; by
            default its place), at most MOST_SERIES; "categories" of groups; "falling" if x
            decreases to the right.
    """
    figure, axes = canvas(look, width)
    every = [np.array(one[key], float) for one in plot["series"] for key in ("low", "high")]
    low, high = span(every)
    axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    if plot["kind"] == "lines":
        _lines(axes, plot, look, width)
    else:
        _groups(axes, plot, look, width)
    axes.set(xlabel=plot["x"], ylabel=plot["y"])
    return figure


def _colors(look: Look) -> tuple[str, ...]:
    return look.main, look.other, _GREEN.get(look.paper, _GREEN["other"]), look.muted


def _lines(axes: "Axes", plot: Mapping[str, Any], look: Look, width: float) -> None:
    from matplotlib.ticker import MaxNLocator

    labels = []
    xs = [value for one in plot["series"] for value in one["x"]]
    margin = 0.02 * (max(xs) - min(xs) or 1)
    axes.set_xlim(min(xs) - margin, max(xs) + margin)
    if plot.get("falling"):
        axes.invert_xaxis()
        axes.xaxis.set_major_locator(
            MaxNLocator(nbins=8 if width >= WIDE else 4, steps=[1, 2, 2.5, 5, 10])
        )
        axes.xaxis.set_major_formatter("{x:.3g}")
    colors = _colors(look)
    for place, one in enumerate(plot["series"]):
        number = one.get("number", place)
        color = colors[number]
        axes.plot(
            one["x"],
            one["y"],
            color=color,
            label=one["name"],
            clip_on=False,
            linewidth=1.8,
            linestyle=_DASHES[number],
            marker=_MARKERS[number] if len(one["x"]) <= _MOST_MARKERS else "",
            markersize=4.5,
        )
        axes.fill_between(one["x"], one["low"], one["high"], color=color, alpha=0.13, linewidth=0)
        if one.get("ring") is not None:
            ring(axes, one["x"][one["ring"]], one["y"][one["ring"]], look, color=color)
        labels.append((one["y"][-1], one["name"], color))
    label_ends(axes, labels, width)


def _groups(axes: "Axes", plot: Mapping[str, Any], look: Look, width: float) -> None:
    """Plot points side by side in every category, with a legend next to the axes."""
    count = len(plot["series"])
    for number, (one, color) in enumerate(zip(plot["series"], _colors(look), strict=False)):
        x = np.array(one["x"], float) + (number - (count - 1) / 2) * 0.13
        y = np.array(one["y"], float)
        bars = np.abs(np.array([y - one["low"], one["high"] - y]))
        axes.errorbar(
            x,
            y,
            bars,
            fmt=_MARKERS[number],
            color=color,
            label=one["name"],
            markersize=6,
            capsize=3,
            linewidth=1.4,
        )
    axes.set_xlim(-0.5, len(plot["categories"]) - 0.5)
    axes.set_xticks(range(len(plot["categories"])), plot["categories"])
    box = axes.get_position()
    axes.set_position((box.x0, box.y0, box.width - 0.3 / width, box.height))  # for long names
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.0, 1.03),
        frameon=False,
        fontsize=FONT,
        labelcolor=look.ink,
        handlelength=1,
    )
