"""Handlers of the web page: the model's view of an image, losses, classes, samples.

B drawings, n positions, R resolution.
"""

import math
import os
import reprlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from igpt.config import read_settings
from igpt.data.images.decode import load, open_image, to_rgb
from igpt.data.images.photographs import photographs
from igpt.data.images.transform import Transform
from igpt.data.tokens.dataset import TokenDataset
from igpt.data.tokens.manifest import MANIFEST
from igpt.errors import InputError
from igpt.evaluation.likelihood import summary
from igpt.evaluation.probe_classifier import ProbeClassifier
from igpt.model.classifier import predict
from igpt.model.images import decode_images, tokens_of_split
from igpt.model.match import palette_of, require_match
from igpt.model.objectives import pixel_losses
from igpt.model.transformer import ImageGPT
from igpt.report.figures import data_uri, encode
from igpt.sampling.grids import UNKNOWN
from igpt.sampling.jobs import SamplingSettings, require_sampling_settings
from igpt.sampling.sampler import generate
from igpt.webapp.downloads import enlarged, zipped
from igpt.webapp.guard import mark_used

# Hidden pixels are transparent, but of this colour where the images have transparent pixels too.
UNKNOWN_COLOR = f"#{UNKNOWN:02x}{UNKNOWN:02x}{UNKNOWN:02x}"
# {"caption", "picture", "download"}; the last two are data URIs, and unfinished pictures have no
# download.
Shown = dict[str, str]
GONE = "the image was deleted because it was not used for a while; choose it again"
# MPO: JPEG of cameras with two lenses
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
_MOST_PIXELS = 50_000_000
_TOO_MANY = "the 50 million that the page reads; make it smaller first"
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of TIFF
_EXAMPLES = 8
_PREVIEW = 320  # pixels of the longer side of an upload on the page
_FADED = 0.65  # share of grey outside the part of an upload that the model sees
_FRAME = (37, 99, 235)  # blue, as the page's buttons
MOST_DRAWINGS, HOTTEST, MOST_GUIDANCE = 8, 2, 10
_LARGEST_SEED = 2**53  # JavaScript's whole numbers are exact up to it


def read(model: ImageGPT, file: str) -> Tensor:
    """Return an uploaded image at the model's resolution and in its palette: tokens [1, n].

    Raises:
        InputError: see `_encoded`; or the image does not decode.
    """
    palette = palette_of(model)
    square = Transform(model.config.resolution, alpha=palette.transparent)(_encoded(file))
    return torch.from_numpy(palette.transform(square).reshape(1, -1).astype(np.int64))


def crop(model: ImageGPT, file: str) -> list[Shown]:
    """Return an uploaded image, upright, with a frame around the part that the model sees.

    Raises:
        InputError: see `read`.
    """
    size, encoded = model.config.resolution, _encoded(file)
    opened, reduction = open_image(encoded), 1
    if opened.format == "JPEG":  # its decoder reduces large images
        while reduction < 8 and min(opened.size) >= 2 * reduction * max(_PREVIEW, size):
            reduction *= 2
    rgb = to_rgb(load(opened, reduction))
    width, height = (reduction * side for side in rgb.size)
    part = Transform(size).centre(width, height)
    shown = fitted(rgb, _PREVIEW)
    scale = shown.width / width, shown.height / height
    left, top, right, bottom = (round(edge * scale[index % 2]) for index, edge in enumerate(part))
    right, bottom = max(right, left + 1), max(bottom, top + 1)  # of extremely narrow images
    faded = Image.blend(shown, Image.new("RGB", shown.size, "grey"), _FADED)
    faded.paste(shown.crop((left, top, right, bottom)), (left, top))
    ImageDraw.Draw(faded).rectangle((left, top, right - 1, bottom - 1), outline=_FRAME, width=2)
    seen = "all of it" if part == (0, 0, width, height) else "the part in the frame"
    bordered = ", with a mirrored border" if min(width, height) < size else ""
    caption = f"Your image. The model sees {seen}{bordered}."
    return [{"caption": caption, "picture": encode(faded)}]


def fitted(picture: Image.Image, side: int) -> Image.Image:
    """Return a picture reduced to `side` pixels, or enlarged to about it by whole factors."""
    factor = max(1, side // max(picture.size))
    shown = picture.resize(
        (factor * picture.width, factor * picture.height), Image.Resampling.NEAREST
    )
    shown.thumbnail((side, side))
    return shown


def _encoded(file: str) -> bytes:
    """Return the content of an uploaded image.

    Raises:
        InputError: it was deleted, is in a format that the page does not read, or has too many
            pixels.
    """
    path = Path(file)
    mark_used(path)
    try:
        encoded = path.read_bytes()
    except FileNotFoundError:
        raise InputError(GONE) from None
    require_moderate(encoded)
    return encoded


def require_moderate(encoded: bytes) -> None:
    """Raise if the header of an image states too many pixels, before it is decoded.

    Raises:
        InputError: its format is none of those a page is for, it has over 50 million pixels, or its
            header is damaged.
    """
    _require_few(_webp_sides(encoded))
    try:
        opened = open_image(encoded)
    except InputError as error:
        if "decompression bomb" in str(error):  # Pillow's own limit, 179 million
            raise InputError(f"the image has far more than {_TOO_MANY}") from None
        raise
    if opened.format not in _FORMATS:
        raise InputError(
            f"{opened.format} is not read here; choose a file in one of {', '.join(_FORMATS)}"
        )
    _require_few(opened.size)
    # TIFF's decoder allocates a whole tile, however small the image is.
    tags = getattr(opened, "tag_v2", {})
    _require_few((int(tags.get(_TILE_WIDTH, 0)), int(tags.get(_TILE_LENGTH, 0))))


def _require_few(sides: tuple[int, int]) -> None:
    pixels = math.prod(sides)
    if pixels > _MOST_PIXELS:
        raise InputError(f"the image has {pixels / 1e6:,.0f} million pixels, more than {_TOO_MANY}")


def _webp_sides(encoded: bytes) -> tuple[int, int]:
    """Return the width and height of a WebP image without decoding it; 0 for other files."""
    if encoded[:4] != b"RIFF" or encoded[8:12] != b"WEBP" or len(encoded) < 30:
        return 0, 0

    def number(first: int, last: int) -> int:
        return int.from_bytes(encoded[first:last], "little")

    if encoded[12:16] == b"VP8X":
        return 1 + number(24, 27), 1 + number(27, 30)
    if encoded[12:16] == b"VP8L":
        return 1 + number(21, 25) % 2**14, 1 + (number(21, 25) >> 14) % 2**14
    return number(26, 28) % 2**14, number(28, 30) % 2**14


def view(model: ImageGPT, tokens: Tensor) -> Shown:
    """Return the model's view of an image, tokens [1, n], with no hidden pixels."""
    return {
        "picture": encode(Image.fromarray(decode_images(model, tokens)[0])),
        "hidden": "0" * tokens.shape[1],
        **({"unknown": UNKNOWN_COLOR} if palette_of(model).transparent else {}),
    }


def known_positions(model: ImageGPT, rows: Any, seen: Any) -> Tensor:
    """Return the pixels to keep, bool [n]: those not hidden, or the first rows.

    Args:
        rows: whole number from 0 to R.
        seen: what `view` returns, or None.

    Raises:
        InputError: one of the two is something else.
    """
    n, side = model.config.n_pixels, model.config.resolution
    if not seen:
        return torch.arange(n) < side * int(_number("rows", rows, 0, side, whole=True))
    hidden = seen.get("hidden") if isinstance(seen, dict) else None
    if not isinstance(hidden, str) or len(hidden) != n or set(hidden) - {"0", "1"}:
        raise InputError(f"hidden pixels are given by {n} characters, 1 for hidden and 0 for kept")
    return torch.tensor([one == "0" for one in hidden])


def _number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    whole: bool = False,
) -> float:
    """Return a number.

    Raises:
        InputError: `value` is something else, or out of range.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (whole and value % 1):
        kind, shown = "whole number" if whole else "number", reprlib.repr(value)
        limits = f" from {low} to {high}" if math.isfinite(low) else ""
        raise InputError(f"{name}: a {kind}{limits} is needed, not {shown}")
    return value  # type: ignore[no-any-return]


def drawings(
    model: ImageGPT,
    tokens: Tensor,
    known: Tensor,
    count: Any,
    temperature: Any,
    seed: Any,
    top_k: Any,
    top_p: Any,
    class_name: Any = "",
    guidance: Any = 1,
    *,
    original: bool,
) -> Iterator[list[Any]]:
    """Generate the unknown pixels `count` times.

    Yields the images so far, the progress, and a ZIP of all images, a data URI that is empty until
    they are finished.

    Closing the iterator ends the work.

    Args:
        tokens: [1, n].
        known: the pixels to keep, bool [n].
        count, temperature, seed, top_k, top_p: as the page's visitor or a program gives them; the
            last two may be None.
        class_name: of a class-conditional model's classes; empty: none, and no guidance.
        guidance: as given, with a class.
        original: show the image itself first.

    Raises:
        InputError: a setting is out of its range.
    """
    if seed is None:  # an empty field
        raise InputError("give a seed, a whole number from 0")
    count = int(_number("drawings", count, 1, MOST_DRAWINGS, whole=True))
    seed = int(_number("seed", seed, 0, _LARGEST_SEED, whole=True))
    settings: SamplingSettings = {
        "temperature": _number("temperature", temperature, 0, HOTTEST),
        "seed": seed,
        "top_k": None if top_k is None else int(_number("top-k", top_k, whole=True)),
        # Not 1: the sum of all probabilities may be rounded to less, or reach 1 too early.
        "top_p": None if top_p in (None, 1) else _number("top-p", top_p),
    }
    labels = None
    if class_name:
        labels = torch.full((count,), model.config.label_of(str(class_name)))
        settings["guidance"] = _number("guidance", guidance, 0, MOST_GUIDANCE)
    require_sampling_settings(**settings)
    start, side, n = time.monotonic(), model.config.resolution, len(known)
    everything = torch.ones(1, n, dtype=torch.bool)
    first = _shown(model, tokens, everything, ["original"]) if original else []
    captions = [f"drawing {number + 1}" for number in range(count)]
    batch, settled = tokens.repeat(count, 1), known.repeat(count, 1)
    yield [first + _shown(model, batch, settled, captions), "Starting ...", ""]
    for state in generate(model, batch, known, labels=labels, **settings):
        batch, settled = state.tokens.cpu(), state.known.cpu()
        whole = settled.all(dim=0).view(side, side).all(dim=1)
        if whole.all():
            continue
        if model.config.trained_as.causal:
            words = f"Row {int(whole.int().argmin()) + 1} of {side} ..."
        else:
            words = f"{float(settled[0, ~known].float().mean()):.0%} of the hidden pixels drawn ..."
        yield [first + _shown(model, batch, settled, captions), words, ""]
    many = "1 drawing" if count == 1 else f"{count} drawings"
    took = f"{many}, seed {seed}, in {time.monotonic() - start:.1f} s."
    images = decode_images(model, torch.cat([tokens, batch]) if original else batch)
    pictures = dict(zip(["original"] * original + captions, images, strict=True))
    archive = zipped({f"{caption}.png": enlarged(image) for caption, image in pictures.items()})
    finished = [_finished(caption, image) for caption, image in pictures.items()]
    yield [finished, took, data_uri(archive, "application/zip")]


def _shown(model: ImageGPT, tokens: Tensor, settled: Tensor, captions: list[str]) -> list[Shown]:
    """Return pictures with captions; positions that are not generated yet are transparent.

    They are grey where the images have transparent pixels too.
    """
    clear = ~settled.view(len(tokens), model.config.resolution, -1).numpy()
    decoded = decode_images(model, tokens.where(settled, 0))
    images = np.full((*decoded.shape[:-1], 4), 255, dtype=np.uint8)
    images[..., : decoded.shape[-1]] = decoded
    images[clear] = (*[UNKNOWN] * 3, 255) if palette_of(model).transparent else (*[0] * 3, 0)
    pictures = [
        encode(Image.fromarray(image if image[..., 3].min() == 0 else image[..., :3]))
        for image in images
    ]
    return [
        {"caption": caption, "picture": picture}
        for caption, picture in zip(captions, pictures, strict=True)
    ]


def _finished(caption: str, picture: NDArray[np.uint8]) -> Shown:
    """Return a picture uint8 [R, R, 3] with a caption, and enlarged as a download."""
    return {
        "caption": caption,
        "picture": encode(Image.fromarray(picture)),
        "download": data_uri(enlarged(picture), "image/png"),
    }


@torch.inference_mode()
def score(model: ImageGPT, tokens: Tensor) -> tuple[list[Shown], str]:
    """Return the losses of an image, tokens [1, n], as a picture and as text."""
    from matplotlib import colormaps

    tokens = tokens.to(model.device)
    losses = pixel_losses(model(tokens), tokens)[0].double().cpu().numpy()  # [n]
    result, blind = summary(losses.mean(keepdims=True)), math.log(model.config.n_colors)
    # A palette of one colour has losses of 0.
    shares = (losses / (blind or 1)).clip(0, 1).reshape(model.config.resolution, -1)
    colors = (255 * colormaps["cividis"](shares)[..., :3]).round().astype(np.uint8)
    return [_finished("loss of each pixel", colors)], (
        f"**{result['nats_per_pixel']:.4f} nats/pixel** ({result['bits_per_pixel']:.4f} "
        "bits/pixel) on average. Pixels that the model foresaw are dark blue (0 nats); yellow ones "
        f"cost {blind:.2f} nats or more, as much as a blind guess among {model.config.n_colors} "
        "colours."
    )


def classifier_of(model: ImageGPT, run: Path | None) -> ProbeClassifier | None:
    """Return the classifier of a run's probe, unless the model is a classifier itself.

    Raises:
        InputError: it is damaged, or of another model or probe.
    """
    if run is None or model.config.class_names is not None:
        return None
    classifier = ProbeClassifier.of_probe(run / "probe.json")
    if classifier and (
        classifier.layer > model.config.n_layer or len(classifier.mean) != model.config.n_embd
    ):
        raise InputError(f"the probe in {run} is of another model; run igpt probe again")
    return classifier


def classes(
    model: ImageGPT, tokens: Tensor, classifier: ProbeClassifier | None
) -> dict[str, float]:
    """Return the probability of every class for an image, tokens [1, n]."""
    if classifier:
        names, found = classifier.class_names, classifier.probabilities(model, tokens)[0].tolist()
    else:
        predicted = predict(model, tokens.numpy().astype(np.uint16), np.zeros(1, np.int64))
        names, found = model.config.class_names or (), predicted.probabilities[0].tolist()
    return dict(zip(names, found, strict=True))


def write_examples(model: ImageGPT, run: Path, folder: Path) -> list[Path]:
    """Write some test images of the run's tokens as PNG, if the tokens exist.

    Raises:
        InputError: the run's settings, or the tokens that they name, are damaged.
    """
    settings = read_settings(run / "config.yaml") if (run / "config.yaml").is_file() else {}
    tokens = settings.get("tokens")
    if not isinstance(tokens, str) or not os.path.isfile(Path(tokens) / MANIFEST):  # noqa: PTH113  is_file may raise
        return []
    data = TokenDataset(Path(tokens))
    try:
        require_match(model, data)
    except InputError:  # they were prepared again since, for another model
        return []
    if not len(data["test"]):
        return []
    files = []
    rows = tokens_of_split(data["test"], min(_EXAMPLES, len(data["test"])))
    for number, picture in enumerate(decode_images(model, rows), 1):
        files.append(folder / f"example-{number}.png")
        Image.fromarray(picture).save(files[-1])
    return files


def write_photographs(folder: Path) -> list[Path]:
    """Write `photographs` as PNG."""
    files = []
    for name, pixels in photographs().items():
        files.append(folder / f"{name}.png")
        Image.fromarray(pixels).save(files[-1])
    return files
