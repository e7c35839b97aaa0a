"""Generation against the full forward pass, and its settings."""

import pytest
import torch

from igpt.errors import InputError
from igpt.model.cost import cache_bytes
from igpt.model.transformer import ImageGPT
from igpt.sampling.jobs import resolve_sampling_precision
from igpt.sampling.sampler import complete, generate, sample

from .models import random_model


def test_samples_depend_on_seed_and_number_alone() -> None:
    model = random_model()
    originals, known = torch.randint(0, 11, (5, 36)), torch.arange(36) < 12
    *_, together = generate(model, originals, known, seed=3, precision="fp32")
    *_, last = generate(model, originals[4:], known, seed=3, numbers=[4], precision="fp32")
    assert torch.equal(together.tokens[4:], last.tokens)
    assert len({tuple(row) for row in together.tokens[:, 12:].tolist()}) == 5


@pytest.mark.parametrize("by", ["row", "pixel"])
def test_images_are_yielded_step_by_step(by: str) -> None:
    """After every pass, or after passes that complete a row of all images."""
    model, originals = random_model(), torch.randint(0, 11, (2, 36))
    steps = list(generate(model, originals, torch.arange(36) < 15, by=by, seed=1, window=1))
    assert [step.known.sum(1).tolist() for step in steps] == [
        [known] * 2 for known in ([18, 24, 30, 36] if by == "row" else range(16, 37))
    ]
    steps = list(generate(model, originals, torch.arange(36) < 15, by=by, seed=1, window=4))
    assert 2 <= len(steps) <= (4 if by == "row" else 21)
    assert steps[-1].known.all()
    for step in steps:  # what is known stays
        assert torch.equal(step.tokens[step.known], steps[-1].tokens[step.known])
    assert torch.equal(steps[-1].tokens, complete(model, originals, torch.arange(36) < 15, seed=1))


def test_known_pixels_anywhere_and_of_each_image_are_kept_and_seen_by_those_after_them() -> None:
    model = random_model()
    originals = torch.randint(0, 11, (3, 36))
    known = torch.rand(3, 36, generator=torch.Generator().manual_seed(1)) < 0.5
    sampled = complete(model, originals, known, temperature=0, precision="fp32")
    assert torch.equal(sampled[known], originals[known])
    assert torch.equal(sampled[~known], model(sampled).argmax(-1)[~known])
    nothing_open = complete(model, originals, torch.ones(36, dtype=torch.bool))
    assert torch.equal(nothing_open, originals)


@pytest.mark.parametrize("objective", ["autoregressive", "bert"])
def test_many_images_are_generated_in_several_batches(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, originals = random_model(objective), torch.randint(0, 11, (5, 36))
    whole = complete(model, originals, 2, precision="fp32")
    monkeypatch.setattr("igpt.sampling.sampler._CACHE", 2 * cache_bytes(model.config, 8))
    if objective == "bert":
        monkeypatch.setattr("igpt.sampling.sampler.inference_batch_size", lambda config: 2)
    sizes: list[int] = []

    def counted(model: ImageGPT, tokens: torch.Tensor, *rest: object, **settings: object) -> object:
        sizes.append(len(tokens))
        return generate(model, tokens, *rest, **settings)

    monkeypatch.setattr("igpt.sampling.sampler.generate", counted)
    reported = []
    again = complete(
        model,
        originals,
        2,
        precision="fp32",
        progress=lambda done, total: reported.append((done, total)),
    )
    assert torch.equal(again, whole)
    assert sizes == [2, 2, 1]
    assert reported[-1] == (180, 180)
    assert reported == sorted(reported)


def test_weights_that_break_later_are_refused() -> None:
    model = random_model()
    torch.nn.init.constant_(model.wpe.weight[30], torch.nan)
    with pytest.raises(InputError, match="weights are broken"):
        complete(model, torch.zeros(1, 36, dtype=torch.long), 2)


def test_broken_weights_are_refused_at_once() -> None:
    for objective in ("autoregressive", "bert"):
        model = random_model(objective)
        torch.nn.init.constant_(model.lm_head.weight, torch.nan)
        with pytest.raises(InputError, match="weights are broken"):
            complete(model, torch.zeros(1, 36, dtype=torch.long), 2)


def test_greedy_sampling_is_the_full_forwards_argmax() -> None:
    model = random_model()
    prefix = torch.randint(0, 11, (2, 7))
    sampled = sample(model, prefix, temperature=0, precision="fp32")
    assert torch.equal(sampled[:, :7], prefix)
    assert torch.equal(sampled[:, 7:], model(sampled).argmax(-1)[:, 7:])


def test_same_seed_same_images_and_another_seed_others() -> None:
    model, nothing = random_model(), torch.empty(4, 0, dtype=torch.long)
    assert torch.equal(sample(model, nothing, seed=5), sample(model, nothing, seed=5))
    assert not torch.equal(sample(model, nothing, seed=5), sample(model, nothing, seed=6))


@pytest.mark.parametrize("objective", ["autoregressive", "bert"])
def test_completion_keeps_what_is_known(objective: str) -> None:
    model = random_model(objective)
    originals = torch.randint(0, 11, (3, 36))
    sampled = complete(model, originals, 2, seed=1)
    assert torch.equal(sampled[:, :12], originals[:, :12])
    assert not torch.equal(sampled[:, 12:], originals[:, 12:])
    assert sampled.min() >= 0
    assert sampled.max() < 11
    assert torch.equal(sampled, complete(model, originals, 2, seed=1))


def test_unknown_pixels_do_not_influence_completions() -> None:
    model = random_model("bert")
    originals = torch.randint(0, 11, (2, 36))
    changed = originals.clone()
    known = torch.rand(36, generator=torch.Generator().manual_seed(0)) < 0.4
    changed[:, ~known] = (changed[:, ~known] + 1) % 11
    filled = complete(model, originals, known, rounds=5)
    assert torch.equal(filled, complete(model, changed, known, rounds=5))
    assert torch.equal(filled[:, known], originals[:, known])


def test_one_greedy_round_is_one_forward_pass() -> None:
    model = random_model("bert")
    originals, known = torch.randint(0, 11, (2, 36)), torch.arange(36) < 20
    filled = complete(model, originals, known, rounds=1, temperature=0, precision="fp32")
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
        ({"rounds": 0}, "round"),
        ({"seed": -1}, "seed"),
        ({"window": 0}, "at least 1 pixel"),
        ({"precision": "int4"}, "auto, fp32, bf16 or int8"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        sample(random_model(), torch.empty(1, 0, dtype=torch.long), **settings)


def test_objectives_and_sizes_must_fit() -> None:
    with pytest.raises(InputError, match="trained as 'autoregressive'; this one is 'bert'"):
        sample(random_model("bert"), torch.empty(1, 0, dtype=torch.long))
    with pytest.raises(InputError, match=r"0\.\.6"):
        complete(random_model(), torch.zeros(1, 36, dtype=torch.long), 7)
    with pytest.raises(InputError, match="longer than an image"):
        sample(random_model(), torch.zeros(1, 37, dtype=torch.long))
    with pytest.raises(InputError, match="do not fit a model of 36"):
        complete(
            random_model(), torch.zeros(1, 16, dtype=torch.long), torch.ones(16, dtype=torch.bool)
        )


def test_int8_is_for_autoregressive_models() -> None:
    with pytest.raises(InputError, match="int8 is for models that sample pixel by pixel"):
        complete(random_model("bert"), torch.zeros(1, 36, dtype=torch.long), 2, precision="int8")


def test_int8_is_for_a_cpu() -> None:
    with pytest.raises(InputError, match="int8 is for a CPU"):
        resolve_sampling_precision("int8", torch.device("cuda"), causal=True)


def test_int8_samples_whole_images() -> None:
    model, nothing = random_model().float(), torch.empty(3, 0, dtype=torch.long)
    sampled = sample(model, nothing, precision="int8")
    assert torch.equal(sampled, sample(model, nothing, precision="int8"))
    assert len(sampled.unique()) > 5
