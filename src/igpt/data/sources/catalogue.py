"""Where images come from: the bundled digits, a folder, files, an archive, or a hub id; splits and classes settled.

Opening has three steps: `find` lists the splits of a source, a choice maps our names of splits to
    the source's, and
`Found.open` returns readers, with everything that the source has and that is not used.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from igpt.config import Config
from igpt.data.left_out import ARCHIVES, OUTSIDE, SPECIAL, Allowance, LeftOut
from igpt.data.sources.archives import open_archive
from igpt.data.sources.folders import (
    SPLIT_NAMES,
    Listing,
    Opened,
    ending_of,
    in_folder,
    list_folder,
    open_images,
    open_tars,
    split_folders,
    split_tars,
)
from igpt.data.sources.readers import Reader
from igpt.data.sources.tables import (
    ArrowTable,
    Table,
    is_saved,
    load_file,
    load_folder,
    load_hub,
    load_saved,
    open_tables,
)
from igpt.data.tokens.manifest import SPLITS
from igpt.errors import InputError, suggest
from igpt.files import require_regular

DIGITS = "digits"


class ColumnConfig(Config):
    """How a source is read."""

    image_column: str | None = Field(
        None, description="column of images; found by type when there is one"
    )
    label_column: str | None = Field(
        None, description="column of classes; found by type; 'none' ignores labels"
    )
    stream: bool = Field(
        False, description="read Parquet on the Hub where it lies, and store nothing here"
    )
    max_bad: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of the images that may be left out: images that do not decode, images that metadata files "
        "do not list, and files that may be or hold images (.heic, .zip, no ending); texts, hidden files, unused "
        "columns and unused splits are named and do not count",
    )


class SourceConfig(ColumnConfig):
    """Which images of a source are taken, and what for."""

    train_split: str | None = Field(
        None, description="the source's split to train on, such as STL-10's unlabeled"
    )
    validation_split: str | None = Field(None, description="the source's split to validate on")
    test_split: str | None = Field(
        None, description="the source's split to test on: validation, of ImageNet"
    )
    held_out: float = Field(
        0.1, gt=0, lt=0.5, description="share split off for a missing validation or test split"
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="of the palette, of the splits and of random crops"
    )


@dataclass(frozen=True)
class Split:
    """Images of one split, undecoded.

    Attributes:
        reader: reads them, and perhaps those of other splits.
        indices: which of its rows belong to the split, ascending.
    """

    reader: Reader
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, positions: NDArray[np.int64]) -> Iterator[tuple[Any, int]]:
        """The undecoded images and class numbers at some positions, ascending."""
        return self.reader.read(self.indices[positions])


class Source(NamedTuple):
    """A source whose splits are settled.

    Attributes:
        splits: train, validation and test.
        class_names: None without labels.
        left_out: everything that the source has and that is in no split.
        notes: what a person should know, a line each: why there are no classes, for example.
    """

    splits: dict[str, Split]
    class_names: list[str] | None
    left_out: LeftOut
    notes: list[str]

    def allowance(self, max_bad: float) -> Allowance:
        """Return how many images may be left out, where the share `max_bad` may be."""
        return _allowance([split.reader for split in self.splits.values()], self.left_out, max_bad)


class WholeSource(NamedTuple):
    """One split as a source has it, or all of them.

    Attributes:
        split: its name, "all" for all of them.
        readers: of its images.
        class_names: None without labels.
        left_out: everything that the source has and that is in no split.
        notes: see `Source`.
    """

    split: str
    readers: list[Reader]
    class_names: list[str] | None
    left_out: LeftOut
    notes: list[str]

    def allowance(self, max_bad: float) -> Allowance:
        """Return how many images may be left out, where the share `max_bad` may be."""
        return _allowance(self.readers, self.left_out, max_bad)


def _allowance(readers: Sequence[Reader], left_out: LeftOut, max_bad: float) -> Allowance:
    images = sum(len(reader) for reader in {id(reader): reader for reader in readers}.values())
    return Allowance(images, left_out.possible_images, max_bad)


class Found(Protocol):
    """A source whose splits are listed and not opened."""

    @property
    def splits(self) -> Sequence[str]:
        """The names of its splits."""

    def size(self, split: str) -> tuple[str, int]:
        """Return what a split holds, and how much: ("images", 5000)."""

    def open(self, chosen: Mapping[str, str], config: ColumnConfig) -> Opened:
        """Open some splits.

        Args:
            chosen: their names in the source, by the names they get, "train" among these.
        """

    @property
    def left_out(self) -> LeftOut:
        """What was seen and is in no split."""


@dataclass(frozen=True)
class _FoundRows:
    """An archive as its site ships it."""

    readers: Mapping[str, Reader]
    class_names: list[str] | None
    left_out: LeftOut

    @property
    def splits(self) -> Sequence[str]:
        return list(self.readers)

    def size(self, split: str) -> tuple[str, int]:
        return "images", len(self.readers[split])

    def open(self, chosen: Mapping[str, str], config: ColumnConfig) -> Opened:
        readers = {ours: self.readers[theirs] for ours, theirs in chosen.items()}
        return Opened(readers, self.class_names, LeftOut(), [])


@dataclass(frozen=True)
class _FoundTables:
    """Parquet, Arrow, or a data set of the Hub."""

    source: str
    tables: Mapping[str, Table]
    left_out: LeftOut

    @property
    def splits(self) -> Sequence[str]:
        return list(self.tables)

    def size(self, split: str) -> tuple[str, int]:
        return "images", len(self.tables[split])

    def open(self, chosen: Mapping[str, str], config: ColumnConfig) -> Opened:
        tables = {ours: self.tables[theirs] for ours, theirs in chosen.items()}
        return open_tables(tables, self.source, config.image_column, config.label_column)


@dataclass(frozen=True)
class _FoundTars:
    """WebDataset tars."""

    folder: Path
    tars: Mapping[str, Sequence[str]]
    left_out: LeftOut

    @property
    def splits(self) -> Sequence[str]:
        return list(self.tars)

    def size(self, split: str) -> tuple[str, int]:
        return "tars", len(self.tars[split])

    def open(self, chosen: Mapping[str, str], config: ColumnConfig) -> Opened:
        paths = {
            ours: [self.folder / name for name in self.tars[theirs]]
            for ours, theirs in chosen.items()
        }
        return open_tars(paths, config.image_column, config.label_column)


@dataclass(frozen=True)
class _FoundImages:
    """A folder of image files."""

    folder: Path
    listing: Listing
    tops: Mapping[str, str]
    left_out: LeftOut
    notes: list[str]

    @property
    def splits(self) -> Sequence[str]:
        return list(self.tops)

    def size(self, split: str) -> tuple[str, int]:
        import pyarrow.compute as pc

        return "images", pc.sum(in_folder(self.listing.images, self.tops[split])).as_py() or 0

    def open(self, chosen: Mapping[str, str], config: ColumnConfig) -> Opened:
        tops = {ours: self.tops[theirs] for ours, theirs in chosen.items()}
        opened = open_images(
            self.folder, self.listing, tops, config.image_column, config.label_column
        )
        return opened._replace(notes=[*self.notes, *opened.notes])


def open_source(source: str, config: SourceConfig | None = None) -> Source:
    """Open a source and settle its splits.

    Train, validation and test splits are taken by their names, or as the settings say; others, such
    as STL-10's unlabelled one, are left out. `held_out` of the training images are split off, by
    seed, for a missing validation split, and as many for a missing test split (10 %, for ImageNet 4
    %; paper, section 3.1).

    Args:
        source: "digits" (scikit-learn's 1,797 handwritten digits); a folder of images, Parquet
            files or WebDataset tars; a `.parquet`, `.arrow` or `.tar` file; an archive as its site
            ships it (see `open_archive`); or a hub id, with a configuration after a colon
            ("name/set:config").

    Raises:
        InputError: nothing there, no images in it, an ambiguous column, or labels that disagree
            between splits.
    """
    config = config or SourceConfig()
    asked = _asked(config)
    with _readable():
        found = find(source, config, asked=bool(asked))
        chosen = _choose(found.splits, asked, source)
        opened = found.open(chosen, config)
        left_out = LeftOut()
        left_out.update(found.left_out)
        left_out.update(opened.left_out)
        for split in (split for split in found.splits if split not in chosen.values()):
            kind, count = found.size(split)
            if count:
                left_out.add(f"{kind} of the split {split}", split, count=count)
    if len(opened.readers["train"]) == 0:
        raise InputError(f"{source} is empty: there is no image in its training split")
    return Source(
        _with_held_out(opened.readers, config, source), opened.class_names, left_out, opened.notes
    )


def open_whole(source: str, config: ColumnConfig, split: str | None) -> WholeSource:
    """Open one split as the source has it, or all its images; nothing is held out.

    Args:
        source: see `open_source`.
        split: its name in the source, or train, validation or test; None takes the test split, and
            all splits of a source without one.

    Raises:
        InputError: see `open_source`; or there is no such split.
    """
    with _readable():
        found = find(source, config, asked=split is not None and split.lower() not in SPLIT_NAMES)
        names = list(found.splits)
        known = {SPLIT_NAMES.get(name.lower(), name): name for name in names} | {
            name: name for name in names
        }
        if split is not None and split not in known:
            raise InputError(
                f"{source} has no split {split!r}; {suggest(split, known) if known else 'it has none'}"
            )
        reference = known.get("train", names[0])
        taken = names if split is None and "test" not in known else [known[split or "test"]]
        wanted = {"train" if name == reference else name: name for name in taken}
        opened = found.open({"train": reference} | wanted, config)
        left_out = LeftOut()
        left_out.update(found.left_out)
        left_out.update(opened.left_out)
    chosen = [opened.readers[key] for key in wanted]
    if sum(map(len, chosen)) == 0:
        raise InputError(f"{source} is empty: there is no image in it")
    name = next(iter(wanted.values()))
    one = split is not None or SPLIT_NAMES.get(name.lower()) == "test"
    return WholeSource(name if one else "all", chosen, opened.class_names, left_out, opened.notes)


@contextmanager
def _readable() -> Iterator[None]:
    """Turn a refusal of the file system into an `InputError`."""
    try:
        yield
    except PermissionError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from None


def find(source: str, config: ColumnConfig, *, asked: bool) -> Found:
    """List the splits of a source.

    Args:
        asked: whether the user named a split: then any folder at the top, or first word of a tar's
            name, may be one.

    Raises:
        InputError: there is nothing that can be read.
    """
    if source == DIGITS:
        return _FoundTables(source, {"train": _digits()}, LeftOut())
    path = Path(source).expanduser()
    require_regular(path)
    archive = open_archive(str(path), config.label_column)
    if archive:
        return _FoundRows(*archive, LeftOut())
    if path.is_dir():
        return _find_in_folder(path, source, asked=asked)
    if path.is_file():
        return _find_in_file(path, source, asked=asked)
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise InputError(f"no folder or file {source}")
    name, _, configuration = source.partition(":")
    return _FoundTables(source, load_hub(name, configuration, stream=config.stream), LeftOut())


def _find_in_file(path: Path, source: str, *, asked: bool) -> Found:
    ending = path.suffix.lower()
    if ending == ".tar":
        return _FoundTars(path.parent, split_tars([path.name], asked=asked), LeftOut())
    if ending in (".parquet", ".arrow"):
        return _FoundTables(source, load_file(path), LeftOut())
    if ending in ARCHIVES:
        raise InputError(
            f"{path} is none of the archives that are read as they are; unpack {path.name} first"
        )
    raise InputError(
        f"{path} is a {ending or 'nameless'} file; give a folder of images or a .parquet, .arrow or .tar"
    )


def _find_in_folder(path: Path, source: str, *, asked: bool) -> Found:
    listing = list_folder(path)
    images, left_out = len(listing.images), listing.left_out
    packed = {ending: names for ending, names in listing.packed.items() if names}
    if not images and ".tar" not in packed and is_saved(path):
        return _FoundTables(source, load_saved(path), LeftOut())
    if not images and not packed:
        raise InputError(_nothing(path, left_out))
    counts = [f"{images} image files"] if images else []
    counts += [f"{len(names)} {ending}" for ending, names in packed.items()]
    if len(packed) > 1 or (packed and sum(map(len, packed.values())) < images):
        raise InputError(f"{path} holds {' and '.join(counts)}; give one or the other")
    if not packed:
        tops, notes = split_folders(listing.images, asked=asked)
        _add_outside(left_out, listing.images, list(tops.values()))
        return _FoundImages(path, listing, tops, left_out, notes)
    ((ending, names),) = packed.items()
    if images:  # a picture may lie beside the file of the images
        kind = f"image files beside the {ending} files"
        left_out.add(kind, listing.images[0].as_py(), count=images, possible_images=True)
        for file in [*listing.metadata, *listing.annotations]:
            left_out.add(f"files {ending_of(file)}", file)
    if ending == ".tar":
        return _FoundTars(path, split_tars(names, asked=asked), left_out)
    for kind, entry in left_out.entries.items():
        if kind.startswith(SPECIAL):  # `datasets` might wait for it
            raise InputError(f"{path / entry.first} is a FIFO, a socket or a device; remove it")
    return _FoundTables(source, load_folder(path, names), left_out)


def _nothing(path: Path, left_out: LeftOut) -> str:
    """Return why there are no images in a folder."""
    if not left_out:
        return f"{path} is an empty folder; there are no images in it"
    return f"{path} holds no images that can be read, but {left_out.text()}{left_out.advice()}"


def _add_outside(left_out: LeftOut, images: Any, tops: Sequence[str]) -> None:
    """Count the images that lie in none of the folders of the splits."""
    import pyarrow.compute as pc

    if not tops:  # no folders at all, and a split was asked for: that is refused later
        return
    inside = in_folder(images, tops[0])
    for top in tops[1:]:
        inside = pc.or_(inside, in_folder(images, top))
    outside = pc.filter(images, pc.invert(inside))
    if len(outside):
        left_out.add(OUTSIDE, outside[0].as_py(), count=len(outside), possible_images=True)


def _digits() -> ArrowTable:
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as Pillow
    from sklearn.datasets import load_digits

    bunch = load_digits()
    levels = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # 17 levels, 0..16
    names = [str(digit) for digit in bunch.target_names]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    rows = {"image": [Pillow.fromarray(image) for image in levels], "label": bunch.target.tolist()}
    return ArrowTable(Dataset.from_dict(rows, features=features))


def _asked(config: SourceConfig) -> dict[str, str]:
    wanted = {
        "train": config.train_split,
        "validation": config.validation_split,
        "test": config.test_split,
    }
    asked = {split: name for split, name in wanted.items() if name is not None}
    if len(set(asked.values())) < len(asked):
        raise InputError(
            f"one split cannot be two: {', '.join(f'--{key}-split {name}' for key, name in asked.items())}"
        )
    return asked


def _choose(names: Sequence[str], asked: Mapping[str, str], source: str) -> dict[str, str]:
    """Return the splits to use, the source's names by ours: those asked for, and the others by their names."""
    chosen = dict(asked)
    for name in asked.values():
        if name not in names:
            raise InputError(
                f"{source} has no split {name!r}; {suggest(name, names) if names else 'it has none'}"
            )
    for name in names:
        split = SPLIT_NAMES.get(name.lower())
        if split is None or split in asked or name in asked.values():
            continue
        if split in chosen:
            raise InputError(
                f"{source} has two {split} splits, {chosen[split]} and {name}; --{split}-split takes one"
            )
        chosen[split] = name
    if not chosen and len(names) == 1:
        chosen = {"train": names[0]}
    if "train" not in chosen:
        raise InputError(
            f"{source} has no training split, only: {', '.join(names)}; --train-split names one"
        )
    return {split: chosen[split] for split in SPLITS if split in chosen}


def _with_held_out(
    readers: Mapping[str, Reader], config: SourceConfig, source: str
) -> dict[str, Split]:
    train = len(readers["train"])
    missing = [name for name in SPLITS[1:] if name not in readers]
    count = max(1, round(config.held_out * train))
    if missing and train <= count * len(missing):
        raise InputError(
            f"{source} has {train} training images: too few to hold {count} out for {' and '.join(missing)}"
        )
    splits = {name: Split(reader, np.arange(len(reader))) for name, reader in readers.items()}
    if missing:
        order = np.random.default_rng(config.seed).permutation(train)
        for number, name in enumerate(missing):
            splits[name] = Split(
                readers["train"], np.sort(order[number * count : (number + 1) * count])
            )
        splits["train"] = Split(readers["train"], np.sort(order[len(missing) * count :]))
    return {name: splits[name] for name in SPLITS}
