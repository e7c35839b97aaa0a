"""The paper's findings as questions, each answered from the results of a reproduction.

An answer claims no more than its intervals allow; otherwise it is "undecided".
"""

from collections.abc import Callable
from dataclasses import dataclass

from igpt.reproduction.evidence import Answer, Results
from igpt.reproduction.features import by_layer, loss_and_probe, resolution
from igpt.reproduction.transfer import bert, finetuning


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        paper: the paper's finding.
        answer: returns the answer, or raises `NotDone`.
    """

    name: str
    asks: str
    paper: str
    answer: Callable[[Results], Answer]


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
        by_layer,
    ),
    Question(
        "loss",
        "Does a lower loss give better features, and is a larger model better at equal loss?",
        "Yes to both, during training and across sizes.",
        loss_and_probe,
    ),
    Question(
        "bert",
        "Is BERT worse under the probe, and does it catch up with fine-tuning?",
        "BERT's probe accuracy is more than 1 point lower on CIFAR-10 and 6 on ImageNet; after "
        "fine-tuning it is level (98.6 and 99.0 %).",
        bert,
    ),
    Question(
        "finetuning",
        "Is fine-tuning better than probing, training from scratch and raw pixels?",
        "Yes: CIFAR-10 96.3 % with the probe, 99.0 % fine-tuned; a probe reaches 73.2, 87.6 and "
        "94.3 % with 4, 25 and 400 labels per class.",
        finetuning,
    ),
    Question(
        "resolution",
        "Does a higher resolution help?",
        "Yes: ImageNet probes of L reach 60.3 % at 32 px and 65.2 % at 48 px.",
        resolution,
    ),
    Question(
        "pictures",
        "How do samples change during training?",
        "Samples and completions of the trained models are coherent images.",
        _pictures,
    ),
)
