"""Tokens against transformers' ImageGPT image processor, on photographs."""

import numpy as np
from numpy.typing import NDArray
from transformers import ImageGPTImageProcessor

from igpt.data.images.palette import Palette


def test_the_processor_gives_the_same_tokens(small_images: NDArray[np.uint8]) -> None:
    """If its rounding makes near ties differ, igpt takes the nearer colour."""
    photographs = small_images[:64]
    palette = Palette(512).fit(photographs)
    processor = ImageGPTImageProcessor(
        clusters=palette.centers_.tolist(),
        do_resize=False,
        do_normalize=True,
        do_color_quantize=True,
    )
    theirs = np.asarray(
        processor(list(photographs), input_data_format="channels_last")["input_ids"]
    )
    ours = palette.transform(photographs)
    positions = ours != theirs.reshape(ours.shape)
    assert positions.sum() <= 3
    points = (palette.centers_.astype(np.float64) + 1) * 127.5
    for pixel, mine, other in zip(
        photographs[positions], ours[positions], theirs.reshape(ours.shape)[positions], strict=True
    ):
        distance = [((pixel - points[token]) ** 2).sum() for token in (mine, other)]
        assert distance[0] <= distance[1] < distance[0] + 1e-2
