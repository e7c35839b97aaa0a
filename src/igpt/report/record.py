"""The content of a run directory; the run may be in progress, killed, or from an earlier igpt.

Missing files and values are empty; those of a wrong type raise an InputError. Losses are in nats
per pixel (per masked pixel with the BERT objective); accuracies are fractions from 0 to 1.
"""

import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from igpt.builtin_models import CARD, find_builtin
from igpt.config import read_settings
from igpt.data.images.palette import HubPalette, Palette
from igpt.data.left_out import LeftOut, left_out_of
from igpt.data.tokens.manifest import MANIFEST
from igpt.environment import RunKind, run_kind
from igpt.errors import InputError
from igpt.evaluation.results import (
    Count,
    Number,
    Share,
    read_probe,
    read_quality,
    read_test,
)
from igpt.files import Stored, read_json, require_regular, require_schema, require_shallow
from igpt.model.objectives import DEFAULT_OBJECTIVE, OBJECTIVES, Objective
from igpt.training.metrics import readable_metrics


def _moderate(loss: float) -> float:
    if math.isfinite(loss) and abs(loss) > 1e100:
        raise ValueError("no loss is as large")
    return loss


Loss = Annotated[float, AfterValidator(_moderate)]  # infinite or NaN in a run that diverged
Numeral = Annotated[str, Field(pattern=r"^\d{1,9}$")]


class _Shape(Stored):
    """A model's shape; files may lack parts of it."""

    resolution: Count | None = None
    n_colors: Count | None = None
    n_layer: Count | None = None
    n_embd: Count | None = None
    n_head: Count | None = None
    objective: str | None = None


class _Settings(_Shape):
    """The part of `config.yaml` that is shown in sentences."""

    tokens: str | None = None
    from_model: str | None = None
    steps: Count | None = None
    batch_size: Count | None = None
    generation_weight: Number | None = None
    condition: str | None = None


class _Record(_Shape):
    """A line of `metrics.jsonl`."""

    kind: str
    step: Count | None = None
    loss: Loss | None = None
    error: Loss | None = None
    error_on_trained: Loss | None = None
    learning_rate: Loss | None = None
    uniform_loss: Loss | None = None
    unigram_loss: Loss | None = None
    seconds: Loss | None = None
    source: str | None = None
    places: Count | None = None
    parameters: Count | None = None
    train_images: Count | None = None
    validation_images: Count | None = None
    classes: Count | None = None
    ranks: Count | None = None
    layer: Count | None = None
    linear_accuracy: Share | None = None
    knn_accuracy: Share | None = None
    k: Count | None = None
    effective_rank: Number | None = None


class _Environment(Stored):
    """`environment.json`; further entries are shown as they are."""

    kind: RunKind | None = None
    igpt: str | None = None


class _SavedSettings(_Shape):
    """The settings under "igpt" in it."""

    conditions: list[str] | None = None


class _Saved(_Shape):
    """A model's `config.json`."""

    model_type: str | None = None
    architectures: list[str] | None = None
    id2label: dict[Numeral, str] | None = None
    igpt: _SavedSettings | None = None


class _Split(Stored):
    """A split of `dataset.json`."""

    count: Count | None = None


class _PaletteError(Stored):
    """The quantization error of the palette."""

    mse: Number | None = None
    psnr_db: Number | None = None


class _MadeConfig(Stored):
    """The settings of `prepare` that are shown."""

    palette: str | None = None


class _Made(Stored):
    """The record of how a token data set was made, as far as it is shown."""

    config: _MadeConfig | None = None
    palette_error: _PaletteError | None = None
    skipped: list[str] | None = None
    left_out: dict[str, Any] = Field(default_factory=dict)  # see `igpt.data.left_out`
    warnings: list[str] | None = None


class _Manifest(Stored):
    """The part of `dataset.json` that is shown."""

    source: str | None = None
    class_names: list[str] | None = None
    splits: dict[str, _Split] | None = None
    made: _Made | None = None


class _Sampling(Stored):
    """The settings of sampling: the JSON file of a grid of pictures."""

    temperature: Number | None = None
    top_k: Count | None = None
    top_p: Number | None = None
    guidance: Number | None = None
    classes: list[str] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    keep_rows: Count | None = None
    command: str | None = None


@dataclass(frozen=True)
class Run:
    """The content of a run directory; missing files are empty or None.

    Attributes:
        unreadable: number of lines of `metrics.jsonl`, except the last, that are no records.
        saved: the model's `config.json`.
        test: a fine-tuned classifier's `test.json`.
        quality: the `quality.json` of `igpt quality`.
        manifest: the token data set's `dataset.json`; empty if the data set was deleted.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    unreadable: int = 0
    environment: dict[str, Any] = field(default_factory=dict)
    saved: dict[str, Any] = field(default_factory=dict)
    palette: Palette | None = None
    probe: dict[str, Any] | None = None
    test: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None
    manifest: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def start(self) -> dict[str, Any]:
        """The start records of the run and of its resumptions, merged."""
        return started(self.metrics)

    @cached_property
    def shape(self) -> dict[str, Any]:
        """The model's shape and objective, by ModelConfig's names, as far as recorded."""
        found: dict[str, Any] = {"objective": DEFAULT_OBJECTIVE}
        if positions := self.start.get("places"):
            found["resolution"] = math.isqrt(positions)
        if self.palette is not None:
            found["n_colors"] = len(self.palette)
        for values in (self.start, self.saved, self.saved.get("igpt") or {}, self.config):
            names = _Shape.model_fields
            found.update({name: values[name] for name in names if values.get(name) is not None})
        return found

    @property
    def finetuned(self) -> bool:
        """True if the run is a fine-tuning."""
        return run_kind(self.environment, self.config) == "finetune"

    @property
    def source(self) -> str:
        """The images' source as the user named it, or else the path of their tokens."""
        names = (self.start.get("source"), self.manifest.get("source"), self.config.get("tokens"))
        return str(next((name for name in names if name), self.path.resolve().name))

    @cached_property
    def left_out(self) -> LeftOut:
        """Files and images left out of the token data set; empty if its manifest is missing.

        Raises:
            InputError: the manifest's entry is malformed.
        """
        return left_out_of(self._made, str(Path(str(self.config.get("tokens"))) / MANIFEST))

    @property
    def split_sizes(self) -> dict[str, int]:
        """The number of images of each split of the token data set, as far as recorded."""
        splits = self.manifest.get("splits") or {}
        counts = {name: split.get("count") for name, split in splits.items()}
        return {name: count for name, count in counts.items() if count is not None}

    @property
    def warnings(self) -> list[str]:
        """The warnings from preparing the token data set."""
        return self._made.get("warnings") or []

    @property
    def _made(self) -> dict[str, Any]:
        return self.manifest.get("made") or {}

    @property
    def objective(self) -> Objective:
        """The pretraining objective; the default one if the files name an unknown one."""
        return OBJECTIVES.get(str(self.shape["objective"]), OBJECTIVES[DEFAULT_OBJECTIVE])

    @property
    def unit(self) -> str:
        """The unit of the losses."""
        if self.finetuned:
            return "nats"
        return self.objective.unit


def read_run(path: Path) -> Run:
    """Read a run directory.

    Raises:
        InputError: it is no run directory (`config.yaml` or `metrics.jsonl` is missing), or a file
            in it is damaged.
    """
    if builtin := find_builtin(path, ("config.yaml", "metrics.jsonl")):
        raise InputError(f"{path} is a built-in model, not a run; its card is {builtin / CARD}")
    tried = sorted(
        (path / "rates").glob("*/metrics.jsonl"), key=lambda metrics: metrics.stat().st_mtime
    )
    if tried and not (path / "metrics.jsonl").exists():
        raise InputError(
            f"{path} is still trying learning rates; `igpt report {tried[-1].parent}` shows the "
            "newest"
        )
    for name in ("config.yaml", "metrics.jsonl"):
        require_regular(path / name)
        if not (path / name).is_file():
            raise InputError(
                f"{path} is no run directory: {name} is missing; `igpt pretrain` writes one"
            )
    config = _read_config(path / "config.yaml")
    metrics, unreadable = read_metrics(path / "metrics.jsonl")
    tokens = config.get("tokens")
    return Run(
        path,
        config,
        metrics,
        unreadable,
        environment=optional_json(path / "environment.json", _Environment) or {},
        saved=optional_json(path / "model" / "config.json", _Saved) or {},
        palette=_read_palette(path / "model" / "preprocessor_config.json"),
        probe=read_probe(path / "probe.json") if (path / "probe.json").exists() else None,
        test=read_test(path / "test.json") if (path / "test.json").exists() else None,
        quality=read_quality(path / "quality.json") if (path / "quality.json").exists() else None,
        manifest=(optional_json(Path(tokens) / MANIFEST, _Manifest) if tokens else None) or {},
    )


def _read_config(path: Path) -> dict[str, Any]:
    config = read_settings(path)
    require_shallow(config, path)
    require_schema(config, _Settings, path)
    return config


def _read_palette(path: Path) -> Palette | None:
    values = optional_json(path, HubPalette) or {}
    try:
        return None if values.get("clusters") is None else Palette.from_hub(values)
    except InputError as error:
        raise InputError(f"{path}: clusters: {error}") from None


def read_sampling(picture: Path) -> dict[str, Any]:
    """Return the settings of sampling from the JSON file of a grid; empty if there is none.

    Raises:
        InputError: the file is damaged.
    """
    return optional_json(picture.with_suffix(".json"), _Sampling) or {}


def optional_json(path: Path, schema: type[Stored]) -> dict[str, Any] | None:
    """Return the JSON object in `path`, or None if there is no such file.

    Raises:
        InputError: it is no regular file, it is damaged, or it violates the schema.
    """
    is_there = os.path.exists(path)  # noqa: PTH110  Path.exists raises for invalid names
    return read_json(path, path.stem, schema) if is_there else None


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the records of a `metrics.jsonl`, and the number of its lines that cannot be shown.

    An incomplete last line is not counted: a run in progress may be writing it.

    Raises:
        InputError: there is no such file, or no regular one.
    """
    records, unreadable = readable_metrics(path)
    shown = [record for record in records if _can_be_shown(record)]
    return shown, unreadable + len(records) - len(shown)


def _can_be_shown(record: dict[str, Any]) -> bool:
    """Return True if the values of a record have the expected types and sizes."""
    try:
        require_schema(record, _Record, "")
    except InputError:
        return False
    return True


def history(metrics: list[dict[str, Any]], kind: str, key: str = "loss") -> list[dict[str, Any]]:
    """Return the records of one kind ("train", "validation") with a value of `key`, by step.

    A run that was killed and resumed repeats some steps; their earlier records are dropped.
    """
    kept: dict[int, dict[str, Any]] = {}
    for record in metrics:
        step = record.get("step")
        if not isinstance(step, int):
            continue
        if record["kind"] == "resume":
            kept = {known: earlier for known, earlier in kept.items() if known <= step}
        elif record["kind"] == kind and isinstance(record.get(key), int | float):
            kept[step] = record
    return [kept[step] for step in sorted(kept)]


def qualities(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the complete records of features that were measured during training, by step."""
    accuracies, counts = ("linear_accuracy", "knn_accuracy"), ("train_images", "validation_images")
    keys = (*accuracies, *counts, "layer", "k", "effective_rank")
    return [
        record
        for record in history(metrics, "probe", "linear_accuracy")
        if all(record.get(key) is not None for key in keys)
    ]


def best_validation(metrics: list[dict[str, Any]], key: str = "loss") -> tuple[int, float] | None:
    """Return step and value of the lowest recorded validation loss (or other `key`), or None."""
    found = [(float(record[key]), record["step"]) for record in history(metrics, "validation", key)]
    finite = [(value, step) for value, step in found if math.isfinite(value)]
    return None if not finite else (min(finite)[1], min(finite)[0])


def baselines(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Return the recorded losses without a model in nats/pixel: "uniform" and "unigram"."""
    found = {}
    for name in ("uniform", "unigram"):
        value = started(metrics).get(f"{name}_loss")
        if isinstance(value, int | float) and math.isfinite(value):
            found[name] = float(value)
    return found


def started(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the start records, merged."""
    merged: dict[str, Any] = {}
    for record in metrics:
        if record["kind"] == "start":
            merged.update(record)
    return merged


def standard_error(accuracy: float, count: int) -> float:
    """Return the standard error of a fraction of `count` trials: sqrt(p (1 - p) / n)."""
    return math.sqrt(max(0.0, accuracy * (1 - accuracy)) / count) if count > 0 else math.nan


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping, with dots in the names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found
