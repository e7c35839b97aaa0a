"""The cached decoder against the full forward pass."""

from typing import Any

import pytest
import torch

from igpt.errors import InputError
from igpt.model.transformer import ImageGPT
from igpt.sampling.decoder import Decoder
from igpt.sampling.jobs import SamplingPrecision

from .models import random_model

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "biases": {"bias": True},
    "rotary": {"positions": "rotary"},
    "value residual": {"value_residual": True},
}


def logits_by_passes(
    model: ImageGPT, tokens: torch.Tensor, prefix: int, size: int, precision: SamplingPrecision
) -> torch.Tensor:
    """Return the decoder's logits at the positions from `prefix` on, [B, n - prefix, V]."""
    batch, n = tokens.shape
    sequence = torch.cat([torch.full((batch, 1), model.config.n_colors), tokens], 1)
    decoder = Decoder(model, batch, precision)
    decoder.prefill(sequence[:, :prefix])
    found = []
    for first in range(prefix, n, size):
        positions = torch.arange(first, min(first + size, n)).expand(batch, -1)
        inputs = sequence.gather(1, positions)
        found.append(decoder.logits(inputs, positions, int(positions.max()) + 1))
    return torch.cat(found, 1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("prefix", [0, 1, 17, 35])
def test_logits_equal_the_full_forward(prefix: int, size: int, variant: str) -> None:
    model = random_model(**{"n_head": 2, **VARIANTS[variant]})
    tokens = torch.randint(0, 11, (3, 36))
    found = logits_by_passes(model, tokens, prefix, size, "fp32")
    torch.testing.assert_close(found, model(tokens)[:, prefix:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("size", [1, 9])
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 2e-6), ("bf16", 0.01), ("int8", 0.05)]
)
def test_logits_are_as_near_as_the_precision_allows(
    precision: SamplingPrecision, tolerance: float, size: int, batch: int
) -> None:
    """The tolerance is for the mean difference, relative to the largest logit."""
    model = random_model().float().requires_grad_(False)
    tokens = torch.randint(0, 11, (batch, 36))
    expected = model(tokens)
    found = logits_by_passes(model, tokens, 9, size, precision)
    assert found.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    difference = (found - expected[:, 9:]).abs()
    assert difference.mean() < tolerance * expected.abs().max()
    assert difference.max() < 10 * tolerance * expected.abs().max()


def test_every_image_is_at_its_own_position() -> None:
    """A wider span than an image has filled gives the same logits, and so do the entries that wrong
    guesses left behind."""
    model = random_model()
    tokens = torch.randint(0, 11, (2, 36))
    sequence = torch.cat([torch.full((2, 1), 11), tokens], 1)
    decoder = Decoder(model, 2)
    decoder.prefill(sequence[:, :9])
    with torch.inference_mode():
        wrong = torch.arange(9, 20).expand(2, -1)
        decoder.logits(torch.zeros_like(wrong), wrong, 20)
        positions = torch.tensor([[9, 10, 11], [9, 10, 11]])
        decoder.logits(sequence.gather(1, positions), positions, 12)
        positions = torch.tensor([[10, 11, 12], [12, 13, 14]])
        found = decoder.logits(sequence.gather(1, positions), positions, 36)
        expected = model(tokens).gather(1, positions[..., None].expand(-1, -1, 11))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_one_position_of_one_image_may_read_a_wider_span() -> None:
    model, tokens = random_model(), torch.randint(0, 11, (1, 36))
    sequence = torch.cat([torch.full((1, 1), 11), tokens], 1)
    decoder = Decoder(model, 1)
    decoder.prefill(sequence[:, :9])
    found = decoder.logits(sequence[:, 9:10], torch.tensor([[9]]), 36)
    torch.testing.assert_close(found, model(tokens)[:, 9:10], rtol=0, atol=1e-12)


def test_int8_logits_of_an_image_do_not_depend_on_the_others() -> None:
    model = random_model().float()
    tokens = torch.randint(0, 11, (4, 36))
    together = logits_by_passes(model, tokens, 0, 36, "int8")
    alone = logits_by_passes(model, tokens[2:3], 0, 36, "int8")
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-4)


def test_equal_prefixes_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    tokens = torch.randint(0, 11, (2, 36))[[0, 1, 0, 0]]
    sequence = torch.cat([torch.full((4, 1), 11), tokens], 1)
    decoder = Decoder(model, 4)
    rows = []
    run = decoder._pass
    monkeypatch.setattr(
        decoder, "_pass", lambda inputs, *rest: rows.append(inputs.shape) or run(inputs, *rest)
    )
    decoder.prefill(sequence[:, :20])
    assert rows == [(2, 20)]
    positions = torch.full((4, 1), 20)
    found = decoder.logits(sequence[:, 20:21], positions, 21)
    torch.testing.assert_close(found, model(tokens)[:, 20:21], rtol=0, atol=1e-12)


def test_a_model_that_is_not_causal_is_refused() -> None:
    with pytest.raises(InputError, match="sampling pixel by pixel needs a model trained as"):
        Decoder(random_model("bert"), 1)
