"""Measurements of the steps of a reproduction, and the answers to questions.

Accuracies are fractions from 0 to 1; in tables and figures they are percentages. Losses are in
nats/pixel.
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
from igpt.reproduction.runner import Records
from igpt.reproduction.scale import Scale
from igpt.statistics import interval_of_share, paired_difference, unpacked

Verdict = Literal["yes", "in part", "no", "undecided", "shown", "not yet"]


class _Probe(Probe):
    """Schema of a probe.json that records its images and settings."""

    tokens: str
    config: ProbeSettings


class NotDone(Exception):  # noqa: N818  not an error
    """A step whose result is needed is not done yet; the message is its name."""


@dataclass(frozen=True)
class Answer:
    """The answer to a question, as evidence.json records it.

    Attributes:
        held: how far the paper's finding holds here.
        verdict: the answer in sentences.
        plot: "kind" ("lines", "groups" or "pictures"), axis labels "x" and "y", "series", and the
            "categories" of groups.
        table: "head" and "rows".
        how: the protocol: n, seeds, and how the numbers were measured.
    """

    held: Verdict
    verdict: str
    plot: Mapping[str, Any]
    table: Mapping[str, Any]
    how: str


@dataclass(frozen=True)
class Accuracy:
    """A measured accuracy with its 95 % interval.

    Attributes:
        n: number of test images and label subsets, for a table.
        right: correctly classified test images, [N], or [subsets, N] with label subsets; None if
            not recorded.
        images: identifies the test images and label subsets; two shares can be compared image by
            image if theirs are equal.
    """

    value: float
    low: float
    high: float
    n: str
    right: NDArray[np.bool_] | None = field(default=None, repr=False, compare=False)
    images: tuple[Any, ...] = ()

    @property
    def half_width(self) -> float:
        """The larger distance of the value to a bound, since bounds are clipped to [0, 1]."""
        return max(self.high - self.value, self.value - self.low)

    @property
    def cell(self) -> str:
        """The value and its interval as a cell of a table."""
        return f"{100 * self.value:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"


def accuracy_on(value: float, count: int) -> Accuracy:
    """Return an accuracy on `count` test images with Wilson's interval."""
    return Accuracy(value, *interval_of_share(round(value * count), count), f"{count:,} images")


def accuracy_of_row(row: Mapping[str, Any], probe: Mapping[str, Any]) -> Accuracy:
    """Return the test accuracy in a row of a probe.json."""
    count, config = probe["images"]["test"], probe["config"]
    images = (probe["tokens"], config.get("test_images") or config.get("limit"), config.get("seed"))
    return replace(
        accuracy_on(row["test_accuracy"], count), right=_right(row, count, "probe"), images=images
    )


def accuracy_of_test(test: Mapping[str, Any]) -> Accuracy:
    """Return the accuracy in a test.json."""
    count = test["test_images"]
    share = accuracy_on(test["test_accuracy"], count)
    return replace(
        share, right=_right(test, count, "fine-tuning"), images=(test.get("tokens"), count)
    )


def _right(result: Mapping[str, Any], count: int, kind: str) -> NDArray[np.bool_]:
    if result.get("test_right") is None:
        raise InputError(
            f"a result of a {kind} was written by an earlier igpt, without predictions per image; "
            "choose another -o"
        )
    return unpacked(result["test_right"], count)


def accuracy_of_subsets(values: Sequence[float], count: int) -> Accuracy:
    """Return the mean accuracy over several subsets of the labels, on the same `count` test images.

    Student's interval over the subsets and Wilson's over the images are combined in quadrature: the
    subsets share the test images, so their spread does not contain the images' sampling error.
    """
    mean = float(np.mean(values))
    half = math.hypot(_half_of_subsets(np.asarray(values)), accuracy_on(mean, count).half_width)
    n = f"{len(values)} label subsets, {count:,} images"
    return Accuracy(mean, max(0.0, mean - half), min(1.0, mean + half), n)


def _half_of_subsets(values: NDArray[np.float64]) -> float:
    """Return half the width of Student's 95 % interval of a mean."""
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * float(values.std(ddof=1)) / math.sqrt(len(values))


def difference(first: Accuracy, second: Accuracy) -> tuple[float, float]:
    """Return first - second in percentage points, and half the width of its 95 % interval.

    The interval is paired if both were measured on the same images. The variation over label
    subsets is paired too, and combined with that over images in quadrature. Otherwise the two
    intervals are combined in quadrature, as for independent images; this is too wide if they share
    some.
    """
    if first.right is None or second.right is None or first.images != second.images:
        return 100 * (first.value - second.value), 100 * math.hypot(
            first.half_width, second.half_width
        )
    found, half = paired_difference(first.right, second.right)
    if first.right.ndim > 1:
        half = math.hypot(
            half, _half_of_subsets(first.right.mean(axis=1) - second.right.mean(axis=1))
        )
    return 100 * found, 100 * half


def points(first: Accuracy, second: Accuracy) -> str:
    """Return the difference of two accuracies as text."""
    found, half = difference(first, second)
    return f"{found:+.1f} ± {half:.1f} points"


def clearly(first: Accuracy, second: Accuracy) -> bool:
    """Return True if the first is higher by more than the interval of the difference."""
    found, half = difference(first, second)
    return found > half


def overall(found: Sequence[Verdict]) -> Verdict:
    """Return the overall answer of several answers to one question."""
    if set(found) == {"yes"}:
        return "yes"
    if "yes" in found:
        return "in part"
    return "no" if "no" in found else "undecided"


@dataclass(frozen=True)
class Results:
    """The results of a reproduction's steps, read from their files when needed.

    All methods raise `NotDone` if a step that they need has no result.

    Attributes:
        records: from `read_records`.
    """

    folder: Path
    scale: Scale
    records: Records

    def has(self, name: str) -> bool:
        """Return True if a step has a result."""
        return name in self.records and self.records[name]["ended"] == "done"

    def require(self, name: str) -> None:
        """Raise `NotDone` if a step has no result."""
        if not self.has(name):
            raise NotDone(name)

    def probe(self, name: str) -> dict[str, Any]:
        """Return the content of a step's probe.json.

        Raises:
            InputError: it lacks something that the answers need.
        """
        self.require(f"probes/{name}")
        path = self.folder / "probes" / f"{name}.json"
        found = read_probe(path)
        if "skipped" in found:
            raise InputError(f"{path} holds no probe ({found['skipped']}); choose another -o")
        require_schema(found, _Probe, path)
        return found

    def best(self, probe: Mapping[str, Any]) -> Accuracy:
        """Return the test accuracy of the layer with the best validation accuracy."""
        return accuracy_of_row(best_row(probe), probe)

    def few(self, name: str, *, pixels: str = "") -> tuple[list[Accuracy], list[Accuracy]]:
        """Return the accuracies with few labels of the best layer and of raw pixels.

        Args:
            pixels: the probe with those of raw pixels, by default the same one.

        Raises:
            InputError: a probe does not contain them.
        """
        raw = (self.probe(pixels or name).get("baselines") or {}).get("raw_pixels") or {}
        return self._few(self.probe(name), name), self._few(raw, pixels or name)

    def _few(self, found: Mapping[str, Any], name: str) -> list[Accuracy]:
        each = found.get("few_labels") or ()
        if [one["per_class"] for one in each] != list(self.scale.few):
            path = self.folder / "probes" / f"{name}.json"
            raise InputError(
                f"{path}: few_labels are not for {self.scale.few} labels per class; "
                "choose another -o"
            )
        count = self.probe(name)["images"]["test"]
        return [accuracy_of_subsets(one["test_accuracies"], count) for one in each]

    def raw_pixels(self, name: str) -> Accuracy:
        """Return the test accuracy of raw pixels.

        Raises:
            InputError: the probe does not contain it.
        """
        probe = self.probe(name)
        row = (probe.get("baselines") or {}).get("raw_pixels")
        if not row:
            raise InputError(
                f"{self.folder / 'probes' / name}.json: raw_pixels is missing; choose another -o"
            )
        return accuracy_of_row(row, probe)

    def untrained(self, name: str) -> Accuracy:
        """Return the test accuracy of the best layer of an untrained network.

        Raises:
            InputError: the probe does not contain it.
        """
        probe = self.probe(name)
        found = (probe.get("baselines") or {}).get("untrained")
        if not found:
            raise InputError(
                f"{self.folder / 'probes' / name}.json: untrained is missing; choose another -o"
            )
        return accuracy_of_row(best_row(found), probe)

    def losses(self, run: str, snapshots: Sequence[int] | None = None) -> dict[int, float]:
        """Return the validation loss by step.

        Args:
            snapshots: steps whose losses must be there; those of the scale by default.

        Raises:
            InputError: a snapshot has none.
        """
        if snapshots is None:
            snapshots = self.scale.snapshots
        self.require(f"runs/{run}")
        path = self.folder / "runs" / run / "metrics.jsonl"
        found = {
            line["step"]: float(line["loss"])
            for line in history(read_metrics(path)[0], "validation")
        }
        if missing := [step for step in snapshots if not math.isfinite(found.get(step, math.nan))]:
            raise InputError(f"{path}: the validation loss of step {missing[0]} is missing")
        return found

    def finetuned(self, start: str, labels: str | int) -> Accuracy:
        """Return the test accuracy after fine-tuning; with few labels, over all label subsets."""
        names = (
            [f"{start}-all"]
            if labels == "all"
            else [f"{start}-{labels}-{subset}" for subset in range(self.scale.subsets)]
        )
        for name in names:
            self.require(f"finetuned/{name}")
        paths = [self.folder / "finetuned" / name / "test.json" for name in names]
        shares = [accuracy_of_test(read_test(path)) for path in paths]
        if labels == "all":
            return shares[0]
        if other := [
            path
            for path, share in zip(paths, shares, strict=True)
            if share.images != shares[0].images
        ]:
            raise InputError(f"{other[0]} has other test images than {paths[0]}; choose another -o")
        right = np.stack([share.right for share in shares if share.right is not None])
        mean = accuracy_of_subsets([share.value for share in shares], right.shape[1])
        return replace(mean, right=right, images=(*shares[0].images, labels))


def series(
    name: str, x: Sequence[float], shares: Sequence[Accuracy], ring: int | None = None
) -> dict[str, Any]:
    """Return a line, or a group of points, with intervals in percent.

    Args:
        ring: index of the point to mark with a ring.
    """
    return {
        "name": name,
        "x": list(x),
        "y": [round(100 * share.value, 3) for share in shares],
        "low": [round(100 * share.low, 3) for share in shares],
        "high": [round(100 * share.high, 3) for share in shares],
        "ring": ring,
    }
