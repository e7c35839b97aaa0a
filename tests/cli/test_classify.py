"""`igpt classify`: it prints and writes what the classifier returns, and mistakes end in one
line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from igpt.data.tokens.dataset import TokenDataset
from igpt.model.classifier import class_logits, predict
from igpt.model.config import ModelConfig
from igpt.model.transformer import ImageGPT

CLASSES = ("up", "down", "left", "right")


def classifier(path: Path, digits: TokenDataset, objective: str) -> ImageGPT:
    torch.manual_seed(0)
    shape = {
        "resolution": 8,
        "n_colors": 17,
        "n_layer": 2,
        "n_embd": 16,
        "n_head": 2,
        "objective": objective,
    }
    model = ImageGPT(ModelConfig.layered({**shape, "class_names": CLASSES}), digits.palette)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(path)
    return model


@pytest.fixture
def images(digits: TokenDataset, tmp_path: Path) -> dict[Path, np.ndarray]:
    """Return three pictures of the resolution, in the palette's colours, and their tokens."""
    made = {}
    for number, tokens in enumerate(digits["test"].rows([0, 1, 2])):
        path = tmp_path / f"{number}.png"
        Image.fromarray(digits.palette.inverse_transform(tokens.reshape(8, 8))).save(path)
        made[path] = tokens
    return made


def test_the_likeliest_classes_are_printed_and_written(
    igpt, digits: TokenDataset, images: dict[Path, np.ndarray], tmp_path: Path
) -> None:
    model = classifier(tmp_path / "model", digits, "autoregressive")
    done = igpt("classify", tmp_path / "model", *images, "--top", 2, "-o", tmp_path / "said.json")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "said.json").read_text())
    assert (written["format"], written["version"], written["masks"]) == ("igpt-classify", 1, 0)
    assert written["environment"]["torch"] == torch.__version__
    for line, answer, (path, tokens) in zip(
        done.stdout.splitlines(), written["images"], images.items(), strict=True
    ):
        with torch.no_grad():
            probabilities = class_logits(
                model, torch.from_numpy(tokens.astype(np.int64))[None]
            ).softmax(1)[0]
        first, second = probabilities.argsort(descending=True)[:2].tolist()
        assert answer["file"] == str(path)
        assert [one["class"] for one in answer["classes"]] == [CLASSES[first], CLASSES[second]]
        shown = [one["probability"] for one in answer["classes"]]
        assert shown == pytest.approx(
            [float(probabilities[first]), float(probabilities[second])], abs=1e-6
        )
        assert line == f"{path}: {CLASSES[first]} {shown[0]:.4f}, {CLASSES[second]} {shown[1]:.4f}"


def test_a_folder_is_its_images_in_order(
    igpt, digits: TokenDataset, images: dict[Path, np.ndarray], tmp_path: Path
) -> None:
    classifier(tmp_path / "model", digits, "autoregressive")
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    moved = [folder / "a.png", folder / "b" / "c.png", folder / "d.png"]
    for path, target in zip(images, moved, strict=True):
        path.rename(target)
    (folder / "notes.txt").write_text("no image")
    words = ["classify", tmp_path / "model"]
    done = igpt(*words, folder, "-o", tmp_path / "said.json")
    answers = igpt(*words, *moved).stdout
    assert len(answers.splitlines()) == 3
    assert done.stdout == f"{answers}left out: files ending in .txt: 1 (first: notes.txt)\n"
    assert json.loads((tmp_path / "said.json").read_text())["left_out"]["files ending in .txt"]


def test_all_classes_are_printed_if_there_are_fewer_than_requested(
    igpt, digits: TokenDataset, images: dict[Path, np.ndarray], tmp_path: Path
) -> None:
    classifier(tmp_path / "model", digits, "autoregressive")
    done = igpt("classify", tmp_path / "model", next(iter(images)), "--top", 9)
    assert len(done.stdout.split(", ")) == len(CLASSES)
    assert len(igpt("classify", tmp_path / "model", next(iter(images))).stdout.split(", ")) == 3


def test_predictions_are_the_mode_over_masks(
    igpt, digits: TokenDataset, images: dict[Path, np.ndarray], tmp_path: Path
) -> None:
    model = classifier(tmp_path / "model", digits, "bert")
    words = ["--masks", 5, "--seed", 4, "--top", 4, "-o", tmp_path / "said.json"]
    done = igpt("classify", tmp_path / "model", *images, *words)
    assert done.returncode == 0, done.stderr
    together = done.stdout.splitlines()
    for line, answer, (path, tokens) in zip(
        together,
        json.loads((tmp_path / "said.json").read_text())["images"],
        images.items(),
        strict=True,
    ):
        found = predict(model, tokens[None], np.zeros(1, np.int64), masks=5, seed=4)
        assert answer["classes"][0]["class"] == CLASSES[found.classes[0]]
        votes = {one["class"]: one["votes"] for one in answer["classes"]}
        assert votes == dict(zip(CLASSES, found.votes[0].tolist(), strict=True))
        assert f"({answer['classes'][0]['votes']} of 5 masks)" in line
        alone = igpt("classify", tmp_path / "model", path, *words[:-2])
        assert alone.stdout.splitlines() == [line], "independent of the other images"


def test_mistakes_are_one_line(
    igpt, short_run: Path, digits: TokenDataset, images: dict[Path, np.ndarray], tmp_path: Path
) -> None:
    model, image = tmp_path / "model", next(iter(images))
    classifier(model, digits, "autoregressive")
    text = tmp_path / "text.png"
    text.write_text("no picture")
    for words, said in (
        ([short_run, image], "no class head; `igpt finetune` makes a classifier of it"),
        ([model, text], f"{text}: not an image"),
        ([model, tmp_path / "none.png"], "no such file"),
        ([model, model], "there are no images in the folder"),
        ([model], "the following arguments are required: IMAGES; see igpt classify --help"),
        ([model, image, "--top", 0], "--top is at least 1, not 0"),
        ([model, image, "--top", "all"], "--top"),
        ([model, image, "--masks", 5], "needs a model trained as 'bert'"),
        ([model, image, "--masks", -1], "masks are 0 or more"),
        ([tmp_path / "nothing", image], "no model directory"),
        ([model, image, "-o", tmp_path], "is a folder"),
    ):
        done = igpt("classify", *words)
        assert done.returncode == 2, (words, done.stdout)
        assert len(done.stderr.splitlines()) == 1
        assert said in done.stderr
