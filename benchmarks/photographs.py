"""Compare `prepare` on JPEG photographs with Pillow's decoding of the same files on the same cores.

Goal: at most 1.25 times the time of decoding alone. On one core, files are either opened and
decoded by Pillow, or opened and converted to tokens of a 512-colour palette. On all cores,
`prepare` of a folder of links to the files alternates with a pool of processes that only decode.
The error of reduced-size decoding is measured too.
"""

import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
from common import CIFAR10, interleaved, record, run, show
from PIL import Image

from igpt.data.images.palette import Palette
from igpt.data.images.transform import Transform
from igpt.data.prepare import PrepareConfig, prepare
from igpt.errors import InputError

PHOTOGRAPHS = CIFAR10.with_name("imagenet-sample")
SIZES = (32, 48, 64)


def decode(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def decode_all(paths: list[Path]) -> None:
    for path in paths:
        decode(path)


def tokenise_all(paths: list[Path], transform: Transform, palette: Palette) -> None:
    for number, path in enumerate(paths):
        palette.transform(transform(path, (0, number)))


def decode_on_all_cores(paths: list[Path]) -> None:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(decode, paths, chunksize=256))


def fidelity(files: list[Path], size: int, palette: Palette) -> dict[str, float]:
    """Return the effect of reduced-size decoding on the squares (8-bit levels), and on their
    tokens."""
    transforms = Transform(size), Transform(size, full_decode=True)
    reduced, full = (
        np.concatenate([transform(file) for file in files]) for transform in transforms
    )
    squared = (reduced.astype(float) - full) ** 2
    tokens, exact = palette.transform(reduced), palette.transform(full)
    return {
        "size": size,
        "psnr_db": float(10 * np.log10(255**2 / squared.mean())),
        "mse": float(squared.mean()),
        "worst_image_rms": float(np.sqrt(squared.mean(axis=(1, 2, 3))).max()),
        "tokens_changed": float((tokens != exact).mean()),
        "palette_mse": float(((palette.inverse_transform(exact).astype(float) - full) ** 2).mean()),
    }


def main(
    data: Path = PHOTOGRAPHS, rounds: int = 7, links: int = 600, whole_rounds: int = 3
) -> None:
    """Time one core, then all.

    Args:
        data: folder with photographs (*.JPEG) at any depth.
        rounds: of which the medians are taken, on one core.
        links: to each file, in the folder that is prepared on all cores.
        whole_rounds: the same there.
    """
    files = sorted(data.rglob("*.JPEG"))
    if not files:
        raise InputError(f"no photographs (*.JPEG) below {data}; name a folder with --data")
    palette = Palette(512).fit(np.concatenate([Transform(32)(file) for file in files]))
    palette.table  # noqa: B018  built once for any number of images
    transforms = {f"tokens, {size} px": Transform(size) for size in SIZES}
    transforms |= {
        f"tokens, {size} px, full decoding": Transform(size, full_decode=True) for size in SIZES
    }
    transforms |= {f"tokens, 32 px, views {views}": Transform(32, views=views) for views in (1, 8)}
    contenders = {"Pillow decodes": partial(decode_all, files)}
    contenders |= {
        name: partial(tokenise_all, files, transform, palette)
        for name, transform in transforms.items()
    }
    seconds = interleaved(contenders, rounds)
    ratios = {name: value / seconds["Pillow decodes"] for name, value in seconds.items()}
    per_image = {name: 1000 * value / len(files) for name, value in seconds.items()}
    show(
        f"One core, {len(files)} photographs",
        ["", "ms/image", "x decoding"],
        [[name, f"{per_image[name]:.3f}", f"{ratio:.2f}"] for name, ratio in ratios.items()],
    )
    lost = [fidelity(files, size, palette) for size in SIZES]
    show(
        "Reduced-size decoding against full decoding",
        list(lost[0]),
        [[f"{value:.3f}".rstrip("0").rstrip(".") for value in row.values()] for row in lost],
    )
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "images").mkdir()
        for file in files:
            for number in range(links):
                (home / "images" / f"{number:05}-{file.name}").symlink_to(file.resolve())
        palette.save(home / "palette.npy")
        paths, attempt = sorted((home / "images").iterdir()), count()
        config = PrepareConfig(palette=str(home / "palette.npy"))

        def prepare_all() -> None:
            prepare(
                str(home / "images"),
                home / f"tokens-{next(attempt)}",
                config,
                workers=os.cpu_count() or 1,
            )

        whole = interleaved(
            {"decode": partial(decode_on_all_cores, paths), "prepare": prepare_all}, whole_rounds
        )
    ratio = whole["prepare"] / whole["decode"]
    rates = {name: len(paths) / value for name, value in whole.items()}
    show(
        f"All {os.cpu_count()} cores, {len(paths)} links, everything included",
        ["", "s", "images/s"],
        [[name, f"{whole[name]:.1f}", f"{rates[name]:.0f}"] for name in whole],
    )
    print(f"\nprepare takes {ratio:.2f} times as long as decoding alone")
    record(
        "photographs",
        {
            "files": len(files),
            "rounds": rounds,
            "one_core": {"ms_per_image": per_image, "ratio": ratios},
            "fidelity": lost,
            "all_cores": {
                "images": len(paths),
                "rounds": whole_rounds,
                "seconds": whole,
                "ratio": ratio,
            },
        },
    )


if __name__ == "__main__":
    run(main)
