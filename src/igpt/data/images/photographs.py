"""Parts of the two photographs that scikit-learn contains: real images on every machine."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 128  # pixels of a part


class Part(NamedTuple):
    """A square of one of the photographs, of 640 x 427 pixels."""

    name: str
    file: str
    left: int
    top: int
    side: int


PARTS = (
    Part("tower", "china.jpg", 0, 0, 427),
    Part("flower", "flower.jpg", 95, 0, 427),
    Part("lake", "china.jpg", 213, 0, 427),
    Part("petals", "flower.jpg", 179, 94, 256),
    Part("roof", "china.jpg", 80, 20, 256),
    Part("blossoms", "flower.jpg", 215, 171, 256),
    Part("shore", "china.jpg", 384, 128, 256),
    Part("leaves", "flower.jpg", 51, 64, 256),
)


def photographs() -> dict[str, NDArray[np.uint8]]:
    """Return the `PARTS` by their names, uint8 [128, 128, 3]."""
    from sklearn.datasets import load_sample_image

    return {
        part.name: np.asarray(
            Image.fromarray(load_sample_image(part.file)).resize(
                (SIDE, SIDE),
                Image.Resampling.BOX,
                (part.left, part.top, part.left + part.side, part.top + part.side),
            )
        )
        for part in PARTS
    }
