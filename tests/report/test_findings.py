"""Sentences about a run state no more than its numbers support."""

from pathlib import Path

import pytest

from igpt.report.findings import (
    compare,
    describe_classifier,
    describe_loss,
    describe_model,
    describe_probe,
    describe_sampling,
    describe_state,
    duration,
    short_source,
)
from igpt.report.record import Run

START = {
    "kind": "start",
    "step": 0,
    "parameters": 1_234_567,
    "train_images": 1437,
    "unigram_loss": 2.0,
}
START |= {"places": 64, "n_colors": 17}
CONFIG = {"steps": 400, "batch_size": 16, "n_layer": 4, "n_embd": 64, "objective": "autoregressive"}


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
    return {
        **layers(accuracy),
        "images": {"train": 9, "validation": 9, "test": count},
        "baselines": known,
    }


def of(config=CONFIG, metrics=(), **others):
    return Run(Path("runs/first"), dict(config), list(metrics), **others)


def test_the_model_is_described_as_far_as_it_is_known():
    words = describe_model(of(metrics=[START]))
    assert words == (
        "An autoregressive transformer (4 layers, width 64, 1.23 M parameters), trained without "
        "labels on 1,437 images "
        "of 8 × 8 pixels in 17 colours."  # noqa: RUF001
    )
    assert describe_model(of({})) == "An autoregressive transformer, trained without labels."
    assert describe_model(of({"objective": "bert"})).startswith("A BERT-style transformer")


def test_a_fine_tuned_model_is_not_described_as_trained_without_labels():
    words = describe_model(
        of(
            {**CONFIG, "generation_weight": 1.0},
            metrics=[{**START, "classes": 10}],
            saved={"n_head": 2, "igpt": {"resolution": 8}},
        )
    )
    assert "2 heads" in words
    description = (
        "fine-tuned with labels on 1,437 images of 8 × 8 pixels in 17 colours, for 10 classes."  # noqa: RUF001
    )
    assert description in words


def test_the_loss_is_compared_with_colour_frequencies():
    better = describe_loss(of(metrics=[START, validation(100, 1.0)]))
    assert (
        "1.000 nats/pixel, at step 100, 1.000 below that of the colour frequencies alone (2.000)"
        in better
    )
    assert "a perplexity of 2.7 colours instead of 7.4" in better
    assert "has not learnt more" in describe_loss(of(metrics=[START, validation(100, 2.0)]))
    assert describe_loss(of(metrics=[START])) == ""
    assert "nats/masked pixel" in describe_loss(of({"objective": "bert"}, [validation(1, 2.0)]))


def test_a_classifier_is_judged_on_test_images_if_there_are_results():
    metrics = [{"kind": "validation", "step": 50, "error": 0.125}]
    assert describe_classifier(of(metrics=metrics)) == (
        "Best validation accuracy: 87.5\u00a0%, at step 50; not tested yet."
    )
    words = describe_classifier(
        of(metrics=metrics, test={"test_accuracy": 0.9, "test_images": 180})
    )
    assert "Test accuracy 90.0\u00a0% on 180 images (standard error 2.2 points)" in words
    assert "step 50 was selected by validation accuracy" in words
    whole = {
        "learning_rate": 1e-3,
        "rates": [{}, {}],
        "fold_back": {"before": {"test_accuracy": 0.89}},
        "modal": {"masks": 5, "accuracy": 0.91},
    }
    words = describe_classifier(
        of(metrics=metrics, test={"test_accuracy": 0.9, "test_images": 180, **whole})
    )
    assert "The learning rate, 0.001, is the best of 2 by validation accuracy." in words
    assert (
        "trained again, on the validation images too, for the same number of epochs; test accuracy "
        "before "
        "that: 89.0\u00a0%." in words
    )
    assert "Test accuracy of the modal prediction over 5 masks: 91.0\u00a0%." in words
    assert describe_classifier(of()) == ""


def test_a_significantly_better_layer_is_stated():
    words = describe_probe(probe(0.96, raw=0.80, untrained=0.70))
    assert "test accuracy 96.0\u00a0% on 180 images (standard error 1.5 points)" in words
    assert "It is 16.0 points above raw pixels (80.0\u00a0%; two standard errors: 6.6)" in words
    assert "26.0 points above the best layer of an untrained network" in words


def test_a_difference_within_two_standard_errors_is_not_stated_as_better():
    words = describe_probe(probe(0.96, raw=0.95))
    assert "within two standard errors (4.4): not significantly better" in words
    assert "above" not in words


def test_a_worse_result_is_stated():
    assert "16.0 points below raw pixels" in compare(0.80, 0.96, 180, "raw pixels")
    small = compare(0.95, 0.96, 180, "raw pixels")
    assert "\u22121.0 points" in small
    assert "not significantly worse" in small


def test_missing_comparisons_are_stated():
    assert "not compared with raw pixels" in describe_probe(probe(0.9))


def test_the_state_of_the_run():
    end = {"kind": "end", "step": 400, "seconds": 81.0}
    assert (
        describe_state(of(metrics=[START, end]))
        == "Finished: 400 steps of 16 images in 1 min 21 s."
    )
    early = describe_state(of(metrics=[START, {**end, "step": 250}]))
    assert early == "Finished: 250 steps of 16 images in 1 min 21 s, stopped early (at most 400)."
    assert describe_state(of(metrics=[START, validation(100, 2.0)])).startswith(
        "Not finished: the last record is of step 100 of 400;"
    )
    assert "Not finished" in describe_state(
        of(metrics=[START, end, {"kind": "resume", "step": 400}])
    )
    assert "2 unreadable lines of metrics.jsonl skipped" in describe_state(of({}, unreadable=2))


def test_how_images_were_sampled():
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
    [
        ("digits", "digits"),
        ("uoft-cs/cifar10", "uoft-cs/cifar10"),
        ("/data/my/birds/", "birds"),
        ("./birds", "birds"),
    ],
)
def test_sources_in_titles(source, name):
    assert short_source(source) == name
