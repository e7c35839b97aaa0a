"""Answers from linear probes: accuracy by layer, by loss and size of the model, by resolution."""

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np

from igpt.reproduction.evidence import (
    Accuracy,
    Answer,
    Results,
    Verdict,
    accuracy_of_row,
    clearly,
    overall,
    points,
    series,
)
from igpt.statistics import mean_of


def by_layer(results: Results) -> Answer:
    """Answer by the probe accuracy of every layer."""
    lines, rows, sentences, fitted = [], [], [], []
    found: list[Verdict] = []
    for size in results.scale.sizes:
        probe = results.probe(
            "main" if size == results.scale.main else f"{size}-{results.scale.steps}"
        )
        layers = probe["layers"]
        shares = [accuracy_of_row(row, probe) for row in layers]
        numbers = [row["layer"] for row in layers]
        peak = numbers.index(probe["best_layer"])
        fitted.append(f"{probe['images']['train'] + probe['images']['validation']:,} ({size})")
        lines.append(series(size, numbers, shares, peak))
        found.append(_peak(shares, peak))
        sentences.append(
            f"{size}: best layer {numbers[peak]} of {numbers[-1]}, {100 * shares[peak].value:.1f} "
            f"%, {points(shares[peak], shares[-1])} relative to the last layer"
        )
        rows += [
            [
                f"{size}, layer {number}{' (best)' if number == probe['best_layer'] else ''}",
                share.cell,
                share.n,
            ]
            for number, share in zip(numbers, shares, strict=True)
        ]
    if results.has("probes/own"):
        own = results.probe("own")
        best = results.best(own)
        rows.append(
            [
                f"{results.scale.main}, the {own['classes']} classes of the pretraining images",
                best.cell,
                best.n,
            ]
        )
    total = len(found)
    verdict = (
        f"{found.count('yes')} of {total} models have a single peak at an inner layer, above the "
        f"last layer by more than the interval; {found.count('no')} of {total} clearly do not; the "
        f"result is inconclusive for {found.count('undecided')} of {total}. {'; '.join(sentences)}."
    )
    plot = {"kind": "lines", "x": "layer", "y": "probe accuracy, %", "series": lines}
    how = (
        "One pretraining run per size (seed 0). Logistic regression on features averaged over "
        "positions: the layer and the regularisation strength are selected on validation images, "
        f"then the classifier is fitted to training and validation images, {', '.join(fitted)} in "
        "all (a subset, seed 0). Intervals: 95 %, Wilson's over test images; paired for "
        "differences."
    )
    table = {"head": ["", "test accuracy, % (95 %)", "n"], "rows": rows}
    return Answer(overall(found), verdict, plot, table, how)


def _peak(shares: list[Accuracy], chosen: int) -> Verdict:
    """Return "yes" if the chosen layer can be the only peak, an inner one, clearly above the last.

    "no" requires that no inner layer can be the only peak. Comparisons are at the 95 % level,
    without correction for their number: among twenty layers, one dent is expected by chance.
    """
    inside = range(1, len(shares) - 1)
    if not any(_may_be_the_peak(shares, layer) for layer in inside):
        return "no"
    return "yes" if chosen in inside and clearly(shares[chosen], shares[-1]) else "undecided"


def _may_be_the_peak(shares: list[Accuracy], peak: int) -> bool:
    """Return False if accuracies clearly do not rise up to a layer, or do not fall after it."""
    if any(clearly(end, shares[peak]) for end in (shares[0], shares[-1])):
        return False
    # Of two layers on one side of the peak, the one closer to it must not be clearly worse.
    sides = combinations(shares[: peak + 1], 2), combinations(reversed(shares[peak:]), 2)
    return not any(clearly(further, nearer) for side in sides for further, nearer in side)


def loss_and_probe(results: Results) -> Answer:
    """Answer by probe accuracy and validation loss, during training and across sizes."""
    lines, rows, sentences = [], [], []
    curves: dict[str, list[tuple[float, Accuracy]]] = {}
    for size in results.scale.sizes:
        losses = results.losses(size)
        taken = [(step, results.probe(f"{size}-{step}")) for step in results.scale.snapshots]
        curve = [(losses[step], results.best(probe)) for step, probe in taken]
        curves[size] = curve
        lines.append(series(size, [loss for loss, _ in curve], [share for _, share in curve]))
        rows += [
            [f"{size}, step {step}", f"{loss:.3f}", share.cell, share.n]
            for (step, _), (loss, share) in zip(taken, curve, strict=True)
        ]
    better: list[Verdict] = []
    for size, curve in curves.items():
        correlation = _rank_correlation(
            [-loss for loss, _ in curve], [share.value for _, share in curve]
        )
        first, last = curve[0][1], curve[-1][1]
        up = correlation > 0.5 and clearly(last, first)
        better.append("yes" if up else "no" if clearly(first, last) else "undecided")
        sentences.append(
            f"{size}: rank correlation {correlation:.2f} over {len(curve)} snapshots, "
            f"{points(last, first)} from the first to the last"
        )
    ahead: list[Verdict] = []
    for smaller, larger in pairwise(curves):
        gain = _at_equal_loss(curves[smaller], curves[larger])
        if gain is None:
            ahead.append("undecided")
            sentences.append(f"{larger} and {smaller}: their losses do not overlap")
            continue
        value, half, count = gain
        ahead.append("yes" if value > half else "no" if value < -half else "undecided")
        sentences.append(
            f"{larger} minus {smaller} at equal loss: {value:+.1f} ± {half:.1f} points "
            f"(mean over {count} snapshots)"
        )
    verdict = (
        f"A lower loss clearly gives better features in {better.count('yes')} of {len(better)} "
        f"sizes and clearly does not in {better.count('no')}; at equal loss, the larger model is "
        f"clearly better in {ahead.count('yes')} of {len(ahead)} pairs of sizes and clearly worse "
        f"in {ahead.count('no')}. {'; '.join(sentences)}."
    )
    plot = {
        "kind": "lines",
        "x": "validation loss, nats/pixel (lower to the right)",
        "y": "probe accuracy of the best layer, %",
        "falling": True,
        "series": lines,
    }
    how = (
        "One run per size (seed 0), all on the same batches; the snapshots are from one cosine "
        "schedule. Every snapshot is probed on the same images, at its best layer by validation "
        "accuracy. The accuracy of the smaller model is interpolated linearly in the loss between "
        "its snapshots."
    )
    table = {"head": ["", "validation loss", "test accuracy, % (95 %)", "n"], "rows": rows}
    return Answer(overall([*better, *ahead]), verdict, plot, table, how)


def _rank_correlation(first: list[float], second: list[float]) -> float:
    from scipy.stats import spearmanr

    constant = min(len(set(first)), len(set(second))) < 2
    return 0.0 if constant else float(spearmanr(first, second).statistic)


def _at_equal_loss(
    smaller: list[tuple[float, Accuracy]], larger: list[tuple[float, Accuracy]]
) -> tuple[float, float, int] | None:
    """Return the mean lead of the larger model at equal loss, half its interval, and a count.

    The lead is in percentage points, averaged over the larger model's snapshots whose losses the
    smaller model reaches too; the count is their number. The interval is over the test images, the
    same for all snapshots.
    """
    order = sorted(smaller, key=lambda point: point[0])
    losses = np.array([loss for loss, _ in order])
    rights = np.array([share.right for _, share in order], dtype=np.float64)  # [points, N]
    inside = [(loss, share) for loss, share in larger if losses[0] <= loss <= losses[-1]]
    if not inside:
        return None
    leads = []  # for every snapshot, by image
    for loss, share in inside:
        after = min(max(1, int(np.searchsorted(losses, loss))), len(losses) - 1)
        part = (loss - losses[after - 1]) / (losses[after] - losses[after - 1])
        assert share.right is not None
        leads.append(share.right - (1 - part) * rights[after - 1] - part * rights[after])
    found = mean_of(np.mean(leads, axis=0))
    low, high = found["interval_95"]
    return 100 * found["mean"], 50 * (high - low), len(inside)


def resolution(results: Results) -> Answer:
    """Answer by the probe accuracy at every resolution."""
    sides = sorted(results.scale.resolutions)
    probes = {side: results.probe(f"at-{side}") for side in sides}
    best = [results.best(probes[side]) for side in sides]
    # All resolutions have the same test images, in the same order, in data sets of different names.
    shares = [replace(share, images=share.images[1:]) for share in best]
    first, last = shares[0], shares[-1]
    held: Verdict = "yes" if clearly(last, first) else "no" if clearly(first, last) else "undecided"
    verdict = (
        f"{sides[-1]} px minus {sides[0]} px: "
        f"{points(last, first)}{', within the interval' if held == 'undecided' else ''}. "
        + ", ".join(
            f"{side} px {100 * share.value:.1f} %"
            for side, share in zip(sides, shares, strict=True)
        )
        + "."
    )
    rows = [[f"{side} px", share.cell, share.n] for side, share in zip(sides, shares, strict=True)]
    plot = {
        "kind": "groups",
        "x": "resolution",
        "y": "probe accuracy, %",
        "categories": [f"{side} px" for side in sides],
        "series": [series("best layer", list(range(len(sides))), shares)],
    }
    how = (
        f"The {results.scale.resolution_size} size, {results.scale.resolution_steps:,} steps on "
        "the same images at every resolution, with the same palette; one run each (seed 0), probed "
        "on the same test images. Losses at different resolutions cannot be compared."
    )
    table = {"head": ["resolution", "test accuracy, % (95 %)", "n"], "rows": rows}
    return Answer(held, verdict, plot, table, how)
