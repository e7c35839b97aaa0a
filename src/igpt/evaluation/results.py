"""Schemas and readers of result files: probe, test, score-NAME and quality (.json).

Shares are from 0 to 1; answers that are right are a bit each in hexadecimal, see
`igpt.statistics.packed`.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core.core_schema import ValidationInfo

from igpt.errors import InputError
from igpt.files import Stored, read_json, require_schema, resolved

PROBE, PROBE_VERSION = "igpt-probe", 2
TEST, TEST_VERSION = "igpt-finetune", 1
SCORE, SCORE_VERSION = "igpt-score", 1
QUALITY, QUALITY_VERSION = "igpt-quality", 1

Share = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[
    float, Field(ge=-1e100, le=1e100)
]  # larger values overflow in sums and squares of a figure's axes
Count = Annotated[int, Field(ge=0, le=2**53)]
Positive = Annotated[int, Field(ge=1, le=2**53)]
Interval = Annotated[list[Share], Field(min_length=2, max_length=2)]
Answers = Annotated[str, Field(pattern="^([0-9a-f]{2})*$")]


class Tested(Stored):
    """The accuracy on test images."""

    test_accuracy: Share
    test_interval_95: Interval | None = None
    test_right: Answers | None = None


class Neighbours(Tested):
    """Accuracies of classification by k nearest neighbours."""

    k: Positive
    validation_accuracy: Share


class Accuracy(Tested):
    """A classifier of a probe: its accuracies, and its setting."""

    validation_accuracy: Share
    regularisation: Number | None = None
    learning_rate: Number | None = None
    converged: bool | None = None
    knn: Neighbours | None = None  # of the same features


class OfLayer(Accuracy):
    """The classifier of one layer."""

    layer: Count


class Layers(Stored):
    """The classifiers of several layers, and the best layer by validation accuracy."""

    layers: Annotated[list[OfLayer], Field(min_length=1)]
    best_layer: Count

    @field_validator("best_layer")
    @classmethod
    def _is_there(cls, best: int, info: ValidationInfo) -> int:
        if "layers" in info.data and best not in [row.layer for row in info.data["layers"]]:
            raise ValueError("that layer is not among the layers")
        return best


class Concatenated(Accuracy):
    """The classifier of several concatenated layers."""

    layers: Annotated[list[Count], Field(min_length=2)]


class FewLabels(Stored):
    """Accuracies over subsets of few labels."""

    per_class: Positive
    test_accuracies: Annotated[list[Share], Field(min_length=2)]
    mean: Share
    standard_deviation: Share
    layer: Count | None = None


class RawPixels(Accuracy):
    """The classifier of the raw pixels."""

    few_labels: list[FewLabels] | None = None


class Baselines(Stored):
    """The baselines of the layers."""

    raw_pixels: RawPixels | None = None
    untrained: Layers | None = None


class Images(Stored):
    """Numbers of images."""

    train: Positive
    validation: Positive
    test: Positive


class Confused(Stored):
    """How often test images of each class (row) were predicted as each class (column)."""

    class_names: list[str] | None = None
    confusion: list[list[Count]] | None = None

    @model_validator(mode="after")
    def _is_square(self) -> Self:
        if self.confusion is not None:
            side = len(self.class_names or ())
            if {len(self.confusion), *map(len, self.confusion)} != {side}:
                raise ValueError("the key 'confusion' has a row and a column for each class")
        return self


class ProbeSettings(Stored):
    """Settings of a probe that readers show or compare."""

    limit: Positive | None = None
    test_images: Positive | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    fold_back: bool | None = None


class Probe(Layers, Confused):
    """`probe.json`."""

    classes: Positive
    images: Images
    source: str | None = None
    tokens: str | None = None
    config: ProbeSettings | None = None
    concatenated: Concatenated | None = None
    few_labels: list[FewLabels] | None = None
    by_likelihood: Tested | None = None
    baselines: Baselines | None = None
    classifier: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None


class SkippedProbe(Stored):
    """`probe.json` of images that cannot be probed."""

    skipped: str


class LearningRate(Stored):
    """A learning rate that was tried."""

    learning_rate: Number


class Modal(Stored):
    """The modal prediction over masks."""

    masks: Positive
    accuracy: Share
    interval_95: Interval | None = None


class Before(Stored):
    """A classifier before training on validation images."""

    test_accuracy: Share
    test_interval_95: Interval | None = None


class FoldBack(Stored):
    """Training on validation images too."""

    before: Before


class Test(Confused):
    """`test.json` of a fine-tuned classifier."""

    test_accuracy: Share
    test_images: Positive
    test_interval_95: Interval | None = None
    test_right: Answers | None = None
    tokens: str | None = None
    learning_rate: Number | None = None
    rates: list[LearningRate] | None = None
    modal: Modal | None = None
    fold_back: FoldBack | None = None


class Maps(Stored):
    """A picture of the losses of pixels: the file, its checksum, and the rows of the images."""

    file: str
    rows: list[Count]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None  # not of earlier versions


class Score(Stored):
    """`score-NAME.json`."""

    images: Positive
    nats_per_pixel: Number
    standard_error: Number | None = None
    split: str | None = None
    source: str | None = None
    maps: Maps | None = None
    source_path: str | None = None


class Frechet(Stored):
    """The Frechet distance of samples to true images."""

    distance: Number
    interval_95: Annotated[list[Number], Field(min_length=2, max_length=2)]
    images: Annotated[list[Positive], Field(min_length=2, max_length=2)]


class Nearer(Stored):
    """The share of other images that are nearer to a completion than the true one."""

    mean: Share


class Completed(Nearer):
    """The same with its interval, and for hidden pixels of another image."""

    interval_95: Annotated[list[Number], Field(min_length=2, max_length=2)]
    count: Positive
    keep_rows: Count
    other_pixels: Nearer


class Quality(Stored):
    """`quality.json`."""

    source: str
    source_path: str | None = None
    model: str | None = None
    features: str
    layer: Count
    frechet: Frechet | None = None
    completions: Completed | None = None


def read_probe(path: Path) -> dict[str, Any]:
    """Return the content of a `probe.json`; if the images could not be probed, "skipped" is the
    reason.

    Raises:
        InputError: there is no such file, it is of another version, or a key is missing or wrong.
    """
    found = read_json(path, "probe")
    _require_version(found, path, PROBE, PROBE_VERSION, "igpt probe")
    if "skipped" in found:
        require_schema(found, SkippedProbe, path)
        return found
    require_schema(found, Probe, path)
    for row in _tested(found):
        _require_answers(row, found["images"]["test"], path)
    return found


def read_test(path: Path) -> dict[str, Any]:
    """Return the content of a `test.json`.

    Raises:
        InputError: there is no such file, it is of another version, or a key is missing or wrong.
    """
    found = read_json(path, "test of a classifier")
    _require_version(found, path, TEST, TEST_VERSION, "igpt finetune")
    require_schema(found, Test, path)
    _require_answers(found, found["test_images"], path)
    return found


def read_score(path: Path) -> dict[str, Any]:
    """Return the content of a `score-NAME.json`.

    Raises:
        InputError: there is no such file, it is of another version, or a key is missing or wrong.
    """
    found = read_json(path, "score")
    _require_version(found, path, SCORE, SCORE_VERSION, "igpt score")
    require_schema(found, Score, path)
    return found


def read_quality(path: Path) -> dict[str, Any]:
    """Return the content of a `quality.json`.

    Raises:
        InputError: there is no such file, it is of another version, or a key is missing or wrong.
    """
    found = read_json(path, "quality of samples")
    _require_version(found, path, QUALITY, QUALITY_VERSION, "igpt quality")
    require_schema(found, Quality, path)
    return found


def score_file(folder: Path, source: str, split: str | None) -> Path:
    """Return where the likelihood of images is written: score-NAME.json, by the source's name.

    Args:
        split: if it was asked for.

    Raises:
        InputError: the file has the result of other images, whose source has the same name.
    """
    name = re.sub(r"[^\w.-]+", "-", source.rstrip("/").rpartition("/")[2]).strip("-.") or "images"
    asked = "" if split in (None, "test") else f"-{split}"
    path = folder / f"score-{name}{asked}.json"
    if path.exists():
        require_same_images(path, read_score(path), source)
    return path


def require_same_images(path: Path, found: Mapping[str, Any], source: str) -> None:
    """Raise if a file's content is the result of another source, which would be lost.

    Raises:
        InputError: both sources are named.
    """
    recorded = found.get("source_path")
    # The same words may name another folder, in another working directory; but a folder that is
    # gone was moved.
    if recorded is None or (found.get("source") == source and not os.path.lexists(recorded)):
        recorded = found.get("source")
    require_same_source(path, recorded, source)


def score_files(folder: Path) -> list[Path]:
    """Return the files with likelihoods in a run directory."""
    return [path for path in sorted(folder.glob("score*.json")) if path.stem[5:6] in ("", "-")]


def require_same_source(path: Path, known: object, source: str) -> None:
    """Raise if a file has a result of another source, which would be lost.

    Raises:
        InputError: both sources are named.
    """
    if known is not None and resolved(Path(str(known))) != resolved(Path(source)):
        raise InputError(f"{path} has the result of {known}; choose another -o for {source}")


def source_path(source: str) -> str | None:
    """Return the absolute path of a source on this machine, or None for others.

    OpenAI's arrays are named by the beginning of their path.
    """
    path = Path(source).expanduser()
    places = (path, path.parent) if path.parent != Path() else (path,)
    is_here = any(map(os.path.exists, places))  # Path.exists raises for invalid names
    return str(resolved(path)) if is_here else None


def best_row(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of the best layer of a probe, or of its untrained model."""
    best: dict[str, Any] = next(
        row for row in result["layers"] if row["layer"] == result["best_layer"]
    )
    return best


def best_row_by_neighbours(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the row of the layer with the best k-nearest-neighbour accuracy on validation images.

    None if the probe was made without nearest neighbours.
    """
    rows: list[dict[str, Any]] = [row for row in result["layers"] if row.get("knn")]
    return max(rows, key=lambda row: row["knn"]["validation_accuracy"], default=None)


def _require_version(
    found: Mapping[str, Any], path: Path, kind: str, version: int, maker: str
) -> None:
    if (found.get("format"), found.get("version")) != (kind, version) or found["version"] is True:
        raise InputError(
            f"{path} is not {kind} of format version {version}; `{maker}` writes it again"
        )


def _tested(probe: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    compared = probe.get("baselines") or {}
    yield from probe["layers"]
    yield from (compared.get("untrained") or {}).get("layers", ())
    for row in (probe.get("concatenated"), probe.get("by_likelihood"), compared.get("raw_pixels")):
        if row:
            yield row


def _require_answers(row: Mapping[str, Any], count: int, path: Path) -> None:
    if row.get("knn"):
        _require_answers(row["knn"], count, path)
    answers = row.get("test_right")
    if answers is not None and len(answers) != 2 * -(-count // 8):
        raise InputError(
            f"{path}: test_right has {4 * len(answers)} bits; {count} test images need a bit each"
        )
