"""Malformed files of a run give one line that names the file, or a page; never a traceback."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from igpt.data.images.grid import image_grid
from igpt.errors import InputError
from igpt.report import figures
from igpt.report.findings import describe_probe
from igpt.report.page import write_report
from igpt.report.record import read_metrics, read_run
from igpt.report.sections import key_tables, probe_section, read_picture

from ..helpers import malformed

ROW = {
    "validation_accuracy": 0.5,
    "test_accuracy": 0.75,
    "test_interval_95": [0.5, 1.0],
    "test_right": "ff",
    "regularisation": 0.1,
    "converged": True,
}
FEW = {
    "per_class": 4,
    "layer": 1,
    "mean": 0.7,
    "standard_deviation": 0.01,
    "test_accuracies": [0.7, 0.71],
}
PROBE: dict[str, Any] = {
    "format": "igpt-probe",
    "version": 2,
    "classes": 10,
    "source": "digits",
    "tokens": "tokens",
    "config": {"fold_back": True, "limit": None, "test_images": None, "seed": 0},
    "images": {"train": 9, "validation": 9, "test": 8},
    "layers": [{"layer": 0, **ROW}, {"layer": 1, **ROW}],
    "best_layer": 1,
    "concatenated": {"layers": [0, 1], **ROW},
    "few_labels": [FEW],
    "baselines": {
        "raw_pixels": {**ROW, "few_labels": [FEW]},
        "untrained": {"layers": [{"layer": 0, **ROW}]},
    },
    "classifier": "0" * 64,
}
PROBE["baselines"]["untrained"]["best_layer"] = 0
TEST = {
    "format": "igpt-finetune",
    "version": 1,
    "test_accuracy": 0.9,
    "test_images": 8,
    "test_interval_95": [0.5, 1.0],
    "test_right": "ff",
    "tokens": "tokens",
    "rates": [{"learning_rate": 0.1}, {"learning_rate": 0.2}],
    "learning_rate": 0.1,
    "modal": {"masks": 2, "accuracy": 0.5},
    "fold_back": {"before": {"test_accuracy": 0.5}},
}
SAVED = {
    "model_type": "imagegpt",
    "architectures": ["ImageGPTForImageClassification"],
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 2,
    "id2label": {"0": "a"},
    "igpt": {"resolution": 8, "objective": "autoregressive"},
}
LINES = [
    {
        "kind": "start",
        "step": 0,
        "parameters": 10,
        "train_images": 9,
        "validation_images": 9,
        "places": 64,
    }
    | {
        "n_colors": 2,
        "classes": 2,
        "source": "digits",
        "uniform_loss": math.log(2),
        "unigram_loss": 0.6,
    },
    {"kind": "train", "step": 50, "loss": 0.7, "learning_rate": 0.001},
    {"kind": "validation", "step": 100, "loss": 0.5, "error": 0.5, "best": True},
    {"kind": "resume", "step": 100},
    {"kind": "end", "step": 100, "best": 0.5, "best_step": 100, "seconds": 1.5},
]
MADE = {
    "config": {"palette": None},
    "palette_error": {"mse": 2.5, "psnr_db": 44.2},
    "skipped": ["train a.png: empty"],
    "left_out": {
        "images that do not decode": {
            "count": 1,
            "first": "train a.png: empty",
            "possible_images": True,
        }
    },
    "warnings": ["nearly black"],
}
CONFIG = {
    "tokens": "tokens",
    "steps": 100,
    "batch_size": 4,
    "n_layer": 2,
    "objective": "bert",
    "betas": [0.9, 0.95],
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run with small files of every kind, without charts, which are slow."""
    run, tokens = tmp_path / "run", tmp_path / "tokens"
    (run / "model").mkdir(parents=True)
    tokens.mkdir()
    picture = np.zeros((8, 8, 3), np.uint8)
    for name in ("samples", "completions"):
        image_grid([[picture] * 3]).save(run / f"{name}.png")
    how = {
        "temperature": 1.0,
        "top_k": None,
        "top_p": 0.9,
        "seed": 0,
        "keep_rows": 4,
        "command": "igpt sample",
    }
    for name, value in {
        "config.yaml": {**CONFIG, "tokens": str(tokens)},
        "environment.json": {"igpt": "0.1.0", "cores": 2, "gpu": None},
        "model/config.json": SAVED,
        "model/preprocessor_config.json": {"clusters": [[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]},
        "samples.json": how,
        "completions.json": how,
        "test.json": TEST,
        "../tokens/dataset.json": {
            "source": "digits",
            "class_names": ["a"],
            "splits": {"train": {"count": 9}},
        }
        | {"made": MADE},
    }.items():
        (run / name).write_text(json.dumps(value))
    (run / "metrics.jsonl").write_text(json.dumps(LINES[0]) + "\n")
    return run


def refused_in_one_line(act: Callable[[], object], name: str, what: str) -> bool:
    """Return True if a call raises one line that names the file; fail on any other error."""
    said = None
    try:
        act()
    except InputError as error:
        said = str(error)
    assert said is None or (name in said and "\n" not in said), (what, said)
    return said is not None


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("environment.json", 20),
        ("test.json", 150),
        ("model/config.json", 90),
        ("model/preprocessor_config.json", 40),
        ("samples.json", 50),
        ("completions.json", 50),
        ("../tokens/dataset.json", 120),
    ],
)
def test_a_malformed_file_gives_a_page_or_one_line(run: Path, name: str, least: int) -> None:
    def report() -> None:
        write_report(run)

    refused = sum(
        refused_in_one_line(report, Path(name).name, what) for what in malformed.files(run / name)
    )
    assert refused >= least, "most of them are refused"
    report()


def test_a_malformed_probe_gives_a_page_or_one_line(run: Path) -> None:
    path = run / "probe.json"
    path.write_text(json.dumps(PROBE))

    def read() -> None:
        found = read_run(run)
        assert found.probe is not None
        if "skipped" not in found.probe:
            assert describe_probe(found.probe)
            assert key_tables(found)
            figures.probe_by_layer(found.probe)

    refused = sum(refused_in_one_line(read, "probe.json", what) for what in malformed.files(path))
    assert refused > 700
    assert probe_section(read_run(run)).chart is not None


def test_settings_of_other_kinds_give_a_page_or_one_line(run: Path) -> None:
    path = run / "config.yaml"
    whole = path.read_bytes()
    refused = 0
    for what, value in malformed.variants(json.loads(whole)):
        path.write_text(yaml.safe_dump(value))
        refused += refused_in_one_line(lambda: write_report(run), "config.yaml", what)
    assert refused > 40
    for what, content in malformed.contents(whole):
        path.write_bytes(content)
        assert refused_in_one_line(lambda: write_report(run), "config.yaml", what), what
    for text in (
        "a: &a [*a]",
        "1: 2",
        "? [1, 2]\n: 3",
        "a: 2001-01-01\nb: !!binary aGVsbG8=\nc: !!set {x}",
    ):
        path.write_text(text)
        refused_in_one_line(lambda: write_report(run), "config.yaml", text)
    path.write_bytes(whole)
    for what in malformed.others(path):
        assert refused_in_one_line(lambda: write_report(run), "config.yaml", what), what


def test_malformed_lines_of_metrics_are_counted_and_the_rest_is_shown(run: Path) -> None:
    path = run / "metrics.jsonl"
    for position, line in enumerate(LINES):
        for what, changed in malformed.variants(line):
            lines = [*LINES[:position], changed, *LINES[position + 1 :]]
            path.write_text("".join(json.dumps(one) + "\n" for one in lines))
            records, unreadable = read_metrics(path)
            assert len(records) + unreadable == len(LINES), what
            found = read_run(run)
            assert key_tables(found) is not None
            figures.loss_curve(found.metrics)
    path.write_text(
        "".join(json.dumps(one) + "\n" for one in [*LINES, 1, "x", None, {"kind": 1}, [[]]])
    )
    assert read_metrics(path) == (LINES, 5)
    path.write_bytes(path.read_bytes() + b"[" * 100_000 + b"\n\xff\xfe\n" + b'{"kind": "tra')
    assert read_metrics(path) == (LINES, 7)
    assert "7 unreadable lines of metrics.jsonl skipped." in write_report(run).read_text()
    for what in malformed.others(path):
        assert refused_in_one_line(lambda: write_report(run), "metrics.jsonl", what), what


def test_files_that_are_not_pictures_are_refused(run: Path) -> None:
    path = run / "samples.png"
    whole = path.read_bytes()
    huge = whole.replace(whole[16:24], (100_000).to_bytes(4) * 2)
    for content in (
        b"",
        b"text",
        whole[:20],
        whole[: len(whole) // 2],
        whole[:50] + b"\0" * 50,
        huge,
    ):
        path.write_bytes(content)
        assert refused_in_one_line(lambda: write_report(run), "samples.png", repr(content[:20]))
    path.write_bytes(whole)
    for what in malformed.others(path):
        assert refused_in_one_line(lambda: write_report(run), "samples.png", what)
    assert read_picture(path).size == (196 + 4, 68)
