"""Samples of classes, and classifier-free guidance, against sequential full forward passes."""

from typing import Any

import pytest
import torch

from igpt.errors import InputError
from igpt.model.transformer import ImageGPT
from igpt.sampling.colors import choose, gumbel_noise, image_keys
from igpt.sampling.sampler import complete, generate, sample

from .models import random_model

CLASSES = ("cat", "dog", "owl")


def conditional_model(**changed: Any) -> ImageGPT:
    return random_model(conditions=CLASSES, **changed)


def guided_by_full_passes(
    model: ImageGPT,
    tokens: torch.Tensor,
    known: torch.Tensor,
    labels: torch.Tensor,
    guidance: float,
    **settings: Any,
) -> torch.Tensor:
    """Sample pixel after pixel, each from two full forward passes of the model."""
    used = {"temperature": 1.0, "top_k": None, "top_p": None, **settings}
    batch, n = tokens.shape
    tokens = tokens.clone()
    noise = gumbel_noise(image_keys(3, range(batch)), torch.arange(n).expand(batch, n), 11)
    for pixel in range(n):
        given, without = model(tokens, labels=labels)[:, pixel], model(tokens)[:, pixel]
        logits = without + guidance * (given - without)
        colors = choose(logits, noise[:, pixel], **used)
        tokens[:, pixel] = torch.where(known[:, pixel], tokens[:, pixel], colors)
    return tokens


@pytest.mark.parametrize(
    ("guidance", "settings"),
    [
        (1.0, {}),
        (0.0, {}),
        (2.5, {}),
        (3.0, {"temperature": 0.0}),
        (2.0, {"temperature": 0.6, "top_k": 4, "top_p": 0.9}),
    ],
)
@pytest.mark.parametrize("variant", [{}, {"positions": "rotary", "value_residual": True}], ids=str)
def test_guided_samples_are_those_of_full_passes(
    variant: dict[str, Any], guidance: float, settings: dict[str, Any]
) -> None:
    model = conditional_model(n_head=2, **variant)
    tokens, labels = torch.randint(0, 11, (4, 36)), torch.tensor([2, -1, 0, 2])
    known = torch.rand(4, 36, generator=torch.Generator().manual_seed(1)) < 0.3
    expected = guided_by_full_passes(model, tokens, known, labels, guidance, **settings)
    given: dict[str, Any] = {"guidance": guidance, "seed": 3, "precision": "fp32", **settings}
    for window in (1, 5, None):
        found = complete(model, tokens, known, labels=labels, window=window, **given)
        assert torch.equal(found, expected), window
    for image in range(4):  # of one image alone
        if guidance != 1 and labels[image] < 0:
            continue
        one = slice(image, image + 1)
        *_, last = generate(
            model, tokens[one], known[one], labels=labels[one], numbers=[image], **given
        )
        assert torch.equal(last.tokens, expected[one])


def test_guidance_zero_is_without_a_class_and_one_is_with_it() -> None:
    model, nothing = conditional_model(), torch.empty(4, 0, dtype=torch.long)
    dogs = torch.full((4,), 1)
    plain = sample(model, nothing, precision="fp32")
    assert torch.equal(sample(model, nothing, labels=dogs, guidance=0.0, precision="fp32"), plain)
    given = sample(model, nothing, labels=dogs, precision="fp32")
    assert not torch.equal(given, plain)
    assert not torch.equal(sample(model, nothing, labels=dogs, guidance=2.0), given)


def test_many_guided_images_are_generated_in_smaller_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, nothing = conditional_model(), torch.empty(5, 0, dtype=torch.long)
    owls = torch.full((5,), 2)
    whole = sample(model, nothing, labels=owls, guidance=2.0, precision="fp32")
    sizes: list[int] = []

    def counted(model: ImageGPT, tokens: torch.Tensor, *rest: Any, **settings: Any) -> Any:
        sizes.append(len(tokens))
        return generate(model, tokens, *rest, **settings)

    monkeypatch.setattr("igpt.sampling.sampler.generate", counted)
    monkeypatch.setattr("igpt.sampling.sampler._batch_size", lambda *_: 4)
    again = sample(model, nothing, labels=owls, guidance=2.0, precision="fp32")
    assert sizes == [2, 2, 1]
    assert torch.equal(again, whole)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_other_precisions_sample_with_guidance(precision: str) -> None:
    model, nothing = conditional_model().float(), torch.empty(3, 0, dtype=torch.long)
    given = {"labels": torch.tensor([0, 1, 2]), "guidance": 2.0, "precision": precision}
    sampled = sample(model, nothing, **given)
    assert torch.equal(sampled, sample(model, nothing, **given))
    assert len(sampled.unique()) > 5


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        (random_model(), {"guidance": 2.0}, "classes and guidance need a class-conditional model"),
        (random_model("bert"), {"guidance": 2.0}, "need a class-conditional model"),
        (random_model(), {"labels": torch.tensor([0])}, "need a class-conditional model"),
        (conditional_model(), {"guidance": 2.0}, "guidance needs a class"),
        (conditional_model(), {"labels": torch.tensor([3])}, r"lie in 0\.\.2"),
        (conditional_model(), {"labels": torch.tensor([-2])}, r"lie in 0\.\.2"),
        (conditional_model(), {"labels": torch.tensor([0]), "guidance": -1.0}, "the guidance is"),
        (
            conditional_model(),
            {"labels": torch.tensor([0]), "guidance": float("nan")},
            "the guidance is",
        ),
    ],
)
def test_classes_and_guidance_must_fit(model: ImageGPT, given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        complete(model, torch.zeros(1, 36, dtype=torch.long), 2, **given)


def test_names_of_classes() -> None:
    model = conditional_model()
    assert model.config.label_of("owl") == 2
    with pytest.raises(InputError, match=r"the model has no class 'cats'; did you mean 'cat'"):
        model.config.label_of("cats")
    with pytest.raises(InputError, match="choose from: cat, dog, owl"):
        model.config.label_of("xyz")
    with pytest.raises(InputError, match="'cat' is asked for, and the model has no classes"):
        random_model().config.label_of("cat")
