"""Accuracies by nearest neighbours, and features measured during training, in reports."""

import json
from pathlib import Path
from typing import Any

import pytest

from igpt.evaluation.results import best_row_by_neighbours
from igpt.report.card import _by_layer
from igpt.report.figures import probe_by_layer, quality_curve, rank_curve
from igpt.report.findings import describe_probe
from igpt.report.record import Run, read_run
from igpt.report.sections import key_tables, probe_section, quality_sections


def accuracies(layer: int, share: float, nearest: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": layer, "validation_accuracy": share, "test_accuracy": share}
    if nearest is not None:
        row["knn"] = {"k": 20, "validation_accuracy": nearest, "test_accuracy": nearest - 0.01}
    return row


def probed(*nearest: float | None) -> dict[str, Any]:
    return {
        "format": "igpt-probe",
        "version": 2,
        "classes": 10,
        "images": {"train": 100, "validation": 50, "test": 50},
        "layers": [accuracies(number, 0.5, share) for number, share in enumerate(nearest)],
        "best_layer": 0,
        "baselines": {"raw_pixels": accuracies(0, 0.4, nearest[0] and 0.33)},
    }


def test_a_probe_with_neighbours(tmp_path: Path) -> None:
    probe = probed(0.61, 0.75, 0.42)
    best = best_row_by_neighbours(probe)
    assert best is not None
    assert best["layer"] == 1
    plain, nearest = (
        {row[0]: row[1:] for row in table.rows} for table in key_tables(Run(tmp_path, probe=probe))
    )
    assert plain["This model, layer 0"][0] == "50.0\N{NO-BREAK SPACE}%"
    assert nearest["This model, layer 1"] == ("74.0\N{NO-BREAK SPACE}%", "±\N{NO-BREAK SPACE}6.2")
    assert nearest["Raw pixels"][0] == "32.0\N{NO-BREAK SPACE}%"
    words = describe_probe(probe).replace("\N{NO-BREAK SPACE}", " ")
    assert "By 20 nearest neighbours: best layer 1 by validation accuracy, test" in words
    assert words.endswith("test accuracy 74.0 %.")
    section = probe_section(Run(tmp_path, probe=probe))
    assert section.table is not None
    assert section.table.head[-2:] == ("20-NN validation", "20-NN test")
    assert section.table.rows[2][-2:] == ("42.0\N{NO-BREAK SPACE}%", "41.0\N{NO-BREAK SPACE}%")
    assert "20-NN: classification by 20 nearest neighbours" in section.caption
    table = _by_layer(probe)
    assert table.head[-1] == "test, 20 nearest neighbours"
    assert [row[-1].rstrip("\N{NO-BREAK SPACE}%") for row in table.rows] == ["60.0", "74.0", "41.0"]
    (axes,) = probe_by_layer(probe).axes
    (line,) = (line for line in axes.get_lines() if line.get_label() == "20-NN")
    assert line.get_ydata() == pytest.approx([60, 74, 41])


def test_a_probe_without_neighbours_shows_none(tmp_path: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).write_text("steps: 3\n" if name == "config.yaml" else "")
    (tmp_path / "probe.json").write_text(json.dumps(probed(None, None)))
    run = read_run(tmp_path)
    assert run.probe is not None
    section = probe_section(run)
    assert section.table is not None
    text = f"{section} {key_tables(run)} {_by_layer(run.probe)} {describe_probe(run.probe)}"
    assert "NN" not in f"{section.table} {section.caption}"
    assert "neighbour" not in text


def quality(step: int, linear: float, nearest: float, rank: float) -> dict[str, Any]:
    accuracies = {"linear_accuracy": linear, "knn_accuracy": nearest, "effective_rank": rank}
    counts = {"layer": 3, "k": 20, "train_images": 1437, "validation_images": 180}
    return {"kind": "probe", "step": step, **accuracies, **counts}


MEASURED = [quality(0, 0.3, 0.2, 9.0), quality(50, 0.7, 0.5, 2.5), quality(80, 0.75, 0.52, 3.0)]


def test_features_during_training_are_shown(tmp_path: Path) -> None:
    incomplete = {"kind": "probe", "step": 100, "linear_accuracy": 0.9}
    accuracy, rank = quality_sections(Run(tmp_path, metrics=[*MEASURED, incomplete]))
    assert accuracy.table is not None
    shown = [
        tuple(cell.replace("\N{NO-BREAK SPACE}", " ") for cell in row)
        for row in accuracy.table.rows
    ]
    assert shown == [
        ("0", "30.0 %", "20.0 %", "9.0"),
        ("50", "70.0 %", "50.0 %", "2.5"),
        ("80", "75.0 %", "52.0 %", "3.0"),
    ]
    assert "Features of layer 3" in accuracy.caption
    assert "fitted to 1,437 training images" in accuracy.caption
    assert "over 1,437 training images" in rank.caption
    (axes,) = quality_curve(MEASURED).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert lines == {"linear probe": [30, 70, 75], "20-NN": [20, 50, 52]}
    (axes,) = rank_curve(MEASURED).axes
    (line,) = axes.get_lines()
    assert list(line.get_xdata()) == [0, 50, 80]
    assert list(line.get_ydata()) == [9, 2.5, 3]


def test_runs_without_measurements_show_nothing(tmp_path: Path) -> None:
    records = [{"kind": "train", "step": 50, "loss": 2.0}]
    assert quality_sections(Run(tmp_path, metrics=records)) == []


def test_one_measurement_is_enough_for_figures(tmp_path: Path) -> None:
    assert len(quality_sections(Run(tmp_path, metrics=MEASURED[:1]))) == 2
