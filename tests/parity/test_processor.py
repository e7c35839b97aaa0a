"""Tokens against transformers' own ImageGPT image processor, on photographs at the model's resolution."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image
from transformers import ImageGPTImageProcessor

from igpt.data.palette import Palette


@pytest.fixture(scope="module")
def photographs() -> NDArray[np.uint8]:
    """64 images of CIFAR-10: uint8 [64, 32, 32, 3]."""
    folder = Path(__file__).parents[3] / "shared" / "data" / "cifar10"
    files = sorted(folder.rglob("test-*.parquet"))
    if not files:
        pytest.skip(f"the real images are not here: {folder} is missing")
    rows = next(pq.ParquetFile(files[0]).iter_batches(64, columns=["img"])).to_pylist()
    return np.stack([np.asarray(Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")) for row in rows])


def test_the_processor_gives_the_same_tokens(photographs: NDArray[np.uint8]) -> None:
    """Where its rounding makes near ties differ, ours is the nearer colour by exact distances."""
    palette = Palette(512).fit(photographs)
    processor = ImageGPTImageProcessor(
        clusters=palette.centers_.tolist(), do_resize=False, do_normalize=True, do_color_quantize=True
    )
    theirs = np.asarray(processor(list(photographs), input_data_format="channels_last")["input_ids"])
    ours = palette.transform(photographs)
    places = ours != theirs.reshape(ours.shape)
    assert places.sum() <= 3
    points = (palette.centers_.astype(np.float64) + 1) * 127.5
    for pixel, mine, other in zip(photographs[places], ours[places], theirs.reshape(ours.shape)[places], strict=True):
        distance = [((pixel - points[token]) ** 2).sum() for token in (mine, other)]
        assert distance[0] <= distance[1] < distance[0] + 1e-2
