"""`igpt sample` and `igpt complete`: mistakes are one line before any computation, and nothing is
overwritten."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError
from igpt.model.transformer import ImageGPT
from igpt.sampling.sampler import complete

Igpt = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return path


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--count", 0), "at least one sample is needed, not 0"),
        (("--count", -5), "at least one sample is needed, not -5"),
        (
            ("--count", 10**9),
            "1,000,000,000 samples do not fit one picture; up to 20,536 of 8 px do",
        ),
        (("--count", "1e9"), "--count"),
        (("--temperature", -1), "the temperature is 0 (the likeliest colour) or above, not -1.0"),
        (("--temperature", "nan"), "the temperature is 0 (the likeliest colour) or above, not nan"),
        (("--temperature", "inf"), "the temperature is 0 (the likeliest colour) or above, not inf"),
        (("--top-k", 0), "top-k is at least 1, not 0"),
        (("--top-p", 0), "top-p lies in (0, 1], not 0.0"),
        (("--top-p", 1.5), "top-p lies in (0, 1], not 1.5"),
        (("--top-p", "nan"), "top-p lies in (0, 1], not nan"),
        (("--seed", -1), "a seed lies in 0 .. 2^63 - 1, not -1"),
        (("--seed", 2**63), "a seed lies in 0 .. 2^63 - 1"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_settings_out_of_range(
    igpt: Igpt, short_run: Path, words: tuple[object, ...], said: str, tmp_path: Path
) -> None:
    assert said in refusal(igpt("sample", short_run, "-o", tmp_path / "out.png", *words))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--completions", 0), "at least one completion is needed, not 0"),
        (
            ("--completions", 10**9),
            "1,000,000,000 completions of 1 images do not fit one picture; up to 20,539 do",
        ),
        (("--keep-rows", 9), "rows to keep lie in 0..8 for this model, not 9"),
        (("--keep-rows", -1), "rows to keep lie in 0..8 for this model, not -1"),
        (("--keep-rows", 8), "all pixels are kept, so that nothing is left to complete"),
        (("--temperature", "nan"), "the temperature is 0"),
        (("--seed", -1), "a seed lies in 0 .. 2^63 - 1, not -1"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_completions_out_of_range(
    igpt: Igpt, short_run: Path, picture: Path, words: tuple[object, ...], said: str, tmp_path: Path
) -> None:
    assert said in refusal(igpt("complete", short_run, picture, "-o", tmp_path / "out.png", *words))
    assert list(tmp_path.iterdir()) == [picture]


@pytest.mark.parametrize("command", ["sample", "complete"])
def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_read(
    igpt: Igpt, picture: Path, command: str, tmp_path: Path
) -> None:
    """The model does not exist, which would otherwise be the error."""
    os.mkfifo(tmp_path / "fifo.png")
    os.mkfifo(tmp_path / "other.json")
    (tmp_path / "link.png").symlink_to("/dev/null")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "data.json").write_text('{"format": "igpt-tokens"}')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "text").write_text("text")
    inputs = [picture] if command == "complete" else []
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    for name, said in (
        ("out.jpg", "images are written as .png, not as out.jpg"),
        ("out", "images are written as .png, not as out"),
        ("fifo.png", "fifo.png is a FIFO"),
        ("other.png", "other.json is a FIFO"),
        ("link.png", "is a device"),
        ("folder.png", "folder.png is a folder"),
        ("data.png", "data.json holds something else than a picture's settings; choose another -o"),
        ("list.png", "list.json should hold a JSON object"),
        ("text/out.png", "text"),
    ):
        done = igpt(command, tmp_path / "no-model", *inputs, "-o", tmp_path / name)
        assert said in refusal(done), name
        assert "no model directory" not in done.stderr, name
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()} == before
    assert "no model directory" in refusal(
        igpt(command, tmp_path / "no-model", *inputs, "-o", tmp_path / "out.png")
    )


def test_an_input_picture_is_not_overwritten(
    igpt: Igpt, short_run: Path, picture: Path, tmp_path: Path
) -> None:
    content = picture.read_bytes()
    (tmp_path / "link.png").symlink_to(picture)
    for out in (picture, tmp_path / "link.png"):
        assert "is one of the images to read; choose another -o" in refusal(
            igpt("complete", short_run, picture, "-o", out)
        )
    assert "is one of the images to read" in refusal(
        igpt("complete", short_run, tmp_path / "link.png", "--mask", picture, "-o", picture)
    )
    assert picture.read_bytes() == content


def test_inputs_that_are_not_images_are_one_line(
    igpt: Igpt, short_run: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "empty.png").touch()
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(10**12)
    for path, said in (
        (tmp_path / "fifo.png", "fifo.png is a FIFO; a regular file is needed"),
        (Path("/dev/zero"), "/dev/zero is a device; a regular file is needed"),
        (tmp_path / "empty.png", "the file is empty (zero bytes)"),
        (
            tmp_path / "huge.png",
            "huge.png has 1,000,000,000,000 bytes; images of up to 2,147,483,648 are read",
        ),
        (tmp_path / "none.png", "no such file"),
    ):
        assert said in refusal(igpt("complete", short_run, path, "-o", tmp_path / "out.png"))
        assert said in refusal(igpt("classify", short_run, path))
    assert not (tmp_path / "out.png").exists()


def test_a_mask_that_hides_all_or_nothing_is_reported(
    igpt: Igpt, short_run: Path, picture: Path, tmp_path: Path
) -> None:
    mask, out = tmp_path / "mask.png", tmp_path / "out.png"
    Image.new("L", (8, 8), 0).save(mask)
    assert f"{mask} hides nothing: bright pixels are hidden" in refusal(
        igpt("complete", short_run, picture, "--mask", mask, "-o", out)
    )
    assert not out.exists()
    Image.new("L", (8, 8), 255).save(mask)
    done = igpt("complete", short_run, picture, "--mask", mask, "-o", out, "--completions", 1)
    assert done.returncode == 0, done.stderr
    assert f"the given pixels (nothing: {mask} hides the whole image)" in done.stdout
    assert json.loads(out.with_suffix(".json").read_text())["kept_pixels"] == 0


def test_the_precision_is_recorded(
    igpt: Igpt, short_run: Path, picture: Path, tmp_path: Path
) -> None:
    for command, inputs in (("sample", ()), ("complete", (picture,))):
        done = igpt(command, short_run, *inputs, "-o", tmp_path / "new" / "out.png")
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "new" / "out.json").read_text())["precision"] in (
            "fp32",
            "bf16",
        )
    again = igpt("sample", short_run, "-o", tmp_path / "new" / "out.png", "--precision", "bf16")
    assert again.returncode == 0, "a picture written by igpt is replaced"
    assert json.loads((tmp_path / "new" / "out.json").read_text())["precision"] == "bf16"


def test_tokens_that_the_model_does_not_have_are_refused(
    short_run: Path, digits: TokenDataset
) -> None:
    model = ImageGPT.from_pretrained(short_run / "model")
    tokens = torch.from_numpy(digits["test"].rows([0]).astype(np.int64))
    for wrong in (model.config.n_colors, -1):
        tokens[0, 3] = wrong
        with pytest.raises(
            InputError, match=rf"tokens of this model lie in 0\.\.{model.config.n_colors - 1}"
        ):
            complete(model, tokens, keep=4, precision="fp32")
        known = torch.arange(64) != 3
        assert (
            0
            <= int(complete(model, tokens, keep=known, precision="fp32")[0, 3])
            < model.config.n_colors
        )
