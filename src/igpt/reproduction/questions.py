"""The paper's findings as questions, each answered from the results of a reproduction.

An answer claims no more than its intervals allow; what they leave open is undecided.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from igpt.confidence import mean_of
from igpt.reproduction.evidence import (
    Held,
    Results,
    Share,
    clearly,
    difference,
    of_draws,
    of_row,
    points,
    question,
    series,
)

Answer = Callable[[Results, str, str, str], dict[str, Any]]


def _by_layer(results: Results, name: str, asks: str, paper: str) -> dict[str, Any]:
    lines, rows, said = [], [], []
    found: list[Held] = []
    for size in results.scale.sizes:
        probe = results.probe("main" if size == results.scale.main else f"{size}-{results.scale.updates}")
        layers = probe["layers"]
        shares = [of_row(row, probe) for row in layers]
        numbers = [row["layer"] for row in layers]
        peak = numbers.index(probe["best_layer"])
        lines.append(series(size, numbers, shares, peak))
        found.append(_peak(shares, peak))
        said.append(
            f"{size}: best at layer {numbers[peak]} of {numbers[-1]}, {100 * shares[peak].value:.1f} %, "
            f"{points(shares[peak], shares[-1])} from the last"
        )
        rows += [
            [f"{size}, layer {number}{' (chosen)' if number == probe['best_layer'] else ''}", share.cell, share.n]
            for number, share in zip(numbers, shares, strict=True)
        ]
    if results.has("probes/own"):
        own = results.probe("own")
        best = results.best(own)
        rows.append([f"{results.scale.main} on the corpus' own {own['classes']} classes", best.cell, best.n])
    held = together(found)
    total = len(found)
    verdict = (
        f"{_of(found.count('yes'), total)} models have a single peak inside that is above the last layer by more than "
        f"the interval; {_of(found.count('no'), total)} clearly have not, the others leave it open. {'; '.join(said)}."
    )
    plot = {"kind": "lines", "x": "layer", "y": "probe accuracy, %", "series": lines}
    how = (
        "One pretraining run of each size (seed 0). Logistic regression on features averaged over places; as many "
        "training as test images, layer and strength chosen on as many validation images, which are then fitted to as "
        "well; images drawn by seed 0. Intervals: Wilson's, 95 %, over test images; of differences, paired."
    )
    return question(
        name, asks, paper, held, verdict, plot, {"head": ["", "test accuracy, % (95 %)", "n"], "rows": rows}, how
    )


def _peak(shares: list[Share], peak: int) -> Held:
    """Whether accuracies by layer have one peak, inside and clearly above the last; `peak` was chosen on validation."""
    last, inner = shares[-1], max(shares[1:-1], key=lambda share: share.value, default=shares[peak])
    # Of two layers on one side of the peak, the one nearer to it must not be clearly the worse one.
    dents = any(clearly(further, nearer) for further, nearer in combinations(shares[: peak + 1], 2))
    dents |= any(clearly(further, nearer) for nearer, further in combinations(shares[peak:], 2))
    if dents or any(clearly(end, inner) for end in (shares[0], last)):
        return "no"
    return "yes" if 0 < peak < len(shares) - 1 and clearly(shares[peak], last) else "undecided"


def together(found: Sequence[Held]) -> Held:
    """What several answers to one question come to."""
    if set(found) == {"yes"}:
        return "yes"
    if "yes" in found:
        return "in part"
    return "no" if "no" in found else "undecided"


def _of(count: int, total: int) -> str:
    return f"{count} of {total}"


def _loss_and_probe(results: Results, name: str, asks: str, paper: str) -> dict[str, Any]:
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
        correlation = _rank_correlation([-loss for loss, _ in curve], [share.value for _, share in curve])
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
        said.append(f"{larger} against {smaller} at equal loss: {value:+.1f} ± {half:.1f} points over {count} points")
    held = together([*better, *ahead])
    verdict = (
        f"Lower loss clearly goes with better features in {_of(better.count('yes'), len(better))} sizes, and clearly "
        f"not in {better.count('no')}; at equal loss the larger model is clearly ahead in "
        f"{_of(ahead.count('yes'), len(ahead))} pairs of sizes, and clearly behind in {ahead.count('no')}. "
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


def _bert(results: Results, name: str, asks: str, paper: str) -> dict[str, Any]:
    probes = [results.best(results.probe(run)) for run in ("main", "bert")]
    tuned = [results.finetuned(start, "all") for start in ("ar", "bert")]
    worse, behind = clearly(probes[0], probes[1]), clearly(tuned[0], tuned[1])
    (before, uncertain), (after, unsure) = difference(*probes), difference(*tuned)
    closer = before - after > math.hypot(uncertain, unsure)
    held: Held = (
        "yes"
        if worse and closer and not behind
        else "in part"
        if worse
        else "no"
        if clearly(probes[1], probes[0])
        else "undecided"
    )
    change = (
        "BERT has caught up"
        if closer and not behind
        else "the gap is clearly smaller"
        if closer
        else "not clearly less"
    )
    verdict = (
        f"Autoregressive minus BERT: {points(*probes)} under the probe{'' if worse else ', not clearly better'}, "
        f"{points(*tuned)} after fine-tuning{f': {change}' if worse else ''}."
    )
    categories = ["linear probe", "fine-tuned"]
    lines = [
        series("autoregressive", [0, 1], [probes[0], tuned[0]]),
        series("BERT", [0, 1], [probes[1], tuned[1]]),
    ]
    rows = [
        [kind, what, share.cell, share.n]
        for what, pair in (("linear probe", probes), ("fine-tuned", tuned))
        for kind, share in zip(("autoregressive", "BERT"), pair, strict=True)
    ]
    plot = {"kind": "groups", "x": "", "y": "test accuracy, %", "categories": categories, "series": lines}
    masks = results.scale.masks
    sees = f"{masks} masked versions, of which the modal prediction counts" if masks else "whole images"
    how = (
        f"The {results.scale.main} size, as many updates of the same batches for both, one run each (seed 0); BERT's "
        f"masks are 15 %. Probe: best layer by validation; BERT sees {sees}. Fine-tuning: the same updates and "
        "learning rates, chosen by validation accuracy; BERT is tested on whole images."
    )
    return question(
        name,
        asks,
        paper,
        held,
        verdict,
        plot,
        {"head": ["objective", "protocol", "test accuracy, % (95 %)", "n"], "rows": rows},
        how,
    )


def _finetuning(results: Results, name: str, asks: str, paper: str) -> dict[str, Any]:
    scale, probe = results.scale, results.probe("main")
    raw = probe["baselines"]["raw_pixels"]
    count = probe["images"]["test"]
    found: dict[str, list[Share]] = {"fine-tuned": [], "linear probe": [], "from scratch": [], "raw pixels": []}
    for position, few in enumerate(scale.few):
        found["fine-tuned"].append(results.finetuned("ar", few))
        found["from scratch"].append(results.finetuned("scratch", few))
        found["linear probe"].append(of_draws(probe["few_labels"][position]["test_accuracies"], count))
        found["raw pixels"].append(of_draws(raw["few_labels"][position]["test_accuracies"], count))
    found["fine-tuned"].append(results.finetuned("ar", "all"))
    found["from scratch"].append(results.finetuned("scratch", "all"))
    found["linear probe"].append(results.best(probe))
    found["raw pixels"].append(of_row(raw, probe))
    categories = [*(f"{few} a class" for few in scale.few), "all"]
    said, wins, losses = [], 0, 0
    for position, labels in enumerate(categories):
        ours = found["fine-tuned"][position]
        others = {other: found[other][position] for other in ("linear probe", "from scratch", "raw pixels")}
        wins += sum(clearly(ours, other) for other in others.values())
        losses += sum(clearly(other, ours) for other in others.values())
        said.append(
            f"{labels}: fine-tuned {100 * ours.value:.1f} %, "
            + ", ".join(f"{other} {100 * share.value:.1f} % ({points(ours, share)})" for other, share in others.items())
        )
    comparisons = 3 * len(categories)
    held: Held = "yes" if wins == comparisons else "in part" if wins else "no" if losses else "undecided"
    verdict = (
        f"Fine-tuning is clearly ahead in {_of(wins, comparisons)} comparisons and clearly behind in {losses}. "
        f"{'; '.join(said)}."
    )
    rows = [
        [kind, labels, share.cell, share.n]
        for kind, shares in found.items()
        for labels, share in zip(categories, shares, strict=True)
    ]
    plot = {
        "kind": "groups",
        "x": "labels",
        "y": "test accuracy, %",
        "categories": categories,
        "series": [series(kind, list(range(len(shares))), shares) for kind, shares in found.items()],
    }
    seen = int(str(scale.finetuning["batch-size"])) * int(str(scale.with_all["steps"]))
    fitted = probe["images"]["train"] + probe["images"]["validation"]
    how = (
        f"The {scale.main} size. All labels: fine-tuning and training from scratch see at most {seen:,} images, at "
        f"learning rates {' and '.join(f'{rate:g}' for rate in _rates(scale.with_all))}, chosen with the update by "
        f"validation accuracy; the probe and raw pixels are fitted to {fitted:,}. Few labels: every draw trains anew; "
        "the mean over draws with Student's interval. Fine-tuning uses the joint loss; training from scratch begins "
        "with the initial weights of pretraining and uses the class loss alone."
    )
    return question(
        name,
        asks,
        paper,
        held,
        verdict,
        plot,
        {"head": ["", "labels", "test accuracy, % (95 %)", "n"], "rows": rows},
        how,
    )


def _rates(flags: Any) -> tuple[float, ...]:
    return tuple(flags.get("learning-rates") or (flags["learning-rate"],))


def _resolution(results: Results, name: str, asks: str, paper: str) -> dict[str, Any]:
    sides = sorted(results.scale.resolutions)
    probes = {side: results.probe(f"at-{side}") for side in sides}
    ours = [results.best(probes[side]) for side in sides]
    first, last = ours[0], ours[-1]
    held: Held = "yes" if clearly(last, first) else "no" if clearly(first, last) else "undecided"
    verdict = (
        f"{sides[-1]} px is {points(last, first)} beside {sides[0]} px"
        f"{'' if held != 'undecided' else ', within the interval'}: "
        + ", ".join(f"{side} px {100 * share.value:.1f} %" for side, share in zip(sides, ours, strict=True))
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
        "at every resolution, in the same palette, one run each (seed 0); losses at different resolutions cannot be "
        "compared."
    )
    return question(
        name,
        asks,
        paper,
        held,
        verdict,
        plot,
        {"head": ["resolution", "test accuracy, % (95 %)", "n"], "rows": rows},
        how,
    )


def _pictures(results: Results, name: str, asks: str, paper: str) -> dict[str, Any]:
    size = next(reversed(results.scale.sizes))
    losses, steps = results.losses(size), results.scale.snapshots
    for step in steps:
        for kind in ("samples", "completions"):
            results.require(f"pictures/{kind}-{step}")
    rows = [[str(step), f"{losses[step]:.3f}"] for step in steps]
    verdict = (
        f"From update {steps[0]} to {steps[-1]} the loss goes from {losses[steps[0]]:.3f} to {losses[steps[-1]]:.3f} "
        "nats/pixel. Whether the pictures become better is for the eye: no number here judges them."
    )
    plot = {"kind": "pictures", "steps": list(steps)}
    how = f"The {size} size; temperature 1, no top-k or top-p; seed 0 in every row: the same random numbers."
    return question(
        name,
        asks,
        paper,
        "shown",
        verdict,
        plot,
        {"head": ["update", "validation loss"], "rows": rows},
        how,
    )


QUESTIONS: list[tuple[str, str, str, Answer]] = [
    (
        "layers",
        "Where are the best features?",
        "Probe accuracy by layer has one peak, mid-network; the last layer costs 2.4 points on CIFAR-10.",
        _by_layer,
    ),
    (
        "loss",
        "Does lower loss mean better features, and does a larger model win at equal loss?",
        "Both, along training and across sizes.",
        _loss_and_probe,
    ),
    (
        "bert",
        "Does BERT probe worse, and catch up under fine-tuning?",
        "BERT probes more than 1 point worse on CIFAR-10 and 6 on ImageNet; fine-tuned it is level (98.6 and 99.0 %).",
        _bert,
    ),
    (
        "finetuning",
        "Does fine-tuning beat probing, training from scratch and raw pixels?",
        "Throughout: CIFAR-10 96.3 % by the probe, 99.0 % fine-tuned; a probe gives 73.2, 87.6 and 94.3 % from 4, 25 "
        "and 400 labels a class.",
        _finetuning,
    ),
    (
        "resolution",
        "Does a higher resolution help?",
        "It does: ImageNet probes of L give 60.3 % at 32 px and 65.2 % at 48 px.",
        _resolution,
    ),
    (
        "pictures",
        "What does the model draw as it learns?",
        "Samples and completions of the trained models are coherent images.",
        _pictures,
    ),
]
