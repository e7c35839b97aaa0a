"""Answers from linear probes: by layer, by loss and size of the model, by resolution, by compute,
and compared with raw pixels and training from scratch."""

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
from igpt.reproduction.steps import LONG, compared, runs
from igpt.statistics import mean_of


def by_layer(results: Results, *, second: bool = False) -> Answer:
    """Answer by the probe accuracy of every layer.

    Args:
        second: whether the models of the second recipe are compared.
    """
    scale = results.scale
    lines, rows, sentences, fitted = [], [], [], []
    found: list[Verdict] = []
    for model in compared(scale, second=second):
        probe = results.probe(model.probe)
        layers = probe["layers"]
        shares = [accuracy_of_row(row, probe) for row in layers]
        numbers = [row["layer"] for row in layers]
        peak = numbers.index(probe["best_layer"])
        name = model.label
        fitted.append(f"{probe['images']['train'] + probe['images']['validation']:,} ({name})")
        lines.append(series(name, numbers, shares, peak))
        found.append(_peak(shares, peak))
        sentences.append(
            f"{name}: best layer {numbers[peak]} of {numbers[-1]}, {100 * shares[peak].value:.1f} "
            f"%, {points(shares[peak], shares[-1])} relative to the last layer"
        )
        rows += [
            [
                f"{name}, layer {number}{' (best)' if number == probe['best_layer'] else ''}",
                share.cell,
                share.n,
            ]
            for number, share in zip(numbers, shares, strict=True)
        ]
    if results.has("probes/own") and not second:
        own = results.probe("own")
        best = results.best(own)
        rows.append(
            [
                f"{scale.main}, the {own['classes']} classes of the pretraining images",
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
    one_each = (
        "One pretraining run per size (seed 0)"
        if scale.seeds == 1
        else f"Models of the {scale.main} size; corpus: pretrained on the pretraining images; "
        "labelled: on the images for evaluation, without their labels"
    )
    how = (
        f"{one_each}. Logistic regression on features averaged over "
        "positions: the layer and the regularization strength are selected on validation images, "
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
        gap = losses[after] - losses[after - 1]
        part = (loss - losses[after - 1]) / gap if gap else 1.0
        assert share.right is not None
        leads.append(share.right - (1 - part) * rights[after - 1] - part * rights[after])
    found = mean_of(np.mean(leads, axis=0))
    low, high = found["interval_95"]
    return 100 * found["mean"], 50 * (high - low), len(inside)


def resolution(results: Results) -> Answer:
    """Answer by the probe accuracy at every resolution, and of every budget the highest one's."""
    scale = results.scale
    sides, first = sorted(scale.resolutions), scale.resolutions[0]
    budgets = {"equal images": [f"at-{side}" for side in sides]}
    if scale.equal_compute:
        budgets["equal compute"] = [
            f"at-{side}" if side == first else f"as-{side}" for side in sides
        ]
    images = {run.name: run.images for run in runs(scale)}
    found: list[Verdict] = []
    sentences, lines, rows = [], [], []
    for budget, names in budgets.items():
        # All resolutions have the same test images, in the same order, in data sets of different
        # names.
        best = [results.best(results.probe(name)) for name in names]
        shares = [replace(share, images=share.images[1:]) for share in best]
        low, high = shares[0], shares[-1]
        held: Verdict = "yes" if clearly(high, low) else "no" if clearly(low, high) else "undecided"
        found.append(held)
        sentences.append(
            (f"With {budget}: " if scale.equal_compute else "")
            + f"{sides[-1]} px minus {sides[0]} px: "
            f"{points(high, low)}{', within the interval' if held == 'undecided' else ''}. "
            + ", ".join(
                f"{side} px {100 * share.value:.1f} %"
                for side, share in zip(sides, shares, strict=True)
            )
            + "."
        )
        if scale.equal_compute and len(sides) > 2:
            sentences += [
                f"{after} px minus {before} px: {points(shares[at + 1], shares[at])}."
                for at, (before, after) in enumerate(pairwise(sides))
            ]
        lines.append(
            series(budget if scale.equal_compute else "best layer", list(range(len(sides))), shares)
        )
        rows += [
            [f"{side} px", f"{images[name]:,}", share.cell, share.n]
            for side, name, share in zip(sides, names, shares, strict=True)
        ]
    plot = {
        "kind": "groups",
        "x": "resolution",
        "y": "probe accuracy, %",
        "categories": [f"{side} px" for side in sides],
        "series": lines,
    }
    compute = (
        f" Equal compute: as many FLOPs as at {first} px, so more images at lower resolutions and "
        "fewer at higher ones, as the table states."
        if scale.equal_compute
        else ""
    )
    how = (
        f"The {scale.resolution_size} size, {scale.resolution_steps:,} steps on "
        "the same images at every resolution, with the same palette; one run each (seed 0), probed "
        f"on the same test images.{compute} Losses at different resolutions cannot be compared."
    )
    table = {
        "head": ["resolution", "images seen", "test accuracy, % (95 %)", "n"],
        "rows": rows,
    }
    return Answer(overall(found), " ".join(sentences), plot, table, how)


def compute(results: Results) -> Answer:
    """Show loss and probe accuracy at each doubling of compute of one training."""
    steps = results.scale.doublings
    run = next(run for run in runs(results.scale) if run.name == LONG)
    losses = results.losses(LONG, steps)
    probes = [results.probe(f"{LONG}-{step}") for step in steps]
    shares = [results.best(probe) for probe in probes]
    seen = [step * run.number("batch-size") for step in steps]
    last, before = shares[-1], shares[-2]
    held: Verdict = (
        "yes" if clearly(last, before) else "no" if clearly(before, last) else "undecided"
    )
    verdict = (
        f"From {seen[0]:,} to {seen[-1]:,} images seen, the loss falls from "
        f"{losses[steps[0]]:.3f} to {losses[steps[-1]]:.3f} nats/pixel, and the accuracy of the "
        f"best layer changes by {points(last, shares[0])}; in the last doubling by "
        f"{points(last, before)}."
    )
    rows = [
        [
            f"{images:,}",
            f"{losses[step]:.3f}",
            f"{probe['best_layer']} of {probe['layers'][-1]['layer']}",
            share.cell,
            share.n,
        ]
        for images, step, probe, share in zip(seen, steps, probes, shares, strict=True)
    ]
    plot = {
        "kind": "groups",
        "x": "images seen in pretraining",
        "y": "probe accuracy of the best layer, %",
        "categories": [f"{images / 1000:.3g} k" for images in seen],
        "series": [series("best layer", list(range(len(seen))), shares)],
    }
    how = (
        f"One training (seed 0) of the {results.scale.main} size with the second recipe and a "
        "constant learning rate after the warm-up, so that no snapshot gains from a decay. Every "
        "snapshot is probed on the same images, at its best layer by validation accuracy."
    )
    table = {
        "head": ["images seen", "validation loss", "best layer", "test accuracy, % (95 %)", "n"],
        "rows": rows,
    }
    return Answer(held, verdict, plot, table, how)


def without_labels(results: Results) -> Answer:
    """Compare probes of the pretrained models with raw pixels, no training and from scratch."""
    scale = results.scale
    assert scale.second
    name = scale.second.name
    pretrained, baselines, scratch = {}, {}, {}  # by the two lines of a label in the figure
    for recipe, second in (("paper's", False), (name, True)):
        for model in compared(scale, second=second):
            if not model.on_labelled:
                pretrained[recipe, f"seed {model.seed}"] = results.best(results.probe(model.probe))
    pretrained[name, "longer"] = results.best(results.probe(LONG))
    baselines["raw", "pixels"] = results.raw_pixels("main")
    baselines["untrained", "network"] = results.untrained("main")
    scratch["scratch,", "paper's"] = results.finetuned("scratch", "all")
    scratch["scratch,", name] = results.finetuned(f"{name}-scratch", "all")
    (_, judged), *others = pretrained.items()
    found: list[Verdict] = [
        "yes" if clearly(judged, other) else "no" if clearly(other, judged) else "undecided"
        for other in (*baselines.values(), scratch["scratch,", "paper's"])
    ]
    compare = "; ".join(
        f"{' '.join(label)} {100 * share.value:.1f} % ({points(judged, share)})"
        for label, share in (*baselines.items(), *scratch.items())
    )
    further = "; ".join(f"{' '.join(label)} {100 * share.value:.1f} %" for label, share in others)
    verdict = (
        f"Linear probe after pretraining without labels, paper's recipe, seed 0: "
        f"{100 * judged.value:.1f} %. In comparison: {compare}. Other pretrained models: {further}."
    )
    shown = {**pretrained, **baselines, **scratch}
    places = list(range(len(shown)))
    probed = len(shown) - len(scratch)
    plot = {
        "kind": "groups",
        "x": "",
        "y": "test accuracy, %",
        "categories": ["\n".join(label) for label in shown],
        "series": [
            series("linear probe", places[:probed], list(shown.values())[:probed]),
            series("all weights trained", places[probed:], list(scratch.values())),
        ],
    }
    images = results.probe("main")["images"]
    how = (
        "Pretrained on the pretraining images without labels. Probes: the best layer by validation "
        f"accuracy, fitted to {images['train'] + images['validation']:,} labelled images. Scratch: "
        "from initial weights with the class loss alone, on all labelled images, with as many "
        "steps and learning rates as fine-tuning. Model names: the recipe, then the seed; longer: "
        "the last snapshot of the longer training. The paper's recipe, seed 0, decides the answer."
    )
    rows = [[" ".join(label), share.cell, share.n] for label, share in shown.items()]
    table = {"head": ["", "test accuracy, % (95 %)", "n"], "rows": rows}
    return Answer(overall(found), verdict, plot, table, how)
