"""Noise, and the distribution of the colours that follow from it."""

import numpy as np
import pytest
import torch
from scipy import stats

from igpt.sampling.colors import choose, gumbel_noise, image_keys


def test_noise_is_splitmix64() -> None:
    """The first outputs for the seed 1234567, which other implementations publish."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    noise = gumbel_noise(torch.tensor([1234567]), torch.tensor([[0]]), 5)
    uniform = (np.array([number >> 41 for number in published]) + 0.5) * 2.0**-23
    np.testing.assert_allclose(noise.numpy().ravel(), -np.log(-np.log(uniform)), rtol=1e-5)


def test_noise_has_the_gumbel_distribution_and_no_correlation() -> None:
    keys = image_keys(0, range(4))
    noise = gumbel_noise(keys, torch.arange(250).expand(4, -1), 40)
    assert stats.kstest(noise.flatten().numpy(), stats.gumbel_r.cdf).pvalue > 0.01
    by_pixel = np.corrcoef(noise.permute(2, 0, 1).flatten(1).numpy())  # between colours
    assert np.abs(by_pixel - np.eye(40)).max() < 0.15
    images = np.corrcoef(noise.flatten(1).numpy())
    assert np.abs(images - np.eye(4)).max() < 0.05


def test_noise_depends_on_seed_image_pixel_and_colour_alone() -> None:
    pixels = torch.tensor([[5, 6], [5, 6]])
    noise = gumbel_noise(image_keys(3, [7, 8]), pixels, 9)
    alone = gumbel_noise(image_keys(3, [8]), torch.tensor([[6]]), 9)
    assert torch.equal(noise[1, 1], alone[0, 0])
    assert len(noise.unique()) == noise.numel()
    assert not torch.equal(noise, gumbel_noise(image_keys(4, [7, 8]), pixels, 9))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.25, 0.09, 0.0225, 0.0025]),
        ({"top_k": 2}, [0.5, 0.3, 0, 0]),
        ({"top_p": 0.6}, [0.5, 0.3, 0, 0]),
        ({"top_p": 0.2}, [1, 0, 0, 0]),
    ],
    ids=str,
)
def test_samples_follow_the_distribution(settings: dict[str, float], expected: list[float]) -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(40_000, 4)
    noise = gumbel_noise(image_keys(1, [0]), torch.arange(40_000)[None], 4)[0]
    chosen = choose(logits, noise, **{"temperature": 1.0, "top_k": None, "top_p": None, **settings})
    counts = torch.bincount(chosen, minlength=4).numpy()
    share = np.array(expected) / sum(expected)
    assert counts[share == 0].sum() == 0
    possible = share > 0
    if possible.sum() > 1:
        assert stats.chisquare(counts[possible], 40_000 * share[possible]).pvalue > 0.01


def test_top_k_takes_no_more_of_equal_colours() -> None:
    noise = gumbel_noise(image_keys(0, [0]), torch.arange(1000)[None], 5)[0]
    assert len(choose(torch.zeros(1000, 5), noise, 1.0, 2, None).unique()) == 2
