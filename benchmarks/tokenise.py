"""Compare Palette.transform with transformers' ImageGPT image processor: images/s and tokens on
CIFAR-10 at 32 px.

Goal: at least 100 times its images/s, with equal tokens for the same pixels. The processor gets the
centres as it reads them from a model's folder (float64) and as float32, which is faster, with 32
images per call and with one per call, which is its fastest. Our side runs on one thread, in one
call and with one image per call. For tokens that differ, exact distances decide which is correct.
"""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import transformers
from common import CIFAR10, cifar10, interleaved, record, run, show
from numpy.typing import NDArray
from transformers import ImageGPTImageProcessor

from igpt.data.images.palette import Palette

Tokens = NDArray[np.integer[Any]]
OURS, OURS_SINGLY = "igpt, all in one call", "igpt, 1 image per call"


def tokens_of(processor: Any, pixels: NDArray[np.uint8], batch: int) -> Tokens:
    calls = [list(pixels[first : first + batch]) for first in range(0, len(pixels), batch)]
    found = [
        np.asarray(processor(images, input_data_format="channels_last")["input_ids"])
        for images in calls
    ]
    return np.concatenate(found).reshape(pixels.shape[:-1])


def differences(palette: Palette, pixels: NDArray[np.uint8], theirs: Tokens) -> dict[str, float]:
    """Return how many tokens differ, and by exact squared distances (8-bit levels) which one is
    nearer and by how much."""
    ours = palette.transform(pixels)
    places = ours != theirs
    centers = (palette.centers_.astype(float) + 1) * 127.5
    mine, other = (
        ((pixels[places] - centers[tokens[places]]) ** 2).sum(axis=-1) for tokens in (ours, theirs)
    )
    return {
        "tokens": ours.size,
        "differ": int(places.sum()),
        "ours_nearer": int((mine < other).sum()),
        "theirs_nearer": int((other < mine).sum()),
        "largest_gap": float(np.abs(other - mine).max(initial=0)),
    }


def main(
    data: Path = CIFAR10, images: int = 2000, timed: int = 200, colors: int = 512, rounds: int = 5
) -> None:
    """Convert images of CIFAR-10 to tokens.

    Args:
        data: folder with CIFAR-10 as Parquet.
        images: whose tokens are compared, and which our side is timed on.
        timed: of these, the first ones, which the processor is timed on.
        colors: k of the palette, which is fitted to 1,000 training images.
        rounds: of which the medians are taken.
    """
    pixels = cifar10(data, "test", images, seed=0)
    palette = Palette(colors).fit(cifar10(data, "train", 1000, seed=0))
    start = perf_counter()
    palette.table  # noqa: B018  built on first use
    table_seconds = perf_counter() - start
    settings = {"do_resize": False, "do_normalize": True, "do_color_quantize": True}
    processors = {
        "float64": ImageGPTImageProcessor(clusters=palette.centers_.tolist(), **settings),
        "float32": ImageGPTImageProcessor(clusters=palette.centers_, **settings),
    }
    compared = {
        name: differences(palette, pixels, tokens_of(one, pixels, 1))
        for name, one in processors.items()
    }

    contenders: dict[str, Callable[[], object]] = {
        OURS: lambda: palette.transform(pixels),
        OURS_SINGLY: lambda: [palette.transform(image) for image in pixels],
    }
    for name, one in processors.items():
        for batch in (1, 32):
            label = f"transformers, {name}, {batch} image{'s' * (batch > 1)} per call"
            contenders[label] = lambda one=one, batch=batch: tokens_of(one, pixels[:timed], batch)
    seconds = interleaved(contenders, rounds)
    rates = {
        name: (images if name in (OURS, OURS_SINGLY) else timed) / value
        for name, value in seconds.items()
    }
    rows, results = [], {}
    for name, rate in rates.items():
        # The table costs as much as this number of images by the contender, less their cost by
        # ours.
        break_even = (
            None if name in (OURS, OURS_SINGLY) else table_seconds / (1 / rate - 1 / rates[OURS])
        )
        results[name] = {
            "images_per_second": rate,
            "ours_over_it": rates[OURS] / rate,
            "break_even_images": break_even,
        }
        rows.append(
            [
                name,
                f"{rate:,.0f}",
                f"{rates[OURS] / rate:.1f}",
                "" if break_even is None else f"{break_even:,.0f}",
            ]
        )
    kind = type(processors["float64"]).__name__
    show(
        f"{kind}, {images:,} images of 32 px, k = {colors}",
        ["", "images/s", "ours x", "break-even images"],
        rows,
    )
    print(f"\nour table is built once per palette, in {table_seconds:.2f} s")
    for name, found in compared.items():
        print(
            f"tokens that differ, {name}: "
            + ", ".join(f"{value:,} {key}" for key, value in found.items())
        )
    made = {"images": images, "timed": timed, "colors": colors, "rounds": rounds, "processor": kind}
    made |= {"transformers": transformers.__version__, "table_seconds": table_seconds}
    record("tokenise", {**made, "differences": compared, "results": results})


if __name__ == "__main__":
    run(main)
