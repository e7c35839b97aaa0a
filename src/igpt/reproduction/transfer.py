"""What fine-tuning says: beside the probe, for both objectives, and beside training from scratch."""

import math
from typing import Any

from igpt.reproduction.evidence import (
    Held,
    Results,
    Share,
    clearly,
    difference,
    points,
    question,
    series,
)


def bert(results: Results, name: str, asks: str, paper: str) -> dict[str, Any]:
    """Both objectives under the probe and after fine-tuning."""
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
    plot = {
        "kind": "groups",
        "x": "",
        "y": "test accuracy, %",
        "categories": categories,
        "series": lines,
    }
    masks = results.scale.masks
    sees = (
        f"{masks} masked versions, of which the modal prediction counts"
        if masks
        else "whole images"
    )
    how = (
        f"The {results.scale.main} size, as many updates of the same batches for both, one run each (seed 0); BERT's "
        f"masks are 15 %. Probe: best layer by validation; BERT sees {sees}. Fine-tuning: the same updates and "
        "learning rates for both, chosen by validation accuracy; BERT is tested on whole images."
    )
    table = {"head": ["objective", "protocol", "test accuracy, % (95 %)", "n"], "rows": rows}
    return question(name, asks, paper, held, verdict, plot, table, how)


def finetuning(results: Results, name: str, asks: str, paper: str) -> dict[str, Any]:
    """Fine-tuning beside the probe, training from scratch and raw pixels, with all labels and few."""
    scale, probe = results.scale, results.probe("main")
    layer, raw = results.few("main")
    labels_of_all: list[str | int] = [*scale.few, "all"]
    found: dict[str, list[Share]] = {
        "fine-tuned": [results.finetuned("ar", labels) for labels in labels_of_all],
        "linear probe": [*layer, results.best(probe)],
        "from scratch": [results.finetuned("scratch", labels) for labels in labels_of_all],
        "raw pixels": [*raw, results.raw_pixels("main")],
    }
    categories = [*(f"{few} a class" for few in scale.few), "all"]
    said, wins, losses = [], 0, 0
    for position, labels in enumerate(categories):
        ours = found["fine-tuned"][position]
        others = {
            other: found[other][position]
            for other in ("linear probe", "from scratch", "raw pixels")
        }
        wins += sum(clearly(ours, other) for other in others.values())
        losses += sum(clearly(other, ours) for other in others.values())
        said.append(
            f"{labels}: fine-tuned {100 * ours.value:.1f} %, "
            + ", ".join(
                f"{other} {100 * share.value:.1f} % ({points(ours, share)})"
                for other, share in others.items()
            )
        )
    comparisons = 3 * len(categories)
    held: Held = (
        "yes" if wins == comparisons else "in part" if wins else "no" if losses else "undecided"
    )
    verdict = (
        f"Fine-tuning is clearly ahead in {wins} of {comparisons} comparisons and clearly behind in {losses}. "
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
        "series": [
            series(kind, list(range(len(shares))), shares) for kind, shares in found.items()
        ],
    }
    flags: dict[str, Any] = {**scale.finetuning, **scale.with_all}
    rates = [f"{rate:g}" for rate in flags.get("learning-rates", ())]
    at = (
        f"learning rates {' and '.join(rates)}"
        if rates
        else f"a learning rate of {flags['learning-rate']:g}"
    )
    seen = flags["batch-size"] * flags["steps"]
    few_flags: dict[str, Any] = {**scale.finetuning, **scale.with_few}
    little = few_flags["batch-size"] * few_flags["steps"]
    fitted = probe["images"]["train"] + probe["images"]["validation"]
    how = (
        f"The {scale.main} size. All labels: fine-tuning and training from scratch see at most {seen:,} images, at "
        f"{at}; the update{' and the rate are' if rates else ' is'} chosen by validation accuracy; the probe and raw "
        f"pixels are fitted to {fitted:,}. Few labels: every draw trains anew, {little} images seen; means over draws, "
        "with intervals of draws (Student's) and test images (Wilson's) added in squares. Layer and strength of the "
        "probe are those of all labels. Fine-tuning uses the joint loss; training from scratch begins with the initial "
        "weights of pretraining and uses the class loss alone."
    )
    table = {"head": ["", "labels", "test accuracy, % (95 %)", "n"], "rows": rows}
    return question(name, asks, paper, held, verdict, plot, table, how)
