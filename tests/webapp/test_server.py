"""The web page, served on loopback and called by a program: its pictures are the model's, mistakes
are answered in words."""

import asyncio
import base64
import contextlib
import http.client
import io
import json
import math
import os
import re
import shutil
import socket
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor

from igpt.data.images.palette import Palette
from igpt.data.images.transform import load_square
from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError
from igpt.evaluation.probe_classifier import ProbeClassifier
from igpt.model.classifier import predict
from igpt.model.config import ModelConfig
from igpt.model.images import decode_images, tokens_of_files
from igpt.model.objectives import pixel_losses
from igpt.model.transformer import ImageGPT
from igpt.sampling.sampler import generate
from igpt.webapp.guard import Guard, delete_unused, names_of
from igpt.webapp.handlers import _webp_sides, crop, require_moderate, write_examples
from igpt.webapp.server import build, start

GREYS = Palette.from_centers(np.linspace(-1, 1, 17)[:, None].repeat(3, 1))
LOOPBACK = "127.0.0.1"


def make_model(palette: Palette | None = GREYS, **settings: object) -> ImageGPT:
    """Return a random model whose predictions are not all alike."""
    torch.manual_seed(0)
    shape = {"resolution": 8, "n_colors": 17, "n_layer": 2, "n_embd": 16, "n_head": 2}
    model = ImageGPT(ModelConfig.model_validate({**shape, **settings}), palette)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    return model.eval()


def serve(model: ImageGPT, downloads: Path) -> Iterator[Client]:
    page = start(model, LOOPBACK, 0)
    try:
        yield Client(
            page.local_url, verbose=False, analytics_enabled=False, download_files=downloads
        )
    finally:
        page.close(verbose=False)


@pytest.fixture(scope="module")
def model() -> ImageGPT:
    return make_model()


@pytest.fixture(scope="module")
def client(model: ImageGPT, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    yield from serve(model, tmp_path_factory.mktemp("downloads"))


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a picture that is larger than the model's images, not square, and partly
    transparent."""
    levels = np.random.default_rng(1).integers(0, 256, (30, 44, 4), dtype=np.uint8)
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.fromarray(levels).save(path)
    return path


def content(link: str, kind: str) -> io.BytesIO:
    """Return the content of a data URI."""
    head, _, encoded = link.partition(",")
    assert head == f"data:{kind};base64"
    return io.BytesIO(base64.b64decode(encoded))


def small(shown: dict[str, Any]) -> NDArray[np.uint8]:
    """Return a picture of the page at the model's resolution."""
    return np.asarray(Image.open(content(shown["picture"], "image/png")))


def images_of(shown: list[dict[str, Any]]) -> NDArray[np.uint8]:
    return np.stack([small(picture) for picture in shown])


def expected_images(
    model: ImageGPT, tokens: Tensor, known: Tensor, **settings: Any
) -> NDArray[np.uint8]:
    *_, last = generate(model, tokens, known, **settings)
    return decode_images(model, last.tokens)


def test_score_shows_the_models_view_and_its_losses(
    client: Client, model: ImageGPT, photo: Path
) -> None:
    seen, _, words, surprise = client.predict(handle_file(photo), api_name="/score")
    np.testing.assert_array_equal(
        small(seen), GREYS.inverse_transform(GREYS.transform(load_square(photo, 8)))
    )
    assert seen["hidden"] == "0" * 64
    tokens = tokens_of_files(model, [photo])
    with torch.inference_mode():
        losses = pixel_losses(model(tokens), tokens)[0].double().numpy()
    assert f"{losses.mean():.4f} nats/pixel" in words
    assert f"{losses.mean() / np.log(2):.4f} bits/pixel" in words
    assert f"{np.log(17):.2f} nats" in words
    brightness = small(surprise[0]).astype(int).sum(axis=-1).reshape(-1)[np.argsort(losses)]
    assert (np.diff(brightness) >= 0).all()
    assert brightness[0] < brightness[-1]


@pytest.mark.parametrize(
    ("size", "turn", "seen", "said"),
    [
        ((40, 20), 1, (10, 0, 30, 20), "the part in the frame."),
        ((40, 20), 6, (0, 10, 20, 30), "the part in the frame."),  # shown upright
        ((20, 20), 1, (0, 0, 20, 20), "all of it."),
        ((20, 4), 1, (6, 0, 14, 4), "the part in the frame, with a mirrored border."),
        ((2, 10_000), 1, None, "the part in the frame, with a mirrored border."),
        ((6000, 3000), 1, (1500, 0, 4500, 3000), "the part in the frame."),
    ],
)
def test_the_part_of_an_upload_that_the_model_sees_is_framed(
    model: ImageGPT,
    size: tuple[int, int],
    turn: int,
    seen: tuple[int, int, int, int] | None,
    said: str,
    tmp_path: Path,
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    Image.new("RGB", size, "white").save(tmp_path / "photo.jpg", exif=exif, quality=95)
    (shown,) = crop(model, str(tmp_path / "photo.jpg"))
    assert shown["caption"] == f"Your image. The model sees {said}"
    picture = small(shown)
    assert max(picture.shape) <= 320
    if seen is None:
        return
    scale = max(picture.shape) / max(size)
    rows, columns = np.nonzero((picture == picture.max(axis=(0, 1))).all(axis=2))
    left, top, right, bottom = (round(edge * scale) for edge in seen)
    assert (columns.min(), rows.min()) == (left + 2, top + 2)  # within the frame
    assert (columns.max(), rows.max()) == (right - 3, bottom - 3)


def test_completions_keep_rows_and_depend_on_the_seed(
    client: Client, model: ImageGPT, photo: Path
) -> None:
    shown, words, archive = client.predict(
        handle_file(photo), 3, None, 2, 1.0, 5, api_name="/complete"
    )
    assert words.startswith("2 drawings, seed 5, in ")
    assert [picture["caption"] for picture in shown] == ["original", "drawing 1", "drawing 2"]
    tokens = tokens_of_files(model, [photo])
    original, rows = decode_images(model, tokens), torch.arange(64) < 24
    expected = np.concatenate([original, expected_images(model, tokens.repeat(2, 1), rows, seed=5)])
    np.testing.assert_array_equal(images_of(shown), expected)
    np.testing.assert_array_equal(expected[:, :3], original[:, :3].repeat(3, 0))
    assert (expected[1] != expected[2]).any()
    files = zipfile.ZipFile(content(archive, "application/zip"))
    assert files.namelist() == ["original.png", "drawing 1.png", "drawing 2.png"]
    for picture, name, pixels in zip(shown, files.namelist(), expected, strict=True):
        download = content(picture["download"], "image/png")
        np.testing.assert_array_equal(
            np.asarray(Image.open(download)), pixels.repeat(64, 0).repeat(64, 1)
        )
        assert files.read(name) == download.getvalue()
    again, words, _ = client.predict(handle_file(photo), 3, None, 1, 1.0, 5, api_name="/complete")
    assert words.startswith("1 drawing, seed 5")
    np.testing.assert_array_equal(images_of(again), expected[:2])


def test_completions_keep_pixels_that_are_not_hidden(
    client: Client, model: ImageGPT, photo: Path
) -> None:
    known = torch.from_numpy(np.random.default_rng(0).random(64) < 0.5)
    view = {"hidden": "".join("0" if one else "1" for one in known)}
    shown, _, _ = client.predict(handle_file(photo), 3, view, 2, 1.0, 0, api_name="/complete")
    tokens = tokens_of_files(model, [photo])
    np.testing.assert_array_equal(
        images_of(shown)[1:], expected_images(model, tokens.repeat(2, 1), known)
    )
    kept = known.view(8, 8).numpy()
    np.testing.assert_array_equal(images_of(shown)[1][kept], decode_images(model, tokens)[0][kept])


@pytest.mark.parametrize("limits", [{}, {"top_k": 3}, {"top_p": 0.5}])
def test_samples_are_the_models(client: Client, model: ImageGPT, limits: dict[str, Any]) -> None:
    shown, _, _ = client.predict(2, 0.5, 3, api_name="/sample", **limits)
    nothing = torch.zeros(2, 64, dtype=torch.long)
    expected = expected_images(model, nothing, nothing[0] > 0, temperature=0.5, seed=3, **limits)
    np.testing.assert_array_equal(images_of(shown), expected)


def test_a_class_and_guidance_are_those_of_the_menu(photo: Path, tmp_path: Path) -> None:
    model = make_model(conditions=("cat", "dog"))
    nothing = torch.zeros(2, 64, dtype=torch.long)
    served = serve(model, tmp_path)
    client = next(served)
    try:
        plain, _, _ = client.predict(2, 1.0, 3, api_name="/sample")
        np.testing.assert_array_equal(
            images_of(plain), expected_images(model, nothing, nothing[0] > 0, seed=3)
        )
        dogs = {"labels": torch.tensor([1, 1]), "guidance": 3}
        shown, _, _ = client.predict(2, 1.0, 3, class_name="dog", guidance=3, api_name="/sample")
        np.testing.assert_array_equal(
            images_of(shown), expected_images(model, nothing, nothing[0] > 0, seed=3, **dogs)
        )
        shown, _, _ = client.predict(
            handle_file(photo),
            4,
            None,
            2,
            1.0,
            3,
            class_name="dog",
            guidance=3,
            api_name="/complete",
        )
        tokens, known = tokens_of_files(model, [photo]).repeat(2, 1), torch.arange(64) < 32
        np.testing.assert_array_equal(
            images_of(shown)[1:], expected_images(model, tokens, known, seed=3, **dogs)
        )
        with pytest.raises(AppError):
            client.predict(2, 1.0, 3, class_name="owl", api_name="/sample")
        with pytest.raises(AppError):
            client.predict(2, 1.0, 3, class_name="dog", guidance=-1, api_name="/sample")
    finally:
        served.close()


def test_keeping_all_rows_returns_the_image(client: Client, model: ImageGPT, photo: Path) -> None:
    shown, _, _ = client.predict(handle_file(photo), 8, None, 1, 1.0, 0, api_name="/complete")
    np.testing.assert_array_equal(
        images_of(shown), decode_images(model, tokens_of_files(model, [photo])).repeat(2, 0)
    )


def test_mistakes_are_answered_in_words(
    client: Client, photo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.png"
    text.write_text("<b>no image</b>")
    empty = tmp_path / "empty.png"
    empty.touch()
    for file, reason in ((text, "not an image in a known format"), (empty, "empty")):
        with pytest.raises(AppError, match=reason):
            client.predict(handle_file(file), api_name="/score")
        with pytest.raises(AppError, match=reason):
            client.predict(handle_file(file), 4, None, 1, 1.0, 0, api_name="/complete")
    with pytest.raises(AppError, match="choose an image first"):
        client.predict(None, 4, None, 1, 1.0, 0, api_name="/complete")
    with pytest.raises(AppError, match="give a seed"):
        client.predict(handle_file(photo), 4, None, 1, 1.0, None, api_name="/complete")
    for hidden in ("1" * 63, "2" * 64):
        with pytest.raises(AppError, match="64 characters, 1 for hidden"):
            client.predict(
                handle_file(photo), 4, {"hidden": hidden}, 1, 1.0, 0, api_name="/complete"
            )
    assert "Traceback" not in capfd.readouterr().err
    for rows, count, temperature, seed in (
        (99, 1, 1, 0),
        (-1, 1, 1, 0),
        (4, 9, 1, 0),
        (4, 1, -1, 0),
    ):
        with pytest.raises(AppError, match=r"(greater|less) than (maximum|minimum) value"):
            client.predict(
                handle_file(photo), rows, None, count, temperature, seed, api_name="/complete"
            )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seed": -1}, "seed: a whole number from 0 to 9007199254740992 is needed, not -1"),
        ({"top_k": 0}, "top-k is at least 1, not 0"),
        ({"top_k": 2.5}, "top-k: a whole number is needed, not 2.5"),
        ({"top_p": 1.5}, r"top-p lies in \(0, 1\], not 1.5"),
        ({"top_p": "x"}, "top-p: a number is needed, not 'x'"),
    ],
)
def test_limits_of_the_settings_are_named(
    client: Client, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(AppError, match=said):
        client.predict(2, 1, **{"seed": 0, **settings}, api_name="/sample")


# Images of a few bytes that decode to very many pixels


def png(width: int, height: int) -> bytes:
    """Return a black and white PNG of one colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    packed = zlib.compressobj(9)
    row = bytes(width // 8 + 1)
    data = b"".join(packed.compress(row) for _ in range(height)) + packed.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def gif(width: int, height: int, frame_width: int, frame_height: int) -> bytes:
    frame = (
        b"," + struct.pack("<HHHHB", 0, 0, frame_width, frame_height, 0) + b"\x02\x02\x44\x01\x00;"
    )
    return (
        b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + frame
    )


def tiff(width: int, height: int, more: Mapping[int, int]) -> bytes:
    """Return a deflated grey TIFF; `more` describes its strips or tiles."""
    tags = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, **more}
    entries = b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())
    )
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head.ljust(300, b"\0") + zlib.compress(bytes(100))


def webp(width: int, height: int) -> bytes:
    """Return an animation with one small frame on a large canvas."""
    small = io.BytesIO()
    Image.new("RGB", (16, 16)).save(small, "WEBP", lossless=True)
    sides = [(side - 1).to_bytes(3, "little") for side in (width, height, 16, 16)]
    frame = bytes(6) + sides[2] + sides[3] + bytes(4) + small.getvalue()[12:]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + sides[0] + sides[1] + b"ANIM"
    body += struct.pack("<I", 6) + bytes(6) + b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


BOMBS = {
    "png": png(12_000, 12_000),
    "gif": gif(60_000, 60_000, 10, 10),
    "gif-frame": gif(10, 10, 60_000, 60_000),
    "tiff": tiff(60_000, 60_000, {273: 300, 278: 60_000, 279: 20}),
    "tiff-tile": tiff(64, 64, {322: 60_000, 323: 60_000, 324: 300, 325: 20}),
    "tiff-long-tile": tiff(64, 64, {322: 16, 323: 2**31, 324: 300, 325: 20}),
    "webp": webp(16_383, 16_383),
}


@pytest.mark.parametrize("name", BOMBS)
def test_images_of_too_many_pixels_are_refused_by_their_header(name: str) -> None:
    assert len(BOMBS[name]) < 20_000
    started = peak_memory()
    with pytest.raises(InputError, match="50 million that the page reads; make it smaller first"):
        require_moderate(BOMBS[name])
    assert peak_memory() - started < 200  # decoded, the smallest of them takes 430


def peak_memory() -> float:
    """Return the peak of resident memory in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PDF", "TGA"])
def test_formats_that_cameras_and_web_pages_do_not_use_are_refused(kind: str) -> None:
    """EPS would start another program; the size in an ICO's header is not that of its image."""
    encoded = io.BytesIO()
    Image.new("RGB", (64, 64)).save(encoded, kind)
    with pytest.raises(
        InputError,
        match=r"not read here; choose a file in one of PNG|not an image in a known format",
    ):
        require_moderate(encoded.getvalue())


def test_a_large_photograph_is_read(client: Client, tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(png(8000, 5000))
    seen, *_ = client.predict(handle_file(tmp_path / "large.png"), api_name="/score")
    assert (small(seen) == small(seen)[0, 0]).all()


def test_a_decompression_bomb_on_the_page_is_answered_in_words(
    client: Client, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bomb.png").write_bytes(BOMBS["png"])
    with pytest.raises(AppError, match="144 million pixels"):
        client.predict(handle_file(tmp_path / "bomb.png"), api_name="/score")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "settings", [{"lossless": True}, {"quality": 50}, {"lossless": True, "exif": b"Exif\0\0"}]
)
def test_the_sides_of_a_webp_are_read_from_its_header(settings: dict[str, Any]) -> None:
    encoded = io.BytesIO()
    Image.new("RGB", (300, 200)).save(encoded, "WEBP", **settings)
    assert _webp_sides(encoded.getvalue()) == (300, 200)
    assert _webp_sides(encoded.getvalue()[:20]) == _webp_sides(b"") == (0, 0)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_the_first_of_many_frames_is_read(kind: str) -> None:
    encoded = io.BytesIO()
    frames = [Image.new("RGB", (300, 200), (index, 0, 0)) for index in range(20)]
    frames[0].save(encoded, kind, save_all=True, append_images=frames[1:])
    require_moderate(encoded.getvalue())


# Requests as a program makes them, well-formed or not


def ask(
    client: Client,
    method: str,
    path: str,
    body: Any = None,
    raw: bytes | None = None,
    **headers: str,
) -> tuple[int, str]:
    """Send one request; return the status and the text of the answer."""
    connection = http.client.HTTPConnection(
        LOOPBACK, int(client.src.rsplit(":", 1)[1].strip("/")), timeout=60
    )
    try:
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


@pytest.mark.parametrize(
    "path", ["/", "/config", "/gradio_api/queue/data?session_hash=a", "/gradio_api/info"]
)
def test_only_its_own_host_names_are_served(client: Client, path: str) -> None:
    """Otherwise a foreign site whose name resolves to this machine could read the page in a
    visitor's browser (DNS rebinding)."""
    for host in (
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example:7860",
        "0.0.0.0",
        "192.168.0.1",
        "",
    ):
        status, said = ask(client, "GET", path, Host=host)
        assert (status, said) == (421, "this page is served as 127.0.0.1, ::1, localhost only\n")
    if "queue" not in path:
        for host in ("localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:7860", "localhost."):
            assert ask(client, "GET", path, Host=host)[0] == 200


def test_posts_from_other_origins_are_refused(client: Client) -> None:
    for path in ("queue/join", "call/sample", "upload", "cancel"):
        assert ask(client, "POST", f"/gradio_api/{path}", {}, Host="evil.example")[0] == 421


def test_names_of_other_addresses() -> None:
    names, any_number = names_of("0.0.0.0")
    assert any_number
    assert {socket.gethostname().lower(), "localhost", "0.0.0.0"} <= names
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.5"):
        assert names_of(host) == (frozenset({"localhost", "127.0.0.1", "::1", host}), False)


def test_the_machines_full_name_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Worker")
    monkeypatch.setattr(socket, "getfqdn", lambda: "Worker.example.org.")
    names, _ = names_of("0.0.0.0")
    assert {"worker", "worker.local", "worker.example.org"} <= names
    assert "worker.example.org" not in names_of("127.0.0.1")[0]


SAMPLES: list[Any] = [
    [],
    [1],
    ["x", "y", "z", None, None],
    [None, None, None, None, None],
    [math.nan, 1, 0, None, None],
    [2, math.nan, 0, None, None],
    [2, 1, math.inf, None, None],
    [2.5, 1, 0, None, None],
    [10**6, 1, 0, None, None],
    [-1, 1, 0, None, None],
    [[1], 1, 0, None, None],
    [{"a": 1}, 1, 0, None, None],
    [True, 1, 0, None, None],
    [2, "hot", 0, None, None],
    [2, 1, "s", None, None],
    [2, 1, 10**30, None, None],
    [2, 1, None, None, None],
    [2, 1, 0, math.inf, None],
    [2, 1, 0, None, [0.5]],
]
FILE = {"meta": {"_type": "gradio.FileData"}}
SCORES: list[Any] = [
    [{"path": "/etc/passwd", **FILE}],
    ["/etc/passwd"],
    [{"path": 5}],
    [{}],
    [[{"path": "/etc/passwd", **FILE}]],
    [3],
]
COMPLETIONS: list[Any] = [
    [None, 4, None, 1, 1, 0, None, None],
    ["x", -1, None, 1, 1, 0, None, None],
    [None, math.nan, {}, 1, 1, 0, None, None],
]


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        (name, inputs)
        for name, all_of in (("sample", SAMPLES), ("score", SCORES), ("complete", COMPLETIONS))
        for inputs in all_of
    ],
    ids=lambda value: str(value)[:40],
)
def test_invalid_inputs_are_answered_in_words(
    client: Client, name: str, inputs: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    status, said = ask(client, "POST", f"/gradio_api/call/{name}", {"data": inputs})
    assert status == 200
    status, said = ask(client, "GET", f"/gradio_api/call/{name}/{json.loads(said)['event_id']}")
    assert "event: error" in said
    assert json.loads(said.rsplit("data: ", 1)[1])["error"]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "seen", [[1], "x", {"hidden": 5}, {"hidden": "0" * 63}, {"hidden": ["0"] * 64}, 7]
)
def test_invalid_views_are_answered_in_words(client: Client, photo: Path, seen: Any, capfd) -> None:
    with pytest.raises(AppError, match="64 characters, 1 for hidden"):
        client.predict(handle_file(photo), 4, seen, 1, 1.0, 0, api_name="/complete")
    assert "Traceback" not in capfd.readouterr().err


MALFORMED: list[tuple[str, Any]] = [
    ("queue/join", {"data": [2, 1, 0, None, None], "fn_index": 99, "session_hash": "a"}),
    ("queue/join", {"data": [2, 1, 0, None, None], "fn_index": -1, "session_hash": "a"}),
    ("queue/join", {"data": [2, 1, 0, None, None], "fn_index": "x", "session_hash": "a"}),
    ("queue/join", {"data": [2, 1, 0, None, None], "session_hash": "a"}),
    ("queue/join", {"data": 5, "fn_index": 1, "session_hash": "a"}),
    ("queue/join", {}),
    *(
        (path, raw)
        for path in ("queue/join", "call/sample")
        for raw in (b"{", b"\xff", b"[]", b"null", b"")
    ),
    ("queue/join", b'{"data":' + b"[" * 100_000),
    ("run/none", {"data": []}),
    ("run/sample", {"data": ["x"]}),
    ("call/none", {"data": []}),
    ("call/v2/sample", {"x": 1}),
    ("component_server", {"data": 1, "component_id": 12345, "session_hash": "q", "fn_name": "x"}),
    ("component_server", {}),
    ("upload", {}),
    ("reset", {}),
]


@pytest.mark.parametrize(("path", "body"), MALFORMED, ids=lambda value: str(value)[:40])
def test_malformed_requests_are_errors_and_one_line_at_most(
    client: Client, path: str, body: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, said = ask(client, "POST", f"/gradio_api/{path}", raw=raw)
    assert status >= 400
    assert said
    assert len(capfd.readouterr().err.splitlines()) <= 1


def test_every_function_of_the_page_accepts_any_input(
    client: Client, capfd: pytest.CaptureFixture[str]
) -> None:
    functions = json.loads(ask(client, "GET", "/config")[1])["dependencies"]
    assert len(functions) > 5
    for function in functions:
        body = {
            "data": [{"bad": 1}],
            "fn_index": function["id"],
            "session_hash": f"s{function['id']}",
        }
        for more in ({}, {"trigger_id": 9999, "event_data": [1, 2]}, {"event_data": {"index": -1}}):
            assert ask(client, "POST", "/gradio_api/queue/join", {**body, **more})[0] == 200
            said = ask(client, "GET", f"/gradio_api/queue/data?session_hash=s{function['id']}")[1]
            assert "process_completed" in said
    assert capfd.readouterr().err == ""


def test_unknown_sessions_and_files(client: Client, capfd: pytest.CaptureFixture[str]) -> None:
    assert "not found" in ask(client, "GET", "/gradio_api/queue/data?session_hash=none")[1].lower()
    assert ask(client, "GET", "/gradio_api/file=/etc/passwd")[0] == 403
    assert ask(client, "GET", "/nothing")[0] == 404
    assert len(capfd.readouterr().err.splitlines()) <= 1


@pytest.mark.parametrize(
    ("header", "status"),
    [("Content-Length: 99999999999", 413), ("Transfer-Encoding: chunked", 411), ("X: y", 411)],
)
def test_uploads_without_a_moderate_length_are_refused_unread(
    client: Client, header: str, status: int
) -> None:
    port = int(client.src.rsplit(":", 1)[1].strip("/"))
    with socket.create_connection((LOOPBACK, port), timeout=60) as connection:
        connection.sendall(
            f"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n".encode()
        )
        assert connection.recv(1000).startswith(f"HTTP/1.1 {status} ".encode())


def test_the_number_of_simultaneous_uploads_is_limited(
    client: Client, capfd: pytest.CaptureFixture[str]
) -> None:
    """Requests that start, state 20 MB each and send next to nothing."""
    port = int(client.src.rsplit(":", 1)[1].strip("/"))
    head = "POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20000000\r\n"
    head += "Content-Type: multipart/form-data; boundary=q\r\n\r\n--q\r\n"
    head += 'Content-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nabc'

    def begin() -> socket.socket:
        connection = socket.create_connection((LOOPBACK, port), timeout=1)
        connection.sendall(head.encode())
        return connection

    waiting = [begin() for _ in range(10)]
    said = b""
    deadline = time.monotonic() + 60
    while not said and time.monotonic() < deadline:
        with begin() as one_more, contextlib.suppress(TimeoutError):
            said = one_more.recv(1000)
    for connection in waiting:
        connection.close()
    assert said.startswith(b"HTTP/1.1 503 ")
    taken = False
    while not taken and time.monotonic() < deadline:
        with begin() as connection:
            try:
                connection.recv(1000)
            except TimeoutError:  # it waits for the rest
                taken = True
    assert taken
    assert "Traceback" not in capfd.readouterr().err


def test_other_requests_do_not_count_as_uploads(client: Client) -> None:
    """Idle requests that state 20 MB each do not keep the page from answering."""
    port = int(client.src.rsplit(":", 1)[1].strip("/"))
    head = "POST /gradio_api/queue/join HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20000000\r\n"
    head += "Content-Type: application/json\r\n\r\n{"
    with contextlib.ExitStack() as open_connections:
        for _ in range(12):
            connection = open_connections.enter_context(
                socket.create_connection((LOOPBACK, port), timeout=60)
            )
            connection.sendall(head.encode())
        body = {"data": [2, 1, 0, None, None]}
        for _ in range(3):
            assert ask(client, "POST", "/gradio_api/call/sample", body)[0] == 200


@pytest.mark.parametrize("path", ["upload", "queue/join"])
def test_requests_whose_bodies_do_not_arrive_are_closed(
    path: str, model: ImageGPT, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("igpt.webapp.server._ARRIVAL", 0.2)
    page = start(model, LOOPBACK, 0)
    try:
        with socket.create_connection((LOOPBACK, page.server_port), timeout=60) as connection:
            head = (
                f"POST /gradio_api/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000\r\n"
            )
            head += "Content-Type: multipart/form-data; boundary=q\r\n\r\n--q\r\n"
            connection.sendall(head.encode())
            with connection.makefile("rb") as answer:
                said = answer.read()  # up to the end: the connection is closed
    finally:
        page.close(verbose=False)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b"the request did not arrive in time\n" in said
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("length", [0, 3])
def test_processing_a_received_request_may_take_longer(length: int, tmp_path: Path) -> None:
    async def program(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await asyncio.sleep(0.1)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": bytes(length), "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    sent: list[Any] = []
    settings: dict[str, Any] = {
        "names": frozenset({"localhost"}),
        "any_number": False,
        "uploads": tmp_path,
    }
    guard = Guard(program, **settings, largest=100, most=1000, seconds=60, arrival=0.01)
    headers = [(b"host", b"localhost"), (b"content-length", str(length).encode())]
    asyncio.run(
        guard({"type": "http", "method": "POST", "path": "/x", "headers": headers}, receive, send)
    )
    assert [message.get("status") for message in sent] == [200, None]


def test_deleted_uploads_are_reported(client: Client, photo: Path) -> None:
    file = handle_file(photo)
    client.predict(file, api_name="/score")
    for upload in Path(os.environ["GRADIO_TEMP_DIR"]).rglob("photo.png"):
        upload.unlink()
    gone = {"path": str(Path(os.environ["GRADIO_TEMP_DIR"]) / "x" / "photo.png"), **FILE}
    event = json.loads(ask(client, "POST", "/gradio_api/call/score", {"data": [gone]})[1])[
        "event_id"
    ]
    assert (
        "was deleted because it was not used"
        in ask(client, "GET", f"/gradio_api/call/score/{event}")[1]
    )


def test_uploads_are_stored_in_a_separate_folder(client: Client) -> None:
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    assert folder.name.startswith("igpt-uploads-")
    assert folder.stat().st_mode & 0o777 == 0o700


def test_the_least_recently_used_uploads_are_deleted_beyond_the_limit(tmp_path: Path) -> None:
    now = time.time()
    for index in range(6):
        (tmp_path / str(index)).mkdir()
        (tmp_path / str(index) / "a.png").write_bytes(bytes(100))
        os.utime(tmp_path / str(index) / "a.png", (now - 10 * index, now - 10 * index))
    delete_unused(tmp_path, most=250, seconds=1000)
    assert sorted(int(path.parent.name) for path in tmp_path.rglob("*.png")) == [0, 1]
    delete_unused(tmp_path, most=250, seconds=5)
    assert [path.parent.name for path in tmp_path.rglob("*.png")] == ["0"]


def test_an_upload_in_use_outlives_newer_ones(client: Client, photo: Path, tmp_path: Path) -> None:
    """Reading an image marks it as used."""
    client.predict(handle_file(photo), api_name="/score")
    upload = max(
        Path(os.environ["GRADIO_TEMP_DIR"]).rglob("photo.png"),
        key=lambda path: path.stat().st_ctime,
    )
    os.utime(upload, (1, 1))
    event = json.loads(
        ask(client, "POST", "/gradio_api/call/score", {"data": [{"path": str(upload), **FILE}]})[1]
    )["event_id"]
    assert "nats/pixel" in ask(client, "GET", f"/gradio_api/call/score/{event}")[1]
    assert time.time() - upload.stat().st_mtime < 600


def test_no_image_shows_nothing(client: Client) -> None:
    assert client.predict(None, api_name="/score") == (None, [], "", [])


def test_page_requests_nothing_from_other_machines(client: Client) -> None:
    for part in ("", "theme.css"):
        with urlopen(client.src + part) as answer:
            text = answer.read().decode()
        assert not re.findall(
            r"""(?:src|href)=["']?(?:https?:)?//|url\(["']?(?:https?:)?//|@import""", text
        )
    with urlopen(client.src + "config") as answer:
        settings = json.load(answer)
    assert not settings["analytics_enabled"]
    assert not settings["run_history"]
    assert not [sheet for sheet in settings["stylesheets"] if "//" in sheet]


def test_bert_model_completes_and_has_no_likelihood(photo: Path, tmp_path: Path) -> None:
    model = make_model(objective="bert")
    for client in serve(model, tmp_path):
        assert set(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == {
            "/view",
            "/complete",
        }
        tokens = tokens_of_files(model, [photo])
        seen, _, words = client.predict(handle_file(photo), api_name="/view")
        np.testing.assert_array_equal(small(seen), decode_images(model, tokens)[0])
        assert not words
        job = client.submit(handle_file(photo), 5, None, 2, 1.0, 0, api_name="/complete")
        shown, *_ = job.result()
        expected = expected_images(model, tokens.repeat(2, 1), torch.arange(64) < 40)
        np.testing.assert_array_equal(images_of(shown)[1:], expected)
        assert any(
            re.fullmatch(r"\d+% of the hidden pixels drawn \.\.\.", words)
            for _, words, _ in job.outputs()
        )


def test_a_classifier_shows_the_class_with_its_probability(photo: Path, tmp_path: Path) -> None:
    model = make_model(class_names=("cat", "dog", "fox", "hen"))
    torch.nn.init.normal_(model.score.weight, std=0.5)
    found = predict(
        model, tokens_of_files(model, [photo]).numpy().astype(np.uint16), np.zeros(1, np.int64)
    )
    for client in serve(model, tmp_path):
        *_, label = client.predict(handle_file(photo), api_name="/score")
        assert label["label"] == ("cat", "dog", "fox", "hen")[found.classes[0]]
        shown = [entry["confidence"] for entry in label["confidences"]]
        np.testing.assert_allclose(shown, np.sort(found.probabilities[0])[::-1][:3])


def test_the_page_of_a_probed_run_shows_the_class_too(
    igpt: Callable[..., Any], short_run: Path, digits: TokenDataset, photo: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    done = igpt("probe", run, digits.path, "--layers", 1, "--no-baselines", "--strengths", 0.1)
    assert done.returncode == 0, done.stderr
    model = ImageGPT.from_pretrained(run / "model")
    page = start(model, LOOPBACK, 0, run)
    try:
        client = Client(
            page.local_url, verbose=False, analytics_enabled=False, download_files=tmp_path
        )
        *_, label = client.predict(handle_file(photo), api_name="/score")
    finally:
        page.close(verbose=False)
    expected = ProbeClassifier.load(run / "probe.safetensors").probabilities(
        model, tokens_of_files(model, [photo])
    )[0]
    assert label["label"] == (digits.class_names or [])[int(expected.argmax())]
    shown = [entry["confidence"] for entry in label["confidences"]]
    np.testing.assert_allclose(shown, expected.sort(descending=True).values[:3].numpy(), atol=1e-6)


def test_a_model_without_a_run_has_its_name_and_photographs_on_the_page() -> None:
    page = build(make_model(), name="<me>/photos")
    try:
        assert page.title == "<me>/photos - igpt"
        values = [getattr(block, "value", None) for block in page.blocks.values()]
        assert any(
            isinstance(value, str)
            and value.startswith("# Completing images with &lt;me&gt;/photos")
            for value in values
        )
        assert [len(value) for value in values if isinstance(value, list) and value] == [8]
    finally:
        page.close(verbose=False)


def test_an_address_that_cannot_be_used_is_named(model: ImageGPT) -> None:
    with socket.create_server((LOOPBACK, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} of {LOOPBACK} is in use"):
            start(model, LOOPBACK, port)
    with pytest.raises(InputError, match="port must be"):
        start(model, LOOPBACK, 70000)
    with pytest.raises(
        InputError, match=r"cannot be served at 192\.0\.2\.1"
    ):  # an address of no machine, RFC 5737
        start(model, "192.0.2.1", 7860)


def test_missing_packages_and_files_are_named(
    model: ImageGPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no palette"):
        build(make_model(palette=None))
    monkeypatch.setitem(sys.modules, "gradio", None)  # Python's convention for "not installed"
    with pytest.raises(InputError, match=re.escape("pip install 'igpt[app]'")):
        build(model)


@pytest.fixture(scope="module")
def probed_run(
    igpt: Callable[..., Any],
    short_run: Path,
    digits: TokenDataset,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    run = tmp_path_factory.mktemp("probed") / "run"
    shutil.copytree(short_run, run)
    for words in (
        ("probe", run, digits.path, "--no-baselines", "--strengths", 0.1),
        ("sample", run, "--count", 2),
    ):
        done = igpt(*words)
        assert done.returncode == 0, done.stderr
    return run


DAMAGE: dict[str, bytes] = {
    "not UTF-8": b"\xff\xfe\x00",
    "cut off": b'{"kind": "train", "step',
    "a list": b"[1, 2]\n",
    "other types": b'{"kind": 5, "step": "x", "layers": 3, "tokens": [1], "best": null, '
    b'"format": "igpt-probe"}\n',
    "deep": b'{"a": ' + b"[" * 100_000,
    "digits and names too long": b'{"step": '
    + b"9" * 5000
    + b', "tokens": "'
    + b"n" * 5000
    + b'"}\n',
}
READ_BY_THE_PAGE = (
    "config.yaml",
    "metrics.jsonl",
    "probe.json",
    "probe.safetensors",
    "samples.png",
    "samples.json",
)


@pytest.mark.parametrize("name", READ_BY_THE_PAGE)
def test_malformed_files_of_a_run_are_one_line_at_the_start(
    probed_run: Path, name: str, tmp_path: Path
) -> None:
    model = ImageGPT.from_pretrained(probed_run / "model")
    assert (probed_run / name).exists()
    run = tmp_path / "run"
    shutil.copytree(probed_run, run)
    for kind, content in DAMAGE.items():
        (run / name).write_bytes(content)
        said = ""
        try:
            build(model, run)
        except InputError as error:
            said = str(error)
        except Exception as error:
            pytest.fail(f"{name}, {kind}: {type(error).__name__}: {str(error)[:200]}")
        assert "\n" not in said, kind


def test_tokens_with_an_impossible_name_give_no_examples(probed_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(probed_run, run)
    for tokens in ("n" * 300, "/" + "x/" * 3000, "file:\\0"):
        (run / "config.yaml").write_text(json.dumps({"tokens": tokens}))
        assert write_examples(ImageGPT.from_pretrained(run / "model"), run, tmp_path) == []
        build(ImageGPT.from_pretrained(run / "model"), run)


def test_a_probe_of_another_model_is_refused_at_the_start(probed_run: Path) -> None:
    with pytest.raises(InputError, match="of another model; run igpt probe again"):
        build(
            make_model(n_embd=ImageGPT.from_pretrained(probed_run / "model").config.n_embd * 2),
            probed_run,
        )
