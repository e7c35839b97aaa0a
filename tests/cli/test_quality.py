"""`igpt quality` on the command line: samples and completions against true images."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import igpt as package
from igpt.data.tokens.dataset import TokenDataset
from igpt.evaluation.features import pooled
from igpt.evaluation.quality import frechet_distance
from igpt.model.config import ModelConfig
from igpt.model.images import split_of_images
from igpt.model.transformer import ImageGPT

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_samples_and_completions_are_compared_with_true_images(
    igpt: Run, short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run / "model", run / "model")
    words = ("--layer", 1, "--limit", 60, "--samples", 40, "--completions", 8, "--seed", 3)
    done = igpt("quality", run, digits.path, *words)
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "quality.json").read_text())
    model = ImageGPT.from_pretrained(run)
    sampled = split_of_images(model, model.sample(40, seed=3))
    true = digits["test"].subset(
        np.sort(np.random.default_rng(3).permutation(len(digits["test"]))[:60])
    )
    expected = frechet_distance(*(next(pooled(model, each))[1] for each in (sampled, true)))
    found = result["frechet"]
    assert found["distance"] == pytest.approx(expected, rel=1e-5)
    assert (found["images"], found["features"], result["images"]) == ([40, 60], 32, 60)
    low, high = found["interval_95"]
    assert low < found["distance"] < high
    assert result["completions"]["count"] == result["completions"]["other_pixels"]["count"] == 8
    assert f"Frechet distance {found['distance']:.4g} (95 % interval {low:.4g} to" in done.stdout
    assert "over 8 images with 4 rows given" in done.stdout
    assert (result["format"], result["version"]) == ("igpt-quality", 1)


def test_features_of_another_model_and_of_a_bert_model(
    digits: TokenDataset, short_run: Path
) -> None:
    shape = {"resolution": 8, "n_colors": 17, "n_layer": 1, "n_embd": 16, "n_head": 2}
    torch.manual_seed(0)
    bert = ImageGPT(ModelConfig.layered({**shape, "objective": "bert"}), digits.palette)
    found = package.quality(bert, digits.path, features=short_run, layer=2, limit=9, keep_rows=6)
    assert found["completions"]["count"] == 9
    assert "frechet" not in found
    # With seven rows of its own and one of another image, an image is near to itself.
    easy = package.quality(bert, digits.path, layer=1, limit=9, keep_rows=7)
    assert easy["completions"]["other_pixels"]["mean"] < 0.5


def test_mistakes_are_one_line(
    igpt: Run, short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    wide = ImageGPT(
        ModelConfig.layered(
            {"resolution": 12, "n_colors": 17, "n_layer": 1, "n_embd": 16, "n_head": 2}
        ),
        digits.palette,
    )
    wide.save_pretrained(tmp_path / "wide")
    model, out = short_run / "model", ("-o", tmp_path / "q.json")
    for given, message in (
        ((), "name a layer (--layer 0 to 2), or run igpt probe first"),
        (("--layer", 3), "the model has the layers 0 to 2, not 3"),
        (("--layer", 1, "--samples", 32), "needs more than 32 images on both sides, not 32"),
        (("--layer", 1, "--limit", 32), "needs more than 32 images on both sides, not 32"),
        (("--layer", 1, "--samples", -1), "--samples is 0 or more, not -1"),
        (("--layer", 1, "--completions", 181), "there are 180 images, not 181"),
        (("--layer", 1, "--completions", 1), "give 2 or more, not 1"),
        (("--layer", 1, "--keep-rows", 8), "the rows to keep are 0 to 7, not 8"),
        (("--layer", 1, "--keep-rows", -1), "the rows to keep are 0 to 7, not -1"),
        (("--layer", 1, "--temperature", -1), "the temperature is 0"),
        (("--features", tmp_path / "wide", "--layer", 1), "sees 12 px, and the samples have 8 px"),
    ):
        done = igpt("quality", model, digits.path, *out, *given)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), (given, done.stderr)
        assert message in done.stderr, given
        assert "sampling" not in done.stdout, "nothing is sampled before"
        assert not (tmp_path / "q.json").exists()


def test_what_is_left_out_is_named_and_other_images_keep_their_result(
    igpt: Run, short_run: Path, tmp_path: Path
) -> None:
    for name in ("photos", "others"):
        (tmp_path / name).mkdir()
        for number in range(4):
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    (tmp_path / "photos" / "broken.png").write_bytes(b"no image")
    words = ("--layer", 1, "--samples", 0, "--max-bad", 0.5, "-o", tmp_path / "q.json")
    done = igpt("quality", short_run / "model", tmp_path / "photos", *words)
    assert done.returncode == 0, done.stderr
    assert "left out: images that do not decode: 1" in done.stdout
    assert "broken.png" in done.stdout
    before = (tmp_path / "q.json").read_bytes()
    assert igpt("quality", short_run / "model", tmp_path / "photos", *words).returncode == 0
    refused = igpt("quality", short_run / "model", tmp_path / "others", *words)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "has the result of" in refused.stderr
    assert json.loads((tmp_path / "q.json").read_bytes()).keys() == json.loads(before).keys()
    assert str(tmp_path / "photos") in (tmp_path / "q.json").read_text()
