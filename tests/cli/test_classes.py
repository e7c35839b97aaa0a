"""Classes on the command line: samples of classes with guidance, and their classification."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import igpt as api
from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError
from igpt.model.config import ModelConfig
from igpt.model.transformer import ImageGPT
from igpt.sampling.sampler import sample

Igpt = Callable[..., subprocess.CompletedProcess[str]]
SHAPE = {"resolution": 8, "n_colors": 17, "n_layer": 2, "n_embd": 16, "n_head": 2}
CLASSES = ("cat", "dog", "owl")


def small_model(path: Path, digits: TokenDataset, **more: Any) -> Path:
    torch.manual_seed(0)
    model = ImageGPT(ModelConfig.layered(SHAPE, more), digits.palette)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(digits: TokenDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("models") / "three", digits, conditions=CLASSES)


def test_count_images_of_each_class_are_a_grid_and_files(
    igpt: Igpt, model: Path, tmp_path: Path
) -> None:
    grid, folder = tmp_path / "grid.png", tmp_path / "files"
    words = ("--class", "owl", "cat", "--guidance", 2, "--count", 9, "--precision", "fp32")
    done = igpt("sample", model, *words, "-o", grid, "--folder", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{grid}: 9 samples of each of owl, cat",
        f"{folder}: the same images, one by one",
    ]
    assert Image.open(grid).size == (8 * 66 + 2, 4 * 66 + 2), "two rows of each class"
    used = json.loads(grid.with_suffix(".json").read_text())
    assert (used["classes"], used["guidance"]) == (["owl", "cat"], 2.0)
    loaded = ImageGPT.from_pretrained(model)
    for name, label in (("owl", 2), ("cat", 0)):
        files = sorted((folder / name).iterdir())
        assert [file.name for file in files] == [f"{number:05d}.png" for number in range(9)]
        found = np.stack([np.asarray(Image.open(file)) for file in files])
        nothing, labels = torch.empty(9, 0, dtype=torch.long), torch.full((9,), label)
        tokens = sample(loaded, nothing, labels=labels, guidance=2.0, precision="fp32")
        expected = loaded.palette.inverse_transform(tokens.numpy().reshape(-1, 8, 8))
        np.testing.assert_array_equal(found, expected)
    again = api.sample(loaded, 9, classes="cat", guidance=2, precision="fp32")
    np.testing.assert_array_equal(np.stack(again), found)


def test_a_plain_model_is_sampled_as_before(igpt: Igpt, short_run: Path, tmp_path: Path) -> None:
    done = igpt("sample", short_run, "--count", 3, "-o", tmp_path / "a.png")
    assert done.stdout == f"{tmp_path / 'a.png'}: 3 samples\n"
    used = json.loads((tmp_path / "a.json").read_text())
    assert not used.keys() & {"classes", "guidance"}
    done = igpt(
        "sample", short_run, "--count", 3, "-o", tmp_path / "a.png", "--folder", tmp_path / "b"
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "b").glob("*.png"))) == 3
    done = igpt("sample", short_run, "-o", tmp_path / "c.png", "--folder", tmp_path / "b")
    assert done.returncode == 2
    assert "exists already; name a new folder for the images" in done.stderr
    assert not (tmp_path / "c.png").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--class", "cats"), "the model has no class 'cats'; did you mean 'cat'?"),
        (("--class", "xyz"), "the model has no class 'xyz'; choose from: cat, dog, owl"),
        (("--guidance", 2), "guidance needs a class; name one with --class"),
        (("--class", "cat", "--guidance", -1), "the guidance is"),
        (("--class", "../up", "--folder", "new"), "'../up' cannot be the name of a folder"),
    ],
    ids=str,
)
def test_mistakes_with_classes_are_one_line(
    igpt: Igpt,
    model: Path,
    words: tuple[object, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = igpt("sample", model, "-o", tmp_path / "x.png", *words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert said in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [("--class", "cat"), ("--guidance", 2)], ids=str)
def test_a_model_without_classes_says_how_to_train_one_with(
    igpt: Igpt, short_run: Path, digits: TokenDataset, words: tuple[object, ...], tmp_path: Path
) -> None:
    for verb, more in (("sample", ()), ("complete", ("--tokens", digits.path))):
        done = igpt(verb, short_run, *more, "-o", tmp_path / "x.png", *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "pretrain --condition labels` trains one" in done.stderr
        assert not (tmp_path / "x.png").exists()


def test_completions_of_a_class(
    igpt: Igpt, model: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    words = ("--tokens", digits.path, "--count", 2, "--precision", "fp32")
    pictures = []
    for name in ("cat", "owl"):
        out = tmp_path / f"{name}.png"
        done = igpt("complete", model, *words, "--class", name, "--guidance", 3, "-o", out)
        assert done.returncode == 0, done.stderr
        used = json.loads(out.with_suffix(".json").read_text())
        assert (used["classes"], used["guidance"]) == ([name], 3.0)
        pictures.append(out.read_bytes())
    assert pictures[0] != pictures[1]
    done = igpt("complete", model, *words, "--class", "cot", "-o", tmp_path / "x.png")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "did you mean 'cat'?" in done.stderr


def test_the_accuracy_on_images_in_folders_named_as_their_classes(
    igpt: Igpt, digits: TokenDataset, tmp_path: Path
) -> None:
    classifier = small_model(tmp_path / "classifier", digits, class_names=CLASSES)
    generator = np.random.default_rng(0)
    for folder in (*CLASSES, "other"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / folder / f"{number}.png")
    out = tmp_path / "said.json"
    done = igpt("classify", classifier, tmp_path / "images", "-o", out)
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    right = [
        answer["classes"][0]["class"] == Path(answer["file"]).parent.name
        for answer in written["images"]
    ]
    assert written["accuracy"]["images"] == 12
    assert written["accuracy"]["accuracy"] == sum(right) / 12
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"accuracy {sum(right) / 12:.1%} (95 % interval")
    assert last.endswith("on 12 images in folders named as their classes")
    done = igpt("classify", classifier, tmp_path / "images" / "other", "-o", out)
    assert "folders named" not in done.stdout
    assert json.loads(out.read_text())["accuracy"] is None


def test_names_of_classes_in_python(model: Path) -> None:
    images = api.sample(model, 2, classes=["dog", "cat"], precision="fp32")
    assert len(images) == 4
    alone = api.sample(model, 2, classes="cat", precision="fp32")
    np.testing.assert_array_equal(np.stack(images[2:]), np.stack(alone))
    (completed,) = api.complete(model, images[:1], class_name="owl", completions=2)
    assert len(completed) == 2
    with pytest.raises(InputError, match="did you mean 'dog'"):
        api.sample(model, 1, classes=["dogs"])
