"""What the steps of a reproduction have measured, and the form in which a question's answer is recorded.

Accuracies are shares from 0 to 1 until they become cells and figures, where they are percent; losses are nats/pixel.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from igpt.confidence import interval_of_share, paired_difference, unpacked
from igpt.errors import InputError
from igpt.files import read_json
from igpt.reproduction.runner import records
from igpt.reproduction.scale import Scale
from igpt.training.metrics import read_metrics

Held = Literal["yes", "in part", "no", "undecided", "shown", "not yet"]


class NotDone(Exception):  # noqa: N818  it is no error
    """A step whose result is wanted is not done yet; the message is its name."""


@dataclass(frozen=True)
class Share:
    """A measured accuracy with its 95 % interval.

    Attributes:
        n: how it was measured, for a table: test images, or draws.
        right: which test images were answered rightly, [N], or in every draw of the labels, [draws, N], where known.
        images: what tells these images, and these draws, from others.
    """

    value: float
    low: float
    high: float
    n: str
    right: NDArray[np.bool_] | None = field(default=None, repr=False, compare=False)
    images: tuple[Any, ...] = ()

    @property
    def half(self) -> float:
        """The longer arm of the interval: the other one may have been cut off at 0 or 1."""
        return max(self.high - self.value, self.value - self.low)

    @property
    def cell(self) -> str:
        """As a table has it."""
        return f"{100 * self.value:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"


def of_images(value: float, count: int) -> Share:
    """An accuracy on so many test images, with Wilson's interval."""
    return Share(value, *interval_of_share(round(value * count), count), f"{count:,} images")


def of_row(row: Mapping[str, Any], probe: Mapping[str, Any]) -> Share:
    """The test accuracy in a row of a probe.json."""
    count, config = probe["images"]["test"], probe["config"]
    images = (probe["tokens"], config["test_images"] or config["limit"], config["seed"])
    return replace(of_images(row["test_accuracy"], count), right=_right(row, count, "probe"), images=images)


def of_test(test: Mapping[str, Any]) -> Share:
    """The accuracy in a test.json."""
    count = test["test_images"]
    share = of_images(test["test_accuracy"], count)
    return replace(share, right=_right(test, count, "fine-tuning"), images=(test["tokens"], count))


def _right(result: Mapping[str, Any], count: int, kind: str) -> NDArray[np.bool_]:
    if "test_right" not in result:
        raise InputError(
            f"a {kind} here was made by an earlier igpt and does not say what was right; choose another -o"
        )
    return unpacked(result["test_right"], count)


def of_draws(values: Sequence[float], count: int) -> Share:
    """The mean accuracy over two or more draws of the labels, all on the same `count` test images.

    The interval is Student's over the draws and Wilson's over the images, added in squares: the draws share the images,
    so that their spread does not hold the images' part.
    """
    mean = float(np.mean(values))
    half = math.hypot(_half_of_draws(np.asarray(values)), of_images(mean, count).half)
    return Share(mean, max(0.0, mean - half), min(1.0, mean + half), f"{len(values)} draws, {count:,} images")


def _half_of_draws(values: NDArray[np.float64]) -> float:
    """Half of Student's 95 % interval of a mean."""
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * float(values.std(ddof=1)) / math.sqrt(len(values))


def difference(first: Share, second: Share) -> tuple[float, float]:
    """first - second in points, and half of its 95 % interval: paired where both were measured on the same images.

    Draws are paired too, and their part and the images' added in squares. Elsewhere the intervals are, as of different
    images; where some are shared, that is too wide.
    """
    if first.right is None or second.right is None or first.images != second.images:
        return 100 * (first.value - second.value), 100 * math.hypot(first.half, second.half)
    found, half = paired_difference(first.right, second.right)
    if first.right.ndim > 1:
        half = math.hypot(half, _half_of_draws(first.right.mean(axis=1) - second.right.mean(axis=1)))
    return 100 * found, 100 * half


def points(first: Share, second: Share) -> str:
    """The difference of two accuracies in words."""
    found, half = difference(first, second)
    return f"{found:+.1f} ± {half:.1f} points"


def clearly(first: Share, second: Share) -> bool:
    """Whether the first is higher by more than the interval of the difference."""
    found, half = difference(first, second)
    return found > half


def together(found: Sequence[Held]) -> Held:
    """What several answers to one question come to."""
    if set(found) == {"yes"}:
        return "yes"
    if "yes" in found:
        return "in part"
    return "no" if "no" in found else "undecided"


@dataclass(frozen=True)
class Results:
    """The files of a reproduction, read when they are asked for; NotDone where a step has no result."""

    folder: Path
    scale: Scale

    def has(self, name: str) -> bool:
        """Whether a step has a result."""
        record = records(self.folder).get(name)
        return record is not None and record["ended"] == "done"

    def require(self, name: str) -> None:
        """Refuses to go on without the result of a step.

        Raises:
            NotDone: there is none.
        """
        if not self.has(name):
            raise NotDone(name)

    def probe(self, name: str) -> dict[str, Any]:
        """A probe.json."""
        self.require(f"probes/{name}")
        return read_json(self.folder / "probes" / f"{name}.json", "probe")

    def best(self, probe: Mapping[str, Any]) -> Share:
        """The test accuracy of the layer that validation has chosen."""
        return of_row(next(row for row in probe["layers"] if row["layer"] == probe["best_layer"]), probe)

    def losses(self, run: str) -> dict[int, float]:
        """Validation loss by update."""
        self.require(f"runs/{run}")
        lines = read_metrics(self.folder / "runs" / run / "metrics.jsonl")
        return {line["step"]: line["loss"] for line in lines if line["kind"] == "validation"}

    def finetuned(self, start: str, labels: str | int) -> Share:
        """Test accuracy after fine-tuning; over all draws where there are several."""
        names = (
            [f"{start}-all"] if labels == "all" else [f"{start}-{labels}-{draw}" for draw in range(self.scale.draws)]
        )
        for name in names:
            self.require(f"finetuned/{name}")
        found = [read_json(self.folder / "finetuned" / name / "test.json", "result") for name in names]
        shares = [of_test(one) for one in found]
        if labels == "all":
            return shares[0]
        right = np.stack([share.right for share in shares if share.right is not None])
        together = of_draws([share.value for share in shares], right.shape[1])
        return replace(together, right=right, images=(*shares[0].images, labels))


def question(
    name: str,
    asks: str,
    paper: str,
    held: Held,
    verdict: str,
    plot: Mapping[str, Any],
    table: Mapping[str, Any],
    how: str,
) -> dict[str, Any]:
    """An answered question as evidence.json has it.

    Args:
        paper: what the paper found.
        held: whether it held here.
        plot: "kind" lines or groups, "x" and "y" labels, "series", for groups their "categories".
        table: "head" and "rows".
        how: what was measured how: n, seeds, protocol.
    """
    return {
        "name": name,
        "asks": asks,
        "paper": paper,
        "held": held,
        "verdict": verdict,
        "plot": plot,
        "table": table,
        "how": how,
    }


def series(name: str, x: Sequence[float], shares: Sequence[Share], ring: int | None = None) -> dict[str, Any]:
    """A line or a group of points with their intervals, in percent."""
    return {
        "name": name,
        "x": list(x),
        "y": [round(100 * share.value, 3) for share in shares],
        "low": [round(100 * share.low, 3) for share in shares],
        "high": [round(100 * share.high, 3) for share in shares],
        "ring": ring,
    }
