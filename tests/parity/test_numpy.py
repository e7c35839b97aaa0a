"""ImageGPT against a forward pass written in NumPy from the paper's description alone, in float64.

B batch, T positions, D width, H heads, K head width, V colours, L layers, C classes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from igpt.model import classifier, objectives
from igpt.model.config import ModelConfig
from igpt.model.transformer import ImageGPT

TOLERANCE = {"rtol": 0, "atol": 1e-9}

Array = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int64]


# The reference, written before the package was read. Weights have GPT-2's names; matrices multiply
# from the right.


def reference_norm(x: Array, gain: Array) -> Array:
    """Divide by the root of the mean square; the mean is not subtracted."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain


def reference_linear(x: Array, weights: dict[str, Array], name: str) -> Array:
    y = x @ weights[f"{name}.weight"]
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def reference_attention(
    x: Array, weights: dict[str, Array], name: str, heads: int, causal: bool
) -> Array:
    """Return the output of one head of one image at a time, from explicit scores."""
    width = x.shape[-1]
    head_width = width // heads
    mixed = np.zeros_like(x)  # (B, T, D)
    for image, projected in enumerate(reference_linear(x, weights, f"{name}.c_attn")):  # (T, 3D)
        queries, keys, values = (
            projected[:, :width],
            projected[:, width : 2 * width],
            projected[:, 2 * width :],
        )
        for head in range(heads):
            columns = slice(head * head_width, (head + 1) * head_width)
            scores = queries[:, columns] @ keys[:, columns].T / np.sqrt(head_width)  # (T, T)
            if causal:
                later = np.arange(scores.shape[1])[None, :] > np.arange(scores.shape[0])[:, None]
                scores[later] = -np.inf
            shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
            mixed[image, :, columns] = (
                shares / shares.sum(axis=-1, keepdims=True) @ values[:, columns]
            )
    return reference_linear(mixed, weights, f"{name}.c_proj")


def reference_mlp(x: Array, weights: dict[str, Array], name: str) -> Array:
    hidden = reference_linear(x, weights, f"{name}.c_fc")  # (B, T, 4D)
    return reference_linear(hidden / (1.0 + np.exp(-1.702 * hidden)), weights, f"{name}.c_proj")


def reference_embedding(
    tokens: Tokens, weights: dict[str, Array], objective: str, mask: npt.NDArray[np.bool_] | None
) -> Array:
    """Autoregressive: sos, then tokens 1 .. T-1. BERT: the tokens, with zeros at masked
    positions."""
    colours, sos = weights["transformer.wte.weight"][:-1], weights["transformer.wte.weight"][-1]
    embedded = colours[tokens]  # (B, T, D)
    if objective == "autoregressive":
        first = np.broadcast_to(sos, (len(tokens), 1, len(sos)))
        embedded = np.concatenate([first, embedded[:, :-1]], axis=1)
    elif mask is not None:
        embedded = np.where(mask[:, :, None], 0.0, embedded)
    return embedded + weights["transformer.wpe.weight"][: tokens.shape[1]]


def reference_features(
    tokens: Tokens,
    weights: dict[str, Array],
    heads: int,
    objective: str,
    mask: npt.NDArray[np.bool_] | None = None,
) -> list[Array]:
    """Return the normalized input of every block, then the final norm's output: (B, T, D)."""
    x = reference_embedding(tokens, weights, objective, mask)
    features = []
    layer = 0
    while f"transformer.h.{layer}.ln_1.weight" in weights:
        name = f"transformer.h.{layer}"
        normalised = reference_norm(x, weights[f"{name}.ln_1.weight"])
        features.append(normalised)
        x = x + reference_attention(
            normalised, weights, f"{name}.attn", heads, causal=objective == "autoregressive"
        )
        x = x + reference_mlp(
            reference_norm(x, weights[f"{name}.ln_2.weight"]), weights, f"{name}.mlp"
        )
        layer += 1
    features.append(reference_norm(x, weights["transformer.ln_f.weight"]))
    return features


def reference_logits(features: list[Array], weights: dict[str, Array]) -> Array:
    return features[-1] @ weights["lm_head.weight"].T  # (B, T, V)


def reference_class_logits(features: list[Array], weights: dict[str, Array]) -> Array:
    return features[-1].mean(axis=1) @ weights["score.weight"].T  # (B, C)


def reference_nats(logits: Array, targets: Tokens) -> Array:
    """Return the cross-entropy at every position, (B, T)."""
    highest = logits.max(axis=-1, keepdims=True)
    log_total = np.log(np.exp(logits - highest).sum(axis=-1)) + highest[..., 0]
    return log_total - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def reference_autoregressive_loss(logits: Array, tokens: Tokens) -> float:
    return float(reference_nats(logits, tokens).mean())


def reference_bert_loss(logits: Array, tokens: Tokens, mask: npt.NDArray[np.bool_]) -> float:
    """Return the mean over the masked pixels of an image, then over images."""
    nats = reference_nats(logits, tokens)
    return float(
        np.mean(
            [
                image_nats[image_mask].mean()
                for image_nats, image_mask in zip(nats, mask, strict=True)
            ]
        )
    )


# The comparison


def random_model(
    seed: int, **settings: object
) -> tuple[ImageGPT, dict[str, Array], np.random.Generator]:
    """Return a float64 model with random weights, and the same weights for the reference."""
    generator = np.random.default_rng(seed)
    shape = {"resolution": 4, "n_colors": 11, "n_layer": 3, "n_embd": 24, "n_head": 3}
    model = ImageGPT(ModelConfig.model_validate({**shape, **settings})).double()
    weights = {}
    for name, parameter in model.named_parameters():
        values = generator.normal(1.0 if ".ln_" in f".{name}" else 0.0, 0.4, tuple(parameter.shape))
        parameter.data = torch.from_numpy(values)
        head = name in ("lm_head.weight", "score.weight")
        linear = ".attn." in name or ".mlp." in name
        weights[name if head else f"transformer.{name}"] = values.T if linear else values
    return model, weights, generator


def random_tokens(
    model: ImageGPT, generator: np.random.Generator, images: int, positions: int
) -> Tokens:
    return generator.integers(0, model.config.n_colors, (images, positions))


def assert_same(
    model: ImageGPT,
    weights: dict[str, Array],
    tokens: Tokens,
    mask: npt.NDArray[np.bool_] | None = None,
) -> None:
    """Check that features of all layers and logits agree."""
    expected = reference_features(
        tokens, weights, model.config.n_head, model.config.objective, mask
    )
    torch_mask = None if mask is None else torch.from_numpy(mask)
    with torch.no_grad():
        features = list(model.features(torch.from_numpy(tokens), torch_mask))
        logits = model(torch.from_numpy(tokens), torch_mask)
    assert len(features) == len(expected) == model.config.n_layer + 1
    for layer, (ours, reference) in enumerate(zip(features, expected, strict=True)):
        np.testing.assert_allclose(ours.numpy(), reference, **TOLERANCE, err_msg=f"layer {layer}")
    np.testing.assert_allclose(logits.numpy(), reference_logits(expected, weights), **TOLERANCE)


@pytest.mark.parametrize("positions", [16, 7, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_autoregressive_logits_and_features(bias: bool, positions: int) -> None:
    model, weights, generator = random_model(1, bias=bias)
    assert_same(model, weights, random_tokens(model, generator, 3, positions))


@pytest.mark.parametrize("positions", [16, 7])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_bert_logits_and_features(bias: bool, masked: bool, positions: int) -> None:
    model, weights, generator = random_model(2, bias=bias, objective="bert")
    tokens = random_tokens(model, generator, 3, positions)
    assert_same(model, weights, tokens, generator.random(tokens.shape) < 0.4 if masked else None)


@pytest.mark.parametrize("objective", ["autoregressive", "bert"])
@pytest.mark.parametrize("positions", [256, 257, 289])
def test_long_sequences(objective: str, positions: int) -> None:
    """A CPU may use plain attention up to 256 positions, and the fused kernel beyond."""
    settings = {"resolution": 17, "n_layer": 2, "n_embd": 16, "n_head": 2, "objective": objective}
    model, weights, generator = random_model(3, **settings)
    tokens = random_tokens(model, generator, 2, positions)
    assert_same(
        model,
        weights,
        tokens,
        generator.random(tokens.shape) < 0.15 if objective == "bert" else None,
    )


def test_autoregressive_loss() -> None:
    model, weights, generator = random_model(4)
    tokens = random_tokens(model, generator, 5, 16)
    features = reference_features(tokens, weights, model.config.n_head, "autoregressive")
    total, count = objectives.Autoregressive().loss(model, torch.from_numpy(tokens))
    expected = reference_autoregressive_loss(reference_logits(features, weights), tokens)
    assert total.item() / count == pytest.approx(expected, abs=1e-9)


def test_bert_loss_weights_images_equally() -> None:
    model, weights, generator = random_model(5, objective="bert")
    tokens = random_tokens(model, generator, 3, 16)
    mask = np.arange(16) < np.array([1, 5, 16])[:, None]
    features = reference_features(tokens, weights, model.config.n_head, "bert", mask)
    total, count = objectives.Bert().loss(model, torch.from_numpy(tokens), torch.from_numpy(mask))
    expected = reference_bert_loss(reference_logits(features, weights), tokens, mask)
    assert total.item() / count == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("objective", ["autoregressive", "bert"])
def test_class_head_and_joint_loss(objective: str) -> None:
    model, weights, generator = random_model(
        6, objective=objective, class_names=("cat", "dog", "ship")
    )
    tokens = random_tokens(model, generator, 4, 16)
    labels = generator.integers(0, 3, 4)
    features = reference_features(tokens, weights, model.config.n_head, objective)
    class_logits = reference_class_logits(features, weights)
    with torch.no_grad():
        ours = model.score(model.hidden(torch.from_numpy(tokens)).mean(dim=1)).numpy()
    np.testing.assert_allclose(ours, class_logits, **TOLERANCE)

    # A BERT model is fine-tuned on masked images.
    mask = generator.random(tokens.shape) < 0.3 if objective == "bert" else None
    if mask is not None:
        mask[:, 0] = True
        features = reference_features(tokens, weights, model.config.n_head, objective, mask)
        generative = reference_bert_loss(reference_logits(features, weights), tokens, mask)
    else:
        generative = reference_autoregressive_loss(reference_logits(features, weights), tokens)
    expected = (
        float(reference_nats(reference_class_logits(features, weights), labels).mean())
        + 0.5 * generative
    )
    masks = [] if mask is None else [torch.from_numpy(mask)]
    total, count = classifier.classification(
        model, torch.from_numpy(tokens), torch.from_numpy(labels), *masks, generation_weight=0.5
    )
    assert total.item() / count == pytest.approx(
        expected, rel=1e-6
    )  # the class part is computed in float32
