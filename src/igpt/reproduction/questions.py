"""The paper's findings as questions, each answered from the results of a reproduction.

An answer claims no more than its intervals allow; otherwise it is "undecided".
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from igpt.reproduction.evidence import Answer, Results
from igpt.reproduction.features import (
    by_layer,
    compute,
    loss_and_probe,
    resolution,
    without_labels,
)
from igpt.reproduction.scale import Scale
from igpt.reproduction.transfer import bert, finetuning


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        paper: the paper's finding.
        finding: the same in a few words, for a summary; "" if there is nothing to decide.
        answer: returns the answer, or raises `NotDone`.
        applies: whether the steps of a scale can answer it.
    """

    name: str
    asks: str
    paper: str
    finding: str
    answer: Callable[[Results], Answer]
    applies: Callable[[Scale], bool] = lambda scale: True


def _compares_recipes(scale: Scale) -> bool:
    return scale.second is not None


def _pictures(results: Results) -> Answer:
    size = next(reversed(results.scale.sizes))
    losses, steps = results.losses(size), results.scale.snapshots
    for step in steps:
        for kind in ("samples", "completions"):
            results.require(f"pictures/{kind}-{step}")
    verdict = (
        f"From step {steps[0]} to {steps[-1]} the loss falls from {losses[steps[0]]:.3f} to "
        f"{losses[steps[-1]]:.3f} nats/pixel. The quality of the images is not measured."
    )
    plot = {"kind": "pictures", "steps": list(steps)}
    table = {
        "head": ["step", "validation loss"],
        "rows": [[str(step), f"{losses[step]:.3f}"] for step in steps],
    }
    how = (
        f"The {size} size; temperature 1, no top-k or top-p; the same random numbers in every row "
        "(seed 0)."
    )
    return Answer("shown", verdict, plot, table, how)


QUESTIONS = (
    Question(
        "layers",
        "Which layer has the best features?",
        "Probe accuracy by layer has a single peak, at a middle layer; the last layer is 2.4 "
        "points lower on CIFAR-10.",
        "an inner layer has the best features",
        by_layer,
    ),
    Question(
        "layers-second",
        "Which layer has the best features with a second, faster recipe?",
        "Not in the paper: the recipe has rotary positions, value residuals, embeddings from the "
        "palette, updates shared by near colours, Muon and mirrored images.",
        "an inner layer has the best features with a second recipe",
        partial(by_layer, second=True),
        _compares_recipes,
    ),
    Question(
        "without-labels",
        "Are features learned without labels better than raw pixels and training from scratch?",
        "Yes: on CIFAR-10, a probe of iGPT-L reaches 96.3 %, above supervised ImageNet features "
        "(94.0 %).",
        "features learned without labels are better than raw pixels, an untrained network and "
        "training from scratch",
        without_labels,
        _compares_recipes,
    ),
    Question(
        "loss",
        "Does a lower loss give better features, and is a larger model better at equal loss?",
        "Yes to both, during training and across sizes.",
        "a lower loss gives better features, and at equal loss a larger model does",
        loss_and_probe,
    ),
    Question(
        "compute",
        "What does each doubling of compute gain?",
        "Features improve along training; the paper does not tabulate doublings.",
        "the last doubling of compute improves the features",
        compute,
        lambda scale: bool(scale.doublings),
    ),
    Question(
        "bert",
        "Is BERT worse under the probe, and does it catch up with fine-tuning?",
        "BERT's probe accuracy is more than 1 point lower on CIFAR-10 and 6 on ImageNet; after "
        "fine-tuning it is level (98.6 and 99.0 %).",
        "BERT is worse under the probe and catches up with fine-tuning",
        bert,
    ),
    Question(
        "finetuning",
        "Is fine-tuning better than probing, training from scratch and raw pixels?",
        "Yes: CIFAR-10 96.3 % with the probe, 99.0 % fine-tuned; a probe reaches 73.2, 87.6 and "
        "94.3 % with 4, 25 and 400 labels per class.",
        "fine-tuning is better than probing, training from scratch and raw pixels",
        finetuning,
    ),
    Question(
        "finetuning-second",
        "Is fine-tuning better with a second, faster recipe too?",
        "Not in the paper: pretraining as in the second recipe, fine-tuning with Muon and a "
        "cosine schedule.",
        "fine-tuning is better with a second recipe",
        partial(finetuning, second=True),
        _compares_recipes,
    ),
    Question(
        "resolution",
        "Does a higher resolution help?",
        "Yes: ImageNet probes of L reach 60.3 % at 32 px and 65.2 % at 48 px.",
        "a higher resolution gives better features",
        resolution,
    ),
    Question(
        "pictures",
        "How do samples change during training?",
        "Samples and completions of the trained models are coherent images.",
        "",
        _pictures,
    ),
)


def questions(scale: Scale) -> list[Question]:
    """Return the questions that a scale answers."""
    return [asked for asked in QUESTIONS if asked.applies(scale)]
