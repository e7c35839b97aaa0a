"""Generation against the full forward pass, and its settings."""

import pytest
import torch

from igpt.errors import InputError
from igpt.model.generate import Decoder, choose, complete, fill, sample
from igpt.model.transformer import ImageGPT, ModelConfig


def random_model(objective: str = "autoregressive", resolution: int = 6) -> ImageGPT:
    torch.manual_seed(0)
    shape = {"resolution": resolution, "n_colors": 11, "n_layer": 3, "n_embd": 24, "n_head": 3, "objective": objective}
    model = ImageGPT(ModelConfig.layered(shape)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("prefix", [0, 1, 17, 35])
def test_cached_logits_equal_the_full_forward_at_every_place(prefix: int) -> None:
    model = random_model()
    tokens = torch.randint(0, 11, (3, 36))
    expected = model(tokens)
    decoder = Decoder(model, 3)
    start = torch.full((3, 1), 11)
    with torch.inference_mode():
        logits = [decoder(torch.cat([start, tokens[:, :prefix]], 1))]
        logits += [decoder(tokens[:, place : place + 1]) for place in range(prefix, 35)]
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-12)


def test_greedy_sampling_is_the_full_forwards_argmax() -> None:
    model = random_model()
    prefix = torch.randint(0, 11, (2, 7))
    drawn = sample(model, prefix, temperature=0)
    assert torch.equal(drawn[:, :7], prefix)
    assert torch.equal(drawn[:, 7:], model(drawn).argmax(-1)[:, 7:])


def test_same_seed_same_images_and_another_seed_others() -> None:
    model, nothing = random_model(), torch.empty(4, 0, dtype=torch.long)
    assert torch.equal(sample(model, nothing, seed=5), sample(model, nothing, seed=5))
    assert not torch.equal(sample(model, nothing, seed=5), sample(model, nothing, seed=6))


def test_draws_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(40_000, 4)
    generator = torch.Generator().manual_seed(0)

    def shares(**settings: float) -> torch.Tensor:
        chosen = {"temperature": 1.0, "top_k": None, "top_p": None, **settings}
        return torch.bincount(choose(logits, generator=generator, **chosen), minlength=4) / len(logits)

    torch.testing.assert_close(shares(), torch.tensor([0.5, 0.3, 0.15, 0.05]), rtol=0, atol=0.01)
    torch.testing.assert_close(shares(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), rtol=0, atol=0.01)
    torch.testing.assert_close(shares(top_p=0.6), torch.tensor([0.625, 0.375, 0, 0]), rtol=0, atol=0.01)
    torch.testing.assert_close(shares(top_p=0.2), torch.tensor([1.0, 0, 0, 0]), rtol=0, atol=0)
    cold = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    torch.testing.assert_close(shares(temperature=0.5), cold / cold.sum(), rtol=0, atol=0.01)


@pytest.mark.parametrize("objective", ["autoregressive", "bert"])
def test_completion_keeps_what_is_known(objective: str) -> None:
    model = random_model(objective)
    originals = torch.randint(0, 11, (3, 36))
    drawn = complete(model, originals, 2, seed=1)
    assert torch.equal(drawn[:, :12], originals[:, :12])
    assert not torch.equal(drawn[:, 12:], originals[:, 12:])
    assert drawn.min() >= 0
    assert drawn.max() < 11
    assert torch.equal(drawn, complete(model, originals, 2, seed=1))


def test_unknown_pixels_do_not_leak_into_the_filling() -> None:
    model = random_model("bert")
    originals = torch.randint(0, 11, (2, 36))
    changed = originals.clone()
    known = torch.rand(36, generator=torch.Generator().manual_seed(0)) < 0.4
    changed[:, ~known] = (changed[:, ~known] + 1) % 11
    filled = fill(model, originals, known, rounds=5)
    assert torch.equal(filled, fill(model, changed, known, rounds=5))
    assert torch.equal(filled[:, known], originals[:, known])


def test_one_round_of_greedy_filling_is_one_forward_pass() -> None:
    model = random_model("bert")
    originals, known = torch.randint(0, 11, (2, 36)), torch.arange(36) < 20
    filled = fill(model, originals, known, rounds=1, temperature=0)
    expected = model(originals, ~known.expand(2, 36)).argmax(-1)
    assert torch.equal(filled[:, 20:], expected[:, 20:])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top-k"),
        ({"top_p": 0.0}, "top-p"),
        ({"top_p": 1.5}, "top-p"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        sample(random_model(), torch.empty(1, 0, dtype=torch.long), **settings)


def test_objectives_are_not_mixed_up() -> None:
    with pytest.raises(InputError, match="trained as 'autoregressive'; this one is 'bert'"):
        sample(random_model("bert"), torch.empty(1, 0, dtype=torch.long))
    with pytest.raises(InputError, match="trained as 'bert'"):
        fill(random_model(), torch.zeros(1, 36, dtype=torch.long), torch.ones(36, dtype=torch.bool))
    with pytest.raises(InputError, match=r"0\.\.6"):
        complete(random_model(), torch.zeros(1, 36, dtype=torch.long), 7)
    with pytest.raises(InputError, match="longer than an image"):
        sample(random_model(), torch.zeros(1, 37, dtype=torch.long))
