import contextlib
import io
import os
import socket
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt.data.images.decode import (
    further_frames,
    highest_level,
    load,
    open_image,
    orientation,
    to_rgb,
)
from igpt.data.images.transform import Transform
from igpt.errors import InputError

from ...helpers.reading import DISPLAYED

RANDOM = np.random.default_rng(0)
GRID = RANDOM.integers(0, 256, (3, 2, 3), dtype=np.uint8)  # neither square nor symmetric


def reopened(image: Image.Image, form: str = "PNG", **options: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return load(open_image(buffer.getvalue()))


def rgb(image: Image.Image) -> list[list[list[int]]]:
    converted = to_rgb(image)
    assert converted.mode == "RGB"
    return np.asarray(converted).tolist()


def test_grey_levels_become_grey_colours():
    assert rgb(reopened(Image.fromarray(np.array([[0, 7, 255]], np.uint8)))) == [
        [[0] * 3, [7] * 3, [255] * 3]
    ]


def test_bilevel():
    image = reopened(Image.fromarray(np.array([[True, False]])))
    assert image.mode == "1"
    assert rgb(image) == [[[255] * 3, [0] * 3]]


def test_transparency_is_composited_over_white():
    grey = reopened(Image.fromarray(np.array([[[0, 255], [0, 0], [100, 51]]], np.uint8), "LA"))
    assert grey.mode == "LA"
    assert rgb(grey) == [[[0] * 3, [255] * 3, [224] * 3]]  # 0.2 * 100 + 0.8 * 255
    colour = reopened(
        Image.fromarray(
            np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [255, 0, 0, 51]]], np.uint8), "RGBA"
        )
    )
    assert rgb(colour) == [[[255, 0, 0], [255, 255, 255], [255, 204, 204]]]


def test_transparency_by_colour_key():
    image = reopened(
        Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)), transparency=(1, 2, 3)
    )
    assert image.mode == "RGB"
    assert rgb(image) == [[[255] * 3, [4, 5, 6]]]
    image = reopened(Image.fromarray(np.array([[10, 20]], np.uint8)), transparency=20)
    assert image.mode == "L"
    assert rgb(image) == [[[10] * 3, [255] * 3]]


@pytest.mark.parametrize(
    ("form", "transparency"), [("PNG", 1), ("GIF", 1), ("PNG", bytes([255, 0, 51]))]
)
def test_palette_images_with_transparency(form: str, transparency: object):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 255, 0, 0])
    image.putdata([0, 1, 2])
    image = reopened(image, form, transparency=transparency)
    assert image.mode == "P"
    last = [255, 204, 204] if isinstance(transparency, bytes) else [255, 0, 0]
    assert rgb(image) == [[[255, 0, 0], [255, 255, 255], last]]


def png(
    width: int, depth: int, kind: int, row: bytes, transparent: bytes, palette: bytes = b""
) -> bytes:
    """Return a PNG of one row, written chunk by chunk: Pillow itself does not write all depths."""
    header = struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0)
    chunks = [
        (b"IHDR", header),
        (b"PLTE", palette),
        (b"tRNS", transparent),
        (b"IDAT", zlib.compress(b"\0" + row)),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in [*chunks, (b"IEND", b"")]
        if data or name == b"IEND"
    )


GREY, COLOUR, PALETTE = 0, 2, 3
WHITE = [255] * 3


@pytest.mark.parametrize(
    ("encoded", "expected"),
    [
        (
            png(3, 16, GREY, struct.pack(">3H", 0, 257, 40000), struct.pack(">H", 0)),
            [WHITE, [1] * 3, [156] * 3],
        ),
        (
            png(3, 16, GREY, struct.pack(">3H", 0, 257, 40000), struct.pack(">H", 40000)),
            [[0] * 3, [1] * 3, WHITE],
        ),
        (png(3, 8, GREY, bytes([0, 1, 200]), struct.pack(">H", 200)), [[0] * 3, [1] * 3, WHITE]),
        (png(2, 4, GREY, b"\x3f", struct.pack(">H", 3)), [WHITE, WHITE]),
        (png(2, 4, GREY, b"\x3e", struct.pack(">H", 14)), [[51] * 3, WHITE]),
        (png(4, 2, GREY, b"\x1b", struct.pack(">H", 1)), [[0] * 3, WHITE, [170] * 3, WHITE]),
        (png(2, 1, GREY, b"\x40", struct.pack(">H", 0)), [WHITE, WHITE]),
        (png(2, 1, GREY, b"\x40", struct.pack(">H", 1)), [[0] * 3, WHITE]),
        (
            png(
                2,
                16,
                COLOUR,
                struct.pack(">6H", 40000, 256, 513, 1, 2, 3),
                struct.pack(">3H", 40000, 256, 513),
            ),
            [WHITE, [0] * 3],
        ),
        (
            png(2, 8, COLOUR, bytes([1, 2, 3, 4, 5, 6]), struct.pack(">3H", 4, 5, 6)),
            [[1, 2, 3], WHITE],
        ),
        (
            png(4, 2, PALETTE, b"\x1b", b"\0\xff", bytes(range(12))),
            [WHITE, [3, 4, 5], [6, 7, 8], [9, 10, 11]],
        ),
    ],
    ids=lambda value: "",
)
def test_a_transparent_level_or_colour_of_any_depth_becomes_white(
    encoded: bytes, expected: list[list[int]]
):
    assert rgb(load(open_image(encoded))) == [expected]


@pytest.mark.parametrize("kind", [4, 6])
def test_alpha_of_16_bits(kind: int):
    """Grey or colour, at half and at no opacity."""
    levels = (
        [[40000, 0], [25700, 51 * 257]]
        if kind == 4
        else [[40000, 0, 0, 0], [25700, 25700, 25700, 51 * 257]]
    )
    row = b"".join(struct.pack(f">{len(pixel)}H", *pixel) for pixel in levels)
    assert rgb(load(open_image(png(2, 16, kind, row, b"")))) == [
        [WHITE, [224] * 3]
    ]  # 0.2 * 100 + 0.8 * 255


def test_the_highest_level_of_16_bit_images():
    for levels, highest in (
        (np.array([[0, 4095]], np.uint16), 4095),
        (np.array([[7, 9]], np.uint8), None),
    ):
        assert highest_level(reopened(Image.fromarray(levels))) == highest


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PNG", "WEBP"])
@pytest.mark.parametrize("count", [1, 5])
def test_the_frames_after_the_first_are_counted(kind: str, count: int):
    file = io.BytesIO()
    frames = [Image.fromarray(np.full((6, 6, 3), 50 * number, np.uint8)) for number in range(count)]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], lossless=True)
    found = Transform(6).squares_of(file.getvalue())
    assert found.further_frames == count - 1
    assert found.pixels.tolist() == np.zeros((1, 6, 6, 3)).tolist()  # the first frame is used


def test_the_highest_level_is_that_of_the_first_frame():
    file = io.BytesIO()
    frames = [Image.fromarray(np.full((6, 6), level, np.uint16)) for level in (300, 60000)]
    frames[0].save(file, "TIFF", save_all=True, append_images=frames[1:])
    found = Transform(6).squares_of(file.getvalue())
    assert (found.highest_level, found.further_frames) == (300, 1)


def test_malformed_later_frames_do_not_make_an_image_unreadable():
    file = io.BytesIO()
    frames = [Image.fromarray(np.full((6, 6, 3), 50 * number, np.uint8)) for number in range(3)]
    frames[0].save(file, "TIFF", save_all=True, append_images=frames[1:])
    content = file.getvalue()
    next_directory = struct.unpack_from("<I", content, 4)[0]
    next_directory += 2 + 12 * struct.unpack_from("<H", content, next_directory)[0]
    broken = (
        content[:next_directory]
        + struct.pack("<I", len(content) + 99)
        + content[next_directory + 4 :]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's warning about the later frames
        found = Transform(6).squares_of(broken)
    assert found.pixels.tolist() == np.zeros((1, 6, 6, 3)).tolist()
    assert found.further_frames == 1  # there are more frames, and they cannot be counted


def test_layers_are_not_counted_as_frames():
    layers = Image.new("RGB", (2, 2))
    layers.format, layers.n_frames = "PSD", 7
    assert further_frames(layers) == 0


def test_heic_is_read_if_its_package_is_installed(tmp_path: Path):
    """Replace the package by one that makes Pillow's PNG reader open .heic too."""
    (tmp_path / "pillow_heif.py").write_text(
        "from PIL import Image\n"
        "def register_heif_opener():\n"
        "    Image.init()\n"
        "    Image.register_extension('PNG', '.heic')\n"
    )
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (2, 2), (number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.png").rename(folder / f"{number}.heic")
    program = (
        "import sys, numpy as np\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from igpt.data.images.decode import open_image\n"
        "from igpt.data.sources.catalogue import open_source\n"
        "splits = open_source(sys.argv[1] + '/photos').splits\n"
        "print(sorted(open_image(image).getpixel((0, 0))[0] for split in splits.values()\n"
        "      for image, _ in split.read(np.arange(1))))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert done.stdout == "[0, 1, 2]\n", done.stderr


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_fifos_and_devices_are_never_opened(tmp_path: Path, kind: str):
    path = Path("/dev/zero") if kind == "device" else tmp_path / "image.png"
    if kind == "fifo":
        os.mkfifo(path)
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    with pytest.raises(
        InputError,
        match=f"is a {kind.upper() if kind == 'fifo' else kind}; a regular file is needed",
    ):
        open_image(path)


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


def test_floating_point_is_refused():
    image = reopened(Image.fromarray(np.array([[0.5]], np.float32)), "TIFF")
    with pytest.raises(InputError, match="floating-point pixels have no known range"):
        to_rgb(image)


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 128, 255), (255, 255, 255), (20, 20, 20)])
def test_cmyk_jpeg(colour: tuple[int, int, int]):
    """Adobe's marker means inverted inks: without it, white would be read as black."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).convert("CMYK").save(buffer, "JPEG", quality=95)
    assert b"Adobe" in buffer.getvalue()
    image = load(open_image(buffer.getvalue()))
    assert image.mode == "CMYK"
    assert np.abs(np.asarray(to_rgb(image)).astype(int) - colour).max() <= 3


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


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation(form: str, tag: int):
    exif = Image.Exif()
    exif[0x0112] = tag
    image = reopened(
        Image.fromarray(GRID), form, exif=exif, **({"lossless": True} if form == "WEBP" else {})
    )
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), DISPLAYED[tag](GRID))


@pytest.mark.parametrize("tag", range(1, 9))
def test_exif_orientation_of_jpegs(tag: int):
    exif = Image.Exif()
    exif[0x0112] = tag
    blocks = GRID.repeat(16, 0).repeat(16, 1)
    image = reopened(Image.fromarray(blocks), "JPEG", exif=exif, quality=100, subsampling=0)
    assert (orientation(image) is None) == (tag == 1)
    shown = np.asarray(to_rgb(image)).astype(int)
    assert np.abs(shown - DISPLAYED[tag](blocks)).max() <= 4


def test_16_bit_images_are_rotated_upright_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = reopened(Image.fromarray(GRID[..., 0].astype(np.uint16) * 257), exif=exif)
    np.testing.assert_array_equal(np.asarray(to_rgb(image))[..., :1], np.rot90(GRID[..., :1], -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0broken", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0"]
)
def test_malformed_metadata_do_not_affect_the_pixels(exif: bytes):
    image = reopened(Image.fromarray(GRID), exif=exif)
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), GRID)


def test_metadata_that_cannot_be_written_back_do_not_matter():
    """Use a number as the artist's name: Pillow's own `exif_transpose` fails to write it back."""
    directory = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), (0x013B, 11, 1, bytes(4))]
    entries = b"".join(
        struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in directory
    )
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(directory)) + entries + bytes(4)
    image = reopened(Image.fromarray(GRID), exif=exif)
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.rot90(GRID, -1))


def test_inputs_of_every_kind(tmp_path: Path, picture: Callable[..., bytes]):
    data = picture(1)
    (tmp_path / "a.png").write_bytes(data)
    opened = Image.open(io.BytesIO(data))
    expected = np.asarray(opened)
    record, on_disk = (
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(tmp_path / "a.png")},
    )
    for given in (
        data,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        opened,
        expected,
        record,
        on_disk,
    ):
        np.testing.assert_array_equal(np.asarray(load(open_image(given))), expected)
    grey = open_image(expected[..., 0])
    assert grey.mode == "L"
    np.testing.assert_array_equal(np.asarray(grey), expected[..., 0])


def test_opening_decodes_no_pixels(picture: Callable[..., bytes]):
    data = picture(0, "JPEG", 64)
    opened = open_image(data[:900])
    assert (opened.format, opened.size) == ("JPEG", (64, 64))
    with pytest.raises(InputError, match="truncated"):
        load(opened)


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for form in ("GIF", "PNG", "WEBP"):
        image = reopened(frames[0], form, save_all=True, append_images=frames[1:])
        assert image.n_frames == 2
        assert np.abs(np.array(rgb(image)) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize(
    ("form", "kept", "reason"),
    [
        ("JPEG", 900, "truncated"),
        ("PNG", 900, "truncated"),
        ("JPEG", 10, "Truncated File Read"),
        ("PNG", 0, r"empty \(zero bytes\)"),
    ],
)
def test_truncated_files_are_refused_with_the_reason(
    picture: Callable[..., bytes], form: str, kept: int, reason: str
):
    with pytest.raises(InputError, match=reason) as refused:
        load(open_image(picture(0, form, 64)[:kept]))
    assert "\n" not in str(refused.value)


def test_files_that_are_not_images_are_refused_with_the_reason(tmp_path: Path):
    with pytest.raises(InputError, match="not an image in a known format"):
        open_image(b"this is no picture")
    with pytest.raises(InputError, match=r"no such file: .*nowhere\.jpg"):
        open_image(tmp_path / "nowhere.jpg")
    with pytest.raises(InputError, match="is a folder"):
        open_image(tmp_path)
    for nothing in (None, {"bytes": None, "path": None}):
        with pytest.raises(InputError, match="no image here"):
            open_image(nothing)
    with pytest.raises(InputError, match="zero bytes"):
        open_image({"bytes": b"", "path": "a.jpg"})
    with pytest.raises(InputError, match="does not decode"):
        open_image(np.zeros((2, 3, 4, 5), np.uint8))


def test_a_lazily_opened_truncated_file_is_an_input_error(picture: Callable[..., bytes]):
    with pytest.raises(InputError, match="truncated"):
        load(Image.open(io.BytesIO(picture(0, "JPEG", 64)[:900])))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_a_reduced_jpeg_has_a_pixel_for_each_block(mode: str, reduction: int):
    """Blocks of one colour keep it, and an incomplete last block becomes a pixel too."""
    blocks = RANDOM.integers(0, 256, (7, 5, 3), dtype=np.uint8)
    whole = Image.fromarray(blocks.repeat(16, 0).repeat(16, 1)[:109, :77]).convert(mode)
    buffer = io.BytesIO()
    whole.save(buffer, "JPEG", quality=100, subsampling=0)
    reduced = load(open_image(buffer.getvalue()), reduction)
    assert (reduced.mode, reduced.size) == (mode, (-(-77 // reduction), -(-109 // reduction)))
    expected = np.asarray(to_rgb(whole)).astype(int)[::reduction, ::reduction]
    assert np.abs(np.asarray(to_rgb(reduced)) - expected).max() <= 6


def blocks_allocated(given: object) -> int:
    """Return the number of blocks that Pillow allocates while one image is opened and decoded, or
    refused."""
    Image.core.reset_stats()
    with contextlib.suppress(InputError):
        load(open_image(given))
    return Image.core.get_stats()["new_count"]


def test_a_header_that_promises_too_much_is_refused_before_decoding(picture: Callable[..., bytes]):
    """A valid PNG of 100 bytes that would take 1.2 GB: refused before memory is allocated for
    it."""
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(40))), (b"IEND", b"")]
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    with pytest.raises(InputError, match=r"400000000 pixels\) exceeds limit") as refused:
        open_image(bomb)
    assert "\n" not in str(refused.value)
    assert blocks_allocated(bomb) == 0
    assert blocks_allocated(picture(0)) > 0


def test_the_limit_of_pixels_is_pillows(
    monkeypatch: pytest.MonkeyPatch, picture: Callable[..., bytes]
):
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", 100
    )  # Pillow warns above this number, and refuses twice as many
    assert load(open_image(picture(0, "PNG", 10))).size == (10, 10)
    for form in ("PNG", "JPEG", "GIF"):
        with pytest.raises(InputError, match=r"225 pixels\) exceeds limit of 200"):
            open_image(picture(0, form, 15))
