"""The paper's findings as questions, each answered from the results of a reproduction.

An answer claims no more than its intervals allow; what they leave open is undecided.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from igpt.reproduction.evidence import Held, Results, Share, clearly, of_draws, of_images, points, question, series

Answer = Callable[[Results, str, str, str], dict[str, Any]]


def _by_layer(results: Results, name: str, asks: str, paper: str) -> dict[str, Any]:
    lines, rows, said, verdicts = [], [], [], []
    for size in results.scale.sizes:
        probe = results.probe(size)
        count, layers = probe["images"]["test"], probe["layers"]
        shares = [of_images(row["test_accuracy"], count) for row in layers]
        numbers = [row["layer"] for row in layers]
        peak = numbers.index(probe["best_layer"])
        lines.append(series(size, numbers, shares, peak))
        inside, one_peak = 0 < peak < len(shares) - 1, _one_peak(shares, peak)
        worse = clearly(shares[peak], shares[-1])
        verdicts.append((inside, one_peak, worse))
        said.append(
            f"{size}: layer {numbers[peak]} of {numbers[-1]}, {100 * shares[peak].value:.1f} %, "
            f"{points(shares[peak], shares[-1])} above the last"
        )
        rows += [
            [f"{size}, layer {number}{' (chosen)' if number == probe['best_layer'] else ''}", share.cell, share.n]
            for number, share in zip(numbers, shares, strict=True)
        ]
    if results.has("probes/own"):
        own = results.probe("own")
        rows.append(
            [
                f"{results.scale.main} on the corpus' own {own['classes']} classes",
                results.best(own).cell,
                f"{own['images']['test']:,} images",
            ]
        )
    inside, one_peak, worse = (sum(column) for column in zip(*verdicts, strict=True))
    total = len(verdicts)
    held: Held = "yes" if inside == worse == one_peak == total else "in part" if inside or worse else "no"
    verdict = (
        f"{_of(inside, total)} models are read best at a layer inside; in {_of(one_peak, total)} accuracy rises to "
        f"the peak and falls after it, as far as the intervals tell; in {_of(worse, total)} the last layer is worse by "
        f"more than the interval. {'; '.join(said)}."
    )
    plot = {"kind": "lines", "x": "layer", "y": "probe accuracy, %", "series": lines}
    how = (
        f"One pretraining run of each size (seed 0). Logistic regression on features averaged over places, "
        f"{probe['images']['train']:,} training and as many validation images (folded back), of which drawn by seed 0; "
        f"layer and strength chosen on validation. Intervals: Wilson's, 95 %, over test images."
    )
    return question(
        name, asks, paper, held, verdict, plot, {"head": ["", "test accuracy, % (95 %)", "n"], "rows": rows}, how
    )


def _one_peak(shares: list[Share], peak: int) -> bool:
    """Whether no step towards the peak is a clear fall, and none after it a clear rise."""
    falls = any(clearly(first, second) for first, second in pairwise(shares[: peak + 1]))
    rises = any(clearly(second, first) for first, second in pairwise(shares[peak:]))
    return not falls and not rises


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
    better = 0
    for size, curve in curves.items():
        correlation = _rank_correlation([-loss for loss, _ in curve], [share.value for _, share in curve])
        better += correlation > 0.5 and clearly(curve[-1][1], curve[0][1])
        said.append(
            f"{size}: rank correlation {correlation:.2f} over {len(curve)} points, "
            f"{points(curve[-1][1], curve[0][1])} from first to last"
        )
    ahead: list[Held] = []
    for smaller, larger in pairwise(curves):
        gain = _at_equal_loss(curves[smaller], curves[larger])
        if gain is None:
            said.append(f"{larger} against {smaller}: their losses do not overlap")
            continue
        value, half, count = gain
        ahead.append("yes" if value > half else "no" if value < -half else "undecided")
        said.append(f"{larger} against {smaller} at equal loss: {value:+.1f} ± {half:.1f} points over {count} points")
    size_wins = bool(ahead) and all(one == "yes" for one in ahead)
    held: Held = "yes" if better == len(curves) and size_wins else "in part" if better or "yes" in ahead else "no"
    loss_words = (
        "Lower loss goes with better features"
        if better == len(curves)
        else (f"Lower loss goes clearly with better features in {_of(better, len(curves))} sizes")
    )
    size_words = (
        "the larger model wins at equal loss"
        if size_wins
        else "at equal loss the larger model loses"
        if "no" in ahead
        else "whether the larger model wins at equal loss is undecided here"
    )
    verdict = f"{loss_words}; {size_words}. {'; '.join(said)}."
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
    """Mean lead of the larger model in points where both reach a loss, half its interval, and over how many points."""
    order = sorted(smaller, key=lambda point: point[0])
    losses = np.array([loss for loss, _ in order])
    inside = [(loss, share) for loss, share in larger if losses[0] <= loss <= losses[-1]]
    if not inside:
        return None
    leads, variances = [], []
    for loss, share in inside:
        leads.append(share.value - float(np.interp(loss, losses, [each.value for _, each in order])))
        variances.append(share.error**2 + float(np.interp(loss, losses, [each.error for _, each in order])) ** 2)
    # The images are the same for all points, so that their errors are not independent: the mean variance stands.
    return 100 * float(np.mean(leads)), 196 * math.sqrt(float(np.mean(variances))), len(inside)


def _bert(results: Results, name: str, asks: str, paper: str) -> dict[str, Any]:
    probes = [results.best(results.probe(run)) for run in (results.scale.main, "bert")]
    tuned = [results.finetuned(start, "all") for start in ("ar", "bert")]
    gaps = [probes[0].value - probes[1].value, tuned[0].value - tuned[1].value]
    worse, behind = clearly(probes[0], probes[1]), clearly(tuned[0], tuned[1])
    closer = gaps[1] < gaps[0]
    held: Held = (
        "yes"
        if worse and closer and not behind
        else "no"
        if clearly(probes[1], probes[0])
        else "in part"
        if worse
        else "undecided"
    )
    change = "BERT has caught up" if closer and not behind else "the gap is smaller then" if closer else "it has not"
    verdict = (
        f"Autoregressive minus BERT: {points(*probes)} under the probe{'' if worse else ', which decides nothing'}, "
        f"{points(*tuned)} after fine-tuning{f'; {change}' if worse else ''}."
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
    how = (
        f"The {results.scale.main} size, as many updates of the same batches for both, one run each (seed 0); BERT's "
        "masks are 15 %. Probe: best layer by validation, whole images. Fine-tuning: the same updates and learning "
        "rates, chosen by validation accuracy; BERT is tested on whole images."
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
    scale, probe = results.scale, results.probe(results.scale.main)
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
    found["raw pixels"].append(of_images(raw["test_accuracy"], count))
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
    held: Held = "yes" if wins == comparisons else "in part" if wins > losses else "no" if losses else "undecided"
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
    untrained = [
        results.best({**probes[side]["baselines"]["untrained"], "images": probes[side]["images"]}) for side in sides
    ]
    raw = [
        of_images(probes[side]["baselines"]["raw_pixels"]["test_accuracy"], probes[side]["images"]["test"])
        for side in sides
    ]
    first, last = ours[0], ours[-1]
    held: Held = "yes" if clearly(last, first) else "no" if clearly(first, last) else "undecided"
    verdict = (
        f"{sides[-1]} px is {points(last, first)} beside {sides[0]} px"
        f"{'' if held != 'undecided' else ', within the interval'}: "
        + ", ".join(f"{side} px {100 * share.value:.1f} %" for side, share in zip(sides, ours, strict=True))
        + "."
    )
    kinds = {"pretrained": ours, "untrained": untrained, "raw pixels": raw}
    rows = [
        [f"{side} px", kind, share.cell, share.n]
        for kind, shares in kinds.items()
        for side, share in zip(sides, shares, strict=True)
    ]
    plot = {
        "kind": "groups",
        "x": "resolution",
        "y": "probe accuracy, %",
        "categories": [f"{side} px" for side in sides],
        "series": [series(kind, list(range(len(sides))), shares) for kind, shares in kinds.items()],
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
        {"head": ["resolution", "features", "test accuracy, % (95 %)", "n"], "rows": rows},
        how,
    )


def _pictures(results: Results, name: str, asks: str, paper: str) -> dict[str, Any]:
    size = next(reversed(results.scale.sizes))
    losses, steps = results.losses(size), results.scale.snapshots
    for step in steps:
        for kind in ("samples", "completions"):
            if not results.has(f"pictures/{kind}-{step}"):
                raise KeyError(f"pictures/{kind}-{step}")
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
