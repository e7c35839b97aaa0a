"""Complete and incomplete run directories can be read."""

import pytest

from igpt.report.record import (
    Run,
    baselines,
    best_validation,
    flat,
    history,
    read_metrics,
    standard_error,
)


def validation(step, loss):
    return {"kind": "validation", "step": step, "loss": loss}


def test_a_truncated_last_line_is_not_damage(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 1, "loss": 2}\n{"kind": "train", "note": "\xc3')
    assert read_metrics(path) == ([{"kind": "train", "step": 1, "loss": 2}], 0)


def test_unreadable_lines_before_the_last_are_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"kind": "tra{"kind": "resume", "step": 1}\n\n[1]\n'
        '{"kind": "train", "step": 2, "loss": 2}\n'
    )
    records, unreadable = read_metrics(path)
    assert [record["step"] for record in records] == [2]
    assert unreadable == 2


def test_steps_repeated_after_a_resume_count_once():
    metrics = [
        validation(100, 1.0),
        validation(200, 0.1),
        {"kind": "resume", "step": 150},
        validation(200, 0.9),
    ]
    assert [(record["step"], record["loss"]) for record in history(metrics, "validation")] == [
        (100, 1.0),
        (200, 0.9),
    ]
    assert best_validation(metrics) == (200, 0.9)


def test_losses_that_are_not_finite_are_never_best():
    assert best_validation([validation(1, float("nan")), validation(2, 3.0)]) == (2, 3.0)
    assert best_validation([validation(1, float("nan"))]) is None
    assert baselines([{"kind": "start", "uniform_loss": float("nan"), "unigram_loss": None}]) == {}


def test_the_standard_error_is_that_of_a_proportion():
    assert standard_error(0.9, 180) == pytest.approx((0.9 * 0.1 / 180) ** 0.5)
    assert standard_error(1.0, 180) == 0


def test_the_model_shape_is_read_from_any_file_that_has_it(tmp_path):
    start = {"kind": "start", "step": 0, "places": 64, "n_colors": 17}
    assert Run(tmp_path, {"n_layer": 4}, [start]).shape == {
        "objective": "autoregressive",
        "resolution": 8,
        "n_colors": 17,
        "n_layer": 4,
    }
    assert Run(tmp_path, {"n_head": 2, "objective": "bert"}).shape == {
        "n_head": 2,
        "objective": "bert",
    }
    saved = Run(
        tmp_path, {"model": "runs/first/model"}, saved={"n_layer": 2, "igpt": {"resolution": 16}}
    )
    assert (saved.shape["n_layer"], saved.shape["resolution"]) == (2, 16)


def test_the_source_is_the_name_that_the_user_gave(tmp_path):
    assert (
        Run(tmp_path, {"tokens": "t"}, [{"kind": "start", "source": "digits"}]).source == "digits"
    )
    assert Run(tmp_path, {"tokens": "t"}, manifest={"source": "birds"}).source == "birds"
    assert Run(tmp_path, {"tokens": "t"}).source == "t"
    assert Run(tmp_path).source == tmp_path.name


def test_nested_settings_are_flattened():
    assert flat({"a": 1, "b": {"c": {"d": 2}}}) == {"a": 1, "b.c.d": 2}
