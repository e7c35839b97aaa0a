"""The command line: a user's mistake is one line and exit code 2; each command does what it says."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt.cli import COMMANDS
from igpt.data.tokens import TokenDataset
from igpt.model.configuration import ModelConfig
from igpt.model.transformer import ImageGPT
from igpt.presets import MODELS


def assert_refused(done: subprocess.CompletedProcess[str], *said: str) -> None:
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for words in said:
        assert words in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prepair"], "no command 'prepair'; did you mean 'prepare'?"),
        (["prepare", "digits", "--sise", "8", "-o", "x"], "Perhaps you meant: --size"),
        (["prepare", "digits"], "--out"),
        (["prepare", "digits", "-o", "x", "--size", "many"], "--size"),
        (["prepare", "digits", "-o", "x", "--size", "1"], "size = 1: Input should be greater than or equal to 2"),
        (["prepare", "digits", "-o", "x", "--filter", "sinc"], "--filter"),
        (["prepare", "no/such/folder", "-o", "x"], "no/such/folder"),
        (["prepare", "./nothing", "-o", "x"], "no folder or file ./nothing"),
        (["pretrain", "t", "-o", "x", "--model", "igpt-x"], "no preset 'igpt-x'; did you mean 'igpt-xl'?"),
        (["pretrain", "t", "-o", "x"], "name a model: --model PRESET"),
        (["pretrain", "t", "-o", "x", "--model", "tiny"], "no token data set at t: dataset.json is missing"),
        (["pretrain", "t", "-o", "x", "--model", "tiny", "--device", "cuda"], "there is no GPU here"),
        (["pretrain", "t", "-o", "x", "--config", "none.yaml"], "no settings file at .: none.yaml is missing"),
        (["probe", "./model", "t"], "no model directory model"),
        (["sample", "/none"], "no model directory /none"),
        (["report", "none"], "none"),
        (["import", "none/model.ckpt", "-o", "x"], "model.ckpt"),
    ],
)
def test_mistakes_are_one_line(igpt, words: list[str], said: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "cuda" in words:
        import torch

        if torch.cuda.is_available():
            said = "no token data set"
    assert_refused(igpt(*words), said)
    assert list(tmp_path.iterdir()) == [], "something was left behind"


def test_unknown_key_in_a_settings_file(igpt, digits: TokenDataset, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("learning_rat: 0.1\n")
    done = igpt("pretrain", digits.path, "-o", tmp_path / "run", "--model", "tiny", "--config", tmp_path / "my.yaml")
    assert_refused(done, "unknown key 'learning_rat'", "did you mean 'learning_rate'?")


def test_preset_then_file_then_flags(igpt, digits: TokenDataset, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("n_layer: 1\nn_embd: 16\nsteps: 3\nlearning_rate: 0.01\n")
    words = ["-o", tmp_path / "run", "--model", "tiny", "--config", tmp_path / "my.yaml", "--learning-rate", "0.02"]
    assert igpt("pretrain", digits.path, *words, "--validation-images", 8).returncode == 0
    from igpt.config import read_settings

    settings = read_settings(tmp_path / "run" / "config.yaml")
    assert settings["n_head"] == MODELS["tiny"]["n_head"]
    assert (settings["n_layer"], settings["steps"], settings["learning_rate"]) == (1, 3, 0.02)
    assert settings["precision"] in ("bf16", "fp32"), "the recorded settings are resolved"


def test_wrong_heads_are_refused_before_anything_is_written(igpt, digits: TokenDataset, tmp_path: Path) -> None:
    done = igpt("pretrain", digits.path, "-o", tmp_path / "run", "--model", "tiny", "--n-head", "3")
    assert_refused(done, "3 heads do not divide a width of 64")
    assert not (tmp_path / "run").exists()


def test_truncated_shard_and_truncated_weights(igpt, digits: TokenDataset, short_run: Path, tmp_path: Path) -> None:
    shutil.copytree(digits.path, tmp_path / "tokens")
    os.truncate(tmp_path / "tokens" / "train-00000.tokens.npy", 5000)
    done = igpt("pretrain", tmp_path / "tokens", "-o", tmp_path / "run", "--model", "tiny")
    assert_refused(done, "train-00000.tokens.npy is damaged: 5000 bytes")
    assert not (tmp_path / "run").exists()
    shutil.copytree(short_run / "model", tmp_path / "model")
    os.truncate(tmp_path / "model" / "model.safetensors", 5000)
    assert_refused(igpt("sample", tmp_path / "model"), "model.safetensors is damaged")


def test_model_and_tokens_that_differ(igpt, short_run: Path, photographs: Path, tmp_path: Path) -> None:
    other, wide = tmp_path / "other", tmp_path / "wide"
    assert igpt("prepare", photographs, "-o", other, "--size", 8, "--colors", 17).returncode == 0
    assert igpt("prepare", photographs, "-o", wide, "--size", 12, "--palette", short_run / "model").returncode == 0
    mine, theirs = (ImageGPT.from_pretrained(short_run / "model").palette, TokenDataset(other).palette)
    for command in ("probe", "score"):
        assert_refused(igpt(command, short_run, other), mine.fingerprint[:12], theirs.fingerprint[:12])
        assert_refused(igpt(command, short_run, wide), "the model sees 8 px", "12 px")


def test_bert_model_is_not_sampled_as_autoregressive(igpt, digits: TokenDataset, tmp_path: Path) -> None:
    shape = {"resolution": 8, "n_colors": 17, "n_layer": 1, "n_embd": 16, "n_head": 2, "objective": "bert"}
    ImageGPT(ModelConfig.layered(shape), digits.palette).save_pretrained(tmp_path / "bert")
    for command in (["score", tmp_path / "bert", digits.path], ["sample", tmp_path / "bert", "-o", tmp_path / "s.png"]):
        assert_refused(igpt(*command), "trained as 'autoregressive'; this one is 'bert'")
    assert not (tmp_path / "s.png").exists()
    done = igpt("complete", tmp_path / "bert", "--tokens", digits.path, "--count", 2, "-o", tmp_path / "c.png")
    assert done.returncode == 0, done.stderr  # BERT models fill instead


def test_samples_are_seeded_pictures(igpt, short_run: Path, tmp_path: Path) -> None:
    pictures = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        done = igpt("sample", short_run, "-o", tmp_path / f"{name}.png", "--count", 3, "--seed", seed)
        assert done.returncode == 0, done.stderr
        pictures.append(np.asarray(Image.open(tmp_path / f"{name}.png")))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])
    assert json.loads((tmp_path / "a.json").read_text())["seed"] == 0


def test_completion_keeps_the_upper_rows_of_files(igpt, short_run: Path, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50), dtype=np.uint8)).save(tmp_path / "wide.png")
    done = igpt("complete", short_run, tmp_path / "wide.png", "-o", tmp_path / "out.png", "--keep-rows", 3)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out.png").size[0] > 5 * 8
    (tmp_path / "text.png").write_text("no picture")
    assert_refused(igpt("complete", short_run, tmp_path / "text.png"), "text.png", "not an image")
    assert_refused(igpt("complete", short_run, tmp_path / "none.png"), "no such file")
    assert_refused(igpt("complete", short_run), "give image files")
    assert_refused(igpt("complete", short_run, tmp_path / "wide.png", "--keep-rows", 9), "0..8")


def test_numbers_out_of_range_are_refused(igpt, short_run: Path, digits: TokenDataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny = ["pretrain", digits.path, "-o", run, "--model", "tiny"]
    assert_refused(igpt(*tiny, "--betas", "0.9", "1.0"), "betas")
    assert_refused(igpt(*tiny, "--seed", 10**20), "seed")
    assert not run.exists()
    assert_refused(igpt("sample", short_run, "--seed", 10**20), "a seed lies in")
    assert_refused(igpt("probe", short_run, digits.path, "--limit", -5), "limit = -5")
    assert_refused(igpt("probe", short_run, digits.path, "--seed", -1), "seed = -1")
    assert_refused(igpt("prepare", "digits", "-o", tmp_path / "t", "--workers", 0), "at least one worker")
    assert_refused(igpt("sample", short_run, "-o", tmp_path / "s.json"), ".png")
    assert_refused(igpt("probe", short_run, digits.path, "--no-baselines", "-o", tmp_path), "is a folder")
    assert_refused(igpt("sample", short_run, "--count", 10**12, "-o", tmp_path / "s.png"), "out of memory")


def test_a_tiny_temperature_is_nearly_greedy(igpt, short_run: Path, tmp_path: Path) -> None:
    pictures = []
    for temperature in ("0", "1e-42"):
        path = tmp_path / f"{temperature}.png"
        assert igpt("sample", short_run, "-o", path, "--temperature", temperature, "--count", 2).returncode == 0
        pictures.append(np.asarray(Image.open(path)))
    assert np.array_equal(*pictures)


def test_help_and_version(igpt) -> None:
    assert "usage: igpt COMMAND" in igpt().stdout
    for name in COMMANDS:
        assert f"  {name} " in igpt("--help").stdout
    assert igpt("--version").stdout.strip()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from igpt.cli import main

    assert main([name, "--help"]) == 0
    assert f"usage: igpt {name}" in capsys.readouterr().out


def test_output_into_a_closed_pipe_is_quiet() -> None:
    done = subprocess.run(
        f"{sys.executable} -m igpt --help | head -1; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr


def test_completing_by_a_mask_keeps_its_dark_pixels(
    igpt: Callable[..., subprocess.CompletedProcess[str]], short_run: Path, tmp_path: Path
) -> None:
    picture, mask, out = tmp_path / "picture.png", tmp_path / "mask.png", tmp_path / "out.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(picture)
    hidden = np.zeros((8, 8), np.uint8)
    hidden[2:5, 3:6] = 255
    Image.fromarray(hidden).save(mask)
    done = igpt("complete", short_run, picture, "--mask", mask, "--completions", 2, "-o", out, "--precision", "fp32")
    assert done.returncode == 0, done.stderr
    settings = json.loads(out.with_suffix(".json").read_text())
    assert settings["kept_pixels"] == 64 - 9
    assert settings["precision"] == "fp32"
    both = igpt("complete", short_run, picture, "--mask", mask, "--keep-rows", 2, "-o", out)
    assert both.returncode == 2
    assert "not both" in both.stderr
