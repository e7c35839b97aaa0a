"""Likelihoods of a small trained model, by image and by pixel; and how well they distinguish
images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from igpt.data.tokens.dataset import TokenDataset, TokenSplit
from igpt.errors import InputError
from igpt.evaluation.likelihood import losses_of, score, separation_by_loss, summary
from igpt.evaluation.loss_maps import loss_maps
from igpt.model.config import ModelConfig
from igpt.model.images import decode_images, spread_evenly
from igpt.model.transformer import ImageGPT
from igpt.statistics import auroc

SHAPE = {"resolution": 8, "n_colors": 17, "n_layer": 1, "n_embd": 8, "n_head": 1}


@pytest.fixture(scope="module")
def model(short_run: Path) -> ImageGPT:
    return ImageGPT.from_pretrained(short_run / "model")


def test_the_likelihood_is_that_of_the_model(model: ImageGPT, digits: TokenDataset) -> None:
    split = digits["test"]
    losses = score(model, split, batch_size=50)
    tokens = torch.from_numpy(split.rows([3]).astype(np.int64))
    log_probability = model(tokens).double().log_softmax(-1).gather(-1, tokens[..., None])
    assert losses[3] == pytest.approx(-float(log_probability.detach().mean()), abs=1e-5)
    inverted = TokenSplit(
        "test", [(16 - split.rows(np.arange(180))).astype(np.uint16)], [split.labels]
    )
    assert score(model, inverted).mean() > losses.mean() + 0.3, (
        "inverted digits are far less likely"
    )


def test_a_pixels_loss_is_at_its_position(model: ImageGPT, digits: TokenDataset) -> None:
    """Changing pixel i changes the loss at i, and none before it."""
    tokens = digits["test"].rows([3])
    before = losses_of(model, tokens)
    for place in (0, 10, 63):
        changed = tokens.copy()
        changed[0, place] = (changed[0, place] + 5) % 17
        after = losses_of(model, changed)
        np.testing.assert_allclose(after[0, :place], before[0, :place], atol=1e-5)
        assert abs(after[0, place] - before[0, place]) > 1e-3


def test_maps_show_each_pixel_at_its_position(model: ImageGPT, digits: TokenDataset) -> None:
    rows = spread_evenly(digits["test"], 10)
    assert rows.tolist() == [0, 18, 36, 54, 72, 90, 108, 126, 144, 162]
    tokens = digits["test"].rows(rows)
    losses, scores = losses_of(model, tokens), score(model, digits["test"])[rows]
    originals = decode_images(model, torch.from_numpy(tokens.astype(np.int64)))
    names = [f"row {row}" for row in rows[:-1]] + ["folder/with a long name/x$_1.png"]
    figure = loss_maps(originals, losses, names)
    pairs = [axes for axes in figure.axes if axes.images]
    assert "loss of a pixel, nats" in {axes.get_ylabel() for axes in figure.axes}
    scales = set()
    for index, axes in enumerate(pairs):
        upper, lower = axes.images
        np.testing.assert_array_equal(upper.get_array(), originals[index])
        np.testing.assert_array_equal(lower.get_array(), losses[index].reshape(8, 8))
        assert losses[index].mean() == pytest.approx(scores[index], abs=1e-6)
        assert axes.get_title() == f"{losses[index].mean():.3f} nats/pixel"
        name = (
            names[index] if index < len(rows) - 1 else "\N{HORIZONTAL ELLIPSIS} long name/x$_1.png"
        )
        assert [text.get_text() for text in axes.texts] == [name]
        scales.add(lower.get_clim())
        above, below = upper.get_extent(), lower.get_extent()
        assert above[:2] == below[:2]
        assert above[2] > below[3]
    assert len(pairs) == len(rows)
    ((low, high),) = scales
    assert low == 0
    assert high < losses.max(), "one pixel of 200 does not darken all others"
    figure.set_dpi(200)
    figure.draw_without_rendering()
    assert pairs[1].images[0].get_window_extent().width / 8 == pytest.approx(29), (
        "whole dots per pixel"
    )


def test_bf16_is_close_to_fp32_but_not_equal(model: ImageGPT, digits: TokenDataset) -> None:
    whole, half = (
        score(model, digits["test"], precision=precision) for precision in ("fp32", "bf16")
    )
    assert not np.array_equal(whole, half)
    np.testing.assert_allclose(half, whole, atol=0.02)


def test_summary_of_likelihoods() -> None:
    found = summary(np.array([1.0, 2.0, 3.0]))
    assert (found["images"], found["nats_per_pixel"]) == (3, 2.0)
    assert found["standard_error"] == pytest.approx(1 / np.sqrt(3))
    assert found["bits_per_pixel"] == pytest.approx(2 / np.log(2))
    assert summary(np.array([1.0]))["standard_error"] is None


def test_bert_has_no_likelihood(digits: TokenDataset) -> None:
    with pytest.raises(InputError, match="a likelihood needs a model trained as 'autoregressive'"):
        score(ImageGPT(ModelConfig.layered(SHAPE, {"objective": "bert"})), digits["test"])


def test_broken_weights_and_zero_images_are_refused(digits: TokenDataset) -> None:
    model = ImageGPT(ModelConfig.layered(SHAPE))
    torch.nn.init.constant_(model.wpe.weight, torch.nan)
    with pytest.raises(
        InputError, match="likelihoods are not finite; the model's weights are broken"
    ):
        score(model, digits["test"])
    with pytest.raises(InputError, match="a likelihood needs images"):
        score(model, TokenSplit("test", [np.empty((0, 64), np.uint16)], [np.empty(0, np.int32)]))


@pytest.mark.parametrize("decimals", [8, 0])
def test_auroc_is_scikit_learns_and_its_error_delongs(decimals: int) -> None:
    generator = np.random.default_rng(0)
    lower, higher = (
        generator.normal(size=40).round(decimals),
        generator.normal(0.8, 1, 60).round(decimals),
    )
    found = auroc(lower, higher)
    truth = np.repeat([0, 1], [40, 60])
    assert found["auroc"] == pytest.approx(
        roc_auc_score(truth, np.concatenate([lower, higher])), abs=1e-12
    )
    wins = (higher[None] > lower[:, None]) + 0.5 * (
        higher[None] == lower[:, None]
    )  # DeLong's components, pair by pair
    expected = np.sqrt(wins.mean(1).var(ddof=1) / 40 + wins.mean(0).var(ddof=1) / 60)
    assert found["standard_error"] == pytest.approx(expected, abs=1e-12)
    low, high = found["interval_95"]
    assert high - low == pytest.approx(2 * 1.96 * expected, rel=0.05)
    assert low < found["auroc"] < high


def test_the_intervals_contain_the_true_value() -> None:
    generator = np.random.default_rng(0)
    truth, held = 0.9615, 0  # for normal values 2.5 deviations apart: Phi(2.5 / sqrt 2)
    for _ in range(400):
        low, high = auroc(generator.normal(size=25), generator.normal(2.5, 1, 35))["interval_95"]
        held += low <= truth <= high
    assert 0.92 <= held / 400 <= 0.985


def test_auroc_if_all_pairs_agree() -> None:
    found = auroc(np.arange(10.0), np.arange(10.0, 30.0))
    assert found["auroc"] == 1
    assert found["interval_95"] == pytest.approx([0.7225, 1], abs=1e-3), "Wilson's, of ten pairs"
    assert auroc(np.arange(10.0, 30.0), np.arange(10.0))["auroc"] == 0
    assert auroc(np.ones(5), np.ones(5))["auroc"] == 0.5
    with pytest.raises(InputError, match="two or more images of each, not 1 and 5"):
        separation_by_loss(np.ones(1), np.ones(5))
