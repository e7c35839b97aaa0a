"""The manifest of a token data set and the writing of its shards.

dataset.json               format, resolution, palette, class names, source, settings, and the
                           shards with their checksums
train-00000.tokens.npy     uint16 [N, n]: N images of n = resolution^2 tokens in raster order
train-00000.labels.npy     int32 [N]: class of each image, -1 where there is none
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, model_validator

from igpt.data.images.palette import Palette, StoredPalette
from igpt.data.left_out import listed
from igpt.errors import InputError
from igpt.files import (
    Stored,
    atomic_file,
    require_regular,
    require_schema,
    sha256_of,
    write_json,
)

FORMAT, VERSION = "igpt-tokens", 1
# With a transparent entry in the palette, so that versions of igpt without it refuse the data set.
VERSION_TRANSPARENT = 2
MANIFEST = "dataset.json"
SPLITS = ("train", "validation", "test")
NAMES_SHOWN = 5  # of files, in a message


def _plain_name(name: str) -> str:
    if name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise ValueError("the plain name of a file in this folder is needed")
    return name


FileName = Annotated[str, Field(max_length=255), AfterValidator(_plain_name)]
Count = Annotated[int, Field(ge=0, lt=2**48)]


def _without_duplicates(names: list[str]) -> list[str]:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} is there more than once")
    return names


ClassNames = Annotated[list[str], AfterValidator(_without_duplicates)] | None


class Shard(Stored):
    """The entry of a shard in the manifest, with the names of its files in the folder."""

    tokens: FileName
    labels: FileName
    count: Count
    bytes: dict[FileName, Count] = Field(default_factory=dict)
    sha256: dict[FileName, str] = Field(default_factory=dict)


class _Split(Stored):
    count: Count
    shards: list[Shard]

    @model_validator(mode="after")
    def _sum(self) -> Self:
        total = sum(shard.count for shard in self.shards)
        if self.count != total:
            raise ValueError(f"the count is {self.count}, and that of its shards {total}")
        return self


class _PaletteError(Stored):
    """The error of the palette; empty for ready tokens."""

    mse: float | None = None
    psnr_db: float | None = None

    @model_validator(mode="after")
    def _all_or_nothing(self) -> Self:
        missing = {"mse", "psnr_db"} - self.model_fields_set
        if self.mse is None:
            missing.add("mse")
        if missing and (self.model_fields_set or self.model_extra):
            raise ValueError(f"{' and '.join(sorted(missing))} is missing")
        return self


class _MadeConfig(Stored):
    views: int = Field(0, ge=0)


class _Made(Stored):
    """The origin of a data set; every entry is optional for other programs."""

    config: _MadeConfig = Field(default_factory=lambda: _MadeConfig())
    images: dict[str, Count] = Field(default_factory=dict)
    skipped: list[str] = Field(default_factory=list)
    palette_error: _PaletteError = Field(default_factory=_PaletteError)
    left_out: dict[str, Any] = Field(default_factory=dict)  # see `igpt.data.left_out`
    warnings: list[str] = Field(default_factory=list)


class _ManifestPalette(StoredPalette):
    fingerprint: str


class Manifest(Stored):
    """Schema of `dataset.json`."""

    resolution: int = Field(ge=1, lt=2**16)
    source: str
    class_names: ClassNames
    splits: dict[str, _Split]
    made: _Made
    palette: _ManifestPalette

    @model_validator(mode="after")
    def _no_file_twice(self) -> Self:
        shards = [shard for split in self.splits.values() for shard in split.shards]
        _without_duplicates([name for shard in shards for name in (shard.tokens, shard.labels)])
        return self


def require_manifest(manifest: Mapping[str, Any], where: object, file: object) -> None:
    """Raise if the content of a `dataset.json` is not one that this version reads.

    Args:
        where, file: the data set and its manifest, for messages.

    Raises:
        InputError: it is of another program or a later version, or malformed.
    """
    if manifest.get("format") != FORMAT:
        raise InputError(f"{where} is not a token data set; `igpt prepare` makes one")
    if manifest.get("version") not in (VERSION, VERSION_TRANSPARENT):
        raise InputError(
            f"{where} has format version {manifest.get('version')}; this igpt reads {VERSION} and "
            f"{VERSION_TRANSPARENT}"
        )
    require_schema(manifest, Manifest, str(file))


def write_shard(
    folder: Path, name: str, tokens: NDArray[np.uint16], labels: NDArray[np.int32]
) -> Shard:
    """Write tokens [N, n] and labels [N] under `name` atomically; return the manifest entry."""
    tokens_file, labels_file = f"{name}.tokens.npy", f"{name}.labels.npy"
    arrays: dict[str, NDArray[Any]] = {tokens_file: tokens, labels_file: labels}
    for file_name, array in arrays.items():
        with atomic_file(folder / file_name) as temporary, temporary.open("wb") as file:
            np.save(file, array)
    return Shard(
        tokens=tokens_file,
        labels=labels_file,
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
    """Write the manifest of a folder of shards, which makes it a data set.

    Raises:
        InputError: the manifest would be malformed, for example with two classes of the same name.
    """
    manifest = {
        "format": FORMAT,
        "version": VERSION_TRANSPARENT if palette.transparent else VERSION,
        "resolution": resolution,
        "source": source,
        "class_names": class_names,
        "splits": {
            split: {
                "count": sum(shard.count for shard in shards),
                "shards": [vars(shard) for shard in shards],
            }
            for split, shards in splits.items()
        },
        "made": dict(made),
        "palette": {
            "fingerprint": palette.fingerprint,
            "centers": palette.stored_centers.tolist(),
        },
    }
    require_schema(manifest, Manifest, folder / MANIFEST)
    write_json(folder / MANIFEST, manifest)


def require_files(folder: Path, shards: Sequence[Shard]) -> None:
    """Raise an `InputError` that names the missing or cut-off files of shards."""
    missing = []
    for shard in shards:
        for name in {shard.tokens: None, shard.labels: None, **shard.bytes}:
            file, size = folder / name, shard.bytes.get(name)
            require_regular(file)
            if not file.exists():
                missing.append(name)
            elif size is not None and file.stat().st_size != size:
                raise InputError(
                    f"{file} is damaged: {file.stat().st_size} bytes, {size} were written; "
                    "prepare the data set again"
                )
    if len(missing) == 1:
        raise InputError(f"{folder / missing[0]} is missing; prepare the data set again")
    if missing:
        names = listed(missing, NAMES_SHOWN)
        raise InputError(
            f"{len(missing)} files of {folder} are missing ({names}); prepare the data set again"
        )


def require_counts(
    counts: Mapping[str, int],
    planned: Mapping[str, int],
    skipped: Sequence[str],
    views: int,
    what: str,
) -> None:
    """Raise if the number of images differs from the planned number minus the skipped ones.

    Args:
        counts: rows of tokens of each split.
        planned: images of each split; if empty, nothing is compared.
        skipped: a line for each skipped image, which begins with its split and a space.
        views: random crops of a training image, 0 for none; images at or below the model resolution
            have a single view.
        what: the name of the data set or part, for the message.

    Raises:
        InputError: the numbers differ; the message has the split and both numbers.
    """
    if not planned:  # optional for other programs
        return
    omitted = Counter(line.split(" ", 1)[0] for line in skipped)
    for split in sorted({*planned, *counts}):
        images = planned.get(split, 0)
        least = images - omitted[split]
        most = least * max(1, views) if split == "train" else least
        if not least <= counts.get(split, 0) <= most:
            wanted = f"{least:,}" if least == most else f"{least:,} to {most:,}"
            raise InputError(
                f"{what} has {counts.get(split, 0):,} images of {split!r}, and there should be "
                f"{wanted} ({images:,} planned, {omitted[split]:,} skipped)"
            )
