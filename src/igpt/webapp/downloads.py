"""Downloads of the web page: pictures enlarged by whole factors, as PNG, and all of them as ZIP."""

import io
import zipfile
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SIDE = 512  # pixels of an enlarged picture, at most unless it is larger by itself


def enlarged(picture: NDArray[np.uint8]) -> bytes:
    """Return a picture uint8 [R, R, 3] as PNG, each pixel as a square of one colour."""
    factor = max(1, _SIDE // len(picture))
    encoded = io.BytesIO()
    Image.fromarray(picture.repeat(factor, 0).repeat(factor, 1)).save(encoded, "PNG", optimize=True)
    return encoded.getvalue()


def zipped(files: Mapping[str, bytes]) -> bytes:
    """Return a ZIP of files, given by their names."""
    encoded = io.BytesIO()
    with zipfile.ZipFile(encoded, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return encoded.getvalue()
