"""Inputs that people have reported of other tools; they are written by a program next to the repository."""

import json
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from igpt.data.masks import hidden_pixels
from igpt.errors import InputError
from igpt.model.transformer import ImageGPT

MAKER = Path(__file__).parents[3] / "shared" / "cases" / "make.py"
pytestmark = pytest.mark.skipif(not MAKER.exists(), reason="the cases are not next to the repository")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cases")
    made = runpy.run_path(str(MAKER))
    for name in ("weights_index", "masks"):
        made[name](folder / name)
    return folder


@pytest.mark.parametrize("name", ["stale-and-new", "named", "new"])
def test_the_index_decides_which_weights_are_read(cases: Path, name: str) -> None:
    from transformers import ImageGPTForCausalImageModeling

    path = cases / "weights_index" / name
    ours = ImageGPT.from_pretrained(path)
    theirs = ImageGPTForCausalImageModeling.from_pretrained(path).eval()
    tokens = torch.randint(0, 16, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(torch.cat([torch.full((2, 1), 16), tokens[:, :-1]], dim=1)).logits
        torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-3)
    newest = ImageGPT.from_pretrained(cases / "weights_index" / "new").state_dict()
    assert all(torch.equal(tensor, newest[key]) for key, tensor in ours.state_dict().items())


def test_a_part_that_the_index_names_and_that_is_missing_is_refused(cases: Path, tmp_path: Path) -> None:
    source = cases / "weights_index" / "named"
    for file in source.iterdir():
        if file.name != "second.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(
        InputError, match=r"second\.safetensors, which model\.safetensors\.index\.json names, is missing"
    ):
        ImageGPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("white-on-transparent", (2, 4), (2, 4)),
        ("white-on-black", (2, 4), (2, 4)),
        ("levels-0-and-1", (2, 4), (2, 4)),
        ("thin-line", (3, 4), (1, 7)),
    ],
)
def test_a_mask_hides_what_is_painted(
    igpt: Callable[..., subprocess.CompletedProcess[str]],
    short_run: Path,
    cases: Path,
    name: str,
    rows: tuple[int, int],
    columns: tuple[int, int],
    tmp_path: Path,
) -> None:
    mask, picture, out = (cases / "masks" / f"{name}.png", cases / "masks" / "picture.png", tmp_path / "out.png")
    expected = np.zeros((8, 8), bool)
    expected[slice(*rows), slice(*columns)] = True
    np.testing.assert_array_equal(hidden_pixels(mask, 8), expected)
    done = igpt("complete", short_run, picture, "--mask", mask, "--completions", 1, "-o", out, "--precision", "fp32")
    assert done.returncode == 0, done.stderr
    assert f"{64 - expected.sum()} of 64 pixels, by {mask}" in done.stdout
    assert json.loads(out.with_suffix(".json").read_text())["kept_pixels"] == 64 - expected.sum()
    cells = np.asarray(Image.open(out))[2:66, 2:].reshape(64, -1, 3)
    original, kept, drawn = (cells[::8, first : first + 64 : 8] for first in (0, 66, 132))
    assert (kept[expected] == 224).all()
    np.testing.assert_array_equal(kept[~expected], original[~expected])
    np.testing.assert_array_equal(drawn[~expected], original[~expected])
