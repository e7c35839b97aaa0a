"""Parameters and FLOPs computed from the configuration equal those of the built model."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from igpt.model.classifier import classification
from igpt.model.config import ModelConfig
from igpt.model.cost import attended_pairs, count_parameters, forward_flops, training_flops
from igpt.model.objectives import Autoregressive, Bert
from igpt.model.transformer import ImageGPT
from igpt.training.presets import MODELS

SMALL = {"resolution": 8, "n_colors": 32, "n_layer": 2, "n_embd": 48, "n_head": 3}
CLASSES = ("a", "b", "c")


def built_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in ImageGPT(config).parameters())


@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_presets(name: str) -> None:
    shape = {key: value for key, value in MODELS[name].items() if key in ModelConfig.model_fields}
    config = ModelConfig.layered(shape)
    assert count_parameters(config) == built_parameters(config)


@pytest.mark.parametrize(
    "more", [{}, {"bias": True}, {"class_names": CLASSES}, {"bias": True, "class_names": CLASSES}]
)
def test_parameters_of_variants(more: dict[str, Any]) -> None:
    config = ModelConfig.layered({**SMALL, **more})
    assert count_parameters(config) == built_parameters(config)


def test_published_sizes() -> None:
    """The paper's: 76 M, 455 M and 1362 M at 32 px, 6.8 B at 64 px."""
    shapes = {
        (24, 512, 8, 32): 76e6,
        (36, 1024, 8, 32): 455e6,
        (48, 1536, 16, 32): 1362e6,
        (60, 3072, 48, 64): 6.8e9,
    }
    for (layers, width, heads, resolution), published in shapes.items():
        config = ModelConfig(resolution=resolution, n_layer=layers, n_embd=width, n_head=heads)
        assert count_parameters(config) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"objective": "bert"},
        {"class_names": CLASSES},
        {"class_names": CLASSES, "objective": "bert"},
    ],
)
def test_operations_equal_those_counted_by_pytorch(more: dict[str, Any]) -> None:
    """PyTorch counts attention in full, even with a causal mask."""
    config = ModelConfig.layered({**SMALL, **more})
    model, tokens = ImageGPT(config), torch.zeros(2, config.n_pixels, dtype=torch.long)
    mask = torch.ones(2, config.n_pixels, dtype=torch.bool) if config.objective == "bert" else None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if config.class_names:
            loss, images = classification(model, tokens, torch.zeros(2, dtype=torch.long), mask)
        elif mask is not None:
            loss, images = Bert().loss(model, tokens, mask)
        else:
            loss, images = Autoregressive().loss(model, tokens)
        forward = counter.get_total_flops()
        loss.backward()
    masked = 4 * (config.n_pixels**2 - attended_pairs(config)) * config.n_embd * config.n_layer
    assert forward == images * (forward_flops(config) + masked)
    assert counter.get_total_flops() == images * (training_flops(config) + 3 * masked)


def test_causal_attention_counts_half() -> None:
    causal, full = (
        ModelConfig.layered({**SMALL, "objective": name}) for name in ("autoregressive", "bert")
    )
    n = causal.n_pixels
    assert attended_pairs(causal) == sum(position + 1 for position in range(n))
    assert (
        training_flops(full) - training_flops(causal)
        == 12 * (n * (n - 1) // 2) * full.n_embd * full.n_layer
    )
