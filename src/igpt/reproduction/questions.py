"""The paper's findings as questions, each answered from the results of a reproduction.

An answer claims no more than its intervals allow; what they leave open is undecided.
"""

from collections.abc import Callable
from typing import Any

from igpt.reproduction.evidence import Results, question
from igpt.reproduction.features import by_layer, loss_and_probe, resolution
from igpt.reproduction.transfer import bert, finetuning

Answer = Callable[[Results, str, str, str], dict[str, Any]]


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
    table = {"head": ["update", "validation loss"], "rows": rows}
    return question(name, asks, paper, "shown", verdict, plot, table, how)


QUESTIONS: list[tuple[str, str, str, Answer]] = [
    (
        "layers",
        "Where are the best features?",
        "Probe accuracy by layer has one peak, mid-network; the last layer costs 2.4 points on CIFAR-10.",
        by_layer,
    ),
    (
        "loss",
        "Does lower loss mean better features, and does a larger model win at equal loss?",
        "Both, along training and across sizes.",
        loss_and_probe,
    ),
    (
        "bert",
        "Does BERT probe worse, and catch up under fine-tuning?",
        "BERT probes more than 1 point worse on CIFAR-10 and 6 on ImageNet; fine-tuned it is level (98.6 and 99.0 %).",
        bert,
    ),
    (
        "finetuning",
        "Does fine-tuning beat probing, training from scratch and raw pixels?",
        "Throughout: CIFAR-10 96.3 % by the probe, 99.0 % fine-tuned; a probe gives 73.2, 87.6 and 94.3 % from 4, 25 "
        "and 400 labels a class.",
        finetuning,
    ),
    (
        "resolution",
        "Does a higher resolution help?",
        "It does: ImageNet probes of L give 60.3 % at 32 px and 65.2 % at 48 px.",
        resolution,
    ),
    (
        "pictures",
        "What does the model draw as it learns?",
        "Samples and completions of the trained models are coherent images.",
        _pictures,
    ),
]
