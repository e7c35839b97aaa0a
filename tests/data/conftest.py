"""Images in folders and Parquet files, made for the tests of the data package."""

import io
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ..helpers.sample_images import ImageSets

Write = Callable[..., Path]


@pytest.fixture(scope="session")
def three_splits(image_sets: ImageSets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a Parquet folder of 600 training, 100 validation and 300 test images."""
    folder = tmp_path_factory.mktemp("sets") / "three-splits"
    records = image_sets.test_rows(1000)
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
    )
    for split, first, last in (("train", 0, 600), ("validation", 600, 700), ("test", 700, 1000)):
        rows = datasets.Dataset.from_list(records[first:last], features=features)
        folder.mkdir(exist_ok=True)
        rows.to_parquet(folder / f"{split}.parquet")
    return folder


def encoded(seed: int, form: str = "PNG", side: int = 6) -> bytes:
    """Return a random image, encoded."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """Return a function that makes an encoded random image: `picture(seed, "JPEG")`."""
    return encoded


@pytest.fixture
def write_folder(tmp_path: Path) -> Write:
    """Write images under the given names into a folder of the given name."""

    def write(name: str, *files: str) -> Path:
        for seed, file in enumerate(files):
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(seed))
        return tmp_path / name

    return write


@pytest.fixture
def write_parquet(tmp_path: Path) -> Write:
    """Write columns as one Parquet file, with the Hub's types if `features` are given."""

    def write(
        file: str, columns: dict[str, list[object]], features: datasets.Features | None = None
    ) -> Path:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if features is None:
            pq.write_table(pa.table(columns), path)
        else:
            table = datasets.Dataset.from_dict(columns, features=features).data.table
            ordered = datasets.Features({name: features[name] for name in table.column_names})
            pq.write_table(
                table.cast(ordered.arrow_schema), path
            )  # some versions do not write an empty set
        return path

    return write
