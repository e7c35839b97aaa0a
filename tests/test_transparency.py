"""Sprites: one entry of the palette stands for transparent pixels, from `prepare` to the pictures.

The sprites are discs of one of three colours on transparent ground, 8 x 8 pixels, some at twice the
size. Invisible pixels are red, so that a red pixel in a result was made from invisible ones.
"""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import ImageGPTForCausalImageModeling, ImageGPTImageProcessor

import igpt as api
from igpt.data.image_set import ImageSetConfig, source_images
from igpt.data.images.palette import Palette
from igpt.data.images.palette_picture import palette_swatch
from igpt.data.images.transform import Transform
from igpt.data.tokens.dataset import TokenDataset
from igpt.data.tokens.inspect import sheet
from igpt.errors import InputError
from igpt.model.config import ModelConfig
from igpt.model.images import decode_images, tokens_of_files
from igpt.model.transformer import ImageGPT
from igpt.webapp.handlers import drawings, view

from .conftest import Run

COLORS = ((20, 60, 200), (40, 160, 40), (250, 230, 90))
RED = (255, 0, 0)
SETTINGS = ("--size", "8", "--colors", "16", "--workers", "1")


def sprite(number: int) -> Image.Image:
    """Return a disc; every third is of 16 pixels, with an edge that is partly transparent."""
    side = 16 if number % 3 == 0 else 8
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    radius = side * (0.25 + 0.02 * (number % 8))
    inside = np.hypot(y, x) - radius
    alpha = np.clip(255 * (0.5 - inside), 0, 255) if side == 16 else 255.0 * (inside < 0)
    pixels = np.empty((side, side, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = COLORS[number % 3], alpha.round()
    pixels[pixels[..., 3] == 0, :3] = RED
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sprites") / "sprites"
    folder.mkdir()
    for number in range(40):
        sprite(number).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def tokens(sprites: Path, igpt: Run) -> TokenDataset:
    out = sprites.with_name("tokens")
    done = igpt("prepare", sprites, *SETTINGS, "--transparent", "-o", out)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout
    return TokenDataset(out)


@pytest.fixture(scope="module")
def model(tokens: TokenDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a random model that draws all colours and transparent pixels."""
    torch.manual_seed(0)
    colors = len(tokens.palette)
    shape = {"resolution": 8, "n_colors": colors, "n_layer": 1, "n_embd": 16, "n_head": 2}
    made = ImageGPT(ModelConfig.model_validate(shape), tokens.palette)
    torch.nn.init.normal_(made.lm_head.weight, std=0.5)
    folder = tmp_path_factory.mktemp("model") / "model"
    made.save_pretrained(folder)
    return folder


def averaged(pixels: NDArray[np.uint8], box: tuple[int, int, int], size: int) -> NDArray[np.int64]:
    """Return the means weighted with the opacity, rounded half up, from repeated pixels."""
    left, top, side = box
    square = pixels[top : top + side, left : left + side].astype(np.int64)
    cells = square.repeat(size, 0).repeat(size, 1).reshape(size, side, size, side, 4)
    opacity = cells[..., 3:].sum((1, 3))
    colors = (cells[..., :3] * cells[..., 3:]).sum((1, 3))
    return np.concatenate(
        [
            (2 * colors + opacity) // np.maximum(2 * opacity, 1),
            (2 * opacity + side**2) // (2 * side**2),
        ],
        axis=-1,
    )


@pytest.mark.parametrize("shape", [(16, 16), (33, 47), (29, 8)])
def test_colours_are_averaged_with_their_opacity(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 4), dtype=np.uint8)
    pixels[:4, :4, 3] = 0
    size, side = 7, min(shape)
    box = ((shape[1] - side) // 2, (shape[0] - side) // 2, side)
    found = Transform(size, alpha=True)(pixels)[0]
    np.testing.assert_array_equal(found, averaged(pixels, box, size))
    # Pillow's filters weight with the opacity too: red that is invisible leaves no trace.
    pixels[:] = (*COLORS[0], 255)
    pixels[::2] = (*RED, 0)
    for name in ("bilinear", "bicubic", "lanczos"):
        blurred = Transform(size, filter=name, alpha=True)(pixels)[0]
        visible = blurred[blurred[..., 3] >= 128][:, :3].astype(int)
        assert len(visible)
        assert np.abs(visible - COLORS[0]).max() <= 2


def test_images_without_transparency_are_opaque_and_the_same() -> None:
    opaque = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG", transparency=3000)
    for image, hidden in ((opaque, 0), (file.getvalue(), 1), (Image.fromarray(levels), 0)):
        found = Transform(8, alpha=True)(image)
        assert (found[..., 3] == 0).sum() == hidden
        shown = found[..., 3] == 255
        np.testing.assert_array_equal(found[..., :3][shown], Transform(8)(image)[shown])


def test_palettes_with_a_transparent_entry(tmp_path: Path) -> None:
    pixels = np.array([[*RED, 127], [*COLORS[0], 128], [*COLORS[1], 255]], np.uint8)
    palette = Palette(8, transparent=True).fit(pixels)
    assert (len(palette), palette.transparent_token) == (3, 2)  # red is not among them
    np.testing.assert_array_equal(palette.transform(pixels), [2, 0, 1])
    np.testing.assert_array_equal(
        palette.inverse_transform([2, 0]), [[255, 255, 255, 0], [*COLORS[0], 255]]
    )
    white = np.full(3, 255, np.uint8)
    assert palette.transform(white) == 0  # never the transparent entry, which is white as well
    palette.save(tmp_path / "a.npy")
    loaded = Palette.load(tmp_path / "a.npy")
    assert loaded.transparent
    assert loaded.fingerprint == palette.fingerprint
    assert palette.fingerprint != Palette.from_centers(palette.centers_).fingerprint
    with pytest.raises(InputError, match="at least one opaque pixel"):
        Palette(transparent=True).fit(pixels[:1])
    with pytest.raises(InputError, match="RGB last"):
        Palette.from_centers(palette.centers_).transform(pixels)


@pytest.mark.parametrize(
    ("fourth", "message"),
    [
        ((1, 1, 1), "the last one"),
        ((-1, 1, 1), "the last one"),
        ((1, -1, -1), "the last one"),
        ((-1,), "needs another colour"),
    ],
)
def test_invalid_fourth_columns_are_refused(fourth: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Palette.from_centers([[0, 0, 0, one] for one in fourth])


def test_prepared_tokens(sprites: Path, tokens: TokenDataset) -> None:
    manifest = json.loads((tokens.path / "dataset.json").read_text())
    assert manifest["version"] == 2  # which earlier versions of igpt refuse
    assert {len(center) for center in manifest["palette"]["centers"]} == {4}
    last = len(tokens.palette) - 1
    assert tokens.palette.transparent_token == last
    reds = tokens.palette.colors[:-1, 0].astype(int) - tokens.palette.colors[:-1, 2]
    assert reds.max() <= 250 - 90  # invisible red is in no colour
    pixels = tokens.palette.inverse_transform(tokens["train"].rows(np.arange(5)))
    alpha = pixels[..., 3].reshape(5, 8, 8)
    assert not alpha[:, [0, 0, -1, -1], [0, -1, 0, -1]].any()
    assert (alpha[:, 3:5, 3:5] == 255).all()
    with Image.open(tokens.path / "palette.png") as picture:
        assert picture.getpixel((3, 22 + 3)) == picture.getpixel((0, 0))  # the ground is visible
    assert sheet(tokens).mode == "RGBA"
    swatch = np.asarray(palette_swatch(tokens.palette))
    assert swatch[-1, -1, 3] == 255  # a frame around what is transparent
    assert swatch[-2, -2, 3] == 0
    assert swatch[-1, -1 - 28, 3] == 255  # a square has 28 pixels


def test_parts_and_repeated_work_give_the_same_bytes(
    sprites: Path, tokens: TokenDataset, igpt: Run, tmp_path: Path
) -> None:
    out = tmp_path / "tokens"
    words = ("prepare", sprites, *SETTINGS, "--transparent", "-o", out)
    for part in ("1/2", "2/2"):
        assert igpt(*words, "--shard", part).returncode == 0
    done = igpt("prepare", "--merge", "-o", out)
    assert done.returncode == 0, done.stderr
    for name in ("dataset.json", "palette.png", "train-00000.tokens.npy"):
        assert (out / name).read_bytes() == (tokens.path / name).read_bytes()


def test_the_model_directory(tokens: TokenDataset, model: Path, tmp_path: Path) -> None:
    loaded = ImageGPT.from_pretrained(model)
    assert loaded.palette
    assert loaded.palette.fingerprint == tokens.palette.fingerprint
    assert Palette.load(model).fingerprint == tokens.palette.fingerprint
    assert json.loads((model / "config.json").read_text())["igpt"]["version"] == 2
    theirs = ImageGPTForCausalImageModeling.from_pretrained(model).eval()
    batch = torch.from_numpy(tokens["train"].rows(np.arange(3)).astype(np.int64))
    start = torch.full((3, 1), len(tokens.palette))
    with torch.no_grad():
        logits = theirs(torch.cat([start, batch[:, :-1]], 1)).logits
        torch.testing.assert_close(logits, loaded(batch), rtol=0, atol=1e-5)
    # transformers sees white where there is nothing.
    processor = ImageGPTImageProcessor.from_pretrained(model)
    np.testing.assert_array_equal(np.asarray(processor.clusters)[-1], [1, 1, 1])
    # Saved by it without the setting that it does not know, the palette would be another one.
    file = model / "preprocessor_config.json"
    kept = {key: value for key, value in json.loads(file.read_text()).items() if "token" not in key}
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(model / name)
    (tmp_path / file.name).write_text(json.dumps(kept))
    with pytest.raises(InputError, match="should have a transparent_token"):
        ImageGPT.from_pretrained(tmp_path)
    (tmp_path / file.name).write_text(json.dumps({**kept, "transparent_token": 1}))
    with pytest.raises(InputError, match="transparent_token is 1, and only the last"):
        ImageGPT.from_pretrained(tmp_path)


def test_embeddings_from_the_palette_leave_the_transparent_one_random(
    tokens: TokenDataset,
) -> None:
    shape = {"resolution": 8, "n_colors": len(tokens.palette), "n_layer": 1, "n_embd": 16}
    torch.manual_seed(0)
    config = ModelConfig.model_validate({**shape, "n_head": 2})
    weights = ImageGPT(config, tokens.palette, from_palette=True).wte.weight.detach()
    assert torch.linalg.matrix_rank(weights[:-2]) == 3
    assert torch.linalg.matrix_rank(weights[:-1]) == 4


def test_grids_and_single_pictures_are_transparent(
    sprites: Path, model: Path, igpt: Run, tmp_path: Path
) -> None:
    done = igpt("sample", model, "--count", "3", "-o", tmp_path / "s.png")
    assert done.returncode == 0, done.stderr
    files = [sprites / "00.png", sprites / "01.png"]
    done = igpt("complete", model, *files, "--completions", "2", "-o", tmp_path / "c.png")
    assert done.returncode == 0, done.stderr
    single = api.sample(model, 3)
    loaded = ImageGPT.from_pretrained(model)
    originals = decode_images(loaded, tokens_of_files(loaded, files))
    completed = api.complete(model, files, completions=2)
    unknown = np.full((4, 8, 4), (224, 224, 224, 255), np.uint8)
    rows = [
        [one, np.concatenate([one[:4], unknown]), *map(np.asarray, filled)]
        for one, filled in zip(originals, completed, strict=True)
    ]
    for name, wanted in (("s", [list(map(np.asarray, single))]), ("c", rows)):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.mode == "RGBA"
            grid = np.asarray(picture)
        grid = grid[len(grid) - 2 - 66 * len(wanted) :]  # without headings
        assert (grid[:2] == (128, 128, 128, 255)).all()  # the gap
        for top, row in enumerate(wanted):
            for left, image in enumerate(row):
                cell = grid[2 + 66 * top :, 2 + 66 * left :][:64:8, :64:8]
                np.testing.assert_array_equal(cell, image)
                assert 0 < image[..., 3].mean() <= 255
    # The upper half is that of the files, in their own opacity.
    np.testing.assert_array_equal(originals[1, ..., 3], np.asarray(sprite(1))[..., 3])
    assert (np.asarray(completed[1][0])[:4] == originals[1, :4]).all()
    assert (grid[..., 3] == 0).any()


def test_the_web_page_shows_hidden_pixels_in_grey(model: Path, tokens: TokenDataset) -> None:
    loaded = ImageGPT.from_pretrained(model)
    rows = torch.from_numpy(tokens["test"].rows(np.arange(1)).astype(np.int64))
    seen = view(loaded, rows)
    assert seen["unknown"] == "#e0e0e0"
    known = torch.arange(64) < 32
    settings = (1, 1, 0, len(loaded.palette), 1)
    first, *_, last = (
        shown for shown, *_ in drawings(loaded, rows, known, *settings, original=False)
    )

    def pixels(picture: str) -> NDArray[np.uint8]:
        with Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))) as image:
            return np.asarray(image)

    original = decode_images(loaded, rows)[0]
    np.testing.assert_array_equal(pixels(seen["picture"]), original)
    start, end = pixels(first[0]["picture"]), pixels(last[0]["picture"])
    np.testing.assert_array_equal(start[:4], original[:4])
    assert (start[4:] == (224, 224, 224, 255)).all()
    np.testing.assert_array_equal(end[:4], original[:4])
    assert (end[4:, :, 3] == 0).any()


def test_the_error_is_that_of_opaque_pixels(sprites: Path, tokens: TokenDataset) -> None:
    assert tokens.manifest["made"]["palette_error"]["mse"] == 0
    for colors, error in ((tokens.palette.stored_centers, 0), ([[0, 0, 0, 1], [1, 1, 1, -1]], 1e3)):
        palette = Palette.from_centers(colors)
        found = source_images(str(sprites), palette, 8, ImageSetConfig()).image_set().palette_error
        assert found
        assert error <= found["mse"] <= 10 * error


def test_an_exported_graph_reads_transparency(sprites: Path, model: Path, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    from igpt.model.onnx_export import export_onnx

    loaded = ImageGPT.from_pretrained(model)
    export_onnx(loaded, tmp_path / "onnx")
    session = ort.InferenceSession(
        tmp_path / "onnx" / "features.onnx", providers=["CPUExecutionProvider"]
    )
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 4), dtype=np.uint8)
    assert loaded.palette
    (found,) = session.run(["tokens"], {"pixels": pixels})
    np.testing.assert_array_equal(found, loaded.palette.transform(pixels).reshape(2, -1))


def test_mistakes_are_named_in_one_line(
    sprites: Path,
    tokens: TokenDataset,
    model: Path,
    digits: TokenDataset,
    igpt: Run,
    tmp_path: Path,
) -> None:
    opaque = tmp_path / "opaque"
    opaque.mkdir()
    for number in range(12):
        sprite(number).convert("RGB").save(opaque / f"{number}.png")
    out = ("-o", tmp_path / "out")
    done = igpt("prepare", sprites, *SETTINGS, "--transparent", "--palette", digits.path, *out)
    assert done.returncode == 2
    assert "has no transparent entry; leave --transparent out" in done.stderr
    assert not (tmp_path / "out").exists()
    done = igpt("prepare", opaque, *SETTINGS, "--transparent", *out)
    assert done.returncode == 0, done.stderr
    assert "warning: no pixel of these images is transparent" in done.stdout
    # A palette with the entry needs no flag; the same colours without it are another palette.
    rgb = tmp_path / "rgb.npy"
    Palette.from_centers(tokens.palette.centers_).save(rgb)
    for palette, name in ((rgb, "rgb"), (model, "fit")):
        words = ("prepare", sprites, *SETTINGS, "--palette", palette, "-o", tmp_path / name)
        assert igpt(*words).returncode == 0
    done = igpt("complete", model, "--tokens", tmp_path / "rgb", "-o", tmp_path / "c.png")
    assert done.returncode == 2
    assert "colours, the last one transparent)" in done.stderr
    assert "--transparent" not in done.stderr
    fitted = TokenDataset(tmp_path / "fit")
    np.testing.assert_array_equal(fitted["test"].rows([0, 1]), tokens["test"].rows([0, 1]))
