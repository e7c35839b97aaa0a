"""Token data sets on disk: a manifest and memory-mapped shards that any tool can read.

Shapes: N images, n = resolution^2 tokens of an image. `igpt.data.tokens.manifest` has the format.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from igpt.data.images.palette import Palette
from igpt.data.left_out import listed
from igpt.data.tokens.cache import local_copy
from igpt.data.tokens.manifest import (
    MANIFEST,
    NAMES_SHOWN,
    Shard,
    require_counts,
    require_files,
    require_manifest,
)
from igpt.data.tokens.shards import Rows, StoredArray, ValueRange, all_rows, take_rows
from igpt.errors import InputError, suggest
from igpt.files import read_json, sha256_of
from igpt.remote import url_of


class TokenSplit:
    """The images of one split: tokens and labels, in memory or in files mapped while they are read.

    Args:
        tokens: shards, uint16 [N_i, n].
        labels: of the same shards, int32 [N_i]; -1 where an image has none.
    """

    def __init__(self, name: str, tokens: Sequence[Rows], labels: Sequence[Rows]) -> None:
        self.name = name
        self._tokens, self._labels = tokens, labels
        self._starts = np.cumsum([0, *map(len, tokens)])

    @classmethod
    def joined(cls, name: str, splits: Sequence["TokenSplit"]) -> Self:
        """Return all images of several splits, one split after the other; nothing is copied."""
        tokens = [shard for split in splits for shard in split._tokens]
        return cls(name, tokens, [shard for split in splits for shard in split._labels])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> tuple[NDArray[np.int64], int]:
        """Return the tokens [n] and the label of an image, -1 for none, as PyTorch's loaders do.

        Raises:
            IndexError: there is no such image.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no image {index}; {self.name!r} has {len(self)}")
        row = [index % len(self)]
        return self.rows(row)[0].astype(np.int64), int(self.labels_of(row)[0])

    def __repr__(self) -> str:
        pixels = self._tokens[0].shape[1] if self._tokens else 0
        return f"TokenSplit({self.name!r}, {len(self)} images of {pixels} pixels)"

    @property
    def nbytes(self) -> int:
        """The size of all tokens in bytes."""
        return sum(math.prod(shard.shape) * shard.dtype.itemsize for shard in self._tokens)

    def rows(self, indices: ArrayLike) -> NDArray[np.uint16]:
        """Return a copy of the tokens of some images, in the given order: [M] -> uint16 [M, n]."""
        return take_rows(self._tokens, self._starts, np.asarray(indices, dtype=np.int64))

    def labels_of(self, indices: ArrayLike) -> NDArray[np.int32]:
        """Return the labels of some images, in the given order: [M] -> int32 [M], -1 for none."""
        return take_rows(self._labels, self._starts, np.asarray(indices, dtype=np.int64))

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """All labels, int32 [N]: read on first use, and kept."""
        shards = [all_rows(shard).copy() for shard in self._labels if len(shard)]
        return np.concatenate([np.empty(0, np.int32), *shards])

    def subset(self, indices: ArrayLike) -> Self:
        """Return some images, in the given order, in memory."""
        return type(self)(self.name, [self.rows(indices)], [self.labels_of(indices)])

    def spread(self, count: int | None) -> Self:
        """Return at most `count` images, spread evenly over all; all of them if None."""
        if count is None or count >= len(self):
            return self
        return self.subset(np.arange(count) * len(self) // count)

    def require_images(self, purpose: str) -> None:
        """Raise an `InputError` if the split is empty."""
        if len(self) == 0:
            raise InputError(f"{purpose} needs images, and the split {self.name!r} is empty")

    def require_labels(self, purpose: str) -> None:
        """Raise an `InputError` with the number of images without a label, if there are any."""
        missing = sum(int((all_rows(shard) < 0).sum()) for shard in self._labels if len(shard))
        if missing:
            raise InputError(
                f"{purpose} needs labels, and {missing} of {len(self)} images of {self.name!r} "
                "have none"
            )


class TokenDataset(Mapping[str, TokenSplit], PathLike[str]):
    """A token data set folder, or one behind a URL: `dataset["train"].rows([0, 1])`.

    It is accepted wherever the path of a token data set is.

    Opening checks the manifest, the size of every shard and the header of the first of each split.
    It reads no tokens; `verify` reads and checks all. Rows are checked when they are read: tokens
    outside the palette and labels without a class raise an error.

    A data set behind a URL (`s3://bucket/tokens`) is copied to a cache of limited size first.

    Attributes:
        path: its folder; of a data set behind a URL, the copy.
        resolution: model resolution in pixels; n = resolution^2 positions.
        palette: the palette the tokens index.
        class_names: names of the labels, or None.
        manifest: all of `dataset.json`.

    Raises:
        InputError: there is no data set or one of a later version, the manifest is malformed, or a
            shard is missing or cut off.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        url = url_of(path)
        self.path = local_copy(url.rstrip("/")) if url else Path(path)
        self.manifest = read_json(self.path / MANIFEST, "token data set")
        require_manifest(self.manifest, self.path, self.path / MANIFEST)
        self.resolution: int = self.manifest["resolution"]
        self.class_names: list[str] | None = self.manifest["class_names"]
        require_files(self.path, self._shards)
        for split in self:
            for stored in (self._tokens_of(split), self._labels_of(split)):
                if stored:
                    stored[0].require_header()

    @cached_property
    def palette(self) -> Palette:
        """The palette the tokens index."""
        return Palette.load(self.path / MANIFEST)

    def _shards_of(self, split: str) -> list[Shard]:
        return [Shard(**shard) for shard in self.manifest["splits"][split]["shards"]]

    @property
    def _shards(self) -> list[Shard]:
        return [shard for split in self for shard in self._shards_of(split)]

    def _tokens_of(self, split: str) -> list[StoredArray]:
        colors = len(self.manifest["palette"]["centers"])
        allowed = ValueRange("token", 0, colors - 1, f"the palette has {colors} colours")
        dtype, n = np.dtype(np.uint16), self.resolution**2
        return [
            StoredArray(self.path / shard.tokens, dtype, (shard.count, n), allowed)
            for shard in self._shards_of(split)
        ]

    def _labels_of(self, split: str) -> list[StoredArray]:
        classes = len(self.class_names or ())
        allowed = ValueRange("label", -1, classes - 1, f"there are {classes} classes")
        dtype = np.dtype(np.int32)
        return [
            StoredArray(self.path / shard.labels, dtype, (shard.count,), allowed)
            for shard in self._shards_of(split)
        ]

    def __getitem__(self, split: str) -> TokenSplit:
        if split not in self:
            raise InputError(
                f"{self.path} has no split {split!r}; {suggest(split, self.manifest['splits'])}"
            )
        if not self.manifest["splits"][split]["shards"]:  # none of its images decoded
            return TokenSplit(
                split, [np.empty((0, self.resolution**2), np.uint16)], [np.empty(0, np.int32)]
            )
        return TokenSplit(split, self._tokens_of(split), self._labels_of(split))

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest["splits"])

    def __len__(self) -> int:
        return len(self.manifest["splits"])

    # Mapping's own expects a KeyError from __getitem__.
    def __contains__(self, split: object) -> bool:
        return split in self.manifest["splits"]

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self[name])} {name}" for name in self)
        return f"TokenDataset({str(self.path)!r}, {self.resolution} px: {counts})"

    def verify(self) -> None:
        """Read every shard and check its checksum, header and count, and the palette's fingerprint.

        Raises:
            InputError: shards or the palette have changed, or images are missing; the message has
                the names of the files or of the split.
        """
        _ = self.palette
        shards = self._shards
        checksums = {name: checksum for shard in shards for name, checksum in shard.sha256.items()}
        unchecked = [
            name
            for shard in shards
            for name in (shard.tokens, shard.labels)
            if name not in checksums
        ]
        if unchecked:
            raise InputError(
                f"{self.path / MANIFEST} has no checksum of {listed(unchecked, NAMES_SHOWN)}"
            )
        require_files(self.path, shards)
        changed = [
            name for name, checksum in checksums.items() if sha256_of(self.path / name) != checksum
        ]
        if changed:
            raise InputError(
                f"{len(changed)} of {len(checksums)} files of {self.path} have changed since they "
                f"were written ({', '.join(changed)}); prepare the data set again"
            )
        for split in self:
            for stored in (*self._tokens_of(split), *self._labels_of(split)):
                stored.require_header()
        made = self.manifest["made"]
        counts = {split: entry["count"] for split, entry in self.manifest["splits"].items()}
        views = made.get("config", {}).get("views", 0)
        require_counts(
            counts,
            made.get("images", {}),
            made.get("skipped", []),
            views,
            str(self.path / MANIFEST),
        )
