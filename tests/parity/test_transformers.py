"""ImageGPT against transformers: weights are converted both ways, and the logits are equal.

transformers' model does not shift its input: it gets the start-of-sequence token and all pixels but
the last.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTImageProcessor,
    pipeline,
)

from igpt.data.images.palette import Palette
from igpt.errors import InputError
from igpt.model.classifier import class_logits
from igpt.model.config import ModelConfig
from igpt.model.transformer import ImageGPT
from igpt.sampling.sampler import sample

N_COLORS, RESOLUTION, N_LAYER = 16, 4, 2
CLASSES = ("cat", "dog", "ship")
TOLERANCE = {"rtol": 0, "atol": 1e-9}


def randomize(model: nn.Module, seed: int) -> None:
    """Set every parameter to random float64 values, gains and biases too."""
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    for name, parameter in model.named_parameters():
        center = 1.0 if ".ln_" in f".{name}" else 0.0
        parameter.data = center + 0.4 * torch.randn(
            parameter.shape, dtype=torch.float64, generator=generator
        )


def random_tokens(seed: int, images: int = 3) -> Tensor:
    return torch.randint(
        0, N_COLORS, (images, RESOLUTION**2), generator=torch.Generator().manual_seed(seed)
    )


def shifted(tokens: Tensor) -> Tensor:
    """Return the input that transformers' model needs: sos, x1 .. x(n-1)."""
    return torch.cat([torch.full((len(tokens), 1), N_COLORS), tokens[:, :-1]], dim=1)


def hub_config(**changes: Any) -> ImageGPTConfig:
    shape = {
        "vocab_size": N_COLORS + 1,
        "n_positions": RESOLUTION**2,
        "n_embd": 24,
        "n_layer": N_LAYER,
        "n_head": 3,
    }
    return ImageGPTConfig(**{**shape, **changes})


@pytest.fixture(scope="module")
def hub_model() -> ImageGPTForCausalImageModeling:
    model = ImageGPTForCausalImageModeling(hub_config())
    randomize(model, seed=1)
    return model


def assert_same(ours: ImageGPT, theirs: ImageGPTForCausalImageModeling) -> None:
    """Check that logits and features agree: their residuals, normalized by their own norms."""
    tokens = random_tokens(seed=2)
    with torch.no_grad():
        output = theirs(shifted(tokens), output_hidden_states=True)
        torch.testing.assert_close(ours(tokens), output.logits, **TOLERANCE)
        *residuals, final = output.hidden_states
        expected = [
            block.ln_1(x) for block, x in zip(theirs.transformer.h, residuals, strict=True)
        ] + [final]
        for feature, reference in zip(ours.features(tokens), expected, strict=True):
            torch.testing.assert_close(feature, reference, **TOLERANCE)


@pytest.mark.parametrize("max_shard_size", ["1GB", "10KB"])
def test_models_saved_by_transformers_load(
    hub_model: ImageGPTForCausalImageModeling, max_shard_size: str, tmp_path: Path
) -> None:
    hub_model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "10KB")
    ours = ImageGPT.from_pretrained(tmp_path, dtype=torch.float64)
    assert ours.config == ModelConfig(
        resolution=RESOLUTION, n_colors=N_COLORS, n_layer=N_LAYER, n_embd=24, n_head=3, bias=True
    )
    assert ours.palette is None
    assert_same(ours, hub_model)


def test_old_pickled_weights_load(
    hub_model: ImageGPTForCausalImageModeling, tmp_path: Path
) -> None:
    """A directory written by transformers 4.11, whose weights also contained each layer's causal
    mask."""
    state = dict(hub_model.state_dict())
    causal = torch.ones(RESOLUTION**2, RESOLUTION**2, dtype=torch.uint8).tril()[None, None]
    for layer in range(N_LAYER):
        state[f"transformer.h.{layer}.attn.bias"] = causal
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, tmp_path / "pytorch_model.bin")
    config = {
        "activation_function": "quick_gelu",
        "layer_norm_epsilon": 1e-05,
        "model_type": "imagegpt",
        "n_embd": 24,
        "n_head": 3,
        "n_inner": None,
        "n_layer": N_LAYER,
        "n_positions": RESOLUTION**2,
        "scale_attn_weights": True,
        "torch_dtype": "float32",
        "vocab_size": N_COLORS + 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    clusters = np.random.default_rng(3).uniform(-1, 1, (N_COLORS, 3))
    preprocessor = {
        "clusters": clusters.tolist(),
        "feature_extractor_type": "ImageGPTFeatureExtractor",
        "size": 4,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    ours = ImageGPT.from_pretrained(tmp_path, dtype=torch.float64)
    assert ours.palette is not None
    np.testing.assert_array_equal(ours.palette.centers_, clusters.astype(np.float32))
    assert_same(ours, hub_model)


def test_biases_of_zero_are_dropped(tmp_path: Path) -> None:
    """As in OpenAI's converted checkpoints: the model is the paper's, without biases."""
    theirs = ImageGPTForCausalImageModeling(hub_config())
    randomize(theirs, seed=4)
    for name, parameter in theirs.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
    theirs.save_pretrained(tmp_path)
    ours = ImageGPT.from_pretrained(tmp_path, dtype=torch.float64)
    assert not ours.config.bias
    assert not any(name.endswith(".bias") for name, _ in ours.named_parameters())
    assert_same(ours, theirs)


@pytest.mark.parametrize("bias", [False, True])
def test_models_saved_by_igpt_load_in_transformers(bias: bool, tmp_path: Path) -> None:
    config = ModelConfig(
        resolution=RESOLUTION, n_colors=N_COLORS, n_layer=N_LAYER, n_embd=24, n_head=3, bias=bias
    )
    ours = ImageGPT(config)
    randomize(ours, seed=5)
    ours.save_pretrained(tmp_path / "model")
    theirs, info = ImageGPTForCausalImageModeling.from_pretrained(
        tmp_path / "model", output_loading_info=True, dtype=torch.float64
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # In training mode too: the paper has no dropout.
    assert_same(ours, theirs.train())


@pytest.mark.parametrize("biases", ["zero", "one", "all"])
def test_weights_are_equal_after_conversion_in_both_directions(biases: str, tmp_path: Path) -> None:
    """From a model with dropout in its configuration; all biases are kept if one is not zero."""
    theirs = ImageGPTForCausalImageModeling(hub_config())
    randomize(theirs, seed=9)
    for name, parameter in theirs.named_parameters():
        if name.endswith(".bias") and biases != "all":
            nn.init.zeros_(parameter)
    if biases == "one":
        theirs.transformer.h[1].mlp.c_fc.bias.data[5] = 1e-30
    theirs.save_pretrained(tmp_path / "theirs")
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert [written[f"{place}_pdrop"] for place in ("resid", "embd", "attn")] == [0.1, 0.1, 0.1]
    ours = ImageGPT.from_pretrained(tmp_path / "theirs", dtype=torch.float64)
    assert ours.config.bias == (biases != "zero")
    assert_same(ours.train(), theirs)  # our model has no dropout
    ours.save_pretrained(tmp_path / "ours")
    back = ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "ours", dtype=torch.float64)
    expected = theirs.state_dict()
    assert back.state_dict().keys() == expected.keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    again = ImageGPT.from_pretrained(tmp_path / "ours", dtype=torch.float64).state_dict()
    assert again.keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in again.items())


@pytest.mark.parametrize("given", [0, 5])
def test_both_generate_the_same_images(given: int, tmp_path: Path) -> None:
    """From the start token and from a prefix, with the likeliest colour of every pixel."""
    ours = ImageGPT(
        ModelConfig(resolution=RESOLUTION, n_colors=N_COLORS, n_layer=N_LAYER, n_embd=24, n_head=3)
    )
    randomize(ours, seed=10)
    ours.save_pretrained(tmp_path)
    theirs = ImageGPTForCausalImageModeling.from_pretrained(tmp_path, dtype=torch.float64)
    prefix = random_tokens(seed=11, images=6)[:, :given]
    fed = torch.cat([torch.full((6, 1), N_COLORS), prefix], dim=1)
    generated = theirs.generate(fed, do_sample=False, max_length=RESOLUTION**2 + 1)[:, 1:]
    assert generated.shape == (6, RESOLUTION**2)
    assert torch.equal(generated, sample(ours, prefix, temperature=0, precision="fp32"))
    assert torch.equal(generated[:, :given], prefix)
    assert len(generated[0].unique()) > 3, "a model that repeats one colour is a weak test"
    if given:
        assert len(generated.unique(dim=0)) == 6


def classifier(path: Path, objective: str) -> tuple[ImageGPT, ImageGPTForImageClassification]:
    """Return a random classifier, and the model that transformers reads from its directory."""
    config = ModelConfig(
        resolution=RESOLUTION,
        n_colors=N_COLORS,
        n_layer=N_LAYER,
        n_embd=24,
        n_head=3,
        class_names=CLASSES,
        objective=objective,
    )
    ours = ImageGPT(
        config, Palette.from_centers(np.random.default_rng(6).uniform(-1, 1, (N_COLORS, 3)))
    )
    randomize(ours, seed=6)
    ours.save_pretrained(path)
    theirs, info = ImageGPTForImageClassification.from_pretrained(
        path, output_loading_info=True, dtype=torch.float64
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert set(info["unexpected_keys"]) == {
        "lm_head.weight"
    }  # their classifier has no generative head
    return ours, theirs


def test_a_classifier_loads_in_transformers_and_agrees_given_the_start_token(
    tmp_path: Path,
) -> None:
    ours, theirs = classifier(tmp_path, "autoregressive")
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    tokens = random_tokens(seed=7)
    with torch.no_grad():
        torch.testing.assert_close(
            class_logits(ours, tokens), theirs(shifted(tokens)).logits, **TOLERANCE
        )


def test_unshifted_tokens_give_other_logits(tmp_path: Path) -> None:
    """transformers' image processor gives the pixels unshifted and without a start token."""
    ours, theirs = classifier(tmp_path, "autoregressive")
    tokens = random_tokens(seed=7)
    with torch.no_grad():
        assert (class_logits(ours, tokens) - theirs(tokens).logits).abs().max() > 0.1


def test_transformers_computes_bert_classifiers_wrongly(tmp_path: Path) -> None:
    """transformers has no ImageGPT without a causal mask: its output is meaningless."""
    ours, theirs = classifier(tmp_path, "bert")
    tokens = random_tokens(seed=7)
    with torch.no_grad():
        for fed in (tokens, shifted(tokens)):
            assert (class_logits(ours, tokens) - theirs(fed).logits).abs().max() > 0.1


def test_a_classifier_without_a_generative_head_is_refused(tmp_path: Path) -> None:
    ImageGPTForImageClassification(hub_config(num_labels=3)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lm_head\.weight is missing"):
        ImageGPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "gelu"},
        {"n_inner": 40},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"layer_norm_epsilon": 1e-6},
        {"n_positions": 15},
    ],
    ids=lambda change: next(iter(change)),
)
def test_unsupported_settings_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    ImageGPTForCausalImageModeling(hub_config(**change)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=rf"config\.json has {next(iter(change))} = "):
        ImageGPT.from_pretrained(tmp_path)


def test_transformers_image_processor_reads_our_palette(tmp_path: Path) -> None:
    generator = np.random.default_rng(8)
    palette = Palette.from_centers(generator.uniform(-1, 1, (N_COLORS, 3)))
    config = ModelConfig(resolution=RESOLUTION, n_colors=N_COLORS, n_layer=1, n_embd=8, n_head=2)
    ImageGPT(config, palette).save_pretrained(tmp_path / "model")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(np.asarray(processor.clusters, np.float32), palette.centers_)
    pixels = generator.integers(0, 256, (5, RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
    theirs = processor(
        [Image.fromarray(image) for image in pixels], input_data_format="channels_last"
    )["input_ids"]
    np.testing.assert_array_equal(np.asarray(theirs), palette.transform(pixels).reshape(5, -1))

    processor.save_pretrained(tmp_path / "processor")
    assert Palette.load(tmp_path / "processor").fingerprint == palette.fingerprint


class ShiftedProcessor(ImageGPTImageProcessor):
    """transformers' image processor with a shift, as in docs/hub.md."""

    def __call__(self, images: Any, **options: Any) -> Any:
        found = super().__call__(images, **options)
        tokens = torch.as_tensor(found["input_ids"]).flatten(1)
        start = torch.full((len(tokens), 1), len(self.clusters))
        found["input_ids"] = torch.cat([start, tokens[:, :-1]], dim=1)
        return found


def test_transformers_pipelines_run_and_agree_if_their_processor_shifts(tmp_path: Path) -> None:
    """Without the shift they give other probabilities and features."""
    ours, _ = classifier(tmp_path, "autoregressive")
    assert ours.palette is not None
    pixels = np.random.default_rng(12).integers(
        0, 256, (3, RESOLUTION, RESOLUTION, 3), dtype=np.uint8
    )
    images = [Image.fromarray(image) for image in pixels]
    tokens = torch.from_numpy(ours.palette.transform(pixels).reshape(3, -1).astype(np.int64))
    with torch.no_grad():
        probabilities = class_logits(ours, tokens).softmax(-1)
        *_, features = ours.features(tokens)
    for processor, agrees in ((None, False), (ShiftedProcessor.from_pretrained(tmp_path), True)):
        chosen = {"model": str(tmp_path), "image_processor": processor, "dtype": torch.float64}
        answers = pipeline("image-classification", **chosen)(images)
        theirs = torch.tensor(
            [
                [{c["label"]: c["score"] for c in image}[name] for name in CLASSES]
                for image in answers
            ]
        )
        assert ((theirs - probabilities).abs().max() < 1e-6) == agrees
        found = torch.tensor(pipeline("image-feature-extraction", **chosen)(images))[:, 0]
        assert found.shape == features.shape
        assert ((found - features).abs().max() < 1e-5) == agrees
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "ImageGPTModel"


@pytest.mark.parametrize(
    "variant",
    [{"positions": "rotary"}, {"value_residual": True}],
    ids=str,
)
@pytest.mark.parametrize(
    "more", [{}, {"objective": "bert", "class_names": ("a", "b"), "bias": True}], ids=str
)
def test_transformers_refuses_what_only_igpt_computes(
    variant: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    shape = {
        "resolution": RESOLUTION,
        "n_colors": N_COLORS,
        "n_layer": N_LAYER,
        "n_embd": 24,
        "n_head": 3,
    }
    ImageGPT(ModelConfig.layered(shape, variant, more)).save_pretrained(tmp_path)
    for reader in (AutoConfig, ImageGPTForCausalImageModeling):
        with pytest.raises((ValueError, KeyError), match="igpt"):
            reader.from_pretrained(tmp_path)


def test_transformers_refuses_class_conditional_models(tmp_path: Path) -> None:
    shape = {"n_layer": 1, "n_embd": 8, "n_head": 2, "conditions": ("cat", "dog")}
    config = ModelConfig.layered({"resolution": RESOLUTION, "n_colors": N_COLORS, **shape})
    ImageGPT(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model type `igpt`"):
        AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(KeyError, match="a class-conditional model: read it with igpt"):
        ImageGPTForCausalImageModeling.from_pretrained(tmp_path)
