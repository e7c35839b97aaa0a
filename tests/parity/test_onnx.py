"""Exported graphs under ONNX Runtime against ImageGPT, in float32.

B images, T positions of a step, S positions of the cache, n pixels, L layers.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from igpt.data.images.palette import Palette
from igpt.errors import InputError
from igpt.model.classifier import class_logits
from igpt.model.config import ModelConfig
from igpt.model.objectives import OBJECTIVES, Bert, register
from igpt.model.onnx_export import export_onnx
from igpt.model.transformer import ImageGPT

SHAPE = {"resolution": 4, "n_colors": 11, "n_layer": 3, "n_embd": 24, "n_head": 2}
IMAGES, N, START = 3, 16, 11
VARIANTS: dict[str, dict[str, object]] = {
    "learned": {},
    "odd head width": {"n_head": 8},
    "rotary": {"positions": "rotary"},
    "value residual": {"value_residual": True},
    "bias": {"bias": True},
    "all": {"positions": "rotary", "value_residual": True, "bias": True},
}
TOLERANCE = {"rtol": 0, "atol": 1e-4}


def random_model(palette: bool = True, **settings: object) -> ImageGPT:
    """A model whose weights are all random."""
    config = ModelConfig.model_validate({**SHAPE, **settings})
    colors = np.random.default_rng(1).uniform(-1, 1, (config.n_colors, 3))
    model = ImageGPT(config, Palette.from_centers(colors) if palette else None)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        center = 1.0 if "ln_" in name else 0.0
        parameter.data = center + 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # it warns of every cache that is copied
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(path: Path, **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
    opened = session(path)
    names = [output.name for output in opened.get_outputs()]
    return dict(zip(names, opened.run(names, inputs), strict=True))


def random_tokens(model: ImageGPT) -> NDArray[np.int64]:
    return np.random.default_rng(3).integers(0, model.config.n_colors, (IMAGES, N))


def expected_logits(model: ImageGPT, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.from_numpy(tokens)).numpy()
    return logits


def inputs_of(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """The start token, and all tokens except the last."""
    return np.concatenate([np.full((len(tokens), 1), START), tokens[:, :-1]], axis=1)


def empty_cache(
    opened: ort.InferenceSession, model: ImageGPT, positions: int = N
) -> dict[str, NDArray[np.float32]]:
    """A cache without positions."""
    config = model.config
    shape = (IMAGES, config.n_head, positions, config.n_embd // config.n_head)
    names = [entry.name for entry in opened.get_inputs() if entry.name.startswith("past.")]
    assert len(names) == 2 * config.n_layer
    return {name: np.zeros(shape, np.float32) for name in names}


@pytest.mark.parametrize("ends", [range(1, N + 1), (N,), (6, *range(7, N + 1)), (5, 9, N)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_and_prefills_give_the_logits_of_the_model(
    variant: str, ends: tuple[int, ...], tmp_path: Path
) -> None:
    model = random_model(**VARIANTS[variant])
    export_onnx(model, tmp_path / "new")
    tokens = random_tokens(model)
    opened = session(tmp_path / "new" / "step.onnx")
    cache, parts = empty_cache(opened, model), []
    for first, end in pairwise((0, *ends)):
        feed = {"tokens": inputs_of(tokens)[:, first:end], "position": np.full(IMAGES, first)}
        logits, *present = opened.run(None, {**feed, **cache})
        cache = dict(zip(cache, present, strict=True))
        parts.append(logits)
    found = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(found, expected_logits(model, tokens), **TOLERANCE)


def test_a_cache_may_be_shorter_and_positions_may_differ(tmp_path: Path) -> None:
    model = random_model()
    export_onnx(model, tmp_path / "new")
    tokens = random_tokens(model)
    opened = session(tmp_path / "new" / "step.onnx")
    feed = {"tokens": inputs_of(tokens)[:, :5], "position": np.zeros(IMAGES, np.int64)}
    cache = empty_cache(opened, model, 6)
    _, *present = opened.run(None, {**feed, **cache})
    position = np.array([5, 2, 4])
    one = inputs_of(tokens)[np.arange(IMAGES), position][:, None]
    feed = {"tokens": one, "position": position}
    logits = opened.run(["logits"], {**feed, **dict(zip(cache, present, strict=True))})[0]
    expected = expected_logits(model, tokens)[np.arange(IMAGES), position]
    np.testing.assert_allclose(logits[:, 0], expected, **TOLERANCE)


def test_the_cache_may_be_updated_in_place(tmp_path: Path) -> None:
    model = random_model()
    export_onnx(model, tmp_path / "new")
    tokens = random_tokens(model)
    opened = session(tmp_path / "new" / "step.onnx")
    binding, cache = opened.io_binding(), empty_cache(opened, model)
    for name, value in cache.items():
        memory = ort.OrtValue.ortvalue_from_numpy(value)
        binding.bind_ortvalue_input(name, memory)
        binding.bind_ortvalue_output(name.replace("past", "present"), memory)
    binding.bind_output("logits")
    for position in range(N):
        binding.bind_cpu_input("tokens", inputs_of(tokens)[:, position : position + 1].copy())
        binding.bind_cpu_input("position", np.full(IMAGES, position))
        opened.run_with_iobinding(binding)
    logits = binding.get_outputs()[-1].numpy()
    np.testing.assert_allclose(logits[:, 0], expected_logits(model, tokens)[:, -1], **TOLERANCE)


@pytest.mark.parametrize("objective", ["autoregressive", "bert"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_features_of_pixels_are_those_of_the_model(
    variant: str, objective: str, tmp_path: Path
) -> None:
    model = random_model(objective=objective, class_names=("cat", "dog"), **VARIANTS[variant])
    export_onnx(model, tmp_path / "new")
    pixels = np.random.default_rng(4).integers(0, 256, (IMAGES, 4, 4, 3), dtype=np.uint8)
    found = run(tmp_path / "new" / "features.onnx", pixels=pixels)
    assert model.palette is not None
    tokens = model.palette.transform(pixels).reshape(IMAGES, N).astype(np.int64)
    np.testing.assert_array_equal(found["tokens"], tokens)
    with torch.no_grad():
        layers = [layer.mean(1) for layer in model.features(torch.from_numpy(tokens))]
        classes = class_logits(model, torch.from_numpy(tokens))
    np.testing.assert_allclose(found["features"], torch.stack(layers, 1).numpy(), **TOLERANCE)
    np.testing.assert_allclose(found["class_logits"], classes.numpy(), **TOLERANCE)


def test_a_model_without_a_palette_takes_tokens(tmp_path: Path) -> None:
    model = random_model(palette=False)
    export_onnx(model, tmp_path / "new")
    tokens = random_tokens(model)
    found = run(tmp_path / "new" / "features.onnx", tokens=tokens)
    with torch.no_grad():
        layers = [layer.mean(1) for layer in model.features(torch.from_numpy(tokens))]
    np.testing.assert_allclose(found["features"], torch.stack(layers, 1).numpy(), **TOLERANCE)
    assert not (tmp_path / "new" / "palette.npy").exists()


@pytest.mark.parametrize("count", [2, 300])
def test_nearest_colours_are_exact(count: int, tmp_path: Path) -> None:
    """Colours that pixels are equally near to, and colours that are near to each other."""
    rng = np.random.default_rng(5)
    levels = rng.integers(100, 110, (count, 3)) if count > 2 else np.array([[0, 0, 0], [2, 0, 0]])
    palette = Palette.from_centers(levels / 127.5 - 1)
    model = random_model(n_colors=count)
    model.palette = palette
    export_onnx(model, tmp_path / "new")
    low, high = (98, 112) if count > 2 else (0, 3)
    pixels = rng.integers(low, high, (200, 4, 4, 3), dtype=np.uint8)
    opened = session(tmp_path / "new" / "features.onnx")
    tokens = opened.run(["tokens"], {"pixels": pixels})[0]
    np.testing.assert_array_equal(tokens, palette.transform(pixels).reshape(200, N))


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_masked_pixels_of_a_bert_model(positions: str, tmp_path: Path) -> None:
    model = random_model(objective="bert", positions=positions)
    export_onnx(model, tmp_path / "new")
    assert not (tmp_path / "new" / "step.onnx").exists()
    tokens = random_tokens(model)
    mask = np.random.default_rng(6).random(tokens.shape) < 0.4
    found = run(tmp_path / "new" / "forward.onnx", tokens=tokens, mask=mask)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens), torch.from_numpy(mask)).numpy()
    np.testing.assert_allclose(found["logits"], expected, **TOLERANCE)


def test_the_files_are_valid_and_describe_themselves(tmp_path: Path) -> None:
    model = random_model()
    assert model.palette is not None
    export_onnx(model, tmp_path / "new", int8=True)
    names = {"step.onnx", "step-int8.onnx", "features.onnx", "weights.bin"}
    found = {file.name for file in (tmp_path / "new").iterdir()}
    assert found == names | {"step-int8.onnx.data", "palette.npy", "export.json"}
    for name in ("step.onnx", "features.onnx"):
        onnx.checker.check_model(str(tmp_path / "new" / name), full_check=True)
        about = session(tmp_path / "new" / name).get_modelmeta()
        assert about.producer_name == "igpt"
        known = about.custom_metadata_map
        assert known["format"] == "igpt-onnx"
        assert known["objective"] == "autoregressive"
        assert {
            key: json.loads(known[key]) for key in ("version", "start_token", "resolution")
        } == {
            "version": 1,
            "start_token": START,
            "resolution": 4,
        }
        assert json.loads(known["palette"]) == model.palette.colors.tolist()
    assert Palette.load(tmp_path / "new" / "palette.npy").fingerprint == model.palette.fingerprint
    told = json.loads((tmp_path / "new" / "export.json").read_text())
    assert (told["start_token"], told["opset"]) == (START, 24)
    assert told["files"].keys() == {"step.onnx", "step-int8.onnx", "features.onnx"}
    for name, signature in told["files"].items():
        opened = session(tmp_path / "new" / name)
        for values, entries in (
            (opened.get_inputs(), signature["inputs"]),
            (opened.get_outputs(), signature["outputs"]),
        ):
            assert {value.name: value.shape for value in values} == {
                key: entry["shape"] for key, entry in entries.items()
            }


def test_a_step_in_int8_is_near(tmp_path: Path) -> None:
    model = random_model(n_embd=64, n_head=2)
    export_onnx(model, tmp_path / "new", int8=True)
    tokens = random_tokens(model)
    opened = session(tmp_path / "new" / "step-int8.onnx")
    feed = {"tokens": inputs_of(tokens), "position": np.zeros(IMAGES, np.int64)}
    logits = opened.run(["logits"], {**feed, **empty_cache(opened, model)})[0]
    expected = expected_logits(model, tokens)
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert 0 < error < 0.1


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a model trained as 'autoregressive'"):
        export_onnx(random_model(objective="bert"), tmp_path / "new", int8=True)

    class Doubled(Bert):
        name = "doubled"

        def embed(self, model: Any, tokens: Any, mask: Any) -> Any:
            return 2 * super().embed(model, tokens, mask)

    register(Doubled())
    try:
        model = random_model(objective="doubled")
        with pytest.raises(InputError, match="trained as 'doubled' cannot be exported"):
            export_onnx(model, tmp_path / "new")
    finally:
        del OBJECTIVES["doubled"]
    assert list(tmp_path.iterdir()) == []


def test_a_class_is_given_by_its_start_token(tmp_path: Path) -> None:
    model = random_model(conditions=("cat", "dog"))
    export_onnx(model, tmp_path / "new")
    tokens = random_tokens(model)
    told = json.loads((tmp_path / "new" / "export.json").read_text())
    start = told["start_tokens_of_classes"]["dog"]
    inputs = inputs_of(tokens)
    inputs[:, 0] = start
    opened = session(tmp_path / "new" / "step.onnx")
    feed = {"tokens": inputs, "position": np.zeros(IMAGES, np.int64)}
    logits = opened.run(["logits"], {**feed, **empty_cache(opened, model)})[0]
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens), labels=torch.ones(IMAGES, dtype=torch.long))
    np.testing.assert_allclose(logits, expected.numpy(), **TOLERANCE)
