"""Updates that near colours share, against AdamW for the two parameters that they stand for."""

import numpy as np
import pytest
import torch

from igpt.data.images.palette import Palette
from igpt.errors import InputError
from igpt.model.config import ModelConfig
from igpt.model.objectives import Autoregressive
from igpt.model.transformer import ImageGPT
from igpt.training.distributed import World
from igpt.training.engine import Engine
from igpt.training.optimizer import make_optimizers
from igpt.training.settings import TrainConfig
from igpt.training.shared_updates import SharedAdamW, color_features

SHAPE = ModelConfig(resolution=4, n_colors=100, n_layer=1, n_embd=8, n_head=1)


def colors(count: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (count, 3)).astype(np.float32)


@pytest.mark.parametrize("count", [2, 100])
def test_features_are_at_most_64_and_of_unit_size(count: int) -> None:
    features = color_features(colors(count))
    assert features.shape == (count, min(count, 64))
    assert features.square().sum(1).mean() == pytest.approx(1, abs=1e-5)


def test_near_colors_have_similar_features() -> None:
    centers = colors(100)
    features = color_features(centers)
    products = features @ features.T
    others = ~torch.eye(100, dtype=torch.bool)
    distances = torch.cdist(*2 * [torch.from_numpy(centers)])[others]
    near, far = products[others][distances < 0.3], products[others][distances > 1]
    assert near.min() > far.max()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_those_of_adamw_for_both_parameters(weight_decay: float) -> None:
    """W = A + S B; a row after the colours has no features. Decay is of W alone."""
    torch.manual_seed(0)
    features, targets = color_features(colors(100)), torch.randn(101, 8)
    table = torch.nn.Parameter(torch.randn(101, 8))
    mine = SharedAdamW([table], features, (0.9, 0.95), weight_decay)
    own, shared = table.detach().clone().requires_grad_(), torch.zeros(64, 8, requires_grad=True)
    padded = torch.nn.functional.pad(features, (0, 0, 0, 1))
    reference = torch.optim.AdamW([own, shared], lr=0.02, betas=(0.9, 0.95), weight_decay=0)
    for _ in range(5):
        (table - targets).pow(4).sum().backward()
        mine.param_groups[0]["lr"] = 0.02
        mine.step()
        mine.zero_grad()
        ((whole := own + padded @ shared) - targets).pow(4).sum().backward()
        reference.step()
        reference.zero_grad()
        with torch.no_grad():
            own.sub_(0.02 * weight_decay * whole)
        torch.testing.assert_close(table, own + padded @ shared, rtol=0, atol=2e-5)
    assert not torch.equal(shared, torch.zeros_like(shared))


def test_colors_that_do_not_occur_move_with_near_ones() -> None:
    torch.manual_seed(0)
    tokens = torch.arange(16).expand(4, 16)
    moved = {}
    for share in (False, True):
        model = ImageGPT(SHAPE, Palette.from_centers(colors(100)))
        torch.nn.init.normal_(model.lm_head.weight, std=0.1)
        before = model.wte.weight.detach().clone()
        config = TrainConfig(batch_size=4, precision="fp32", share_color_updates=share)
        engine = Engine(model, config, World(0, 1, torch.device("cpu")), Autoregressive().loss)
        engine.update((tokens,), 1e-2)
        moved[share] = (model.wte.weight - before).abs().sum(1)
    assert not moved[False][16:100].any()
    assert moved[True][16:100].all()


def test_optimizers_partition_the_parameters() -> None:
    model = ImageGPT(SHAPE)
    features = color_features(colors(100))
    optimizers = make_optimizers(
        model, "muon", betas=(0.9, 0.95), weight_decay=0.0, color_features=features
    )
    found = [p for one in optimizers for group in one.param_groups for p in group["params"]]
    assert sorted(map(id, found)) == sorted(map(id, model.parameters()))
    tables = optimizers[-1].param_groups[0]["params"]
    assert list(map(id, tables)) == [id(model.wte.weight), id(model.lm_head.weight)]


def test_a_model_without_a_palette_is_refused() -> None:
    config = TrainConfig(batch_size=4, share_color_updates=True)
    with pytest.raises(InputError, match="no palette"):
        Engine(ImageGPT(SHAPE), config, World(0, 1, torch.device("cpu")), Autoregressive().loss)
