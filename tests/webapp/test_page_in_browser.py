"""The web page in a real browser: what visitors see, and what happens if they make mistakes, arrive
together, or leave."""

import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

import igpt.webapp.handlers
from igpt.data.tokens.dataset import TokenDataset
from igpt.model.images import decode_images, tokens_of_files
from igpt.model.transformer import ImageGPT
from igpt.sampling.sampler import generate
from igpt.webapp.server import start

LOOPBACK = "127.0.0.1"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PATIENCE = 60_000  # milliseconds for what should take a fraction of a second
PHONE = {"width": 390, "height": 844}
# The pixels of a picture, row by row, as [red, green, blue, opacity].
READ = """async (image) => {
    if (image.decode) await image.decode();
    const canvas = document.createElement("canvas"), side = image.naturalWidth || image.width;
    canvas.width = canvas.height = side;
    const pen = canvas.getContext("2d");
    pen.drawImage(image, 0, 0);
    return [...pen.getImageData(0, 0, side, side).data];
}"""
Visit = Callable[..., Page]


class Work:
    """Real sampling that a test can pause after a row, or let repeat a row until it is closed."""

    def __init__(self) -> None:
        self.hold_after, self.go_on = -1, threading.Event()
        self.endless, self.closed = False, threading.Event()
        self.begun = 0

    def __call__(self, *inputs: Any, **settings: Any) -> Iterator[Any]:
        self.begun += 1
        try:
            # With one pixel per pass, all images are in the same row.
            for row, state in enumerate(generate(*inputs, **settings, window=1)):
                yield state
                while self.endless:
                    self.closed.wait(0.02)
                    yield state
                if row == self.hold_after:
                    assert self.go_on.wait(2 * PATIENCE / 1000)
        except GeneratorExit:
            self.closed.set()
            raise


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    work = Work()
    monkeypatch.setattr(igpt.webapp.handlers, "generate", work)
    yield work
    work.endless = False
    work.go_on.set()


@pytest.fixture(scope="module")
def run(
    short_run: Path, digits: TokenDataset, igpt, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a run that has been probed and sampled."""
    copy = tmp_path_factory.mktemp("page") / "run"
    shutil.copytree(short_run, copy)
    for words in (
        ("probe", copy, digits.path, "--limit", 150, "--no-baselines"),
        ("sample", copy, "--count", 4),
    ):
        done = igpt(*words)
        assert done.returncode == 0, done.stderr
    return copy


@pytest.fixture(scope="module")
def model(run: Path) -> ImageGPT:
    return ImageGPT.from_pretrained(run / "model").eval()


@pytest.fixture(scope="module")
def address(model: ImageGPT, run: Path) -> Iterator[str]:
    page = start(model, LOOPBACK, 0, run)
    yield page.local_url
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.fail("Chromium is missing: make chromium, or apt-get install chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def desktop(browser: Browser) -> Iterator[BrowserContext]:
    """Start one browser for all tests: it caches the page's scripts, which take seconds to load."""
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        yield context


@pytest.fixture
def visit(desktop: BrowserContext, address: str) -> Iterator[Visit]:
    """Open the page as one more visitor; requests to other machines and errors of its scripts fail
    the test."""
    asked: set[str | None] = set()
    errors: list[str] = []
    pages = []

    def come(context: BrowserContext = desktop, address: str = address) -> Page:
        page = context.new_page()
        pages.append(page)
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.add(urlsplit(request.url).hostname))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        expect(page.get_by_role("button", name="Complete")).to_be_visible(timeout=PATIENCE)
        return page

    yield come
    for page in pages:
        page.close()
    assert asked <= {LOOPBACK, None}  # None: data within the page
    assert not errors


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    levels = np.random.default_rng(1).integers(0, 256, (30, 44, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.fromarray(levels).save(path)
    return path


def upload(page: Page, file: Path) -> None:
    page.locator("input[type=file]").set_input_files(file)


def upload_and_see(page: Page, file: Path) -> None:
    upload(page, file)
    expect(page.get_by_text("nats/pixel")).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text("32 of 64 pixels are hidden")).to_be_visible(timeout=PATIENCE)


def canvas(page: Page) -> Locator:
    return page.locator(".igpt-view canvas")


def pixels(picture: Locator) -> NDArray[np.uint8]:
    return np.array(picture.evaluate(READ), np.uint8).reshape(8, 8, 4)


def canvas_of(page: Page, caption: str) -> NDArray[np.uint8]:
    return pixels(page.get_by_role("img", name=caption, exact=True))


def say(page: Page, words: str) -> None:
    expect(page.locator(".igpt-words").first).to_contain_text(words, timeout=PATIENCE)


def complete(page: Page) -> None:
    page.get_by_role("button", name="Complete").click()


def test_upload_is_shown_as_the_model_sees_it(visit: Visit, model: ImageGPT, photo: Path) -> None:
    page = visit()
    upload_and_see(page, photo)
    seen = pixels(canvas(page))
    np.testing.assert_array_equal(
        seen[:4, :, :3], decode_images(model, tokens_of_files(model, [photo]))[0, :4]
    )
    np.testing.assert_array_equal(
        seen[..., 3], np.repeat([255, 0], 32).reshape(8, 8)
    )  # hidden: transparent


def test_example_is_loaded(visit: Visit, model: ImageGPT, digits: TokenDataset) -> None:
    page = visit()
    page.get_by_role("button", name="example 1").click()
    expect(page.get_by_text("32 of 64 pixels are hidden")).to_be_visible(timeout=PATIENCE)
    row = torch.from_numpy(
        digits["test"].rows(np.array([len(digits["test"]) // 8])).astype(np.int64)
    )
    np.testing.assert_array_equal(pixels(canvas(page))[:4, :, :3], decode_images(model, row)[0, :4])
    assert len(np.unique(canvas_of(page, "loss of each pixel").reshape(-1, 4), axis=0)) > 4


def test_completions_appear_row_by_row_beside_the_original(
    visit: Visit, model: ImageGPT, photo: Path, work: Work
) -> None:
    page = visit()
    upload_and_see(page, photo)
    work.hold_after = 1
    complete(page)
    say(page, "Row 7 of 8 ...")
    for number in range(1, 5):
        half = canvas_of(page, f"drawing {number}")
        np.testing.assert_array_equal(half[..., 3], np.repeat([255, 0], (48, 16)).reshape(8, 8))
    work.go_on.set()
    say(page, "4 drawings, seed 0, in")
    tokens = tokens_of_files(model, [photo])
    *_, last = generate(model, tokens.repeat(4, 1), torch.arange(64) < 32)
    expected = decode_images(model, torch.cat([tokens, last.tokens]))
    for picture, caption in zip(
        expected, ("original", *(f"drawing {number}" for number in range(1, 5))), strict=True
    ):
        np.testing.assert_array_equal(canvas_of(page, caption)[..., :3], picture)
        assert (canvas_of(page, caption)[..., 3] == 255).all()


def test_drawings_are_downloaded_enlarged(visit: Visit, photo: Path) -> None:
    page = visit()
    upload_and_see(page, photo)
    complete(page)
    say(page, "4 drawings")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download all (ZIP)").click()
    assert download.value.suggested_filename == "drawings.zip"
    with zipfile.ZipFile(download.value.path()) as files:
        assert len(files.namelist()) == 5
        with files.open("drawing 4.png") as file:
            large = np.asarray(Image.open(file))
    np.testing.assert_array_equal(large[::64, ::64], canvas_of(page, "drawing 4")[..., :3])


def test_only_painted_pixels_are_generated(visit: Visit, model: ImageGPT, photo: Path) -> None:
    page = visit()
    upload_and_see(page, photo)
    page.get_by_label("number input for Rows to keep").fill("8")
    expect(page.get_by_text("0 of 64 pixels are hidden")).to_be_visible(timeout=PATIENCE)

    def stroke(row: int, first: int, last: int) -> None:
        canvas(page).scroll_into_view_if_needed()
        box = canvas(page).bounding_box()
        assert box
        cell = box["width"] / 8
        page.mouse.move(box["x"] + (first + 0.5) * cell, box["y"] + (row + 0.5) * cell)
        page.mouse.down()
        page.mouse.move(box["x"] + (last + 0.5) * cell, box["y"] + (row + 0.5) * cell)
        page.mouse.up()

    stroke(2, 1, 6)
    expect(page.get_by_text("6 of 64 pixels are hidden")).to_be_visible(timeout=PATIENCE)
    stroke(2, 6, 6)  # on a hidden one: shown again
    expect(page.get_by_text("5 of 64 pixels are hidden")).to_be_visible(timeout=PATIENCE)
    keep_all, undo = (page.get_by_role("button", name=name) for name in ("Keep all", "Undo"))
    for button, hidden in ((keep_all, 0), (undo, 5), (undo, 6), (undo, 0)):
        button.click()
        expect(page.get_by_text(f"{hidden} of 64 pixels")).to_be_visible(timeout=PATIENCE)
    expect(undo).to_be_disabled()
    stroke(2, 1, 5)
    expect(page.get_by_text("5 of 64 pixels are hidden")).to_be_visible(timeout=PATIENCE)
    known = torch.ones(64, dtype=torch.bool)
    known[17:22] = False
    np.testing.assert_array_equal(pixels(canvas(page))[..., 3].ravel() == 255, known)
    complete(page)
    say(page, "4 drawings")
    tokens = tokens_of_files(model, [photo])
    *_, last = generate(model, tokens.repeat(4, 1), known)
    expected = decode_images(model, last.tokens)
    for number in range(4):
        np.testing.assert_array_equal(
            canvas_of(page, f"drawing {number + 1}")[..., :3], expected[number]
        )
    assert (expected != decode_images(model, tokens)).any()


def test_text_named_png_is_reported_and_the_page_continues(
    visit: Visit, photo: Path, tmp_path: Path
) -> None:
    page = visit()
    complete(page)
    say(page, "Choose an image first.")
    text = tmp_path / "text.png"
    text.write_text("<b>no image</b>")
    upload(page, text)
    expect(page.get_by_text("Not an image in a known format.")).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_test_id("toast-body")).to_have_count(0)  # said once, on the page
    expect(canvas(page)).to_be_hidden(timeout=PATIENCE)
    page.get_by_role("button", name="Clear").first.click()
    upload_and_see(page, photo)
    complete(page)
    say(page, "4 drawings")


def test_forty_megapixels_are_accepted(visit: Visit, tmp_path: Path) -> None:
    large = tmp_path / "large.jpg"
    Image.linear_gradient("L").resize((8000, 5000)).convert("RGB").save(large, quality=95)
    page = visit()
    upload_and_see(page, large)
    brightness = pixels(canvas(page))[:4, :, 0].mean(axis=1)
    assert (np.diff(brightness) > 0).all()


def test_two_visitors_sample_at_once_and_a_third_waits(
    visit: Visit, model: ImageGPT, photo: Path, tmp_path: Path, work: Work
) -> None:
    other = tmp_path / "other.png"
    Image.open(photo).rotate(180).save(other)
    pages = [visit(), visit(), visit()]
    work.hold_after = 0
    for page, file in zip(pages, (photo, other, photo), strict=True):
        upload_and_see(page, file)
        complete(page)
        say(page, "Waiting for a turn ..." if page is pages[2] else "Row 6 of 8 ...")
    pages[2].get_by_role("button", name="Stop").click()
    say(pages[2], "Stopped.")
    complete(pages[2])
    say(pages[2], "Waiting for a turn ...")
    work.go_on.set()
    for page, file in zip(pages, (photo, other, photo), strict=True):
        say(page, "4 drawings")
        original = decode_images(model, tokens_of_files(model, [file]))[0]
        np.testing.assert_array_equal(canvas_of(page, "original")[..., :3], original)
        np.testing.assert_array_equal(canvas_of(page, "drawing 1")[:4, :, :3], original[:4])
    assert work.begun == 3  # the work that was stopped while it waited has not started


@pytest.mark.parametrize("way", ["stop", "close"])
def test_work_ends_when_it_is_stopped_or_its_tab_is_closed(
    visit: Visit, photo: Path, work: Work, way: str
) -> None:
    page = visit()
    upload_and_see(page, photo)
    work.endless = True
    complete(page)
    say(page, "Row 6 of 8 ...")
    assert not work.closed.is_set()
    if way == "close":
        page.close()
    else:
        page.get_by_role("button", name="Stop").click()
        say(page, "Stopped.")
    assert work.closed.wait(PATIENCE / 1000)


def test_the_run_is_described(visit: Visit) -> None:
    page = visit()
    page.get_by_role("tab", name="About this model").click()
    for title in ("Linear probe of every layer", "Samples", "Loss during training", "Palette"):
        expect(page.get_by_role("heading", name=title)).to_be_visible(timeout=PATIENCE)
    for alt in ("Line chart of linear probe accuracy", "Grid of pictures: 4 images"):
        picture = page.get_by_role("img", name=alt)
        assert (
            picture.evaluate(
                "async (image) => { await image.decode(); return image.naturalWidth; }"
            )
            > 100
        )


def test_the_card_of_a_model_without_a_run_is_shown(
    visit: Visit, model: ImageGPT, photo: Path, tmp_path: Path
) -> None:
    shutil.copy(photo, tmp_path / "samples.png")
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\n---\n\n# photos\n\nOf $1 to $2.\n\n![Samples](samples.png)\n"
    )
    served = start(model, LOOPBACK, 0, name="photos", card=tmp_path / "README.md")
    try:
        page = visit(address=served.local_url)
        page.get_by_role("tab", name="About this model").click()
        expect(page.get_by_role("heading", name="photos", exact=True)).to_be_visible()
        expect(page.get_by_text("Of $1 to $2.")).to_be_visible()
        expect(page.get_by_text("license")).to_have_count(0)
        picture = page.get_by_role("img", name="Samples")
        decoded = "async (image) => { await image.decode(); return image.naturalWidth; }"
        assert picture.evaluate(decoded) == 44
    finally:
        served.close(verbose=False)


def test_page_fits_a_phone(visit: Visit, browser: Browser, photo: Path) -> None:
    page = visit(browser.new_context(viewport=PHONE, has_touch=True, is_mobile=True))
    upload_and_see(page, photo)
    complete(page)
    say(page, "4 drawings")

    def wide() -> int:
        return page.evaluate("document.documentElement.scrollWidth")

    assert wide() == PHONE["width"]
    for name in ("Complete", "Sample", "Stop"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert box
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= PHONE["width"]
        assert box["height"] >= 36
    page.get_by_role("tab", name="About this model").click()
    expect(page.get_by_role("heading", name="Samples")).to_be_visible(timeout=PATIENCE)
    assert wide() == PHONE["width"]
