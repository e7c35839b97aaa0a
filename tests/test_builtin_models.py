"""The built-in model: how its name is resolved, which commands use it, and what its card says.

The tests package a small model in its place (see `packaged` in conftest.py). The last one is on
the model that the package really contains.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from igpt import ImageGPT, ImageGPTFeatures, Palette, builtin_models
from igpt.data.images.photographs import SIDE, photographs
from igpt.data.images.transform import Transform
from igpt.errors import InputError
from igpt.model.cost import count_parameters
from igpt.model.objectives import pixel_losses
from igpt.report.card import card_results

Igpt = Callable[..., subprocess.CompletedProcess[str]]
NAME = builtin_models.DEFAULT_MODEL


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, with an image in it."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Image.fromarray(photographs()["flower"]).save("flower.jpg")
    return folder


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stdout + done.stderr
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    return done.stderr


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def require_loss_of_card(model: Path) -> None:
    """Compute the loss of `photographs`, and compare it with the one in the model's card."""
    loaded = ImageGPT.from_pretrained(model)
    transform = Transform(loaded.config.resolution)
    tokens = np.stack([transform(image) for image in photographs().values()])
    tokens = torch.from_numpy(loaded.palette.transform(tokens).astype(np.int64)).flatten(1)
    with torch.inference_mode():
        loss = float(pixel_losses(loaded(tokens), tokens).double().mean())
    (said,) = (
        one.metric_value
        for one in card_results(model / "README.md")
        if one.dataset_name == "scikit-learn-photographs"
    )
    assert loss == pytest.approx(said, abs=1e-4)
    assert f"8 images of `scikit-learn-photographs`: {said:.4f} nats/pixel" in (
        (model / "README.md").read_text()
    )


def test_the_photographs_are_eight_different_images() -> None:
    found = photographs()
    assert len(found) == 8
    assert {(image.shape, str(image.dtype)) for image in found.values()} == {
        ((SIDE, SIDE, 3), "uint8")
    }
    assert len({image.tobytes() for image in found.values()}) == 8
    assert min(image.std() for image in found.values()) > 20


def test_a_run_is_packaged_with_weights_in_bf16_and_its_card(
    builtin_model: Path, short_run: Path
) -> None:
    with safe_open(builtin_model / "model.safetensors", "pt") as stored:
        names = stored.keys()
        assert {stored.get_tensor(name).dtype for name in names} == {torch.bfloat16}
    expected = ImageGPT.from_pretrained(short_run / "model").state_dict()
    found = ImageGPT.from_pretrained(NAME)
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].bfloat16().float()), name
    require_loss_of_card(builtin_model)
    card = (builtin_model / "README.md").read_text()
    assert "- terms of use: Tiny ImageNet consists of images of ImageNet" in card
    assert "license: other" in card
    assert "$ igpt prepare digits -o TOKENS --size 8\n" in card
    assert re.search(r"\$ igpt pretrain TOKENS -o RUN .*--batch-size 16 --steps 24 ", card)
    assert f'from_pretrained("{NAME}")' in card
    for picture in re.findall(r"\]\((\S+\.png)\)", card):
        assert (builtin_model / picture).is_file()
    probe = (builtin_model / "probe.json").read_text()
    assert f'"model": "{NAME}"' in probe
    assert str(short_run.parents[1]) not in probe, "no paths of the machine"


def test_a_local_model_of_the_same_name_is_used_instead(
    builtin_model: Path, folder: Path, short_run: Path
) -> None:
    (folder / NAME).mkdir()
    (folder / NAME / "image.png").touch()
    expected = ImageGPT.from_pretrained(builtin_model).state_dict()
    found = ImageGPT.from_pretrained(NAME).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    shutil.copytree(short_run / "model", folder / NAME, dirs_exist_ok=True)
    found = ImageGPT.from_pretrained(NAME).state_dict()
    assert not all(torch.equal(found[name], expected[name]) for name in expected)


def test_names_that_resemble_a_built_in_one(igpt: Igpt, builtin_model: Path, folder: Path) -> None:
    said = "no model 'photo-16'; the nearest built-in name is 'photos-16'"
    with pytest.raises(InputError, match=re.escape(said)):
        ImageGPT.from_pretrained("photo-16")
    for words in (("sample", "photo-16"), ("complete", "photo-16", "flower.jpg")):
        assert said in refusal(igpt(*words))
    assert "no model directory nothing" in refusal(igpt("sample", "nothing"))
    assert names_in(folder) == {"flower.jpg"}


@pytest.mark.usefixtures("no_builtin_model")
def test_a_build_without_the_model_says_so(igpt: Igpt, folder: Path) -> None:
    said = "this build of igpt has no built-in model photos-16; give a run or model directory"
    for words in (
        ("complete", "flower.jpg"),
        ("sample",),
        ("score", "."),
        ("features", ".", "-o", "features.npz"),
        ("app",),
        ("palette", "digits", "--size", "8", "--palette", NAME),
    ):
        assert said in refusal(igpt(*words)), words
    done = igpt("models")
    assert done.returncode == 0
    assert done.stdout.startswith("This build of igpt has no built-in model.\n")
    assert names_in(folder) == {"flower.jpg"}


@pytest.mark.usefixtures("builtin_model")
def test_commands_without_a_model_use_the_built_in_one(igpt: Igpt, folder: Path) -> None:
    done = igpt("complete", "flower.jpg")
    assert done.stdout.startswith("completions.png: from left to right"), done.stderr
    alone = Path("completions.png").read_bytes()
    assert igpt("complete", NAME, "flower.jpg").returncode == 0
    assert Path("completions.png").read_bytes() == alone
    shutil.copy("flower.jpg", "other.jpg")
    assert igpt("complete", "flower.jpg", "other.jpg", "-o", "two.png").returncode == 0
    assert Image.open("two.png").height > 1.5 * Image.open("completions.png").height
    assert igpt("sample", "--count", 2).stdout == "samples.png: 2 samples\n"
    Path("images").mkdir()
    shutil.move("flower.jpg", "images")
    done = igpt("score", "images")
    assert (done.returncode, json.loads(Path("score-images.json").read_text())["model"]) == (
        0,
        NAME,
    )
    done = igpt("features", "images", "-o", "features.npz")
    layer = json.loads((builtin_models.folder_of(NAME) / "probe.json").read_text())["best_layer"]
    assert f"of layer {layer} of 2" in done.stdout, done.stderr
    estimator = ImageGPTFeatures(NAME).fit(None)
    assert estimator.layer_ == layer
    np.testing.assert_allclose(
        estimator.transform(["images/flower.jpg"]), np.load("features.npz")["features"], atol=1e-5
    )
    assert Palette.load(NAME).fingerprint == ImageGPT.from_pretrained(NAME).palette.fingerprint


@pytest.mark.usefixtures("builtin_model")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("complete",), "give image files to complete, or --tokens"),
        (("complete", NAME), "give image files to complete, or --tokens"),
        (("complete", "none.jpg"), "no such file: none.jpg"),
        (("complete", "none.jpg", "flower.jpg"), "no such file: none.jpg"),
        (("complete", "flower.jpg", "--tokens", "t"), "give image files to complete, or --tokens"),
        (("complete", "none", "flower.jpg"), "no model directory none"),
        (("score", NAME), f"{NAME} is a model; name the images after it"),
        (("features", "run", "-o", "f.npz"), "run is a model; name the images after it"),
        (("score", "nothing"), "nothing"),
        (("report", NAME), f"{NAME} is a built-in model, not a run; its card is /"),
        (("card", NAME, "me/model"), f"{NAME} is a built-in model, not a run"),
        (("push", NAME, "me/model"), f"{NAME} is a built-in model, not a run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_line(
    igpt: Igpt,
    folder: Path,
    short_run: Path,
    words: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    Path("run").symlink_to(short_run)
    assert said in refusal(igpt(*words))
    assert names_in(folder) == {"run", "flower.jpg"}


@pytest.mark.parametrize("columns", [80, 120])
def test_the_models_are_listed(
    igpt: Igpt, builtin_model: Path, folder: Path, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    done = igpt("models", "-o", "models.json")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    (row,) = (line for line in lines if line.startswith(NAME))
    listed = json.loads(Path("models.json").read_text())
    (model,) = listed["built_in"]
    stored = ImageGPT.from_pretrained(builtin_model)
    assert model["parameters"] == count_parameters(stored.config)
    (score,) = (builtin_model.parents[1] / "run-packaged").glob("score-digits*.json")
    assert model["loss"] == pytest.approx(json.loads(score.read_text())["nats_per_pixel"])
    for words in ("8", "17", f"{model['loss']:.3f} (test)", "digits"):
        assert words in row
    for preset in listed["presets"]:
        (row,) = (line for line in lines if line.startswith(f"{preset['name']} "))
        assert f"{preset['settings']['n_layer']} x {preset['settings']['n_embd']} " in row
        assert f" {preset['settings']['learning_rate']:g} " in row


def test_the_model_in_the_package() -> None:
    model = builtin_models.folder_of(NAME)
    assert (model / "model.safetensors").stat().st_size < 12_000_000
    with safe_open(model / "model.safetensors", "pt") as stored:
        names = stored.keys()
        assert {stored.get_tensor(name).dtype for name in names} == {torch.bfloat16}
    config = ImageGPT.from_pretrained(NAME).config
    assert (config.resolution, config.n_colors, config.objective) == (16, 512, "autoregressive")
    assert 4e6 < count_parameters(config) < 6e6
    require_loss_of_card(model)
    card = (model / "README.md").read_text()
    assert "non-commercial research" in card
    assert "Accuracy of a linear probe of every layer" in card
    assert names_in(model) == {
        *("config.json", "model.safetensors", "preprocessor_config.json"),
        *("README.md", "probe.json", "samples.png", "completions.png"),
    }
