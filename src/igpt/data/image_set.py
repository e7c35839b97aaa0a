"""Images to evaluate a model on: a split of a token data set, or any images, tokenised in memory.

Shapes: N images, n tokens of an image.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from igpt.data.images.palette import Palette, psnr_db, squared_error
from igpt.data.images.transform import Transform
from igpt.data.left_out import BAD, LeftOut, left_out_of
from igpt.data.sources.archives import TokenRows, token_palette
from igpt.data.sources.catalogue import ColumnConfig, open_whole
from igpt.data.sources.readers import Reader
from igpt.data.tokenizer import Tally, Tokenizer, subset_rows
from igpt.data.tokens.dataset import TokenDataset, TokenSplit
from igpt.data.tokens.manifest import MANIFEST
from igpt.errors import InputError
from igpt.files import sha256_of

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


@dataclass(frozen=True)
class Origin:
    """What is known of images before they are read; see `ImageSet`.

    Attributes:
        palette_error, skipped, left_out: of a token data set, those of its preparation; of other
            images, only what is left out before decoding.
    """

    source: str
    split: str
    class_names: list[str] | None
    palette_error: dict[str, Any] | None
    skipped: list[str]
    left_out: LeftOut
    notes: list[str]
    prepared: bool

    def image_set(self, ranges: Sequence["ReadImages"]) -> ImageSet:
        """Return the images of consecutive ranges together.

        Raises:
            InputError: no image decodes.
        """
        skipped = [line for one in ranges for line in one.skipped]
        if not sum(len(one.rows) for one in ranges):
            raise InputError(f"no image of {self.source} decodes; the first: {skipped[0]}")
        left_out = LeftOut(dict(self.left_out.entries))
        for one in ranges:
            left_out.update(one.left_out)
        if skipped:
            left_out.add(BAD, skipped[0], count=len(skipped), possible_images=True)
        palette_error = self.palette_error
        error, values = np.sum([one.squared_error for one in ranges], axis=0).tolist()
        if values:
            mse = error / values
            palette_error = {"mse": mse, "psnr_db": psnr_db(mse), "measured_on": "these images"}
        names = [name for one in ranges for name in one.names or ()]
        return ImageSet(
            source=self.source,
            split=self.split,
            tokens=TokenSplit.joined(self.split, [one.tokens for one in ranges]),
            rows=np.concatenate([one.rows for one in ranges]),
            names=names or None,
            class_names=self.class_names,
            palette_error=palette_error,
            skipped=[*self.skipped, *skipped],
            left_out=left_out,
            notes=self.notes,
            prepared=self.prepared,
        )


@dataclass(frozen=True)
class ReadImages:
    """Images of a range of a selection that decode.

    Attributes:
        tokens: with labels, -1 where an image has none.
        positions: of each image in the selection, [N].
        rows: of each image in the split, [N].
        names: of the images; None for a token data set.
        skipped: images that do not decode, with the reasons.
        left_out: what was left out of the images when they were read.
        squared_error: of the palette on the images: the sum, and the number of colour values.
    """

    tokens: TokenSplit
    positions: NDArray[np.int64]
    rows: NDArray[np.int64]
    names: list[str] | None = None
    skipped: list[str] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    squared_error: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Selection(ABC):
    """Images that settings select of a source, to be read range by range.

    Attributes:
        rows: of the images in the split, ascending.
    """

    origin: Origin
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    @abstractmethod
    def read(
        self,
        first: int,
        last: int,
        *,
        total: int | None = None,
        progress: Progress | None = None,
    ) -> ReadImages:
        """Return the images at the positions from `first` to `last` - 1.

        Args:
            total: number of images that the share of undecodable ones is counted in; those of the
                range by default.
            progress: called with (images done, images of the range) while images are tokenised.

        Raises:
            InputError: too many images do not decode.
        """

    @abstractmethod
    def require_decoded(self, skipped: Sequence[str]) -> None:
        """Raise an `InputError` if too many of all images do not decode."""

    @abstractmethod
    def fingerprints(self) -> list[str]:
        """Return hashes that are equal on all machines that have the same source."""

    def image_set(self, progress: Progress | None = None) -> ImageSet:
        """Read all images.

        Raises:
            InputError: see `read`; or no image decodes.
        """
        return self.origin.image_set([self.read(0, len(self), progress=progress)])


@dataclass(frozen=True)
class _StoredSelection(Selection):
    data: TokenDataset
    split: TokenSplit

    def read(
        self,
        first: int,
        last: int,
        *,
        total: int | None = None,
        progress: Progress | None = None,
    ) -> ReadImages:
        rows = self.rows[first:last]
        tokens = self.split if len(rows) == len(self.split) else self.split.subset(rows)
        return ReadImages(tokens, np.arange(first, first + len(rows)), rows)

    def require_decoded(self, skipped: Sequence[str]) -> None:
        assert not skipped

    def fingerprints(self) -> list[str]:
        return [sha256_of(self.data.path / MANIFEST)]


def stored_images(data: TokenDataset, config: ImageSetConfig) -> Selection:
    """Select images of a token data set; they stay on disk unless `config` asks for a subset.

    Raises:
        InputError: there is no such split, it is empty, or a setting applies to images only.
    """
    if config.image_column or config.label_column or config.stream:
        raise InputError(
            f"{data.path} holds tokens: --image-column, --label-column and --stream are for images"
        )
    split = data[config.split or "test"]
    split.require_images("this")
    made = data.manifest["made"]
    error = made.get("palette_error") or None
    if error:
        error = {"mse": error["mse"], "psnr_db": error["psnr_db"], "measured_on": "training images"}
    origin = Origin(
        source=str(data.path),
        split=split.name,
        class_names=data.class_names,
        palette_error=error,
        skipped=made.get("skipped", []),
        left_out=left_out_of(made, str(data.path / MANIFEST)),
        notes=made.get("warnings", []),
        prepared=True,
    )
    rows = subset_rows(len(split), config.limit, config.seed)
    return _StoredSelection(origin, rows, data, split)


@dataclass(frozen=True)
class _SourceSelection(Selection):
    readers: list[Reader]
    tokenizer: Tokenizer

    def read(
        self,
        first: int,
        last: int,
        *,
        total: int | None = None,
        progress: Progress | None = None,
    ) -> ReadImages:
        wanted = self.rows[first:last]
        tokenizer = replace(self.tokenizer, total=len(wanted) if total is None else total)
        tokens = np.empty((len(wanted), tokenizer.transform.size**2), dtype=np.uint16)
        tally = Tally()
        rows, labels, names = list[int](), list[int](), list[str]()
        error, values = 0, 0
        if progress:
            progress(0, len(wanted))
        start = 0  # row of the reader's first image
        for reader in self.readers:
            inside = wanted[(wanted >= start) & (wanted < start + len(reader))] - start
            for image in tokenizer.read(reader, inside, tally, first_row=start):
                tokens[len(rows)] = image.tokens[0]
                rows.append(start + image.row)
                labels.append(image.label)
                names.append(image.name)
                if image.pixels is not None:
                    found = image.tokens.reshape(image.pixels.shape[:-1])
                    more = squared_error(tokenizer.palette, image.pixels, found)
                    error, values = error + more[0], values + more[1]
                if progress:
                    progress(len(rows) + len(tally.skipped), len(wanted))
            start += len(reader)
        read = np.array(rows, dtype=np.int64)
        return ReadImages(
            TokenSplit(
                self.origin.split, [tokens[: len(rows)]], [np.array(labels, dtype=np.int32)]
            ),
            first + np.searchsorted(wanted, read),
            read,
            names,
            tally.skipped,
            tally.left_out,
            (error, values),
        )

    def require_decoded(self, skipped: Sequence[str]) -> None:
        self.tokenizer.allowance.require_decoded(skipped, len(self))

    def fingerprints(self) -> list[str]:
        return [reader.fingerprint() for reader in self.readers]


def source_images(
    source: str, palette: Palette, resolution: int, config: ImageSetConfig
) -> Selection:
    """Select images of any source, to be tokenised in memory, 2 n bytes each; none is held out.

    Args:
        source: see `open_source`. OpenAI's arrays hold tokens already, which must be of this
            palette.
        palette, resolution: of the model.

    Raises:
        InputError: the source cannot be used.
    """
    opened = open_whole(source, config, config.split)
    allowance = opened.allowance(config.max_bad)
    allowance.require(source, opened.left_out)
    if isinstance(opened.readers[0], TokenRows):
        _require_fit(source, opened.readers[0], palette, resolution)
    rows = subset_rows(sum(map(len, opened.readers)), config.limit, config.seed)
    origin = Origin(
        source=source,
        split=opened.split,
        class_names=opened.class_names,
        palette_error=None,
        skipped=[],
        left_out=opened.left_out,
        notes=opened.notes,
        prepared=False,
    )
    tokenizer = Tokenizer(
        palette,
        Transform(resolution, alpha=palette.transparent),
        len(opened.class_names or ()),
        allowance,
        len(rows),
        strict=True,
    )
    return _SourceSelection(origin, rows, opened.readers, tokenizer)


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
