"""Variants, together and separately: against NumPy, decoded, saved, at other resolutions.

B batch, T positions, D width, H heads, K head width, R resolution.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from igpt.data.images.palette import Palette
from igpt.errors import InputError
from igpt.model.classifier import with_head
from igpt.model.config import ModelConfig
from igpt.model.cost import count_parameters, forward_flops
from igpt.model.resolution import at_resolution
from igpt.model.transformer import ImageGPT
from igpt.model.variants import apply_rope_2d, rope_table
from igpt.sampling.sampler import complete, sample
from igpt.training.pretrain import PretrainConfig

APART: dict[str, dict[str, Any]] = {
    "rotary": {"positions": "rotary"},
    "value_residual": {"value_residual": True},
}
VARIANTS = {
    **APART,
    "together": {name: value for one in APART.values() for name, value in one.items()},
}
PALETTE = Palette.from_centers(np.random.default_rng(0).uniform(-1, 1, (11, 3)))
all_variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def config_of(variant: dict[str, Any], **more: Any) -> ModelConfig:
    return ModelConfig.layered(
        {"resolution": 5, "n_colors": 11, "n_layer": 3, "n_embd": 24, "n_head": 3}, variant, more
    )


def random_model(variant: dict[str, Any], **more: Any) -> ImageGPT:
    """Return a float64 model with random weights."""
    model = ImageGPT(config_of(variant, **more), PALETTE).double().eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        center = 1.0 if "ln_" in name else 0.0
        parameter.data = center + 0.4 * torch.randn(
            parameter.shape, dtype=torch.float64, generator=generator
        )
    return model


def random_tokens(model: ImageGPT, images: int) -> Tensor:
    return torch.randint(
        0, 11, (images, model.config.n_pixels), generator=torch.Generator().manual_seed(2)
    )


# A plain computation: one image and one head at a time, pairs of numbers as complex ones.

Array = NDArray[np.float64]


def norm(x: Array) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)


def rotated(x: Array, resolution: int) -> Array:
    """Rotate x [T, K]: number p of a half is paired with number p + K/4."""
    quarter = x.shape[1] // 4
    result = np.empty_like(x)
    for position in range(len(x)):
        for half, distance in enumerate((position // resolution, position % resolution)):
            for pair in range(quarter):
                one = 2 * half * quarter + pair
                angle = distance / 100 ** (pair / quarter)
                product = complex(x[position, one], x[position, one + quarter]) * np.exp(1j * angle)
                result[position, one], result[position, one + quarter] = product.real, product.imag
    return result


def plain_logits(model: ImageGPT, tokens: NDArray[np.int64]) -> Array:
    """Return the logits of one image, [T, V]."""
    config = model.config
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    bert = config.objective == "bert"
    x = weights["wte.weight"][tokens if bert else [config.n_colors, *tokens[:-1]]]
    if config.positions == "learned":
        x = x + weights["wpe.weight"][: len(x)]
    head, first = config.n_embd // config.n_head, None
    for layer in range(config.n_layer):
        at = f"h.{layer}."
        q, k, v = np.split(
            norm(x) * weights[at + "ln_1.weight"] @ weights[at + "attn.c_attn.weight"].T, 3, axis=1
        )
        if config.value_residual:
            if first is None:
                first = v
            else:
                own, others = weights[at + "attn.mix"]
                v = own * v + others * first
        read = np.empty_like(x)
        for number in range(config.n_head):
            some = slice(number * head, (number + 1) * head)
            one, other = q[:, some], k[:, some]
            if config.positions == "rotary":
                one, other = rotated(one, config.resolution), rotated(other, config.resolution)
            scores = np.exp(one @ other.T / np.sqrt(head))
            scores = scores if bert else np.tril(scores)
            read[:, some] = scores / scores.sum(1, keepdims=True) @ v[:, some]
        x = x + read @ weights[at + "attn.c_proj.weight"].T
        inner = norm(x) * weights[at + "ln_2.weight"] @ weights[at + "mlp.c_fc.weight"].T
        x = x + inner / (1 + np.exp(-1.702 * inner)) @ weights[at + "mlp.c_proj.weight"].T
    return norm(x) * weights["ln_f.weight"] @ weights["lm_head.weight"].T


@pytest.mark.parametrize("objective", ["autoregressive", "bert"])
@all_variants
def test_against_a_plain_computation(variant: dict[str, Any], objective: str) -> None:
    model = random_model(variant, objective=objective)
    tokens = random_tokens(model, 2)
    for positions in (25, 13):
        with torch.no_grad():
            logits = model(tokens[:, :positions]).numpy()
        for image in range(2):
            expected = plain_logits(model, tokens[image, :positions].numpy())
            np.testing.assert_allclose(logits[image], expected, rtol=0, atol=1e-11)


def test_rotary_products_depend_only_on_the_offset() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 8, dtype=torch.float64, generator=generator)
    table = rope_table(torch.arange(49), 8, 7)
    scores = apply_rope_2d(q.expand(49, 8), table) @ apply_rope_2d(k.expand(49, 8), table).T
    grid = scores.reshape(7, 7, 7, 7)  # row, column of the query; of the key
    found = {}
    for at in np.ndindex(7, 7, 7, 7):
        offset = (at[0] - at[2], at[1] - at[3])
        assert grid[at].item() == pytest.approx(
            found.setdefault(offset, grid[at].item()), abs=1e-12
        )
    assert len({round(score, 9) for score in found.values()}) == 13 * 13, "each offset has its own"


@all_variants
def test_a_pixel_changes_the_logits_of_every_later_position_and_no_other(
    variant: dict[str, Any],
) -> None:
    model = random_model(variant)
    tokens = random_tokens(model, 1).repeat(25, 1)
    changed = tokens.clone()
    changed.diagonal().copy_((tokens.diagonal() + 1) % 11)
    with torch.no_grad():
        seen = (model(changed) - model(tokens)).abs().amax(-1)
    after = torch.ones(25, 25, dtype=torch.bool).triu(1)
    assert (seen[~after] == 0).all()
    assert (seen[after] > 1e-9).all()


@all_variants
def test_sampling_in_bf16(variant: dict[str, Any]) -> None:
    model = random_model(variant).float()
    tokens = random_tokens(model, 2)
    completed = complete(model, tokens, 2, precision="bf16", seed=1)
    assert torch.equal(completed[:, :10], tokens[:, :10])
    assert sample(model, tokens[:, :0], precision="bf16").shape == (2, 25)


@all_variants
def test_a_bert_variant_completes(variant: dict[str, Any]) -> None:
    model = random_model(variant, objective="bert")
    tokens = random_tokens(model, 2)
    completed = complete(model, tokens, 2, rounds=3, precision="fp32")
    assert torch.equal(completed[:, :10], tokens[:, :10])


@all_variants
def test_the_last_feature_gives_the_logits_and_all_parameters_get_gradients(
    variant: dict[str, Any],
) -> None:
    model = random_model(variant)
    tokens = random_tokens(model, 2)
    features = list(model.features(tokens))
    assert len(features) == 4
    logits = model(tokens)
    assert torch.equal(model.lm_head(features[-1]), logits)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("more", [{}, {"class_names": ("a", "b")}, {"bias": True}], ids=str)
@all_variants
def test_the_number_of_parameters(variant: dict[str, Any], more: dict[str, Any]) -> None:
    config = config_of(variant, **more)
    with torch.device("meta"):
        model = ImageGPT(config)
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())
    assert forward_flops(config) == forward_flops(config_of({}, **more)), (
        "the number of matrix products is unchanged"
    )


@pytest.mark.parametrize(
    "more", [{}, {"objective": "bert", "class_names": ("a", "b"), "bias": True}], ids=str
)
@all_variants
def test_a_saved_variant_is_read(
    variant: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    model = random_model(variant, **more)
    model.save_pretrained(tmp_path)
    read = ImageGPT.from_pretrained(tmp_path, dtype=torch.float64)
    assert read.config == model.config
    assert list(read.state_dict()) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "igpt"
    assert {name: written["igpt"][name] for name in variant} == variant


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"positions": "sung"}, "positions = 'sung': Input should be 'learned' or 'rotary'"),
        ({"qk_norm": True}, r"config\.json has qk_norm = True, a variant that .* no longer has"),
        ({"activation": "relu2"}, r"config\.json has activation = 'relu2', a variant that"),
        ({"twist": 1}, r"unknown key 'twist' in .*config\.json"),
        ({"version": 3}, "model format version 3; this igpt reads"),
    ],
    ids=str,
)
def test_an_unknown_variant_is_refused_in_a_sentence(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    random_model(VARIANTS["together"]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["igpt"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=words) as caught:
        ImageGPT.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_removed_variants_that_are_off_are_accepted(tmp_path: Path) -> None:
    """Earlier versions wrote every variant into config.json."""
    model = random_model(VARIANTS["together"])
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["igpt"] |= {"qk_norm": False, "activation": "quick_gelu"}
    path.write_text(json.dumps(config))
    assert ImageGPT.from_pretrained(tmp_path, dtype=torch.float64).config == model.config


def test_a_run_with_a_removed_variant_is_refused(tmp_path: Path) -> None:
    recorded = tmp_path / "config.yaml"
    recorded.write_text("tokens: tokens/digits\nqk_norm: true\nactivation: quick_gelu\n")
    with pytest.raises(InputError, match=r"config\.yaml has qk_norm = True, a variant that"):
        PretrainConfig.load(recorded)
    recorded.write_text("tokens: tokens/digits\nqk_norm: false\nactivation: quick_gelu\n")
    assert PretrainConfig.load(recorded).faithful


def test_the_papers_configuration_has_no_variants() -> None:
    hub = config_of({}).to_hub()
    assert (hub["model_type"], hub["activation_function"]) == ("imagegpt", "quick_gelu")
    assert hub["igpt"] == {"objective": "autoregressive", "resolution": 5}


@all_variants
def test_another_resolution_and_a_class_head(variant: dict[str, Any]) -> None:
    model = random_model(variant)
    larger = with_head(at_resolution(model, 7), ("a", "b"), PALETTE)
    assert larger.config == model.config.model_copy(
        update={"resolution": 7, "class_names": ("a", "b")}
    )
    assert larger(torch.zeros(1, 49, dtype=torch.long)).shape == (1, 49, 11)
    same = at_resolution(model, 5)
    assert torch.equal(same(random_tokens(model, 2)), model(random_tokens(model, 2)))


def test_rotary_heads_must_be_divisible_by_four() -> None:
    with pytest.raises(InputError, match="its width of 6 is not divisible by 4"):
        config_of(APART["rotary"], n_head=4)


def test_initial_mixes_are_one_half_and_change_no_other_weights() -> None:
    models = []
    for variant in ({}, APART["value_residual"]):
        torch.manual_seed(4)
        models.append(ImageGPT(config_of(variant)))
    plain, mixing = (model.state_dict() for model in models)
    assert mixing.keys() - plain.keys() == {"h.1.attn.mix", "h.2.attn.mix"}
    for name, tensor in mixing.items():
        assert torch.equal(tensor, plain[name] if name in plain else torch.tensor([0.5, 0.5])), name


def test_embeddings_from_the_palette() -> None:
    """They are linear in the colours, have the usual scale, and depend on the seed."""
    palette = Palette.from_centers(np.random.default_rng(5).uniform(-1, 1, (300, 3)))
    config = config_of({}, n_colors=300, n_embd=96)
    completed = []
    for seed in (6, 6, 7):
        torch.manual_seed(seed)
        completed.append(ImageGPT(config, palette, from_palette=True).wte.weight.detach())
    assert torch.equal(completed[0], completed[1])
    assert not torch.allclose(completed[0], completed[2])
    colours, start = completed[0][:-1].double().numpy(), completed[0][-1]
    _, residual, rank, _ = np.linalg.lstsq(palette.centers_.astype(np.float64), colours, rcond=None)
    assert rank == 3
    assert residual.max() < 1e-10
    assert colours.std() == pytest.approx(0.02, rel=0.2)
    assert start.std().item() == pytest.approx(0.02, rel=0.4)
