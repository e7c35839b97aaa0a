"""Classifiers: logits and predictions by definition, modal predictions, refusals."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from igpt.data.images.palette import Palette
from igpt.errors import InputError
from igpt.model.classifier import Predictions, class_logits, modal, predict, with_head
from igpt.model.config import ModelConfig
from igpt.model.objectives import Bert
from igpt.model.transformer import ImageGPT

CLASSES = ("cat", "dog", "ship")
PALETTE = Palette.from_centers(np.linspace(-1, 1, 21).reshape(7, 3))


def random_model(**changes: object) -> ImageGPT:
    torch.manual_seed(0)
    shape = {
        "resolution": 4,
        "n_colors": 7,
        "n_layer": 2,
        "n_embd": 16,
        "n_head": 2,
        "class_names": CLASSES,
    }
    model = ImageGPT(ModelConfig.layered({**shape, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def random_images(count: int) -> NDArray[np.uint16]:
    return np.random.default_rng(2).integers(0, 7, (count, 16)).astype(np.uint16)


@pytest.mark.parametrize("objective", ["autoregressive", "bert"])
def test_logits_and_predictions_by_definition(objective: str) -> None:
    model, images = random_model(objective=objective).double(), random_images(40)
    tokens = torch.from_numpy(images.astype(np.int64))
    with torch.no_grad():
        expected = list(model.features(tokens))[-1].mean(1) @ model.score.weight.t()
        torch.testing.assert_close(class_logits(model, tokens), expected, rtol=0, atol=1e-12)
    found = predict(model, images, np.arange(40))
    assert np.array_equal(found.classes, expected.argmax(1))
    assert len(np.unique(found.classes)) > 1
    np.testing.assert_allclose(found.probabilities, expected.softmax(1), atol=1e-12)
    assert np.array_equal(found.votes, np.eye(3, dtype=int)[found.classes])


def test_several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = random_model(objective="bert"), random_images(11)
    whole = predict(model, images, np.arange(11), masks=3)
    monkeypatch.setattr("igpt.model.classifier.inference_batch_size", lambda config: 4)
    parts = predict(model, images, np.arange(11), masks=3)
    assert np.array_equal(parts.votes, whole.votes)
    np.testing.assert_allclose(parts.probabilities, whole.probabilities, atol=1e-6)


def test_the_modal_prediction_counts_votes_over_masks() -> None:
    model, images, rows = (
        random_model(objective="bert").double(),
        random_images(60),
        np.arange(100, 160),
    )
    found = predict(model, images, rows, masks=5, probability=0.4, seed=3)
    tokens = torch.from_numpy(images.astype(np.int64))
    votes, probabilities = np.zeros((60, 3), int), np.zeros((60, 3))
    for number in range(5):
        mask = torch.from_numpy(Bert().masks_of_rows(rows, 16, 0.4, (3, number)))
        with torch.no_grad():
            logits = class_logits(model, tokens, mask)
        votes[np.arange(60), logits.argmax(1).numpy()] += 1
        probabilities += logits.softmax(1).numpy() / 5
    assert np.array_equal(found.votes, votes)
    np.testing.assert_allclose(found.probabilities, probabilities, atol=1e-12)
    assert (votes[np.arange(60), found.classes] == votes.max(axis=1)).all()
    assert (votes.max(axis=1) < 5).any(), "masks matter here"
    assert (found.probabilities.argmax(axis=1) != found.classes).any(), (
        "the most frequent class, not the most probable one"
    )


def test_predictions_depend_only_on_row_and_seed() -> None:
    model, images = random_model(objective="bert").double(), random_images(60)
    whole = predict(model, images, np.arange(60), masks=4)
    some = np.array([41, 3, 59])
    part = predict(model, images[some], some, masks=4)
    assert np.array_equal(part.classes, whole.classes[some])
    assert np.array_equal(part.votes, whole.votes[some])
    assert not np.array_equal(
        predict(model, images, np.arange(60), masks=4, seed=1).votes, whole.votes
    )
    assert not np.array_equal(
        predict(model, images, np.arange(60) + 60, masks=4).votes, whole.votes
    )


def test_ties_are_broken_by_seed_and_row() -> None:
    votes, rows = np.tile([2, 0, 2, 1], (400, 1)), np.arange(400)
    predicted = modal(votes, rows, (0, 5))
    assert set(predicted) == {0, 2}
    assert 150 < (predicted == 0).sum() < 250
    assert np.array_equal(modal(votes[7:9], rows[7:9], (0, 5)), predicted[7:9])
    assert not np.array_equal(modal(votes, rows, (1, 5)), predicted)
    assert modal(np.array([[1, 3, 1]]), np.array([0]), (0, 5)).tolist() == [1], (
        "a unique maximum needs no random number"
    )


def test_ranked_by_prediction_then_votes_then_probability() -> None:
    probabilities, votes = np.array([[0.1, 0.4, 0.2, 0.3]]), np.array([[2, 1, 2, 0]])
    found = Predictions(np.array([2]), probabilities, votes)
    assert found.ranked().tolist() == [[2, 0, 1, 3]]


def test_a_new_head_is_uniform_and_shares_other_weights() -> None:
    model = random_model(class_names=("a", "b"))
    fresh = with_head(model, CLASSES, PALETTE)
    assert fresh.config.class_names == CLASSES
    assert fresh.palette is PALETTE
    for name, tensor in fresh.state_dict().items():
        assert name == "score.weight" or torch.equal(tensor, model.state_dict()[name])
    tokens = torch.from_numpy(random_images(3).astype(np.int64))
    assert not class_logits(fresh, tokens).any()
    assert class_logits(model, tokens).any()
    half = with_head(model.bfloat16(), CLASSES, PALETTE)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.float32}, (
        "training needs fp32 weights"
    )


@pytest.mark.parametrize(
    ("changes", "asked", "said"),
    [
        ({"class_names": None}, {}, "no class head; `igpt finetune`"),
        ({}, {"masks": 5}, "masking at test time needs a model trained as 'bert'"),
        ({"objective": "bert"}, {"masks": -1}, "masks are 0 or more"),
        ({"objective": "bert"}, {"masks": 2, "seed": -1}, "a seed lies in"),
    ],
)
def test_invalid_requests_are_refused(
    changes: dict[str, Any], asked: dict[str, int], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        predict(random_model(**changes), random_images(2), np.arange(2), **asked)


def test_broken_weights_are_refused() -> None:
    model = random_model()
    with torch.no_grad():
        model.ln_f.weight[3] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        predict(model, random_images(2), np.arange(2))
