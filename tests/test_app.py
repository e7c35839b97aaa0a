"""The web page, served on loopback and called by a program: its pictures are the model's, mistakes are words."""

import base64
import io
import json
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
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
from torch import Tensor

from igpt.app import build, start
from igpt.data.palette import Palette
from igpt.data.tokens import TokenDataset
from igpt.data.views import load_square
from igpt.errors import InputError
from igpt.evaluation.readout import Readout
from igpt.model.classifier import predict
from igpt.model.configuration import ModelConfig
from igpt.model.generate import draw
from igpt.model.objectives import place_losses
from igpt.model.transformer import ImageGPT
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


def small(shown: dict[str, Any]) -> NDArray[np.uint8]:
    """A picture of the page; it comes at the model's resolution."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(shown["picture"].partition(",")[2]))))


def drawn(shown: list[dict[str, Any]]) -> NDArray[np.uint8]:
    return np.stack([small(picture) for picture in shown])


def all_drawn(model: ImageGPT, tokens: Tensor, known: Tensor, **settings: Any) -> NDArray[np.uint8]:
    *_, last = draw(model, tokens, known, **settings)
    return pictures(model, last.tokens)


def test_score_shows_the_models_view_and_its_losses(client: Client, model: ImageGPT, photo: Path) -> None:
    seen, words, surprise = client.predict(handle_file(photo), api_name="/score")
    np.testing.assert_array_equal(small(seen), GREYS.inverse_transform(GREYS.transform(load_square(photo, 8))))
    assert seen["hidden"] == "0" * 64
    tokens = tokens_of_files(model, [photo])
    with torch.inference_mode():
        losses = place_losses(model(tokens), tokens)[0].double().numpy()
    assert f"{losses.mean():.4f} nats/pixel" in words
    assert f"{losses.mean() / np.log(2):.4f} bits/pixel" in words
    assert f"{np.log(17):.2f} nats" in words
    brightness = small(surprise[0]).astype(int).sum(axis=-1).reshape(-1)[np.argsort(losses)]
    assert (np.diff(brightness) >= 0).all()
    assert brightness[0] < brightness[-1]


def test_completions_keep_rows_and_follow_the_seed(client: Client, model: ImageGPT, photo: Path) -> None:
    shown, words = client.predict(handle_file(photo), 3, None, 2, 1.0, 5, api_name="/complete")
    assert words.startswith("2 drawings, seed 5, in ")
    assert [picture["caption"] for picture in shown] == ["original", "drawing 1", "drawing 2"]
    tokens = tokens_of_files(model, [photo])
    original, rows = pictures(model, tokens), torch.arange(64) < 24
    expected = np.concatenate([original, all_drawn(model, tokens.repeat(2, 1), rows, seed=5)])
    np.testing.assert_array_equal(drawn(shown), expected)
    np.testing.assert_array_equal(expected[:, :3], original[:, :3].repeat(3, 0))
    assert (expected[1] != expected[2]).any()
    again, words = client.predict(handle_file(photo), 3, None, 1, 1.0, 5, api_name="/complete")
    assert words.startswith("1 drawing, seed 5")
    np.testing.assert_array_equal(drawn(again), expected[:2])


def test_completions_keep_what_is_not_hidden(client: Client, model: ImageGPT, photo: Path) -> None:
    known = torch.from_numpy(np.random.default_rng(0).random(64) < 0.5)
    view = {"hidden": "".join("0" if one else "1" for one in known)}
    shown, _ = client.predict(handle_file(photo), 3, view, 2, 1.0, 0, api_name="/complete")
    tokens = tokens_of_files(model, [photo])
    np.testing.assert_array_equal(drawn(shown)[1:], all_drawn(model, tokens.repeat(2, 1), known))
    kept = known.view(8, 8).numpy()
    np.testing.assert_array_equal(drawn(shown)[1][kept], pictures(model, tokens)[0][kept])


def test_samples_are_the_models(client: Client, model: ImageGPT) -> None:
    shown, _ = client.predict(2, 0.5, 3, api_name="/sample")
    nothing = torch.zeros(2, 64, dtype=torch.long)
    expected = all_drawn(model, nothing, nothing[0] > 0, temperature=0.5, seed=3)
    np.testing.assert_array_equal(drawn(shown), expected)


def test_all_rows_kept_give_the_image_back(client: Client, model: ImageGPT, photo: Path) -> None:
    shown, _ = client.predict(handle_file(photo), 8, None, 1, 1.0, 0, api_name="/complete")
    np.testing.assert_array_equal(drawn(shown), pictures(model, tokens_of_files(model, [photo])).repeat(2, 0))


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
            client.predict(handle_file(file), 4, None, 1, 1.0, 0, api_name="/complete")
    with pytest.raises(AppError, match="choose an image first"):
        client.predict(None, 4, None, 1, 1.0, 0, api_name="/complete")
    with pytest.raises(AppError, match="give a seed"):
        client.predict(handle_file(photo), 4, None, 1, 1.0, None, api_name="/complete")
    for hidden in ("1" * 63, "2" * 64):
        with pytest.raises(AppError, match="64 characters, 1 for hidden"):
            client.predict(handle_file(photo), 4, {"hidden": hidden}, 1, 1.0, 0, api_name="/complete")
    assert "Traceback" not in capfd.readouterr().err
    for rows, count, temperature, seed in ((99, 1, 1, 0), (-1, 1, 1, 0), (4, 9, 1, 0), (4, 1, -1, 0), (4, 1, 1, -1)):
        with pytest.raises(AppError, match=r"(greater|less) than (maximum|minimum) value"):
            client.predict(handle_file(photo), rows, None, count, temperature, seed, api_name="/complete")


def test_no_image_shows_nothing(client: Client) -> None:
    assert client.predict(None, api_name="/score") == (None, "", [])


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
        tokens = tokens_of_files(model, [photo])
        seen, words = client.predict(handle_file(photo), api_name="/view")
        np.testing.assert_array_equal(small(seen), pictures(model, tokens)[0])
        assert not words
        job = client.submit(handle_file(photo), 5, None, 2, 1.0, 0, api_name="/complete")
        shown, _ = job.result()
        expected = all_drawn(model, tokens.repeat(2, 1), torch.arange(64) < 40)
        np.testing.assert_array_equal(drawn(shown)[1:], expected)
        assert any(re.fullmatch(r"\d+% of the hidden pixels drawn \.\.\.", words) for _, words in job.outputs())


def test_classifier_tells_the_class_with_its_probability(photo: Path, tmp_path: Path) -> None:
    model = make_model(class_names=("cat", "dog", "fox", "hen"))
    torch.nn.init.normal_(model.score.weight, std=0.5)
    found = predict(model, tokens_of_files(model, [photo]).numpy().astype(np.uint16), np.zeros(1, np.int64))
    for client in serve(model, tmp_path):
        *_, label = client.predict(handle_file(photo), api_name="/score")
        assert label["label"] == ("cat", "dog", "fox", "hen")[found.classes[0]]
        told = [entry["confidence"] for entry in label["confidences"]]
        np.testing.assert_allclose(told, np.sort(found.probabilities[0])[::-1][:3])


def test_a_probed_runs_page_tells_the_class_too(
    igpt: Callable[..., Any], short_run: Path, digits: TokenDataset, photo: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    done = igpt("probe", run, digits.path, "--layers", 1, "--no-baselines", "--strengths", 0.1)
    assert done.returncode == 0, done.stderr
    model = ImageGPT.from_pretrained(run / "model")
    page = start(model, LOOPBACK, 0, run)
    try:
        client = Client(page.local_url, verbose=False, analytics_enabled=False, download_files=tmp_path)
        *_, label = client.predict(handle_file(photo), api_name="/score")
    finally:
        page.close(verbose=False)
    expected = Readout.load(run / "probe.safetensors").probabilities(model, tokens_of_files(model, [photo]))[0]
    assert label["label"] == (digits.class_names or [])[int(expected.argmax())]
    told = [entry["confidence"] for entry in label["confidences"]]
    np.testing.assert_allclose(told, expected.sort(descending=True).values[:3].numpy(), atol=1e-6)


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
