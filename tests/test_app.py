"""The web page, served on loopback and called as a browser would: its pictures are the model's, mistakes are words."""

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from numpy.typing import NDArray
from PIL import Image

from igpt.app import build, start
from igpt.data.palette import Palette
from igpt.data.views import load_square
from igpt.errors import InputError
from igpt.model.generate import complete
from igpt.model.objectives import place_losses
from igpt.model.transformer import ImageGPT, ModelConfig
from igpt.pictures import pictures, tokens_of_files

GREYS = Palette.from_centers(np.linspace(-1, 1, 17)[:, None].repeat(3, 1))
LOOPBACK = "127.0.0.1"


def make_model(palette: Palette | None = GREYS, **settings: object) -> ImageGPT:
    """A random model whose predictions are not all alike."""
    torch.manual_seed(0)
    shape = {"resolution": 8, "n_colors": 17, "n_layer": 2, "n_embd": 16, "n_head": 2}
    model = ImageGPT(ModelConfig.model_validate({**shape, **settings}), palette)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    return model.eval()


def serve(model: ImageGPT, downloads: Path) -> Iterator[Client]:
    page = start(model, LOOPBACK, 0)
    try:
        yield Client(page.local_url, verbose=False, analytics_enabled=False, download_files=downloads)
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
    """Larger than the model's images, not square, and partly transparent."""
    levels = np.random.default_rng(1).integers(0, 256, (30, 44, 4), dtype=np.uint8)
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.fromarray(levels).save(path)
    return path


def small(path: str, resolution: int = 8) -> NDArray[np.uint8]:
    """A picture of the page at the model's resolution; every pixel of it stands as a square of one colour."""
    large = np.asarray(Image.open(path))
    scale = len(large) // resolution
    picture = large[::scale, ::scale]
    np.testing.assert_array_equal(picture.repeat(scale, 0).repeat(scale, 1), large)
    return picture


def drawn(gallery: list[dict[str, Any]]) -> NDArray[np.uint8]:
    return np.stack([small(item["image"]) for item in gallery])


def test_score_shows_the_models_view_and_its_losses(client: Client, model: ImageGPT, photo: Path) -> None:
    seen, surprise, words = client.predict(handle_file(photo), api_name="/score")
    np.testing.assert_array_equal(small(seen), GREYS.inverse_transform(GREYS.transform(load_square(photo, 8))))
    tokens = tokens_of_files(model, [photo])
    with torch.inference_mode():
        losses = place_losses(model(tokens), tokens)[0].double().numpy()
    assert f"{losses.mean():.4f} nats/pixel" in words
    assert f"{losses.mean() / np.log(2):.4f} bits/pixel" in words
    assert f"{np.log(17):.2f} nats" in words
    brightness = small(surprise).astype(int).sum(axis=-1).reshape(-1)[np.argsort(losses)]
    assert (np.diff(brightness) >= 0).all()
    assert brightness[0] < brightness[-1]


def test_completions_keep_rows_and_follow_the_seed(client: Client, model: ImageGPT, photo: Path) -> None:
    gallery, words = client.predict(handle_file(photo), 3, 2, 1.0, 5, api_name="/complete")
    assert "2 of 2" in words
    assert [item["caption"] for item in gallery] == ["seed 5", "seed 6"]
    tokens = tokens_of_files(model, [photo])
    expected = torch.cat([complete(model, tokens, 3, seed=seed) for seed in (5, 6)])
    np.testing.assert_array_equal(drawn(gallery), pictures(model, expected))
    np.testing.assert_array_equal(drawn(gallery)[:, :3], pictures(model, tokens)[:, :3].repeat(2, 0))
    assert (drawn(gallery)[0] != drawn(gallery)[1]).any()
    again, _ = client.predict(handle_file(photo), 3, 1, 1.0, 6, api_name="/complete")
    np.testing.assert_array_equal(drawn(again)[0], drawn(gallery)[1])


def test_samples_are_the_models(client: Client, model: ImageGPT) -> None:
    gallery, _ = client.predict(2, 0.5, 3, api_name="/sample")
    nothing = torch.zeros(1, 64, dtype=torch.long)
    expected = torch.cat([complete(model, nothing, 0, temperature=0.5, seed=seed) for seed in (3, 4)])
    np.testing.assert_array_equal(drawn(gallery), pictures(model, expected))


def test_all_rows_kept_give_the_image_back(client: Client, model: ImageGPT, photo: Path) -> None:
    gallery, _ = client.predict(handle_file(photo), 8, 1, 1.0, 0, api_name="/complete")
    np.testing.assert_array_equal(drawn(gallery), pictures(model, tokens_of_files(model, [photo])))


def test_mistakes_are_told_in_words(
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
            client.predict(handle_file(file), 4, 1, 1.0, 0, api_name="/complete")
    with pytest.raises(AppError, match="choose an image first"):
        client.predict(None, 4, 1, 1.0, 0, api_name="/complete")
    assert "Traceback" not in capfd.readouterr().err
    for rows, count, temperature, seed in ((99, 1, 1, 0), (-1, 1, 1, 0), (4, 9, 1, 0), (4, 1, -1, 0), (4, 1, 1, -1)):
        with pytest.raises(AppError, match=r"(greater|less) than (maximum|minimum) value"):
            client.predict(handle_file(photo), rows, count, temperature, seed, api_name="/complete")


def test_no_image_shows_nothing(client: Client) -> None:
    assert client.predict(None, api_name="/score") == (None, None, "")


def test_page_asks_no_other_machine_for_anything(client: Client) -> None:
    for part in ("", "theme.css"):
        with urlopen(client.src + part) as answer:
            text = answer.read().decode()
        assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//|url\(["']?(?:https?:)?//|@import""", text)
    with urlopen(client.src + "config") as answer:
        settings = json.load(answer)
    assert not settings["analytics_enabled"]
    assert not settings["run_history"]
    assert not [sheet for sheet in settings["stylesheets"] if "//" in sheet]


def test_bert_model_completes_and_has_no_likelihood(photo: Path, tmp_path: Path) -> None:
    model = make_model(objective="bert")
    for client in serve(model, tmp_path):
        assert set(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == {"/view", "/complete"}
        original = pictures(model, tokens_of_files(model, [photo]))
        np.testing.assert_array_equal(small(client.predict(handle_file(photo), api_name="/view")), original[0])
        gallery, _ = client.predict(handle_file(photo), 5, 2, 1.0, 0, api_name="/complete")
        np.testing.assert_array_equal(drawn(gallery)[:, :5], original[:, :5].repeat(2, 0))
        expected = complete(model, tokens_of_files(model, [photo]), 5, seed=1)
        np.testing.assert_array_equal(drawn(gallery)[1:], pictures(model, expected))


def drawing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "igpt drawing"]


def test_stop_ends_the_work_within_a_drawing(tmp_path: Path) -> None:
    for client in serve(make_model(resolution=64, n_layer=16), tmp_path):  # a drawing takes many seconds
        job = client.submit(8, 1.0, 0, api_name="/sample")
        deadline = time.monotonic() + 20
        while not drawing_threads() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.6)
        assert drawing_threads()
        job.cancel()
        deadline = time.monotonic() + 2
        while drawing_threads() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not drawing_threads()
        words = [output[1] for output in job.outputs()]
        assert any(re.fullmatch(r"Drawing 1 of 8: \d+% \.\.\.", word) for word in words)


def test_address_that_cannot_be_had_is_named(model: ImageGPT) -> None:
    with socket.create_server((LOOPBACK, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} of {LOOPBACK} is in use"):
            start(model, LOOPBACK, port)
    with pytest.raises(InputError, match="port must be"):
        start(model, LOOPBACK, 70000)
    with pytest.raises(InputError, match=r"cannot be served at 192\.0\.2\.1"):  # an address of no machine, RFC 5737
        start(model, "192.0.2.1", 7860)


def test_what_is_missing_is_named(model: ImageGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no palette"):
        build(make_model(palette=None))
    monkeypatch.setitem(sys.modules, "gradio", None)  # Python's own way to say: not installed
    with pytest.raises(InputError, match=re.escape("pip install 'igpt[app]'")):
        build(model)
