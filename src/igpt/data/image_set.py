"""Images to evaluate a model on: a split of a token data set, or any images, tokenised in memory.

Shapes: N images, n tokens of an image.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from igpt.data.images.palette import Palette, psnr_db, squared_error
from igpt.data.images.transform import Transform
from igpt.data.left_out import BAD, LeftOut, left_out_of
from igpt.data.sources.archives import TokenRows, token_palette
from igpt.data.sources.catalogue import ColumnConfig, open_whole
from igpt.data.tokenizer import Tally, Tokenizer, subset_rows
from igpt.data.tokens.dataset import TokenDataset, TokenSplit
from igpt.data.tokens.manifest import MANIFEST
from igpt.errors import InputError

Progress = Callable[[int, int], None]  # (images done, images in all)


class ImageSetConfig(ColumnConfig):
    """Settings that select images of a source."""

    split: str | None = Field(
        None, description="split to use; by default test, or all images of a source without it"
    )
    limit: int | None = Field(None, ge=1, description="use a random subset of at most this size")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the random subset")


@dataclass(frozen=True)
class ImageSet:
    """Images as tokens, and where they come from.

    Attributes:
        source: as the user gave it.
        split: the split of the source; "all" for all images of a source without a test split.
        tokens: with labels, -1 where an image has none.
        rows: the row of each image in the split, [N].
        names: of the images, in the same order; None for a token data set.
        class_names: of the labels; None without labels.
        palette_error: `mse` per channel in 8-bit levels and `psnr_db` (None without error) of the
            palette, and `measured_on`: "these images", or "training images" of a token data set.
            None where it is not known.
        skipped: images that do not decode, with the reasons.
        left_out: everything in the source that is not among the images.
        notes: warnings about the source, one line each.
        prepared: whether the images are of a token data set: then `skipped`, `left_out` and `notes`
            are those of its preparation, and concern all of its splits.
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

    def name_of(self, index: int) -> str:
        """Return the name of an image's file, or its row."""
        return self.names[index] if self.names else f"row {self.rows[index]}"

    def class_of(self, label: int) -> str | None:
        """Return the name of a class; None for the label -1."""
        return None if self.class_names is None or label < 0 else self.class_names[label]

    def to_json(self) -> dict[str, Any]:
        """Return the description of the images that is stored with results."""
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


def stored_image_set(data: TokenDataset, config: ImageSetConfig) -> ImageSet:
    """Return images of a token data set; they stay on disk unless `config` asks for a subset.

    Raises:
        InputError: there is no such split, it is empty, or a setting applies to images only.
    """
    if config.image_column or config.label_column or config.stream:
        raise InputError(
            f"{data.path} holds tokens: --image-column, --label-column and --stream are for images"
        )
    split = data[config.split or "test"]
    split.require_images("this")
    rows = subset_rows(len(split), config.limit, config.seed)
    if len(rows) < len(split):
        split = split.subset(rows)
    made = data.manifest["made"]
    error = made.get("palette_error") or None
    if error:
        error = {"mse": error["mse"], "psnr_db": error["psnr_db"], "measured_on": "training images"}
    return ImageSet(
        source=str(data.path),
        split=split.name,
        tokens=split,
        rows=rows,
        names=None,
        class_names=data.class_names,
        palette_error=error,
        skipped=made.get("skipped", []),
        left_out=left_out_of(made, str(data.path / MANIFEST)),
        notes=made.get("warnings", []),
        prepared=True,
    )


def tokenized_image_set(
    source: str,
    palette: Palette,
    resolution: int,
    config: ImageSetConfig,
    progress: Progress | None = None,
) -> ImageSet:
    """Tokenise images of any source in memory, 2 n bytes each; nothing is held out or stored.

    Args:
        source: see `open_source`. OpenAI's arrays hold tokens already, which must be of this
            palette.
        palette, resolution: of the model.

    Raises:
        InputError: the source cannot be used, or too many of its images do not decode.
    """
    opened = open_whole(source, config, config.split)
    allowance = opened.allowance(config.max_bad)
    allowance.require(source, opened.left_out)
    if isinstance(opened.readers[0], TokenRows):
        _require_fit(source, opened.readers[0], palette, resolution)

    wanted = subset_rows(sum(map(len, opened.readers)), config.limit, config.seed)
    classes = len(opened.class_names or ())
    tokenizer = Tokenizer(
        palette,
        Transform(resolution, alpha=palette.transparent),
        classes,
        allowance,
        len(wanted),
        strict=True,
    )
    tally = Tally(left_out=opened.left_out)
    tokens = np.empty((len(wanted), resolution**2), dtype=np.uint16)
    rows, labels, names = list[int](), list[int](), list[str]()
    first = 0
    error, values = 0, 0  # squared, and the number of colour values of opaque pixels
    if progress:
        progress(0, len(wanted))
    for reader in opened.readers:
        inside = wanted[(wanted >= first) & (wanted < first + len(reader))] - first
        for image in tokenizer.read(reader, inside, tally, first_row=first):
            tokens[len(rows)] = image.tokens[0]
            rows.append(first + image.row)
            labels.append(image.label)
            names.append(image.name)
            if image.pixels is not None:
                found = image.tokens.reshape(image.pixels.shape[:-1])
                more = squared_error(palette, image.pixels, found)
                error, values = error + more[0], values + more[1]
            if progress:
                progress(len(rows) + len(tally.skipped), len(wanted))
        first += len(reader)
    if not rows:
        raise InputError(f"no image of {source} decodes; the first: {tally.skipped[0]}")
    if tally.skipped:
        tally.left_out.add(BAD, tally.skipped[0], count=len(tally.skipped), possible_images=True)
    palette_error = None
    if values:
        mse = error / values
        palette_error = {"mse": mse, "psnr_db": psnr_db(mse), "measured_on": "these images"}
    return ImageSet(
        source=source,
        split=opened.split,
        tokens=TokenSplit(opened.split, [tokens[: len(rows)]], [np.array(labels, dtype=np.int32)]),
        rows=np.array(rows, dtype=np.int64),
        names=names,
        class_names=opened.class_names,
        palette_error=palette_error,
        skipped=tally.skipped,
        left_out=tally.left_out,
        notes=opened.notes,
    )


def _require_fit(source: str, reader: TokenRows, palette: Palette, resolution: int) -> None:
    """Raise if ready tokens have another resolution or another palette than the model."""
    if reader.resolution != resolution:
        raise InputError(
            f"{source} holds tokens of {reader.resolution} px, and the model's are of "
            f"{resolution} px"
        )
    path = token_palette(source)
    if path is None:
        raise InputError(
            f"{source} holds tokens without their palette; put kmeans_centers.npy next to them"
        )
    Palette.load(path).require_same(palette, str(path), "the model")
