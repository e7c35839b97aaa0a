"""Sampling several pixels per pass gives the samples of a pass per pixel."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
from scipy import stats

from igpt.model.transformer import ImageGPT
from igpt.sampling.colors import choose, gumbel_noise, image_keys
from igpt.sampling.decoder import Decoder
from igpt.sampling.sampler import complete, generate

from .models import random_model


def sampled_by_full_passes(
    model: ImageGPT, tokens: torch.Tensor, known: torch.Tensor, seed: int, **settings: Any
) -> torch.Tensor:
    """Sample pixel after pixel, each from a full forward pass of the model."""
    used = {"temperature": 1.0, "top_k": None, "top_p": None, **settings}
    batch, n = tokens.shape
    tokens = tokens.clone()
    noise = gumbel_noise(
        image_keys(seed, range(batch)), torch.arange(n).expand(batch, n), model.config.n_colors
    )
    for pixel in range(n):
        colors = choose(model(tokens)[:, pixel], noise[:, pixel], **used)
        tokens[:, pixel] = torch.where(known[:, pixel], tokens[:, pixel], colors)
    return tokens


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.0}, {"temperature": 0.6, "top_k": 4}, {"top_p": 0.7}],
    ids=str,
)
@pytest.mark.parametrize("kind", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("variant", [{}, {"positions": "rotary", "value_residual": True}], ids=str)
def test_any_window_and_batch_gives_the_sequential_samples(
    variant: dict[str, Any], kind: torch.dtype, settings: dict[str, Any]
) -> None:
    model = random_model(n_head=2, **variant).to(kind)
    tokens = torch.randint(0, 11, (5, 36))
    known = torch.rand(5, 36, generator=torch.Generator().manual_seed(1)) < 0.3
    expected = sampled_by_full_passes(model, tokens, known, 3, **settings)
    for window in (1, 4, 16, 64, None):
        found = complete(model, tokens, known, seed=3, precision="fp32", window=window, **settings)
        assert torch.equal(found, expected), window
    for image in range(5):
        one = slice(image, image + 1)
        *_, last = generate(
            model, tokens[one], known[one], numbers=[image], seed=3, precision="fp32", **settings
        )
        assert torch.equal(last.tokens, expected[one])


def test_right_guesses_save_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose logits do not depend on the pixels: what a pass samples is final."""
    model = random_model()
    torch.nn.init.zeros_(model.wte.weight)
    passes = sizes_of_passes(monkeypatch)
    complete(model, torch.zeros(3, 36, dtype=torch.long), 1, window=16)
    assert len(passes) <= 5, "for 30 unknown pixels"


def test_samples_follow_the_models_distribution() -> None:
    """Of all images of two pixels above two given ones, with three colours."""
    model = random_model(resolution=2, n_colors=3)
    count = 6000
    found = complete(model, torch.tensor([[1, 2, 0, 0]]).expand(count, 4), 1, window=2)
    counts = Counter(map(tuple, found[:, 2:].tolist()))
    images = torch.tensor([[1, 2, *pair] for pair in product(range(3), repeat=2)])
    with torch.no_grad():
        chosen = model(images).log_softmax(-1).gather(-1, images[..., None])[..., 0]
    probability = chosen[:, 2:].sum(1).exp()
    assert probability.sum().item() == pytest.approx(1)
    found_counts = [counts[tuple(pair)] for pair in images[:, 2:].tolist()]
    assert stats.chisquare(found_counts, (count * probability).tolist()).pvalue > 0.01


def test_windows_are_larger_when_more_guesses_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = random_model(resolution=12), sizes_of_passes(monkeypatch)
    complete(model, torch.zeros(1, 144, dtype=torch.long), 0, temperature=0.03)
    hard = sum(sizes) / len(sizes)
    sizes.clear()
    complete(model, torch.zeros(1, 144, dtype=torch.long), 0, temperature=1e6)  # only noise matters
    assert max(sizes) == 64
    assert sum(sizes) / len(sizes) > 1.3 * hard
    sizes.clear()
    complete(model, torch.zeros(400, 144, dtype=torch.long), 11)
    assert set(sizes[2:]) == {1}, "many images keep the processor busy with a pixel each"


def sizes_of_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which the decoder appends the number of positions of every pass."""
    sizes: list[int] = []
    logits = Decoder.logits

    def counted(self: Decoder, inputs: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(inputs.shape[1])
        return logits(self, inputs, *rest)

    monkeypatch.setattr(Decoder, "logits", counted)
    return sizes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("window", [None, 1, 8])
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.7}], ids=str
)
@pytest.mark.parametrize("variant", [{}, {"positions": "rotary", "value_residual": True}], ids=str)
def test_captured_passes_give_the_samples_of_the_cpu(
    variant: dict[str, Any], settings: dict[str, float], window: int | None
) -> None:
    model = random_model(resolution=14, n_head=2, **variant)  # 196 positions: four spans
    originals = torch.randint(0, 11, (3, 196))
    known = (torch.arange(196) < 20) | (torch.rand(3, 196) < 0.2) | (torch.arange(196) > 190)
    given: dict[str, Any] = {"precision": "fp32", "window": window, **settings}
    expected = complete(model, originals, known, **given)
    model.cuda()
    assert torch.equal(complete(model, originals, known, **given).cpu(), expected)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(complete, model, originals, known, **given) for _ in range(2)]
        assert all(torch.equal(job.result().cpu(), expected) for job in jobs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_gives_the_same_samples_again(precision: str) -> None:
    model = random_model(resolution=14).float().cuda()
    given: dict[str, Any] = {"precision": precision, "seed": 2}
    first = complete(model, torch.zeros(5, 196, dtype=torch.long), 0, **given)
    assert torch.equal(complete(model, torch.zeros(5, 196, dtype=torch.long), 0, **given), first)
