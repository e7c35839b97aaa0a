"""Images that a model is to judge or describe: a split of a token data set, or any images, tokenised in memory.

N images, n places.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from igpt.data.images.palette import Palette
from igpt.data.images.transform import Transform
from igpt.data.left_out import BAD, FRAMES, UNLABELLED, LeftOut, left_out_of
from igpt.data.sources.archives import TokenRows, token_palette
from igpt.data.sources.catalogue import ColumnConfig, open_whole
from igpt.data.sources.readers import Reader, name_of_image
from igpt.data.tokens.dataset import MANIFEST, TokenDataset, TokenSplit
from igpt.errors import InputError

Progress = Callable[[int, int], None]  # (images done, images in all)


class GatherConfig(ColumnConfig):
    """Which images of a source are taken."""

    split: str | None = Field(
        None, description="split to take; by default test, or all images of a source without it"
    )
    limit: int | None = Field(None, ge=1, description="at most so many images, drawn by seed")
    seed: int = Field(0, ge=0, lt=2**63, description="of the images drawn")


@dataclass(frozen=True)
class Gathered:
    """Images as tokens, and where they come from.

    Attributes:
        source: as it was given.
        split: which of its splits; "all" for all images of a source without a test split.
        tokens: with labels, -1 where an image has none.
        rows: where each image stands in the split, [N].
        names: of the images, in the same order; None where only tokens are known.
        class_names: of the labels; None without labels.
        palette_error: `mse` a channel in 8-bit levels and `psnr_db` (None without error) that the
            palette makes, and `measured_on`: "these images", or "training images" of a token data
            set. None where it is not known.
        skipped: images that do not decode, with the reasons.
        left_out: everything that the source has and that is not among the images.
        notes: what a person should know of the source, a line each.
        prepared: whether the images are of a token data set: then `skipped`, `left_out` and `notes`
            are those of when it was prepared, and concern all of its splits.
    """

    source: str
    split: str
    tokens: TokenSplit
    rows: NDArray[np.int64]
    names: list[str] | None
    class_names: list[str] | None
    palette_error: dict[str, Any] | None
    skipped: list[str]
    left_out: LeftOut = field(default_factory=LeftOut)
    notes: list[str] = field(default_factory=list)
    prepared: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def name_of(self, position: int) -> str:
        """How a person finds an image: its file's name, or its row."""
        return self.names[position] if self.names else f"row {self.rows[position]}"

    def class_of(self, label: int) -> str | None:
        """The name of a class; None of an image without."""
        return None if self.class_names is None or label < 0 else self.class_names[label]

    def to_json(self) -> dict[str, Any]:
        """What results are written with."""
        return {
            "source": self.source,
            "split": self.split,
            "images": len(self),
            "palette_error": self.palette_error,
            "skipped": self.skipped,
            "left_out": self.left_out.to_json(),
            "left_out_of": "the token data set, all splits" if self.prepared else "these images",
            "warnings": self.notes,
        }


def gather_tokens(data: TokenDataset, config: GatherConfig) -> Gathered:
    """Images of a token data set; they stay on the disk, unless some are drawn.

    Raises:
        InputError: no such split, no images in it, or settings that only images have.
    """
    if config.image_column or config.label_column or config.stream:
        raise InputError(
            f"{data.path} holds tokens: --image-column, --label-column and --stream are for images"
        )
    split = data[config.split or "test"]
    split.require_images("this")
    rows = _drawn(len(split), config)
    if len(rows) < len(split):
        split = TokenSplit(split.name, [split.rows(rows)], [split.labels_of(rows)])
    made = data.manifest["made"]
    error = made.get("palette_error") or None
    if error:
        error = {"mse": error["mse"], "psnr_db": error["psnr_db"], "measured_on": "training images"}
    return Gathered(
        str(data.path),
        split.name,
        split,
        rows,
        None,
        data.class_names,
        error,
        made.get("skipped", []),
        left_out_of(made, str(data.path / MANIFEST)),
        made.get("warnings", []),
        prepared=True,
    )


def gather_images(
    source: str,
    palette: Palette,
    resolution: int,
    config: GatherConfig,
    progress: Progress | None = None,
) -> Gathered:
    """Images of any source as tokens in memory, 2 n bytes each; nothing is held out, and nothing is stored.

    Args:
        source: see `open_source`. OpenAI's arrays hold tokens already: they are taken if they are
            of this palette.
        palette, resolution: of the model.

    Raises:
        InputError: what the source has wrong, or too many of its images that do not decode.
    """
    opened = open_whole(source, config, config.split)
    readers, class_names, left_out = opened.readers, opened.class_names, opened.left_out
    allowance = opened.allowance(config.max_bad)
    allowance.require(source, left_out)
    ready = isinstance(readers[0], TokenRows)
    if ready:
        _require_fit(source, readers[0], palette, resolution)
    wanted = _drawn(sum(map(len, readers)), config)
    transform = Transform(resolution)
    tokens = np.empty((len(wanted), resolution**2), dtype=np.uint16)
    rows, labels, names, skipped = list[int](), list[int](), list[str](), list[str]()
    first, squares = 0, 0
    for reader in readers:
        inside = wanted[(wanted >= first) & (wanted < first + len(reader))]
        for row, (image, label) in zip(inside.tolist(), reader.read(inside - first), strict=False):
            if not -1 <= label < (known := len(class_names or ())):
                raise InputError(
                    f"{reader.name_of(row - first)} has the class {label}, and there are {known} (from 0)"
                )
            if ready and not 0 <= image.min() <= image.max() < len(palette):
                found = f"{reader.name_of(row - first)} holds tokens {image.min()} to {image.max()}"
                raise InputError(f"{found}, and the palette has {len(palette)} colours (from 0)")
            try:
                if ready:
                    tokens[len(rows)], lost, further = image, 0, 0
                else:
                    pixels, _, further = transform.squares_of(image)
                    tokens[len(rows)], lost = _quantised(pixels[0], palette)
            except InputError as error:
                skipped.append(f"{reader.name_of(row - first)}: {error}")
                allowance.require_decoded(skipped, len(wanted))
                continue
            squares += lost
            rows.append(row)
            labels.append(label)
            names.append(name_of_image(image, row))
            if further:
                left_out.add(FRAMES, names[-1], count=further)
            if label < 0 and class_names:
                left_out.add(UNLABELLED, names[-1])
            if progress:
                progress(len(rows) + len(skipped), len(wanted))
        first += len(reader)
    if len(rows) + len(skipped) < len(wanted):
        raise InputError(f"the images of {source} have become fewer while they were read")
    if not rows:
        raise InputError(f"no image of {source} decodes; the first: {skipped[0]}")
    if skipped:
        left_out.add(BAD, skipped[0], count=len(skipped), possible_images=True)
    split = TokenSplit(opened.split, [tokens[: len(rows)]], [np.array(labels, dtype=np.int32)])
    return Gathered(
        source,
        opened.split,
        split,
        np.array(rows, dtype=np.int64),
        names,
        class_names,
        None
        if ready
        else {**_error(squares / (3 * resolution**2 * len(rows))), "measured_on": "these images"},
        skipped,
        left_out,
        opened.notes,
    )


def _require_fit(source: str, reader: Reader, palette: Palette, resolution: int) -> None:
    """Refuses ready tokens that do not mean to this model what they say."""
    assert isinstance(reader, TokenRows)
    if reader.resolution != resolution:
        raise InputError(
            f"{source} holds tokens of {reader.resolution} px, and the model's are of {resolution} px"
        )
    path = token_palette(source)
    if path is None:
        raise InputError(
            f"{source} holds tokens; their palette, kmeans_centers.npy, is to lie beside them"
        )
    theirs = Palette.load(path)
    if theirs.fingerprint != palette.fingerprint:
        raise InputError(
            f"the palettes differ: {path} has {theirs.fingerprint[:12]} ({len(theirs)} colours), the model has "
            f"{palette.fingerprint[:12]} ({len(palette)} colours); tokens of one mean nothing in the other"
        )


def _quantised(square: NDArray[np.uint8], palette: Palette) -> tuple[NDArray[np.uint16], int]:
    """The tokens of an image [R, R, 3], [n], and the sum of squares that the palette loses."""
    found = palette.transform(square)
    return found.reshape(-1), int(
        ((square.astype(np.int64) - palette.inverse_transform(found)) ** 2).sum()
    )


def _drawn(count: int, config: GatherConfig) -> NDArray[np.int64]:
    if config.limit is None or config.limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(config.seed).permutation(count)[: config.limit])


def _error(mse: float) -> dict[str, float | None]:
    return {"mse": mse, "psnr_db": float(10 * np.log10(255**2 / mse)) if mse else None}
