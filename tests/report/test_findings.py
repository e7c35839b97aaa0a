"""Sentences about a run say what its numbers support, and no more."""

import pytest

from igpt.report.findings import (
    baselines,
    best_validation,
    compare,
    describe_loss,
    describe_model,
    describe_probe,
    describe_sampling,
    describe_state,
    duration,
    history,
    read_metrics,
    short_source,
    standard_error,
)

START = {"kind": "start", "step": 0, "parameters": 1_234_567, "train_images": 1437, "unigram_loss": 2.0}
CONFIG = {"steps": 400, "batch_size": 16, "model": {"resolution": 8, "n_colors": 17, "n_layer": 4, "n_embd": 64}}


def validation(step, loss):
    return {"kind": "validation", "step": step, "loss": loss}


def probe(accuracy, raw=None, untrained=None, count=180):
    def layers(best):
        return {
            "layers": [{"layer": 0, "test_accuracy": 0.1}, {"layer": 1, "test_accuracy": best}],
            "best_layer": 1,
        }

    known = {} if raw is None else {"raw_pixels": {"test_accuracy": raw}}
    if untrained is not None:
        known["untrained"] = layers(untrained)
    return {**layers(accuracy), "images": {"train": 9, "validation": 9, "test": count}, "baselines": known}


def test_a_cut_last_line_is_no_damage(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 1, "loss": 2}\n{"kind": "train", "note": "\xc3')
    assert read_metrics(path) == ([{"kind": "train", "step": 1, "loss": 2}], 0)


def test_unreadable_lines_before_the_last_are_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "tra{"kind": "resume", "step": 1}\n\n[1]\n{"kind": "train", "step": 2, "loss": 2}\n')
    records, unreadable = read_metrics(path)
    assert [record["step"] for record in records] == [2]
    assert unreadable == 2


def test_steps_taken_again_after_a_resume_count_once():
    metrics = [validation(100, 1.0), validation(200, 0.1), {"kind": "resume", "step": 150}, validation(200, 0.9)]
    assert [(record["step"], record["loss"]) for record in history(metrics, "validation")] == [(100, 1.0), (200, 0.9)]
    assert best_validation(metrics) == (200, 0.9)


def test_losses_that_are_no_numbers_are_never_best():
    assert best_validation([validation(1, float("nan")), validation(2, 3.0)]) == (2, 3.0)
    assert best_validation([validation(1, float("nan"))]) is None
    assert baselines([{"kind": "start", "uniform_loss": float("nan"), "unigram_loss": None}]) == {}


def test_the_model_is_described_as_far_as_it_is_known():
    words = describe_model(CONFIG, [START])
    assert words == (
        "An autoregressive transformer (4 layers, width 64, 1.23 M parameters), trained without labels on 1,437 images "
        "of 8 × 8 pixels in 17 colours."  # noqa: RUF001
    )
    assert describe_model({}, []) == "An autoregressive transformer."
    assert describe_model({"model": {"objective": "bert"}}, []) == "A BERT-style transformer."


def test_the_loss_is_set_against_colour_frequencies():
    better = describe_loss(CONFIG, [START, validation(100, 1.0)])
    assert "1.000 nats/pixel, at step 100, 1.000 below what colour frequencies alone give (2.000)" in better
    assert "among 2.7 colours instead of 7.4" in better
    assert "has not learnt more" in describe_loss(CONFIG, [START, validation(100, 2.0)])
    assert describe_loss(CONFIG, [START]) == ""
    assert "nats/masked pixel" in describe_loss({"model": {"objective": "bert"}}, [validation(1, 2.0)])


def test_a_clear_lead_is_called_one():
    words = describe_probe(probe(0.96, raw=0.80, untrained=0.70))
    assert "right on 96.0\u00a0% of 180 test images (standard error 1.5 points)" in words
    assert "It is 16.0 points above raw pixels (80.0\u00a0%; two standard errors: 6.6)" in words
    assert "26.0 points above the best layer of an untrained network" in words


def test_a_lead_within_two_standard_errors_is_not_claimed():
    words = describe_probe(probe(0.96, raw=0.95))
    assert "within two standard errors (4.4): these test images do not show that it is better" in words
    assert "above" not in words


def test_a_lag_is_told():
    assert "16.0 points below raw pixels" in compare(0.80, 0.96, 180, "raw pixels")
    small = compare(0.95, 0.96, 180, "raw pixels")
    assert "\u22121.0 points" in small
    assert "do not show that it is worse" in small


def test_missing_comparisons_are_told():
    assert "not compared with raw pixels" in describe_probe(probe(0.9))


def test_the_standard_error_is_that_of_a_share():
    assert standard_error(0.9, 180) == pytest.approx((0.9 * 0.1 / 180) ** 0.5)
    assert standard_error(1.0, 180) == 0


def test_state_of_the_run():
    end = {"kind": "end", "step": 400, "seconds": 81.0}
    assert describe_state(CONFIG, [START, end], 0) == "Finished: 400 steps of 16 images in 1 min 21 s."
    assert describe_state(CONFIG, [START, validation(100, 2.0)], 0).startswith(
        "Not finished: the last record is of step 100 of 400;"
    )
    assert "Not finished" in describe_state(CONFIG, [START, end, {"kind": "resume", "step": 400}], 0)
    assert "2 unreadable lines of metrics.jsonl left out" in describe_state({}, [], 2)


def test_how_images_were_drawn():
    plain = {"temperature": 1.0, "top_k": None, "top_p": None, "seed": 0}
    assert describe_sampling(plain) == " (temperature 1.0, no top-k or nucleus cut, seed 0)"
    assert describe_sampling({**plain, "top_k": 5}) == " (temperature 1.0, top-k 5, seed 0)"
    assert describe_sampling({}) == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3.14, "3.1 s"), (59, "59 s"), (81, "1 min 21 s"), (7265, "2 h 1 min"), (3599.6, "1 h 0 min")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("source", "name"),
    [("digits", "digits"), ("uoft-cs/cifar10", "uoft-cs/cifar10"), ("/data/my/birds/", "birds"), ("./birds", "birds")],
)
def test_sources_in_titles(source, name):
    assert short_source(source) == name
