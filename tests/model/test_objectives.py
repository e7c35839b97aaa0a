"""Losses against their definitions, and their sums over parts of a batch."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from igpt.errors import InputError
from igpt.model import objectives
from igpt.model.classifier import classification
from igpt.model.config import ModelConfig
from igpt.model.objectives import OBJECTIVES, Autoregressive, Bert, sample_masks
from igpt.model.transformer import ImageGPT


def random_model(**changes: object) -> ImageGPT:
    torch.manual_seed(0)
    shape = {"resolution": 4, "n_colors": 7, "n_layer": 2, "n_embd": 16, "n_head": 2}
    model = ImageGPT(ModelConfig.layered({**shape, **changes})).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_autoregressive_is_the_mean_over_all_pixels() -> None:
    model, tokens = random_model(), torch.randint(0, 7, (5, 16))
    log_probability = model(tokens).log_softmax(-1)
    expected = [-sum(log_probability[b, i, tokens[b, i]] for i in range(16)) / 16 for b in range(5)]
    total, count = Autoregressive().loss(model, tokens)
    assert count == 5
    assert float(total) == pytest.approx(float(sum(expected)), abs=1e-10)


def test_bert_is_the_mean_over_masked_pixels_of_an_image_then_over_images() -> None:
    model, tokens = random_model(objective="bert"), torch.randint(0, 7, (3, 16))
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[0, :2], mask[1, 5:15], mask[2, 3] = True, True, True
    log_probability = model(tokens, mask).log_softmax(-1)
    expected = 0.0
    for image in range(3):
        positions = mask[image].nonzero()[:, 0].tolist()
        expected -= sum(
            float(log_probability[image, i, tokens[image, i]]) for i in positions
        ) / len(positions)
    total, count = Bert().loss(model, tokens, mask)
    assert count == 3
    assert float(total) == pytest.approx(expected, abs=1e-10)


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    model, tokens = random_model(objective="bert"), torch.randint(0, 7, (6, 16))
    mask = torch.from_numpy(sample_masks((6, 16), 0.3, np.random.default_rng(0)))
    whole, count = Bert().loss(model, tokens, mask)
    parts = [Bert().loss(model, tokens[rows], mask[rows]) for rows in (slice(0, 1), slice(1, 6))]
    assert sum(part[1] for part in parts) == count
    assert float(sum(part[0] for part in parts)) == pytest.approx(float(whole), abs=1e-10)


def test_masks_have_the_probability_and_are_never_empty() -> None:
    mask = sample_masks((2000, 64), 0.15, np.random.default_rng(0))
    assert mask.mean() == pytest.approx(0.15, abs=0.005)
    sparse = sample_masks((500, 16), 0.001, np.random.default_rng(0))
    assert (sparse.sum(axis=1) >= 1).all()
    assert np.array_equal(sparse, sample_masks((500, 16), 0.001, np.random.default_rng(0)))


def test_classification_adds_the_weighted_generative_loss() -> None:
    model = random_model(class_names=("a", "b", "c"))
    tokens, labels = torch.randint(0, 7, (4, 16)), torch.tensor([0, 2, 1, 2])
    pooled = list(model.features(tokens))[-1].mean(1)
    scores = (pooled @ model.score.weight.t()).float().log_softmax(-1)
    expected = -float(sum(scores[b, labels[b]] for b in range(4)))
    assert float(classification(model, tokens, labels, generation_weight=0.0)[0]) == pytest.approx(
        expected, rel=1e-6
    )
    generative = float(Autoregressive().loss(model, tokens)[0])
    joint = float(classification(model, tokens, labels, generation_weight=0.5)[0])
    assert joint == pytest.approx(expected + 0.5 * generative, rel=1e-6)


def test_classification_of_masked_images_adds_the_loss_of_their_masked_pixels() -> None:
    model = random_model(objective="bert", class_names=("a", "b", "c"))
    tokens, labels = torch.randint(0, 7, (4, 16)), torch.tensor([0, 2, 1, 2])
    mask = torch.from_numpy(sample_masks((4, 16), 0.3, np.random.default_rng(1)))
    scores = (
        (list(model.features(tokens, mask))[-1].mean(1) @ model.score.weight.t())
        .float()
        .log_softmax(-1)
    )
    expected = -float(scores[torch.arange(4), labels].sum().detach()) + 0.5 * float(
        Bert().loss(model, tokens, mask)[0].detach()
    )
    joint, count = classification(model, tokens, labels, mask, generation_weight=0.5)
    assert count == 4
    assert float(joint.detach()) == pytest.approx(expected, rel=1e-6)
    unmasked = classification(model, tokens, labels, generation_weight=0.5)[0].detach()
    alone = classification(model, tokens, labels, generation_weight=0.0)[0].detach()
    assert float(unmasked) == float(alone), "without masks a BERT model has nothing to predict"
    assert float(unmasked) != pytest.approx(expected, rel=1e-3)


def test_the_name_of_a_registered_objective_is_a_valid_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InputError, match="Input should be 'autoregressive' or 'bert'"):
        random_model(objective="mine")

    class Mine(Bert):
        name = "mine"

    monkeypatch.setitem(OBJECTIVES, "mine", Mine())
    model = random_model(objective="mine")
    assert model.config.trained_as.name == "mine"
    with pytest.raises(InputError, match="'bert' or 'mine'; this one is 'autoregressive'"):
        random_model().config.trained_as.require("masked", "masking")


def test_no_other_module_compares_names_of_objectives() -> None:
    package = Path(objectives.__file__).parents[1]
    names = "|".join(OBJECTIVES)
    for path in package.rglob("*.py"):
        # The reproduction has runs with these names.
        if path != Path(objectives.__file__) and path.parent.name != "reproduction":
            assert not re.search(rf'[!=]= *"({names})"|"({names})" *[!=]=', path.read_text()), path
