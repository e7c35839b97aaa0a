"""The loop that turns images into tokens, for data sets on disk and for images in memory.

Shapes: V views of an image, R resolution, n = R^2 tokens of a view, C channels: RGB, or RGBA.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from igpt.data.images.palette import Palette
from igpt.data.images.transform import Squares, Transform
from igpt.data.left_out import FRAMES, UNLABELLED, Allowance, LeftOut
from igpt.data.sources.archives import TokenRows
from igpt.data.sources.readers import Reader, name_of_image
from igpt.errors import InputError


class TokenizedImage(NamedTuple):
    """An image as tokens.

    Attributes:
        row: its row in the reader.
        name: the path of its file, or its row.
        split: the split it belongs to.
        label: the number of its class; -1 without one.
        tokens: uint16 [V, n].
        pixels: uint8 [V, R, R, C], before the palette; None for ready tokens.
        highest_level: of 16-bit grey levels; None for other images.
    """

    row: int
    name: str
    split: str
    label: int
    tokens: NDArray[np.uint16]
    pixels: NDArray[np.uint8] | None
    highest_level: int | None


@dataclass
class Tally:
    """Images that the loop skipped, and what it left out of the others.

    Attributes:
        skipped: a line for each image that does not decode, with the reason.
        left_out: further frames and missing labels.
    """

    skipped: list[str] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)


@dataclass(frozen=True)
class Tokenizer:
    """Decode, transform and quantize the images of a reader.

    Args:
        palette: the colours; ready tokens are checked against their number.
        transform: applied to every image, except where `crops` is.
        classes: the number of classes.
        allowance: how many images may be skipped.
        total: the number of images of the whole run, which `allowance` is applied to.
        crops: applied to the images of the split "train" instead of `transform`.
        seed: of the random crops.
        strict: raise for ready tokens outside the palette instead of skipping them.
    """

    palette: Palette
    transform: Transform
    classes: int
    allowance: Allowance
    total: int
    crops: Transform | None = None
    seed: int = 0
    strict: bool = False

    def read(
        self,
        reader: Reader,
        rows: NDArray[np.int64],
        tally: Tally,
        *,
        splits: Iterable[str] = repeat(""),
        first_row: int = 0,
    ) -> Iterator[TokenizedImage]:
        """Yield the images of some ascending rows; skipped ones are added to `tally`.

        Args:
            splits: the split of each row.
            first_row: added to rows that serve as names, where several readers are numbered as one.

        Raises:
            InputError: a class number has no name, too many images do not decode, or the source has
                lost images.
        """
        count = 0
        ready = isinstance(reader, TokenRows)
        for row, split, (image, label) in zip(
            rows.tolist(), splits, reader.read(rows), strict=False
        ):
            count += 1
            prefix = f"{split} " if split else ""
            if not -1 <= label < self.classes:
                raise InputError(
                    f"{reader.name_of(row)} has the class {label}, and there are {self.classes} "
                    "(from 0)"
                )
            try:
                if ready:
                    pixels, highest_level, frames = None, None, 0
                    tokens = self._checked(image)
                else:
                    pixels, highest_level, frames = self._squares(image, split, row)
                    tokens = self.palette.transform(pixels).reshape(len(pixels), -1)
            except InputError as error:
                if ready and self.strict:
                    raise InputError(f"{reader.name_of(row)}: {error}") from None
                tally.skipped.append(f"{prefix}{reader.name_of(row)}: {error}")
                self.allowance.require_decoded(tally.skipped, self.total)
                continue
            name = name_of_image(image, first_row + row)
            if frames:
                tally.left_out.add(FRAMES, prefix + name, count=frames)
            if label < 0 and self.classes:
                tally.left_out.add(UNLABELLED, prefix + name)
            yield TokenizedImage(row, name, split, label, tokens, pixels, highest_level)
        if count < len(rows):
            raise InputError(
                f"the source lost images while it was read: {count} of {len(rows)} are there, near "
                f"{reader.name_of(0)}"
            )

    def _squares(self, image: Any, split: str, row: int) -> Squares:
        transform = self.crops if self.crops and split == "train" else self.transform
        return transform.squares_of(image, (self.seed, row))

    def _checked(self, tokens: NDArray[Any]) -> NDArray[np.uint16]:
        """Return ready tokens [n] as uint16 [1, n]."""
        low, high = tokens.min(), tokens.max()
        if low < 0 or high >= len(self.palette):
            raise InputError(f"tokens {low} to {high} in a palette of {len(self.palette)} colours")
        return tokens.astype(np.uint16)[None]


def subset_rows(count: int, limit: int | None, seed: int) -> NDArray[np.int64]:
    """Return `limit` of `count` rows, selected by seed, ascending; all of them if None."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:limit])
