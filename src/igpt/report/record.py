"""What a run directory holds, read leniently: a run in progress, a killed one and an old one are runs too.

Losses are in nats per pixel (of masked pixels under the BERT objective); accuracies are shares from 0 to 1.
"""

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from igpt.config import read_settings
from igpt.data.palette import Palette
from igpt.data.tokens import MANIFEST
from igpt.errors import InputError
from igpt.files import read_json

PROBE_FORMAT, PROBE_VERSION = "igpt-probe", 2


@dataclass(frozen=True)
class Run:
    """The contents of a run directory; what is not there is empty or None.

    Attributes:
        unreadable: lines of `metrics.jsonl`, before the last, that are no records.
        saved: the model's `config.json`.
        test: a fine-tuned classifier's `test.json`.
        manifest: the token data set's `dataset.json`; the run may outlive it.
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
    manifest: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def start(self) -> dict[str, Any]:
        """All that the run wrote down at its start; a resumed run may have written it again."""
        return started(self.metrics)

    @cached_property
    def shape(self) -> dict[str, Any]:
        """The model's shape and objective, by ModelConfig's names, as far as the run's files tell it."""
        found: dict[str, Any] = {"objective": "autoregressive"}
        places = self.start.get("places")
        if isinstance(places, int) and places > 0:
            found["resolution"] = math.isqrt(places)
        if self.palette is not None:
            found["n_colors"] = len(self.palette)
        layers = (self.start, self.saved, self.saved.get("igpt"), self.config)
        for values in layers:
            if isinstance(values, dict):
                names = ("resolution", "n_colors", "n_layer", "n_embd", "n_head", "objective")
                found.update({name: values[name] for name in names if values.get(name) is not None})
        return found

    @property
    def finetuned(self) -> bool:
        """Whether labels were trained on."""
        return "classes" in self.start or "generation_weight" in self.config

    @property
    def source(self) -> str:
        """The images' source as the user named it, or else where their tokens are."""
        names = (self.start.get("source"), self.manifest.get("source"), self.config.get("tokens"))
        return str(next((name for name in names if name), self.path.resolve().name))

    @property
    def unit(self) -> str:
        """The unit of the losses."""
        if self.finetuned:
            return "nats"
        return "nats/masked pixel" if self.shape["objective"] == "bert" else "nats/pixel"


def read_run(path: Path) -> Run:
    """Reads a run directory.

    Raises:
        InputError: it is none (`config.yaml` or `metrics.jsonl` is missing), or a file in it is damaged.
    """
    tried = sorted((path / "rates").glob("*/metrics.jsonl"), key=lambda metrics: metrics.stat().st_mtime)
    if tried and not (path / "metrics.jsonl").exists():
        raise InputError(f"{path} is still trying learning rates; `igpt report {tried[-1].parent}` tells of the newest")
    for name in ("config.yaml", "metrics.jsonl"):
        if not (path / name).is_file():
            raise InputError(f"{path} is no run directory: {name} is missing; `igpt pretrain` writes one")
    config = read_settings(path / "config.yaml")
    metrics, unreadable = read_metrics(path / "metrics.jsonl")
    clusters = (optional_json(path / "model" / "preprocessor_config.json") or {}).get("clusters")
    probe = optional_json(path / "probe.json")
    if probe is not None and (probe.get("format"), probe.get("version")) != (PROBE_FORMAT, PROBE_VERSION):
        raise InputError(
            f"{path / 'probe.json'} is not a probe of format version {PROBE_VERSION}; `igpt probe` makes it anew"
        )
    tokens = config.get("tokens")
    return Run(
        path,
        config,
        metrics,
        unreadable,
        environment=optional_json(path / "environment.json") or {},
        saved=optional_json(path / "model" / "config.json") or {},
        palette=None if clusters is None else Palette.from_centers(clusters),
        probe=probe,
        test=optional_json(path / "test.json"),
        manifest=(optional_json(Path(str(tokens)) / MANIFEST) if tokens else None) or {},
    )


def optional_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None if there is no such file."""
    return read_json(path, path.stem) if path.is_file() else None


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a `metrics.jsonl`, and how many lines before the last are unreadable.

    A run in progress may be writing the last line, and a killed one leaves it cut off: that is no damage.
    """
    records, unreadable = [], 0
    lines = path.read_text("utf-8", errors="replace").splitlines()
    for position, line in enumerate(lines):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("kind"), str):
            records.append(record)
        elif line.strip() and position < len(lines) - 1:
            unreadable += 1
    return records, unreadable


def history(metrics: list[dict[str, Any]], kind: str, key: str = "loss") -> list[dict[str, Any]]:
    """The records of one kind ("train", "validation") that have `key` and count, by step.

    A run that was killed and resumed takes some steps twice; those it had taken past the resumed state are dropped.
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


def best_validation(metrics: list[dict[str, Any]], key: str = "loss") -> tuple[int, float] | None:
    """Step and value of the lowest validation loss (or other `key`) on record, or None."""
    found = [(float(record[key]), record["step"]) for record in history(metrics, "validation", key)]
    finite = [(value, step) for value, step in found if math.isfinite(value)]
    return None if not finite else (min(finite)[1], min(finite)[0])


def baselines(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """The losses in nats/pixel that need no model, "uniform" and "unigram": those that the run wrote down."""
    found = {}
    for name in ("uniform", "unigram"):
        value = started(metrics).get(f"{name}_loss")
        if isinstance(value, int | float) and math.isfinite(value):
            found[name] = float(value)
    return found


def started(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """The start records, merged."""
    merged: dict[str, Any] = {}
    for record in metrics:
        if record["kind"] == "start":
            merged.update(record)
    return merged


def chosen_layer(probe: dict[str, Any]) -> dict[str, Any]:
    """The entry of a probe's `layers` that its `best_layer` names."""
    for layer in probe["layers"]:
        if layer["layer"] == probe["best_layer"]:
            found: dict[str, Any] = layer
            return found
    raise KeyError(f"layers[{probe['best_layer']}]")


def standard_error(accuracy: float, count: int) -> float:
    """Of a share of `count` independent answers: sqrt(p (1 - p) / n)."""
    return math.sqrt(max(0.0, accuracy * (1 - accuracy)) / count) if count > 0 else math.nan


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dots in the names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found
