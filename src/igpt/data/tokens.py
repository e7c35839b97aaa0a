"""Token data sets on disk: a manifest and memory-mapped shards that any tool can read.

dataset.json                  format, resolution, palette, class names, source, settings, shards with checksums
train-00000.tokens.npy        uint16 [N, n]: N images of n = resolution^2 tokens in raster order
train-00000.labels.npy        int32 [N]: class of each image, -1 where there is none
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from igpt.data.palette import Palette
from igpt.errors import InputError, suggest
from igpt.files import atomic_file, read_json, sha256_of, write_json

FORMAT, VERSION = "igpt-tokens", 1
MANIFEST = "dataset.json"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Shard:
    """One shard's entry in the manifest; paths are relative to the data set's folder."""

    tokens: str
    labels: str
    count: int
    bytes: dict[str, int] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)


def write_shard(folder: Path, name: str, tokens: NDArray[np.uint16], labels: NDArray[np.int32]) -> Shard:
    """Writes tokens [N, n] and labels [N] under `name`, atomically, and returns the manifest entry."""
    tokens_file, labels_file = f"{name}.tokens.npy", f"{name}.labels.npy"
    arrays: dict[str, NDArray[Any]] = {tokens_file: tokens, labels_file: labels}
    for file_name, array in arrays.items():
        with atomic_file(folder / file_name) as temporary, temporary.open("wb") as file:
            np.save(file, array)
    return Shard(
        tokens_file,
        labels_file,
        count=len(tokens),
        bytes={file_name: (folder / file_name).stat().st_size for file_name in arrays},
        sha256={file_name: sha256_of(folder / file_name) for file_name in arrays},
    )


def write_manifest(
    folder: Path,
    *,
    resolution: int,
    palette: Palette,
    class_names: list[str] | None,
    splits: Mapping[str, list[Shard]],
    source: str,
    made: Mapping[str, Any],
) -> None:
    """Writes the manifest of a folder of shards; until it is there, the folder is not a data set."""
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "version": VERSION,
            "resolution": resolution,
            "source": source,
            "class_names": class_names,
            "splits": {
                split: {"count": sum(shard.count for shard in shards), "shards": [vars(shard) for shard in shards]}
                for split, shards in splits.items()
            },
            "made": dict(made),
            "palette": {"fingerprint": palette.fingerprint, "centers": palette.centers_.tolist()},
        },
    )


class TokenSplit:
    """The images of one split: rows of tokens and their labels, memory-mapped.

    Attributes:
        labels: int32 [N], -1 where an image has none.
    """

    def __init__(self, name: str, tokens: list[NDArray[np.uint16]], labels: list[NDArray[np.int32]]) -> None:
        self.name = name
        self._tokens = tokens
        self._starts = np.cumsum([0] + [len(shard) for shard in tokens])
        self.labels = np.concatenate(labels) if labels else np.empty(0, np.int32)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, indices: ArrayLike) -> NDArray[np.uint16]:
        """Tokens of some images, in the order asked for: [M] -> uint16 [M, n]."""
        wanted = np.asarray(indices, dtype=np.int64)
        if len(self._tokens) == 1:
            return np.asarray(self._tokens[0][wanted])
        shard = np.searchsorted(self._starts, wanted, side="right") - 1
        out = np.empty((len(wanted), self._tokens[0].shape[1]), dtype=np.uint16)
        for index in np.unique(shard):
            here = shard == index
            out[here] = self._tokens[index][wanted[here] - self._starts[index]]
        return out

    def require_images(self, purpose: str) -> None:
        """Refuses an empty split.

        Raises:
            InputError: there is no image in it.
        """
        if len(self) == 0:
            raise InputError(f"{purpose} needs images, and the split {self.name!r} is empty")

    def require_labels(self, purpose: str) -> NDArray[np.int32]:
        """The labels, if every image has one.

        Raises:
            InputError: some or all are missing.
        """
        missing = int((self.labels < 0).sum())
        if missing:
            raise InputError(f"{purpose} needs labels, and {missing} of {len(self)} images of {self.name!r} have none")
        return self.labels


class TokenDataset(Mapping[str, TokenSplit]):
    """A token data set folder: `dataset["train"].rows([0, 1])`.

    Opening checks the manifest and the size of every shard, and reads no tokens; `verify` reads and checks all.

    Attributes:
        resolution: model resolution in pixels; n = resolution^2 places.
        palette: the palette the tokens index.
        class_names: names of the labels, or None.
        manifest: all of `dataset.json`.

    Raises:
        InputError: no data set there, one of a later version, or a missing or cut-off shard.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_json(self.path / MANIFEST, "token data set")
        if self.manifest.get("format") != FORMAT:
            raise InputError(f"{self.path} is not a token data set; `igpt prepare` makes one")
        if self.manifest.get("version") != VERSION:
            raise InputError(
                f"{self.path} has format version {self.manifest.get('version')}; this igpt reads {VERSION}"
            )
        self.resolution: int = self.manifest["resolution"]
        self.class_names: list[str] | None = self.manifest["class_names"]
        for split in self.manifest["splits"].values():
            for shard in split["shards"]:
                self._check_sizes(shard)

    @cached_property
    def palette(self) -> Palette:
        """The palette the tokens index."""
        palette = Palette.from_centers(self.manifest["palette"]["centers"])
        if palette.fingerprint != self.manifest["palette"]["fingerprint"]:
            raise InputError(f"{self.path / MANIFEST}: the palette does not match its fingerprint; was it edited?")
        return palette

    def _check_sizes(self, shard: Mapping[str, Any]) -> None:
        for name, size in shard["bytes"].items():
            file = self.path / name
            if not file.exists():
                raise InputError(f"{file} is missing; prepare the data set anew")
            if file.stat().st_size != size:
                raise InputError(
                    f"{file} is damaged: {file.stat().st_size} bytes, {size} were written; prepare the data set anew"
                )

    def __getitem__(self, split: str) -> TokenSplit:
        try:
            shards = self.manifest["splits"][split]["shards"]
        except KeyError:
            raise InputError(f"{self.path} has no split {split!r}; {suggest(split, self.manifest['splits'])}") from None
        mapped = [np.load(self.path / shard["tokens"], mmap_mode="r") for shard in shards]
        return TokenSplit(split, mapped, [np.load(self.path / shard["labels"]) for shard in shards])

    def __iter__(self) -> Any:
        return iter(self.manifest["splits"])

    def __len__(self) -> int:
        return len(self.manifest["splits"])

    def __contains__(self, split: object) -> bool:  # Mapping's own expects a KeyError from __getitem__
        return split in self.manifest["splits"]

    def verify(self) -> None:
        """Reads every shard and compares its checksum, and the palette's.

        Raises:
            InputError: a shard or the palette has changed; the file is named.
        """
        _ = self.palette
        for split in self.manifest["splits"].values():
            for shard in split["shards"]:
                for name, checksum in shard["sha256"].items():
                    if sha256_of(self.path / name) != checksum:
                        raise InputError(f"{self.path / name} has changed since it was written; prepare it anew")
