"""The transformer: which pixels influence which, initial weights, sizes, features."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from igpt.data.images.palette import Palette
from igpt.errors import InputError
from igpt.model.config import ModelConfig
from igpt.model.cpu import plain_attention
from igpt.model.objectives import Autoregressive, Bert
from igpt.model.transformer import ImageGPT, attention


def random_model(seed: int, **settings: object) -> ImageGPT:
    """Return a float64 model with random weights; a new one has a zero output matrix."""
    shape = {"resolution": 4, "n_colors": 11, "n_layer": 2, "n_embd": 24, "n_head": 3}
    model = ImageGPT(ModelConfig.model_validate({**shape, **settings})).double()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        center = 1.0 if "ln_" in name else 0.0
        parameter.data = center + 0.4 * torch.randn(
            parameter.shape, dtype=torch.float64, generator=generator
        )
    return model


def random_tokens(model: ImageGPT, seed: int, images: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        0, model.config.n_colors, (images, model.config.n_pixels), generator=generator
    )


def influence(model: ImageGPT, pixels: list[int], mask: Tensor | None = None) -> Tensor:
    """Return at [i, j] the largest change of pixel j's logits when pixels[i] changes."""
    tokens = random_tokens(model, 1, 1).repeat(len(pixels), 1)
    changed = tokens.clone()
    rows = torch.arange(len(pixels))
    changed[rows, pixels] = (changed[rows, pixels] + 1) % model.config.n_colors
    masks = None if mask is None else mask.repeat(len(pixels), 1)
    with torch.no_grad():
        return (model(changed, masks) - model(tokens, masks)).abs().amax(dim=-1)


@pytest.mark.parametrize("resolution", [1, 2, 5, 17])
def test_a_pixel_changes_the_logits_of_every_later_position_and_no_other(resolution: int) -> None:
    """At 17 px the sequence is long enough for the fused attention."""
    model = random_model(2, resolution=resolution)
    n = model.config.n_pixels
    pixels = list(range(n)) if n < 100 else [0, 1, 16, 17, 100, 255, 256, 257, 287, 288]
    seen = influence(model, pixels)
    after = torch.arange(n)[None, :] > torch.tensor(pixels)[:, None]
    assert (seen[~after] == 0).all()
    assert (seen[after] > 1e-9).all()


@pytest.mark.parametrize("resolution", [4, 17])
def test_bert_sees_all_but_the_masked_pixels(resolution: int) -> None:
    model = random_model(3, resolution=resolution, objective="bert")
    n = model.config.n_pixels
    pixels = list(range(n)) if n < 100 else [0, 1, 2, 3, 143, 144, 287, 288]
    mask = torch.arange(n)[None] % 3 == 1
    seen = influence(model, pixels, mask)
    hidden = mask[0, pixels]
    assert (seen[hidden] == 0).all()
    assert (seen[~hidden] > 1e-9).all()  # before it, at it and after it
    assert (influence(model, pixels) > 1e-9).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("positions", [1, 9, 64])
def test_plain_and_fused_attention_agree(positions: int, causal: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    q, k, v = torch.randn(
        3, 2, 3, positions, 8, dtype=torch.float64, generator=generator
    ).requires_grad_()
    upstream = torch.randn(2, 3, positions, 8, dtype=torch.float64, generator=generator)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    ours = plain_attention(q, k, v, causal)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(ours, (q, k, v), upstream)
    for gradient, reference in zip(
        gradients, torch.autograd.grad(expected, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("positions", [256, 257])
def test_attention_is_the_same_on_both_code_paths(positions: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    q, k, v = torch.randn(3, 2, 3, positions, 8, generator=generator).to(dtype).requires_grad_()
    expected = plain_attention(*(part.double() for part in (q, k, v)), True)
    tolerance = 1e-12 if dtype == torch.float64 else 0.03
    torch.testing.assert_close(attention(q, k, v, True).double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("objective", ["autoregressive", "bert"])
def test_last_feature_gives_the_logits(objective: str) -> None:
    model = random_model(7, objective=objective)
    tokens = random_tokens(model, 8, 3)
    mask = tokens % 3 == 0 if objective == "bert" else None
    with torch.no_grad():
        features = list(model.features(tokens, mask))
        assert len(features) == model.config.n_layer + 1
        assert {tuple(feature.shape) for feature in features} == {(3, 16, 24)}
        assert torch.equal(model.lm_head(features[-1]), model(tokens, mask))
        assert torch.equal(model.hidden(tokens, mask), features[-1])


def test_every_parameter_gets_a_gradient() -> None:
    for objective in ("autoregressive", "bert"):
        model = random_model(9, objective=objective, bias=True)
        tokens = random_tokens(model, 10, 2)
        loss, _ = (
            Autoregressive().loss(model, tokens)
            if objective == "autoregressive"
            else Bert().loss(model, tokens, tokens < 5)
        )
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_initial_weights() -> None:
    width, layers = 96, 6
    torch.manual_seed(11)
    model = ImageGPT(
        ModelConfig(
            resolution=16,
            n_colors=300,
            n_layer=layers,
            n_embd=width,
            n_head=4,
            class_names=("a", "b"),
        )
    )
    deviations = {
        "wte.weight": 0.02,
        "wpe.weight": 0.01,
        "attn.c_attn.weight": width**-0.5,
        "attn.c_proj.weight": (width * layers) ** -0.5,
        "mlp.c_fc.weight": 0.02,
        "mlp.c_proj.weight": 0.02,
    }
    random = 0
    for name, parameter in model.named_parameters():
        if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
            assert (parameter == 1).all(), name
        elif name in ("lm_head.weight", "score.weight"):
            assert (parameter == 0).all(), name
        else:
            deviation = next(value for end, value in deviations.items() if name.endswith(end))
            random += 1
            # Five standard errors of an estimated standard deviation, and of a mean.
            assert parameter.std().item() == pytest.approx(
                deviation, rel=5 / math.sqrt(2 * parameter.numel())
            ), name
            assert abs(parameter.mean().item()) < 5 * deviation / math.sqrt(parameter.numel()), name
            fourth_moment = ((parameter / deviation) ** 4).mean().item()
            assert fourth_moment == pytest.approx(3, abs=5 * math.sqrt(96 / parameter.numel())), (
                f"{name}: not normal"
            )
    assert random == 2 + 4 * layers
    start = model.wte.weight[-1]
    assert start.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * width))


def test_the_seed_decides_the_initial_weights() -> None:
    config = ModelConfig(resolution=2, n_colors=3, n_layer=1, n_embd=8, n_head=2)
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(ImageGPT(config))
    one, same, other = (model.h[0].attn.c_attn.weight for model in models)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("objective", ["autoregressive", "bert"])
def test_the_initial_loss_is_that_of_a_uniform_prediction(objective: str) -> None:
    model = ImageGPT(
        ModelConfig(resolution=4, n_colors=300, n_layer=2, n_embd=16, n_head=2, objective=objective)
    ).double()
    tokens = random_tokens(model, 12, 3)
    total, count = (
        Autoregressive().loss(model, tokens)
        if objective == "autoregressive"
        else Bert().loss(model, tokens, tokens % 2 == 0)
    )
    assert total.item() / count == pytest.approx(math.log(300), abs=1e-12)


@pytest.mark.parametrize(
    ("layers", "width", "heads", "resolution", "published", "rounding"),
    [
        (24, 512, 8, 32, 76e6, 1e6),
        (36, 1024, 8, 32, 455e6, 1e6),
        (48, 1536, 16, 32, 1362e6, 1e6),
        (60, 3072, 48, 64, 6.8e9, 0.1e9),
    ],
    ids=["S", "M", "L", "XL"],
)
def test_published_sizes(
    layers: int, width: int, heads: int, resolution: int, published: float, rounding: float
) -> None:
    config = ModelConfig(resolution=resolution, n_layer=layers, n_embd=width, n_head=heads)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in ImageGPT(config).parameters())
    block = (
        3 * width**2 + width**2 + 8 * width**2 + 2 * width
    )  # q, k, v; output projection; MLP; two gains
    assert count == 513 * width + resolution**2 * width + layers * block + width + 512 * width
    assert abs(count - published) < rounding


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(InputError, match="5 heads do not divide a width of 24"):
        ModelConfig.layered({"n_embd": 24, "n_head": 5})


def test_a_palette_of_another_size_is_refused() -> None:
    palette = Palette.from_centers([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    with pytest.raises(InputError, match="the palette has 2 colours, the model 3"):
        ImageGPT(ModelConfig(resolution=2, n_colors=3, n_layer=1, n_embd=8, n_head=2), palette)


def test_a_model_of_another_objective_is_refused() -> None:
    model = ImageGPT(
        ModelConfig(resolution=2, n_colors=3, n_layer=1, n_embd=8, n_head=2, objective="bert")
    )
    model.config.trained_as.require("masked", "filling")
    with pytest.raises(
        InputError, match="sampling needs a model trained as 'autoregressive'; this one is 'bert'"
    ):
        model.config.trained_as.require("has_likelihood", "sampling")
