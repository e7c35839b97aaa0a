"""Pictures of a palette: its colours, and what it makes of some images.

R resolution, C channels: RGB, or RGBA.
"""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from igpt.data.images.grid import image_grid
from igpt.data.images.palette import Palette

_MARGIN = 42, 18  # pixels left of the colours and above them, for labels
_LABEL = "#7d858f"  # a grey that can be read on light and on dark pages
_TITLE = 22  # pixels: the line above a part of a picture
_BACKGROUND = (236, 236, 236)  # distinct from white colours


def palette_swatch(palette: Palette) -> Image.Image:
    """Return a picture of all colours in the order of their tokens, on transparent ground.

    Every row is labelled with the token of its first colour, and columns with what to add to it.
    The transparent entry is a frame.
    """
    count = len(palette)
    columns = count if count <= 32 else max(32, math.ceil(math.sqrt(2 * count)))
    cells = np.zeros((math.ceil(count / columns) * columns, 4), dtype=np.uint8)
    cells[:count, 3] = 255
    cells[:count, : palette.colors.shape[1]] = palette.colors
    side = min(28, max(2, 576 // columns))
    colors = Image.fromarray(cells.reshape(-1, columns, 4).repeat(side, 0).repeat(side, 1))
    rows = len(cells) // columns
    left, top = _MARGIN if rows > 1 else (0, _MARGIN[1])
    picture = Image.new("RGBA", (colors.width + left, colors.height + top))
    picture.paste(colors, (left, top))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    if palette.transparent:
        row, column = divmod(count - 1, columns)
        x, y = left + column * side, top + row * side
        draw.rectangle((x, y, x + side - 1, y + side - 1), outline=_LABEL)
    # Labels keep a distance of a line's height, or of a number's width.
    for row in range(0, rows if rows > 1 else 0, math.ceil(13 / side)):
        place = left - 5, top + (row + 0.5) * side
        draw.text(place, str(row * columns), _LABEL, font, anchor="rm")
    for column in range(0, columns, next(step for step in (1, 2, 4, 8, 16) if step * side >= 26)):
        text = f"+{column}" if rows > 1 else str(column)
        draw.text((left + (column + 0.5) * side, top - 4), text, _LABEL, font, anchor="ms")
    return picture


def palette_picture(images: NDArray[np.uint8], palette: Palette) -> Image.Image:
    """Return images, below each its version in the palette's colours, and all colours.

    Args:
        images: [n, R, R, C].
    """
    last = "; the last one is transparent" if palette.transparent else ""
    quantized = palette.inverse_transform(palette.transform(images))
    parts = [
        (
            "images, and below each its version in the palette's colours",
            image_grid([list(images), list(quantized)]),
        ),
        (f"the {len(palette)} colours, numbered as tokens{last}", palette_swatch(palette)),
    ]
    font = ImageFont.load_default(12)
    width = max(
        *(part.width for _, part in parts),
        *(math.ceil(font.getlength(text)) + 8 for text, _ in parts),
    )
    picture = Image.new("RGB", (width, sum(part.height + _TITLE for _, part in parts)), _BACKGROUND)
    draw, top = ImageDraw.Draw(picture), 0
    for text, part in parts:
        draw.text((4, top + _TITLE // 2), text, "black", font, anchor="lm")
        mask = part if part.mode == "RGBA" else None
        picture.paste(part, (0, top + _TITLE), mask)
        top += _TITLE + part.height
    return picture
