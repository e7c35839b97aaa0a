import io
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt.data.images import decode, load_square, to_rgb, to_square
from igpt.errors import InputError

RANDOM = np.random.default_rng(0)
GRID = RANDOM.integers(0, 256, (3, 2, 3), dtype=np.uint8)  # not square and without symmetry

# EXIF 2.3, table 6: which visual side the stored row 0 and column 0 are, as numpy operations on the stored grid.
DISPLAYED = {
    1: lambda grid: grid,
    2: lambda grid: grid[:, ::-1],
    3: lambda grid: grid[::-1, ::-1],
    4: lambda grid: grid[::-1],
    5: lambda grid: grid.transpose(1, 0, 2),
    6: lambda grid: np.rot90(grid, -1),
    7: lambda grid: grid[::-1, ::-1].transpose(1, 0, 2),
    8: lambda grid: np.rot90(grid, 1),
}


def reopened(image: Image.Image, form: str = "PNG", **options: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return decode(buffer.getvalue())


def rgb(image: Image.Image) -> list[list[list[int]]]:
    converted = to_rgb(image)
    assert converted.mode == "RGB"
    return np.asarray(converted).tolist()


def area_average(pixels: np.ndarray, size: int) -> np.ndarray:
    """The mean over each target pixel's area, rounded half up; weights and sums are integers in float64."""
    side = len(pixels)
    edges, source = np.arange(size + 1) * side, np.arange(side) * size
    shares = np.minimum(edges[1:, None], source + size) - np.maximum(edges[:-1, None], source)
    weights = np.clip(shares, 0, None).astype(np.float64)
    down = (weights @ pixels.reshape(side, -1).astype(np.float64)).reshape(size, side, 3)
    total = (weights @ down.transpose(1, 0, 2).reshape(side, -1)).reshape(size, size, 3).transpose(1, 0, 2)
    return np.floor((2 * total + side**2) / (2 * side**2))


def test_grey_levels_become_grey_colours():
    assert rgb(reopened(Image.fromarray(np.array([[0, 7, 255]], np.uint8)))) == [[[0] * 3, [7] * 3, [255] * 3]]


def test_bilevel():
    image = reopened(Image.fromarray(np.array([[True, False]])))
    assert image.mode == "1"
    assert rgb(image) == [[[255] * 3, [0] * 3]]


def test_transparency_is_laid_over_white():
    grey = reopened(Image.fromarray(np.array([[[0, 255], [0, 0], [100, 51]]], np.uint8), "LA"))
    assert grey.mode == "LA"
    assert rgb(grey) == [[[0] * 3, [255] * 3, [224] * 3]]  # 0.2 * 100 + 0.8 * 255
    colour = reopened(
        Image.fromarray(np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [255, 0, 0, 51]]], np.uint8), "RGBA")
    )
    assert rgb(colour) == [[[255, 0, 0], [255, 255, 255], [255, 204, 204]]]


def test_transparency_by_colour_key():
    image = reopened(Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)), transparency=(1, 2, 3))
    assert image.mode == "RGB"
    assert rgb(image) == [[[255] * 3, [4, 5, 6]]]
    image = reopened(Image.fromarray(np.array([[10, 20]], np.uint8)), transparency=20)
    assert image.mode == "L"
    assert rgb(image) == [[[10] * 3, [255] * 3]]


@pytest.mark.parametrize(("form", "transparency"), [("PNG", 1), ("GIF", 1), ("PNG", bytes([255, 0, 51]))])
def test_palette_images_with_transparency(form: str, transparency: object):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 255, 0, 0])
    image.putdata([0, 1, 2])
    image = reopened(image, form, transparency=transparency)
    assert image.mode == "P"
    last = [255, 204, 204] if isinstance(transparency, bytes) else [255, 0, 0]
    assert rgb(image) == [[[255, 0, 0], [255, 255, 255], last]]


def test_16_bit_grey_is_scaled_to_8_bits():
    levels = np.array([[0, 257, 32896, 65535, 128, 129]], np.uint16)
    image = reopened(Image.fromarray(levels))
    assert image.mode.startswith("I")
    assert [pixel[0] for pixel in rgb(image)[0]] == [0, 1, 128, 255, 0, 1]
    wide = reopened(Image.fromarray(levels.astype(np.int32)), "TIFF")
    assert wide.mode == "I"
    assert rgb(wide) == rgb(image)


@pytest.mark.parametrize("level", [-1, 65536])
def test_integers_of_unknown_range_are_refused(level: int):
    image = reopened(Image.fromarray(np.array([[0, level]], np.int32)), "TIFF")
    with pytest.raises(InputError, match="beyond 16 bits"):
        to_rgb(image)


def test_floating_point_is_refused(tmp_path: Path):
    Image.fromarray(np.array([[0.5]], np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match=r"a\.tiff: floating-point pixels have no known range"):
        load_square(tmp_path / "a.tiff", 1)


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 128, 255), (255, 255, 255), (20, 20, 20)])
def test_cmyk_jpeg(colour: tuple[int, int, int]):
    """Adobe's marker stands for inverted inks: read plainly, white would be black."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).convert("CMYK").save(buffer, "JPEG", quality=95)
    assert b"Adobe" in buffer.getvalue()
    image = decode(buffer.getvalue())
    assert image.mode == "CMYK"
    assert np.abs(to_square(image, 4).astype(int) - colour).max() <= 3


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB"])
def test_other_colour_spaces(mode: str):
    image = Image.new("RGB", (2, 2), (200, 100, 50)).convert("RGB")
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    else:
        image = image.convert(mode)
    assert image.mode == mode
    assert np.abs(np.asarray(to_rgb(image)).astype(int) - (200, 100, 50)).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = reopened(Image.fromarray(GRID), exif=exif)
    expected = DISPLAYED[orientation](GRID)
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), expected)
    blocks = reopened(Image.fromarray(GRID.repeat(16, 0).repeat(16, 1)), "JPEG", exif=exif, quality=100, subsampling=0)
    shown = np.asarray(to_rgb(blocks)).astype(int)
    assert np.abs(shown - expected.repeat(16, 0).repeat(16, 1)).max() <= 4


def test_16_bit_images_are_turned_upright_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = reopened(Image.fromarray(GRID[..., 0].astype(np.uint16) * 257), exif=exif)
    np.testing.assert_array_equal(np.asarray(to_rgb(image))[..., :1], np.rot90(GRID[..., :1], -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0broken", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0"])
def test_malformed_metadata_does_not_spoil_the_pixels(exif: bytes):
    image = reopened(Image.fromarray(GRID), exif=exif)
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), GRID)


def test_metadata_that_cannot_be_written_anew_does_not_matter():
    """A number for the artist's name: Pillow's own `exif_transpose` fails to write it back."""
    directory = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), (0x013B, 11, 1, bytes(4))]
    entries = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in directory)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(directory)) + entries + bytes(4)
    image = reopened(Image.fromarray(GRID), exif=exif)
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.rot90(GRID, -1))


@pytest.mark.parametrize(
    ("shape", "crop"),
    [
        ((4, 10), np.s_[:, 3:7]),
        ((10, 4), np.s_[3:7, :]),
        ((4, 9), np.s_[:, 2:6]),
        ((9, 4), np.s_[2:6, :]),
        ((4, 4), np.s_[:, :]),
    ],
)
def test_centre_crop(shape: tuple[int, int], crop: object):
    pixels = RANDOM.integers(0, 256, (*shape, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_square(Image.fromarray(pixels), 4), pixels[crop])


@pytest.mark.parametrize("size", [3, 8])
def test_what_is_cropped_away_does_not_shine_in(size: int):
    pixels = RANDOM.integers(0, 256, (5, 15, 3), dtype=np.uint8)
    other = pixels.copy()
    other[:, :5] = other[:, 10:] = 255
    first, second = (to_square(Image.fromarray(each), size) for each in (pixels, other))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("side", "size"),
    [(16, 8), (24, 8), (56, 8), (128, 8), (33, 32), (48, 32), (50, 32), (96, 64), (375, 32), (100, 7), (1500, 5)],
)
def test_reduction_averages_areas(side: int, size: int):
    pixels = RANDOM.integers(0, 256, (side, side, 3), dtype=np.uint8)
    pixels[: side // 2, :, 0] = 255  # the largest sums
    np.testing.assert_array_equal(to_square(Image.fromarray(pixels), size), area_average(pixels, size))


def test_averages_are_rounded_once():
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, 1] = 1  # a quarter; rows rounded first would make it one
    assert (to_square(Image.fromarray(pixels), 1) == 0).all()
    pixels[1, 1] = 1
    assert (to_square(Image.fromarray(pixels), 1) == 1).all()


def test_an_image_of_the_right_size_passes_untouched():
    pixels = RANDOM.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    squared = to_square(Image.fromarray(pixels), 32)
    assert squared.dtype == np.uint8
    np.testing.assert_array_equal(squared, pixels)


def test_tiny_images_are_enlarged():
    single = to_square(Image.new("RGB", (1, 1), (1, 2, 3)), 32)
    assert (single == (1, 2, 3)).all()
    assert single.shape == (32, 32, 3)
    line = to_square(Image.new("RGB", (500, 1), (9, 9, 9)), 8)
    assert (line == 9).all()
    pixels = np.array([[[0, 0, 0], [90, 0, 0]], [[0, 90, 0], [90, 90, 90]]], np.uint8)
    large = to_square(Image.fromarray(pixels), 16).astype(int)
    assert (large[[0, 0, -1, -1], [0, -1, 0, -1]] > 45).tolist() == (pixels.reshape(4, 3) > 45).tolist()
    assert len(np.unique(large[0, :, 0])) > 4  # between the pixels there are levels between theirs


def test_inputs_of_every_kind(tmp_path: Path, picture: Callable[..., bytes]):
    data = picture(1)
    (tmp_path / "a.png").write_bytes(data)
    opened = Image.open(io.BytesIO(data))
    expected = np.asarray(opened)
    record, on_disk = {"bytes": data, "path": None}, {"bytes": None, "path": str(tmp_path / "a.png")}
    for given in (data, tmp_path / "a.png", str(tmp_path / "a.png"), opened, record, on_disk):
        np.testing.assert_array_equal(np.asarray(decode(given)), expected)


def test_the_first_frame_of_an_animation(tmp_path: Path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (load_square(tmp_path / "a.gif", 4) == (255, 0, 0)).all()


def test_damaged_files_are_named_with_the_reason(tmp_path: Path, picture: Callable[..., bytes]):
    files = {
        "cut.jpg": (picture(0, "JPEG", 64)[:900], "truncated"),
        "cut.png": (picture(0, "PNG", 64)[:900], "truncated"),
        "head.jpg": (picture(0, "JPEG", 64)[:10], "Truncated File Read"),
        "empty.jpg": (b"", r"empty \(zero bytes\)"),
        "text.jpg": (b"this is no picture", "not an image in a known format"),
    }
    for name, (content, reason) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}: .*{reason}"):
            load_square(tmp_path / name, 8)
    with pytest.raises(InputError, match="no such file"):
        load_square(tmp_path / "nowhere.jpg", 8)
    with pytest.raises(InputError, match="is a folder"):
        load_square(tmp_path, 8)
    for nothing in (None, {"bytes": None, "path": None}):
        with pytest.raises(InputError, match="no image here"):
            decode(nothing)
    with pytest.raises(InputError, match=r"zero bytes"):
        decode({"bytes": b"", "path": "a.jpg"})
    with pytest.raises(InputError, match="no pixels"):
        to_square(Image.new("RGB", (0, 4)), 8)


def test_a_lazily_opened_cut_file_is_an_input_error(picture: Callable[..., bytes]):
    with pytest.raises(InputError, match="truncated"):
        decode(Image.open(io.BytesIO(picture(0, "JPEG", 64)[:900])))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF"])
def test_no_damage_escapes_as_another_error(form: str):
    """200 files with bytes changed and ends cut off: each gives a square or an InputError."""
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    options = {} if form in ("GIF", "BMP", "PPM") else {"exif": exif}
    Image.fromarray(RANDOM.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(buffer, form, **options)
    refused = 0
    for seed in range(200):
        generator = random.Random(seed)
        damaged = bytearray(buffer.getvalue())
        for _ in range(generator.randint(1, 6)):
            damaged[generator.randrange(min(len(damaged), 300))] = generator.randrange(256)
        if seed % 5 == 0:
            del damaged[generator.randrange(len(damaged)) :]
        try:
            assert to_square(decode(bytes(damaged)), 8).shape == (8, 8, 3)
        except InputError:
            refused += 1
    assert 20 < refused < 200


def test_photographs(shared_data: Path):
    """Full-size photographs, two of them grey: their centres' averages, whatever mode the decoder gives."""
    files = sorted(shared_data.glob("imagenet-sample/train/*/*.JPEG"))
    grey = [file for file in files if Image.open(file).mode == "L"]
    assert (len(files), len(grey)) == (100, 2)
    for file in [*grey, *files[::5]]:
        with Image.open(file) as image:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            pixels = np.asarray(image.convert("RGB"))[top : top + side, left : left + side]
        np.testing.assert_array_equal(load_square(file, 32), area_average(pixels, 32))
