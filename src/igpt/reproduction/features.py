"""What linear probes say of features: by layer, by loss and size, by resolution."""

from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from igpt.reproduction.evidence import (
    Held,
    Results,
    Share,
    clearly,
    of_row,
    points,
    question,
    series,
    together,
)
from igpt.statistics import mean_of


def by_layer(results: Results, name: str, asks: str, paper: str) -> dict[str, Any]:
    """Probe accuracy by layer."""
    lines, rows, said, fitted = [], [], [], []
    found: list[Held] = []
    for size in results.scale.sizes:
        probe = results.probe(
            "main" if size == results.scale.main else f"{size}-{results.scale.updates}"
        )
        layers = probe["layers"]
        shares = [of_row(row, probe) for row in layers]
        numbers = [row["layer"] for row in layers]
        peak = numbers.index(probe["best_layer"])
        fitted.append(f"{probe['images']['train'] + probe['images']['validation']:,} ({size})")
        lines.append(series(size, numbers, shares, peak))
        found.append(_peak(shares, peak))
        said.append(
            f"{size}: best at layer {numbers[peak]} of {numbers[-1]}, {100 * shares[peak].value:.1f} %, "
            f"{points(shares[peak], shares[-1])} from the last"
        )
        rows += [
            [
                f"{size}, layer {number}{' (chosen)' if number == probe['best_layer'] else ''}",
                share.cell,
                share.n,
            ]
            for number, share in zip(numbers, shares, strict=True)
        ]
    if results.has("probes/own"):
        own = results.probe("own")
        best = results.best(own)
        rows.append(
            [f"{results.scale.main} on the corpus' own {own['classes']} classes", best.cell, best.n]
        )
    held = together(found)
    total = len(found)
    verdict = (
        f"{found.count('yes')} of {total} models have a single peak inside that is above the last layer by more than "
        f"the interval; {found.count('no')} of {total} clearly have not, the others leave it open. {'; '.join(said)}."
    )
    plot = {"kind": "lines", "x": "layer", "y": "probe accuracy, %", "series": lines}
    how = (
        "One pretraining run of each size (seed 0). Logistic regression on features averaged over places, "
        f"fitted to {', '.join(fitted)} images, of which the validation images had first chosen layer and strength; "
        "images drawn by seed 0. Intervals: Wilson's, 95 %, over test images; of "
        "differences, paired."
    )
    table = {"head": ["", "test accuracy, % (95 %)", "n"], "rows": rows}
    return question(name, asks, paper, held, verdict, plot, table, how)


def _peak(shares: list[Share], chosen: int) -> Held:
    """Whether accuracies by layer have one peak, inside, and the layer that validation chose is clearly above the last.

    "no" needs that no layer inside can be the only peak. Every comparison is at 95 %, and they are
    many: of some twenty layers one would have a dent by chance.
    """
    inside = range(1, len(shares) - 1)
    if not any(_may_be_the_peak(shares, layer) for layer in inside):
        return "no"
    return "yes" if chosen in inside and clearly(shares[chosen], shares[-1]) else "undecided"


def _may_be_the_peak(shares: list[Share], peak: int) -> bool:
    """Whether nothing speaks clearly against accuracies that rise up to a layer and fall from there."""
    if any(clearly(end, shares[peak]) for end in (shares[0], shares[-1])):
        return False
    # Of two layers on one side of the peak, the one nearer to it must not be clearly the worse one.
    sides = combinations(shares[: peak + 1], 2), combinations(reversed(shares[peak:]), 2)
    return not any(clearly(further, nearer) for side in sides for further, nearer in side)


def loss_and_probe(results: Results, name: str, asks: str, paper: str) -> dict[str, Any]:
    """Probe accuracy by validation loss, along training and across sizes."""
    lines, rows, said = [], [], []
    curves: dict[str, list[tuple[float, Share]]] = {}
    for size in results.scale.sizes:
        losses = results.losses(size)
        taken = [(step, results.probe(f"{size}-{step}")) for step in results.scale.snapshots]
        curve = [(losses[step], results.best(probe)) for step, probe in taken]
        curves[size] = curve
        lines.append(series(size, [loss for loss, _ in curve], [share for _, share in curve]))
        rows += [
            [f"{size}, update {step}", f"{loss:.3f}", share.cell, share.n]
            for (step, _), (loss, share) in zip(taken, curve, strict=True)
        ]
    better: list[Held] = []
    for size, curve in curves.items():
        correlation = _rank_correlation(
            [-loss for loss, _ in curve], [share.value for _, share in curve]
        )
        first, last = curve[0][1], curve[-1][1]
        up = correlation > 0.5 and clearly(last, first)
        better.append("yes" if up else "no" if clearly(first, last) else "undecided")
        said.append(
            f"{size}: rank correlation {correlation:.2f} over {len(curve)} points, {points(last, first)} from first "
            "to last"
        )
    ahead: list[Held] = []
    for smaller, larger in pairwise(curves):
        gain = _at_equal_loss(curves[smaller], curves[larger])
        if gain is None:
            ahead.append("undecided")
            said.append(f"{larger} against {smaller}: their losses do not overlap")
            continue
        value, half, count = gain
        ahead.append("yes" if value > half else "no" if value < -half else "undecided")
        said.append(
            f"{larger} against {smaller} at equal loss: {value:+.1f} ± {half:.1f} points over {count} points"
        )
    held = together([*better, *ahead])
    verdict = (
        f"Lower loss clearly goes with better features in {better.count('yes')} of {len(better)} sizes, and clearly "
        f"not in {better.count('no')}; at equal loss the larger model is clearly ahead in "
        f"{ahead.count('yes')} of {len(ahead)} pairs of sizes, and clearly behind in {ahead.count('no')}. "
        f"{'; '.join(said)}."
    )
    plot = {
        "kind": "lines",
        "x": "validation loss, nats/pixel (better to the right)",
        "y": "best layer's probe accuracy, %",
        "falling": True,
        "series": lines,
    }
    how = (
        "One run of each size (seed 0), all on the same batches; snapshots along one cosine schedule. Every snapshot "
        "is probed on the same images, its layer chosen on validation. Between points of the smaller model accuracy "
        "is interpolated linearly by loss."
    )
    table = {"head": ["", "validation loss", "test accuracy, % (95 %)", "n"], "rows": rows}
    return question(name, asks, paper, held, verdict, plot, table, how)


def _rank_correlation(first: list[float], second: list[float]) -> float:
    from scipy.stats import spearmanr

    constant = min(len(set(first)), len(set(second))) < 2
    return 0.0 if constant else float(spearmanr(first, second).statistic)


def _at_equal_loss(
    smaller: list[tuple[float, Share]], larger: list[tuple[float, Share]]
) -> tuple[float, float, int] | None:
    """Mean lead of the larger model in points where both reach a loss, half its interval, and over how many points.

    The interval is over the test images, which are the same at all points.
    """
    order = sorted(smaller, key=lambda point: point[0])
    losses = np.array([loss for loss, _ in order])
    rights = np.array([share.right for _, share in order], dtype=np.float64)  # [points, N]
    inside = [(loss, share) for loss, share in larger if losses[0] <= loss <= losses[-1]]
    if not inside:
        return None
    leads = []  # of every point, by image
    for loss, share in inside:
        after = min(max(1, int(np.searchsorted(losses, loss))), len(losses) - 1)
        part = (loss - losses[after - 1]) / (losses[after] - losses[after - 1])
        assert share.right is not None
        leads.append(share.right - (1 - part) * rights[after - 1] - part * rights[after])
    found = mean_of(np.mean(leads, axis=0))
    low, high = found["interval_95"]
    return 100 * found["mean"], 50 * (high - low), len(inside)


def resolution(results: Results, name: str, asks: str, paper: str) -> dict[str, Any]:
    """Probe accuracy by resolution."""
    sides = sorted(results.scale.resolutions)
    probes = {side: results.probe(f"at-{side}") for side in sides}
    best = [results.best(probes[side]) for side in sides]
    ours = [
        replace(share, images=share.images[1:]) for share in best
    ]  # of every data set the same ones, in its order
    first, last = ours[0], ours[-1]
    held: Held = "yes" if clearly(last, first) else "no" if clearly(first, last) else "undecided"
    verdict = (
        f"{sides[-1]} px is {points(last, first)} beside {sides[0]} px"
        f"{'' if held != 'undecided' else ', within the interval'}: "
        + ", ".join(
            f"{side} px {100 * share.value:.1f} %" for side, share in zip(sides, ours, strict=True)
        )
        + "."
    )
    rows = [[f"{side} px", share.cell, share.n] for side, share in zip(sides, ours, strict=True)]
    plot = {
        "kind": "groups",
        "x": "resolution",
        "y": "probe accuracy, %",
        "categories": [f"{side} px" for side in sides],
        "series": [series("best layer", list(range(len(sides))), ours)],
    }
    how = (
        f"The {results.scale.resolution_size} size, {results.scale.resolution_updates:,} updates of the same images "
        "at every resolution, in the same palette, one run each (seed 0), probed on the same test images; losses "
        "at different resolutions cannot be compared."
    )
    table = {"head": ["resolution", "test accuracy, % (95 %)", "n"], "rows": rows}
    return question(name, asks, paper, held, verdict, plot, table, how)
