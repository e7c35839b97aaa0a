"""`igpt score --published` on arrays in OpenAI's layout: the loss is compared with the published
one."""

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from igpt.data.images.palette import Palette
from igpt.evaluation.published import compared, published_loss
from igpt.model.config import ModelConfig
from igpt.model.transformer import ImageGPT
from igpt.training.presets import preset

Run = Callable[..., subprocess.CompletedProcess[str]]
SHAPES = {"igpt-s": 2.0895, "igpt-m": 2.0614, "igpt-l": 2.0466}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ImageGPT:
    torch.manual_seed(1)
    shape = ModelConfig(resolution=4, n_colors=11, n_layer=2, n_embd=24, n_head=3)
    model = ImageGPT(shape, Palette.from_centers(np.random.default_rng(1).uniform(-1, 1, (11, 3))))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.fixture
def folder(model: ImageGPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a model, released arrays and their palette."""
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("model")
    assert model.palette is not None
    tokens = np.random.default_rng(2).integers(0, 11, (40, 16))
    np.save("imagenet_teX.npy", tokens)
    np.save("imagenet_trX.npy", tokens[:3])
    np.save("kmeans_centers.npy", model.palette.centers_)
    return tmp_path


def read(path: Path) -> dict[str, object]:
    return json.loads(path.read_text())


def test_the_test_images_are_scored(igpt: Run, folder: Path, model: ImageGPT) -> None:
    done = igpt("score", "model", "imagenet", "--published")
    assert done.returncode == 0, done.stderr
    result = read(folder / "published.json")
    assert (result["format"], result["version"]) == ("igpt-published", 1)
    assert (result["images"], result["split"], result["source"]) == (40, "test", "imagenet")
    with torch.no_grad():
        tokens = torch.from_numpy(np.load("imagenet_teX.npy"))
        losses = torch.nn.functional.cross_entropy(
            model(tokens).flatten(0, 1), tokens.flatten(), reduction="none"
        )
    each = losses.view(40, 16).mean(1).numpy()
    assert result["nats_per_pixel"] == pytest.approx(each.mean(), rel=1e-5)
    assert result["standard_error"] == pytest.approx(each.std(ddof=1) / math.sqrt(40), rel=1e-4)
    assert f"{each.mean():.4f} nats/pixel +- " in done.stdout
    assert "no loss was published for a model of this shape on imagenet" in done.stdout
    assert "published" not in result
    again = igpt("score", "model", "imagenet", "-o", "s.csv")  # the same computation
    assert again.returncode == 0, again.stderr
    assert read(folder / "s.json")["nats_per_pixel"] == result["nats_per_pixel"]


def test_arrays_in_another_folder_and_a_subset_of_them(
    igpt: Run, folder: Path, model: ImageGPT
) -> None:
    (folder / "down" / "loads").mkdir(parents=True)
    for name in ("imagenet_teX.npy", "kmeans_centers.npy"):
        (folder / name).rename(folder / "down" / "loads" / name)
    (folder / "imagenet_trX.npy").unlink()
    np.save("down/loads/imagenet_teY.npy", np.eye(5)[np.arange(39) % 5])  # invalid, and not needed
    done = igpt(
        "score",
        "model",
        "down/loads/imagenet",
        "--published",
        "--limit",
        9,
        "--seed",
        3,
        "-o",
        "few.json",
    )
    assert done.returncode == 0, done.stderr
    result = read(folder / "few.json")
    assert (result["images"], result["limit"], result["seed"]) == (9, 9, 3)
    assert not (folder / "published.json").exists()


def test_mistakes_are_one_line_and_leave_nothing(igpt: Run, folder: Path, model: ImageGPT) -> None:
    shape = {"resolution": 4, "n_colors": 11, "n_layer": 1, "n_embd": 8, "n_head": 2}
    ImageGPT(ModelConfig.layered(shape, {"objective": "bert"}), model.palette).save_pretrained(
        "bert"
    )
    ImageGPT(ModelConfig.layered(shape)).save_pretrained("bare")
    ImageGPT(ModelConfig.layered(shape, {"resolution": 5}), model.palette).save_pretrained("larger")
    ImageGPT(
        ModelConfig.layered(shape, {}), Palette.from_centers(np.zeros((11, 3)))
    ).save_pretrained("grey")
    (folder / "alone").mkdir()
    np.save("alone/imagenet_teX.npy", np.zeros((2, 16), np.int64))
    np.save("alone/cifar10_trX.npy", np.zeros((2, 16), np.int64))
    (folder / "notes.json").write_text("{}")
    before = sorted(folder.rglob("*"))
    for words, message in (
        (("model", "cifar10"), "OpenAI's arrays are missing: there is no cifar10_teX.npy"),
        (
            ("model", "alone/cifar10"),
            "OpenAI's arrays are missing: there is no alone/cifar10_teX.npy",
        ),
        (("model", "alone"), "OpenAI's arrays are missing: there is no alone_teX.npy"),
        (("model", "alone/imagenet"), "put kmeans_centers.npy next to them"),
        (("bert", "imagenet"), "trained as 'autoregressive'; this one is 'bert'"),
        (("bare", "imagenet"), "holds no palette"),
        (("larger", "imagenet"), "holds tokens of 4 px, and the model's are of 5 px"),
        (("grey", "imagenet"), "the palettes differ"),
        (("model", "imagenet", "--limit", 0), "limit = 0"),
        (("model", "imagenet", "-o", "notes.json"), "holds something else already"),
        (("nowhere", "imagenet"), "no model directory nowhere"),
    ):
        done = igpt("score", *words, "--published")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), (words, done.stderr)
        assert message in done.stderr, words
        assert sorted(folder.rglob("*")) == before, words


@pytest.mark.parametrize(("name", "loss"), SHAPES.items())
def test_published_losses_are_only_reported_for_the_published_shapes(
    name: str, loss: float
) -> None:
    keys = ("n_layer", "n_embd", "n_head")
    config = ModelConfig(**{key: preset(name)[key] for key in keys})
    reported = published_loss(config, "arrays/imagenet")
    assert reported is not None
    assert (reported["model"], reported["nats_per_pixel"]) == (name, loss)
    for other in ({"resolution": 48}, {"n_colors": 256}, {"n_layer": 12}, {"objective": "bert"}):
        assert published_loss(config.model_copy(update=other), "imagenet") is None
    assert published_loss(config, "arrays/cifar10") is None


@pytest.mark.parametrize(
    ("loss", "error", "whole", "agrees"),
    [
        (2.08954, 0.002, True, True),
        (2.08946, 0.002, True, True),
        (2.08956, 0.002, True, False),
        (2.0902, 0.002, True, False),
        (2.0902, 0.002, False, True),
        (2.0936, 0.002, False, False),
        (2.0894, None, False, False),
    ],
)
def test_agreement_means_four_digits_or_two_standard_errors(
    loss: float, error: float | None, whole: bool, agrees: bool
) -> None:
    published = {"model": "igpt-s", "nats_per_pixel": 2.0895}
    reported = compared({"nats_per_pixel": loss, "standard_error": error}, published, whole=whole)
    assert (reported["agrees"], reported["within"]) == (
        agrees,
        "four digits" if whole else "two standard errors",
    )
    assert reported["difference"] == pytest.approx(loss - 2.0895)
