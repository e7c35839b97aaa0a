"""Answers from fine-tuning, compared with the probe and with training from scratch."""

import math
from typing import Any

from igpt.reproduction.evidence import (
    Accuracy,
    Answer,
    Results,
    Verdict,
    clearly,
    difference,
    points,
    series,
)
from igpt.reproduction.scale import Scale
from igpt.reproduction.steps import compared


def bert(results: Results) -> Answer:
    """Answer by the accuracies of both objectives, with the probe and after fine-tuning."""
    scale = results.scale
    size = scale.of_both_objectives
    ar, probed = ("ar", "main") if size == scale.main else (f"ar-{size}", f"ar-{size}")
    probes = [results.best(results.probe(run)) for run in (probed, "bert")]
    tuned = [results.finetuned(start, "all") for start in (ar, "bert")]
    worse, behind = clearly(probes[0], probes[1]), clearly(tuned[0], tuned[1])
    (before, uncertain), (after, unsure) = difference(*probes), difference(*tuned)
    closer = before - after > math.hypot(uncertain, unsure)
    held: Verdict = (
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
        else "the gap is not clearly smaller"
    )
    verdict = (
        f"Autoregressive minus BERT: {points(*probes)} with the probe"
        f"{'' if worse else ' (not clearly better)'}, {points(*tuned)} after fine-tuning"
        f"{f': {change}' if worse else ''}."
    )
    categories = ["linear probe", "fine-tuned"]
    lines = [
        series("autoregressive", [0, 1], [probes[0], tuned[0]]),
        series("BERT", [0, 1], [probes[1], tuned[1]]),
    ]
    rows = [
        [kind, protocol, share.cell, share.n]
        for protocol, pair in (("linear probe", probes), ("fine-tuned", tuned))
        for kind, share in zip(("autoregressive", "BERT"), pair, strict=True)
    ]
    plot = {
        "kind": "groups",
        "x": "",
        "y": "test accuracy, %",
        "categories": categories,
        "series": lines,
    }
    masks = scale.masks
    inputs = f"{masks} masked versions (modal prediction)" if masks else "complete images"
    how = (
        f"The {size} size, {_lengths(scale)}, "
        "one run each (seed 0); BERT masks 15 % of the pixels. Probe: best layer by validation "
        f"accuracy; BERT's input: {inputs}. Fine-tuning: the same number of steps and the same "
        "learning rates for both, selected by validation accuracy; BERT is tested on complete "
        "images."
    )
    table = {"head": ["objective", "protocol", "test accuracy, % (95 %)", "n"], "rows": rows}
    return Answer(held, verdict, plot, table, how)


def _lengths(scale: Scale) -> str:
    """Return the length of pretraining with both objectives, relative to each other."""
    if scale.masked_ratio == 1:
        return "the same number of steps on the same batches for both"
    predicted = f"{0.15 * scale.masked_ratio:.2g}"
    return (
        f"{scale.masked_ratio:g} times as many images for BERT, so "
        f"{'' if predicted == '1' else f'{predicted} times '}as many predicted positions"
    )


def finetuning(results: Results, *, second: bool = False) -> Answer:
    """Compare fine-tuning with the probe, training from scratch and raw pixels.

    Args:
        second: whether the second recipe is compared.
    """
    scale = results.scale
    prefix, name, with_all, with_few = "", "main", scale.with_all, scale.with_few
    every = scale.finetuning
    if second:
        assert scale.second
        prefix, name = f"{scale.second.name}-", compared(scale, second=True)[0].probe
        every = scale.second.finetuning
        with_all, with_few = scale.second.with_all, scale.second.with_few
    probe = results.probe(name)
    layer, raw = results.few(name, pixels="main")
    labels_of_all: list[str | int] = [*scale.few, "all"]
    found: dict[str, list[Accuracy]] = {
        "fine-tuned": [results.finetuned(f"{prefix}ar", labels) for labels in labels_of_all],
        "linear probe": [*layer, results.best(probe)],
        "from scratch": [results.finetuned(f"{prefix}scratch", labels) for labels in labels_of_all],
        "raw pixels": [*raw, results.raw_pixels("main")],
    }
    categories = [*(f"{few} per class" for few in scale.few), "all"]
    sentences, wins, losses = [], 0, 0
    for position, labels in enumerate(categories):
        tuned = found["fine-tuned"][position]
        others = {
            other: found[other][position]
            for other in ("linear probe", "from scratch", "raw pixels")
        }
        wins += sum(clearly(tuned, other) for other in others.values())
        losses += sum(clearly(other, tuned) for other in others.values())
        sentences.append(
            f"{labels}: fine-tuned {100 * tuned.value:.1f} %, "
            + ", ".join(
                f"{other} {100 * share.value:.1f} % ({points(tuned, share)})"
                for other, share in others.items()
            )
        )
    comparisons = 3 * len(categories)
    held: Verdict = (
        "yes" if wins == comparisons else "in part" if wins else "no" if losses else "undecided"
    )
    verdict = (
        f"Fine-tuning is clearly better in {wins} of {comparisons} comparisons and clearly worse "
        f"in {losses}. {'; '.join(sentences)}."
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
    flags: dict[str, Any] = {**every, **with_all}
    rates = [f"{rate:g}" for rate in flags.get("learning-rates", ())]
    rate = (
        f"learning rates {' and '.join(rates)}"
        if rates
        else f"learning rate {flags['learning-rate']:g}"
    )
    from_scratch = () if second else scale.from_scratch.get("learning-rates")
    if isinstance(from_scratch, tuple) and from_scratch:
        rate += f", from scratch {' and '.join(f'{one:g}' for one in from_scratch)}"
    images = flags["batch-size"] * flags["steps"]
    few_flags: dict[str, Any] = {**every, **with_few}
    few_images = few_flags["batch-size"] * few_flags["steps"]
    fitted = probe["images"]["train"] + probe["images"]["validation"]
    how = (
        f"The {scale.main} size. All labels: fine-tuning and training from scratch process at most "
        f"{images:,} images ({rate}); the step{' and the rate are' if rates else ' is'} selected "
        f"by validation accuracy; the probe and raw pixels are fitted to {fitted:,} images. Few "
        f"labels: one training per label subset, on {few_images} images; means over subsets, with "
        "intervals over subsets (Student's) and test images (Wilson's) combined in quadrature. The "
        "layer and the regularization strength of the probe are those selected with all labels. "
        "Fine-tuning uses the joint loss; training from scratch starts from the initial weights of "
        "pretraining and uses the class loss alone."
    )
    table = {"head": ["", "labels", "test accuracy, % (95 %)", "n"], "rows": rows}
    return Answer(held, verdict, plot, table, how)
