"""What the steps of a reproduction have measured, and the form in which a question's answer is recorded.

Accuracies are shares from 0 to 1 until they become cells and figures, where they are percent;
losses are nats/pixel.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from igpt.errors import InputError
from igpt.evaluation.results import Probe, ProbeSettings, best_row, read_probe, read_test
from igpt.files import require_schema
from igpt.report.record import history, read_metrics
from igpt.reproduction.runner import records
from igpt.reproduction.scale import Scale
from igpt.statistics import interval_of_share, paired_difference, unpacked

Held = Literal["yes", "in part", "no", "undecided", "shown", "not yet"]


class _Probe(Probe):
    """A probe that answers a question: its images must be known."""

    tokens: str
    config: ProbeSettings


class NotDone(Exception):  # noqa: N818  it is no error
    """A step whose result is wanted is not done yet; the message is its name."""


@dataclass(frozen=True)
class Share:
    """A measured accuracy with its 95 % interval.

    Attributes:
        n: how it was measured, for a table: test images, or draws.
        right: which test images were answered rightly, [N], or in every draw of the labels, [draws,
            N], where known.
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
    images = (probe["tokens"], config.get("test_images") or config.get("limit"), config.get("seed"))
    return replace(
        of_images(row["test_accuracy"], count), right=_right(row, count, "probe"), images=images
    )


def of_test(test: Mapping[str, Any]) -> Share:
    """The accuracy in a test.json."""
    count = test["test_images"]
    share = of_images(test["test_accuracy"], count)
    return replace(
        share, right=_right(test, count, "fine-tuning"), images=(test.get("tokens"), count)
    )


def _right(result: Mapping[str, Any], count: int, kind: str) -> NDArray[np.bool_]:
    if result.get("test_right") is None:
        raise InputError(
            f"a {kind} here was made by an earlier igpt and does not say what was right; choose another -o"
        )
    return unpacked(result["test_right"], count)


def of_draws(values: Sequence[float], count: int) -> Share:
    """The mean accuracy over two or more draws of the labels, all on the same `count` test images.

    The interval is Student's over the draws and Wilson's over the images, added in squares: the
    draws share the images, so that their spread does not hold the images' part.
    """
    mean = float(np.mean(values))
    half = math.hypot(_half_of_draws(np.asarray(values)), of_images(mean, count).half)
    return Share(
        mean, max(0.0, mean - half), min(1.0, mean + half), f"{len(values)} draws, {count:,} images"
    )


def _half_of_draws(values: NDArray[np.float64]) -> float:
    """Half of Student's 95 % interval of a mean."""
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * float(values.std(ddof=1)) / math.sqrt(len(values))


def difference(first: Share, second: Share) -> tuple[float, float]:
    """first - second in points, and half of its 95 % interval: paired where both were measured on the same images.

    Draws are paired too, and their part and the images' added in squares. Elsewhere the intervals
    are, as of different images; where some are shared, that is too wide.
    """
    if first.right is None or second.right is None or first.images != second.images:
        return 100 * (first.value - second.value), 100 * math.hypot(first.half, second.half)
    found, half = paired_difference(first.right, second.right)
    if first.right.ndim > 1:
        half = math.hypot(
            half, _half_of_draws(first.right.mean(axis=1) - second.right.mean(axis=1))
        )
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
        """Return what a step's probe.json holds.

        Raises:
            InputError: it does not hold all that answers need.
        """
        self.require(f"probes/{name}")
        path = self.folder / "probes" / f"{name}.json"
        found = read_probe(path)
        if "skipped" in found:
            raise InputError(f"{path} holds no probe ({found['skipped']}); choose another -o")
        require_schema(found, _Probe, path)
        return found

    def best(self, probe: Mapping[str, Any]) -> Share:
        """Return the test accuracy of the layer that validation has chosen."""
        return of_row(best_row(probe), probe)

    def few(self, name: str) -> tuple[list[Share], list[Share]]:
        """Return the accuracies with few labels, of the best layer and of raw pixels.

        Raises:
            InputError: a probe does not hold them.
        """
        probe = self.probe(name)
        count = probe["images"]["test"]
        pixels = (probe.get("baselines") or {}).get("raw_pixels") or {}
        found = [one.get("few_labels") or () for one in (probe, pixels)]
        for each in found:
            if [one["per_class"] for one in each] != list(self.scale.few):
                path = self.folder / "probes" / f"{name}.json"
                raise InputError(
                    f"{path}: few_labels are not of {self.scale.few} labels a class; choose another -o"
                )
        layer, raw = ([of_draws(one["test_accuracies"], count) for one in each] for each in found)
        return layer, raw

    def raw_pixels(self, name: str) -> Share:
        """Return the test accuracy of raw pixels.

        Raises:
            InputError: a probe does not hold it.
        """
        probe = self.probe(name)
        row = (probe.get("baselines") or {}).get("raw_pixels")
        if not row:
            raise InputError(
                f"{self.folder / 'probes' / name}.json: raw_pixels are missing; choose another -o"
            )
        return of_row(row, probe)

    def losses(self, run: str) -> dict[int, float]:
        """Return the validation loss by update.

        Raises:
            InputError: a snapshot has none.
        """
        self.require(f"runs/{run}")
        path = self.folder / "runs" / run / "metrics.jsonl"
        found = {
            line["step"]: float(line["loss"])
            for line in history(read_metrics(path)[0], "validation")
        }
        if missing := [
            step for step in self.scale.snapshots if not math.isfinite(found.get(step, math.nan))
        ]:
            raise InputError(f"{path}: the validation loss of update {missing[0]} is missing")
        return found

    def finetuned(self, start: str, labels: str | int) -> Share:
        """Return the test accuracy after fine-tuning; over all draws where there are several."""
        names = (
            [f"{start}-all"]
            if labels == "all"
            else [f"{start}-{labels}-{draw}" for draw in range(self.scale.draws)]
        )
        for name in names:
            self.require(f"finetuned/{name}")
        paths = [self.folder / "finetuned" / name / "test.json" for name in names]
        shares = [of_test(read_test(path)) for path in paths]
        if labels == "all":
            return shares[0]
        if other := [
            path
            for path, share in zip(paths, shares, strict=True)
            if share.images != shares[0].images
        ]:
            raise InputError(
                f"{other[0]} is of other test images than {paths[0]}; choose another -o"
            )
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


def series(
    name: str, x: Sequence[float], shares: Sequence[Share], ring: int | None = None
) -> dict[str, Any]:
    """A line or a group of points with their intervals, in percent."""
    return {
        "name": name,
        "x": list(x),
        "y": [round(100 * share.value, 3) for share in shares],
        "low": [round(100 * share.low, 3) for share in shares],
        "high": [round(100 * share.high, 3) for share in shares],
        "ring": ring,
    }
