"""Small image sets in common layouts, made from scikit-learn's two photographs and from patterns.

They let every test run without the real sets (CIFAR-10, Tiny ImageNet, photographs of ImageNet).
"""

import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

CIFAR10_CLASSES = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]
WORDNET_IDS = [f"n{1440764 + 3331 * number:08d}" for number in range(20)]

# Width, height and how the JPEG is encoded: the usual sizes of ImageNet's photographs, larger and
# smaller ones, sides that are not multiples of the decoder's blocks, all three chroma samplings,
# baseline and progressive, high and low quality.
PHOTOGRAPHS: list[tuple[int, int, dict[str, object]]] = [
    (500, 375, {"quality": 95}),
    (375, 500, {"quality": 90}),
    (500, 333, {"quality": 85, "progressive": True}),
    (333, 500, {"quality": 95, "subsampling": "4:4:4"}),
    (500, 334, {"quality": 75}),
    (427, 427, {"quality": 95, "subsampling": "4:2:2"}),
    (640, 427, {"quality": 95}),
    (639, 426, {"quality": 95, "optimize": True}),
    (800, 1067, {"quality": 85}),
    (1024, 683, {"quality": 90, "progressive": True}),
    (481, 326, {"quality": 95}),
    (320, 240, {"quality": 95}),
    (246, 301, {"quality": 95}),
    (192, 193, {"quality": 95}),
    (191, 240, {"quality": 95}),
    (153, 214, {"quality": 90}),
    (136, 150, {"quality": 95}),
    (95, 95, {"quality": 95}),
    (500, 281, {"quality": 95}),
    (368, 382, {"quality": 95}),
]
GREY = (3, 16)  # numbers of the grey photographs


@dataclass(frozen=True)
class ImageSets:
    """Image sets in common layouts, and their names, which counts and bounds depend on."""

    folder: Path
    real: bool

    @property
    def cifar10(self) -> Path:
        """Return the folder with Parquet with `img` and `label`, splits train and test."""
        return self.folder / "cifar10"

    @property
    def tiny_imagenet(self) -> Path:
        """Return the folder with two Parquet shards with `image` and `label`, split train."""
        return self.folder / "tiny-imagenet-32"

    @property
    def photographs(self) -> list[Path]:
        """Return the folder with full-size JPEG files in class folders; two of them are grey."""
        return sorted(self.folder.glob("imagenet-sample/train/*/*.JPEG"))

    def small_images(self) -> NDArray[np.uint8]:
        """Return 200 images of `cifar10`: uint8 [200, 32, 32, 3]."""
        encoded = [row["img"]["bytes"] for row in self.test_rows(200)]
        return np.stack(
            [np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in encoded]
        )

    def test_rows(self, count: int) -> list[dict[str, Any]]:
        """Return the first rows of the test split of `cifar10`, as in the Parquet file."""
        file = next(self.cifar10.rglob("test-*.parquet"))
        return next(pq.ParquetFile(file).iter_batches(count)).to_pylist()


@lru_cache(1)
def sources() -> list[Image.Image]:
    """Return scikit-learn's two photographs, of 640 x 427 pixels."""
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """Return a part of one of scikit-learn's photographs, enlarged if it is too small."""
    generator = np.random.default_rng(seed)
    source = sources()[seed % 2]
    factor = min(1.0, source.width / width, source.height / height)
    inner_width, inner_height = int(width * factor), int(height * factor)
    left = int(generator.integers(0, source.width - inner_width, endpoint=True))
    top = int(generator.integers(0, source.height - inner_height, endpoint=True))
    part = source.crop((left, top, left + inner_width, top + inner_height))
    return (
        part
        if part.size == (width, height)
        else part.resize((width, height), Image.Resampling.BICUBIC)
    )


def small_images(count: int, side: int = 32) -> NDArray[np.uint8]:
    """Return uint8 [count, side, side, 3]: parts of the photographs, and one pattern in ten."""
    generator = np.random.default_rng(0)
    images = np.empty((count, side, side, 3), np.uint8)
    for number in range(count):
        if number % 10 == 9:
            images[number] = pattern(side, generator)
            continue
        source = sources()[int(generator.integers(2))]
        extent = int(generator.integers(side, 200))
        left = int(generator.integers(0, source.width - extent))
        top = int(generator.integers(0, source.height - extent))
        box = (left, top, left + extent, top + extent)
        part = np.asarray(source.resize((side, side), Image.Resampling.BOX, box))
        images[number] = part[:, ::-1] if generator.random() < 0.5 else part
    return images


def pattern(side: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    """Return uint8 [side, side, 3]: a gradient of two random colours with a disc of a third."""
    start, end, disc = generator.integers(0, 256, (3, 3))
    rows, columns = np.mgrid[:side, :side] / (side - 1)
    share = (columns if generator.random() < 0.5 else rows)[..., None]
    image = start * (1 - share) + end * share
    center = generator.uniform(0.25, 0.75, 2)
    image[(rows - center[0]) ** 2 + (columns - center[1]) ** 2 < generator.uniform(0.01, 0.1)] = (
        disc
    )
    return image.astype(np.uint8)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def write_parquet(
    path: Path, column: str, images: list[bytes], labels: list[int], names: list[str]
) -> None:
    """Write encoded images and labels as a Parquet file with the features of Hub data sets."""
    features = datasets.Features(
        {column: datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    rows = {column: [{"bytes": image, "path": None} for image in images], "label": labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def write_sample_sets(folder: Path) -> None:
    """Write `cifar10/`, `tiny-imagenet-32/` and `imagenet-sample/` into a folder.

    - `cifar10`: Parquet with `img` (JPEG) and `label`, 10 classes, 200 training and 1,000 test
    images of 32 px.
    - `tiny-imagenet-32`: two Parquet shards with `image` (WebP) and `label`, 20 classes, 60 + 40
    images of 32 px.
    - `imagenet-sample`: 20 JPEG photographs in the class folders `train/<WordNet id>/`, two of them
    grey.
    """
    images = [Image.fromarray(pixels) for pixels in small_images(1200)]
    jpegs = [encoded(image, "JPEG", quality=95) for image in images]
    for split, chosen in (("train", slice(1000, 1200)), ("test", slice(1000))):
        path = folder / "cifar10" / "plain_text" / f"{split}-00000-of-00001.parquet"
        labels = [number * 7 % 10 for number in range(len(jpegs[chosen]))]
        write_parquet(path, "img", jpegs[chosen], labels, CIFAR10_CLASSES)

    webps = [encoded(image, "WEBP", quality=80) for image in images[:100]]
    for shard, chosen in enumerate((slice(60), slice(60, 100))):
        path = folder / "tiny-imagenet-32" / "data" / f"train-{shard:05d}-of-00002.parquet"
        labels = [number % 20 for number in range(100)][chosen]
        write_parquet(path, "image", webps[chosen], labels, WORDNET_IDS)

    for number, (width, height, options) in enumerate(PHOTOGRAPHS):
        image = photograph(width, height, number)
        if number in GREY:
            image = image.convert("L")
            options = {name: value for name, value in options.items() if name != "subsampling"}
        class_folder = folder / "imagenet-sample" / "train" / WORDNET_IDS[number // 2]
        class_folder.mkdir(parents=True, exist_ok=True)
        (class_folder / f"{number:02d}.JPEG").write_bytes(encoded(image, "JPEG", **options))
