"""Masks from public reports about other tools."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt.data.images.masks import hidden_pixels

from ..helpers import reported_cases


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cases") / "masks"
    reported_cases.masks(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("white-on-transparent", (2, 4), (2, 4)),
        ("white-on-black", (2, 4), (2, 4)),
        ("levels-0-and-1", (2, 4), (2, 4)),
        ("thin-line", (3, 4), (1, 7)),
    ],
)
def test_a_mask_hides_the_painted_pixels(
    igpt: Callable[..., subprocess.CompletedProcess[str]],
    short_run: Path,
    masks: Path,
    name: str,
    rows: tuple[int, int],
    columns: tuple[int, int],
    tmp_path: Path,
) -> None:
    mask, picture, out = (masks / f"{name}.png", masks / "picture.png", tmp_path / "out.png")
    expected = np.zeros((8, 8), bool)
    expected[slice(*rows), slice(*columns)] = True
    np.testing.assert_array_equal(hidden_pixels(mask, 8), expected)
    done = igpt(
        "complete",
        short_run,
        picture,
        "--mask",
        mask,
        "--completions",
        1,
        "-o",
        out,
        "--precision",
        "fp32",
    )
    assert done.returncode == 0, done.stderr
    assert f"{64 - expected.sum()} of 64 pixels, by {mask}" in done.stdout
    assert json.loads(out.with_suffix(".json").read_text())["kept_pixels"] == 64 - expected.sum()
    cells = np.asarray(Image.open(out))[-66:-2, 2:].reshape(64, -1, 3)
    original, kept, completed = (cells[::8, first : first + 64 : 8] for first in (0, 66, 132))
    assert (kept[expected] == 224).all()
    np.testing.assert_array_equal(kept[~expected], original[~expected])
    np.testing.assert_array_equal(completed[~expected], original[~expected])
