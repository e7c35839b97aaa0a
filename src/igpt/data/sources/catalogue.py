"""Open a source of images: the digits, a folder, files, an archive, or a data set of the Hub.

Opening has three steps. `find` lists the splits of a source and opens none. `choose` maps our names
of splits (train, validation, test) to the source's. `open_splits` returns readers. Everything that
the source has and that is not used is counted on the way.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from igpt.config import Config
from igpt.data.left_out import ARCHIVES, SPECIAL, Allowance, LeftOut
from igpt.data.sources.archives import open_archive
from igpt.data.sources.file_kinds import ending_of, is_image_ending
from igpt.data.sources.folders import (
    Files,
    Listing,
    LocalFiles,
    in_folder,
    list_folder,
    open_images,
    split_folders,
)
from igpt.data.sources.readers import ImageFiles, Reader
from igpt.data.sources.remote import list_url
from igpt.data.sources.splits import (
    SPLIT_NAMES,
    Opened,
    Splits,
    are_splits,
    split_by_words,
)
from igpt.data.sources.tables import (
    ArrowTable,
    is_saved,
    load_file,
    load_folder,
    load_hub,
    load_saved,
    open_parquet,
    open_tables,
)
from igpt.data.sources.tars import open_tars
from igpt.data.sources.zips import list_zips
from igpt.data.tokens.manifest import SPLITS
from igpt.errors import InputError, suggest
from igpt.files import require_regular
from igpt.remote import file_system, name_in, url_of

DIGITS = "digits"


class ColumnConfig(Config):
    """Columns and tolerances for reading a source."""

    image_column: str | None = Field(
        None, description="column of images; default: the only column with the image type"
    )
    label_column: str | None = Field(
        None, description="column of classes; found by type; 'none' ignores labels"
    )
    stream: bool = Field(
        False, description="read Parquet files directly from the Hub, without storing a copy"
    )
    max_bad: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of the images that may be left out: images that do not decode, images "
        "that metadata files do not list, and files that may be or hold images (.heic, .zip, no "
        "ending); texts, hidden files, unused columns and unused splits are named and do not count",
    )


class SourceConfig(ColumnConfig):
    """Splits of a source and their use."""

    train_split: str | None = Field(
        None, description="the source's split to train on, such as STL-10's unlabeled"
    )
    validation_split: str | None = Field(None, description="the source's split to validate on")
    test_split: str | None = Field(
        None, description="the source's split to test on; for ImageNet, give validation"
    )
    held_out: float = Field(
        0.1, gt=0, lt=0.5, description="share split off for a missing validation or test split"
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="seed of the palette, of the splits and of random crops"
    )


@dataclass(frozen=True)
class Split:
    """Undecoded images of one split.

    Attributes:
        reader: of these images, and perhaps of other splits.
        indices: the rows of the reader that belong to the split, ascending.
    """

    reader: Reader
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, positions: NDArray[np.int64]) -> Iterator[tuple[Any, int]]:
        """Yield the undecoded images and class numbers at some indices, which ascend."""
        return self.reader.read(self.indices[positions])


class Source(NamedTuple):
    """A source with its three splits.

    Attributes:
        splits: train, validation and test.
        class_names: None without labels.
        left_out: everything that the source has and that is in no split.
        notes: what a user should know, one line each, such as why there are no classes.
    """

    splits: dict[str, Split]
    class_names: list[str] | None
    left_out: LeftOut
    notes: list[str]

    def allowance(self, max_bad: float) -> Allowance:
        """Return how many images may be left out, given the share `max_bad`."""
        return _allowance([split.reader for split in self.splits.values()], self.left_out, max_bad)


class WholeSource(NamedTuple):
    """One split of a source, or all of them.

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
        """Return how many images may be left out, given the share `max_bad`."""
        return _allowance(self.readers, self.left_out, max_bad)


def _allowance(readers: Sequence[Reader], left_out: LeftOut, max_bad: float) -> Allowance:
    images = sum(len(reader) for reader in {id(reader): reader for reader in readers}.values())
    return Allowance(images, left_out.possible_images, max_bad)


def open_source(source: str, config: SourceConfig | None = None) -> Source:
    """Open the train, validation and test splits of a source.

    Splits are found by their names or given by the settings; others, such as STL-10's unlabelled
    one, are left out. For a missing validation split, the share `held_out` of the training images
    is split off by seed, and as many for a missing test split (10 %, for ImageNet 4 %; paper,
    section 3.1).

    Args:
        source: "digits" (scikit-learn's 1,797 handwritten digits); a folder of images, Parquet
            files, WebDataset tars or ZIP archives; a `.parquet`, `.arrow`, `.tar` or `.zip` file;
            the URL of such a file (but `.arrow`) or folder; an archive from its site (see
            `open_archive`); or a Hub id, with a configuration after a colon ("name/set:config").

    Raises:
        InputError: there is nothing, or no images; a column is ambiguous; or labels disagree
            between splits.
    """
    config = config or SourceConfig()
    requested = _requested_splits(config)
    with _file_errors():
        found = find(source, config)
        chosen = choose(found, requested)
        opened = open_splits(found, chosen.parts, config)
        left_out = _sum(found.left_out, opened.left_out, chosen.left_out)
    if len(opened.readers["train"]) == 0:
        raise InputError(f"{source} is empty: there is no image in its training split")
    splits = _with_held_out(opened.readers, config, source)
    return Source(splits, opened.class_names, left_out, [*chosen.notes, *opened.notes])


def open_whole(source: str, config: ColumnConfig, split: str | None) -> WholeSource:
    """Open one split of a source, or all its images, and hold nothing out.

    Args:
        source: see `open_source`.
        split: its name in the source, or train, validation or test; None takes the test split, or
            all splits of a source without one.

    Raises:
        InputError: see `open_source`; or there is no such split.
    """
    with _file_errors():
        found = find(source, config)
        is_usual = split is None or split.lower() in SPLIT_NAMES
        splits = found.usual if is_usual else found.named
        names = list(splits.parts)
        by_usual_name = {SPLIT_NAMES.get(name.lower(), name): name for name in names}
        known = by_usual_name | {name: name for name in names}
        if split is not None and split not in known:
            raise _no_split(source, split, list(known))
        taken = names if split is None and "test" not in known else [known[split or "test"]]
        # Classes are those of the training split, so it is opened in any case.
        train = known.get("train", names[0])
        keys = {"train" if name == train else name: name for name in taken}
        parts = {key: splits.parts[name] for key, name in ({"train": train} | keys).items()}
        opened = open_splits(found, parts, config)
        left_out = _sum(found.left_out, splits.left_out, opened.left_out)
    readers = [opened.readers[key] for key in keys]
    if sum(map(len, readers)) == 0:
        raise InputError(f"{source} is empty: there is no image in it")
    one = split is not None or SPLIT_NAMES.get(taken[0].lower()) == "test"
    notes = [*splits.notes, *opened.notes]
    return WholeSource(taken[0] if one else "all", readers, opened.class_names, left_out, notes)


def _sum(*left_out: LeftOut) -> LeftOut:
    total = LeftOut()
    for part in left_out:
        total.update(part)
    return total


@contextmanager
def _file_errors() -> Iterator[None]:
    """Raise an `InputError` where the file system denies access."""
    try:
        yield
    except PermissionError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from None


# Step 1: find the splits.


@dataclass(frozen=True)
class Found:
    """A source with its splits listed and none of them opened.

    Attributes:
        source: its name.
        kind: how its splits are opened.
        usual: the splits by the usual names; {"train": everything} where there are none.
        named: the splits where the user names one: of folders without usual names, any folder at
            the top, and of tars, the first words of their names.
        class_names: of `kind` "readers"; None without classes.
        files, listing: of `kind` "folders": where its files are, and which.
        left_out: what was found and is in no split.
    """

    source: str
    kind: Literal["readers", "tables", "tars", "folders"]
    usual: Splits
    named: Splits
    class_names: list[str] | None = None
    files: Files | None = None
    listing: Listing | None = None
    left_out: LeftOut = field(default_factory=LeftOut)


def found_readers(
    source: str, readers: Mapping[str, Reader], class_names: list[str] | None
) -> Found:
    """Return a source whose splits have readers already."""
    return Found(source, "readers", Splits(readers), Splits(readers), class_names)


def _found_tables(source: str, tables: Mapping[str, Any], left_out: LeftOut | None = None) -> Found:
    splits = Splits(tables)
    return Found(source, "tables", splits, splits, left_out=left_out or LeftOut())


def _found_tars(source: str, tars: Mapping[str, str], left_out: LeftOut) -> Found:
    usual, named = map(Splits, _splits_of_files(tars))
    return Found(source, "tars", usual, named, left_out=left_out)


def _found_images(source: str, files: Files, listing: Listing) -> Found:
    """Return a source of image files.

    Raises:
        InputError: there are none.
    """
    left_out = listing.left_out
    if not len(listing.images):
        if not left_out:
            raise InputError(f"{source} is an empty folder; there are no images in it")
        raise InputError(
            f"{source} holds no images that can be read, but {left_out.text()}{left_out.advice()}"
        )
    usual, named = split_folders(listing.images)
    return Found(source, "folders", usual, named, files=files, listing=listing, left_out=left_out)


def _found_zips(source: str, zips: Mapping[str, str], left_out: LeftOut) -> Found:
    splits, _ = _splits_of_files(zips)
    folders = {
        file: f"{split}/" if len(splits) > 1 else ""
        for split, files in splits.items()
        for file in files
    }
    files, listing = list_zips(source, folders)
    listing.left_out.update(left_out)
    return _found_images(source, files, listing)


_Paths = dict[str, list[str]]


def _splits_of_files(files: Mapping[str, str]) -> tuple[_Paths, _Paths]:
    """Return files by the splits in their names: if these are the usual ones, and in any case.

    Args:
        files: the path or URL of each file by its name in the folder.
    """
    by_words = {
        split: [files[name] for name in names] for split, names in split_by_words(files).items()
    }
    return by_words if are_splits(by_words) else {"train": list(files.values())}, by_words


def find(source: str, config: ColumnConfig) -> Found:
    """List the splits of a source.

    Raises:
        InputError: there is nothing that can be read.
    """
    if source == DIGITS:
        return _found_tables(source, {"train": _digits()})
    if url := url_of(source):
        return _find_behind(url)
    path = Path(source).expanduser()
    require_regular(path)
    archive = open_archive(str(path), config.label_column)
    if archive:
        return found_readers(source, *archive)
    if path.is_dir():
        return _find_in_folder(path, source)
    if path.is_file():
        return _find_in_file(path, source)
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise InputError(f"no folder or file {source}")
    name, _, configuration = source.partition(":")
    return _found_tables(source, load_hub(name, configuration, stream=config.stream))


def _find_in_file(path: Path, source: str) -> Found:
    ending = path.suffix.lower()
    if ending == ".tar":
        return _found_tars(source, {path.name: str(path)}, LeftOut())
    if ending == ".zip":
        return _found_zips(source, {"": str(path)}, LeftOut())
    if ending in (".parquet", ".arrow"):
        return _found_tables(source, load_file(path))
    if is_image_ending(ending):
        import pyarrow as pa

        names = pa.array([path.name], pa.large_string())
        return found_readers(source, {"train": ImageFiles(path.parent, names, None)}, None)
    raise _unreadable_file(str(path), ending)


def _unreadable_file(file: str, ending: str) -> InputError:
    if ending in ARCHIVES:
        return InputError(
            f"{file} is not one of the archives that can be read directly; unpack "
            f"{name_in(file)} first"
        )
    return InputError(
        f"{file} is a {ending or 'nameless'} file; give a folder of images or a .parquet, .arrow, "
        ".tar or .zip file"
    )


def _find_in_folder(path: Path, source: str) -> Found:
    listing = list_folder(path)
    packed = _packed_in(str(path), listing)
    if ".tar" not in packed and not len(listing.images) and is_saved(path):
        return _found_tables(source, load_saved(path))
    if not packed:
        return _found_images(source, LocalFiles(path), listing)
    ((ending, names),) = packed.items()
    files = {name: str(path / name) for name in names}
    left_out = _next_to(listing, ending)
    if ending == ".tar":
        return _found_tars(source, files, left_out)
    if ending == ".zip":
        return _found_zips(source, files, left_out)
    for kind, entry in left_out.entries.items():
        if kind.startswith(SPECIAL):  # `datasets` might wait for it forever.
            raise InputError(f"{path / entry.first} is a FIFO, a socket or a device; remove it")
    return _found_tables(source, load_folder(path, names), left_out)


def _find_behind(url: str) -> Found:
    """List the splits of the file or folder behind a URL."""
    file_system(url)[0].invalidate_cache()  # it may have changed since this process listed it
    ending = PurePosixPath(name_in(url)).suffix.lower()
    is_file = ending in (".tar", ".zip", ".parquet") or is_image_ending(ending)
    if url.startswith("http") and not is_file:
        raise InputError(
            f"{url} cannot be read in place; give the URL of one .parquet, .tar or .zip file"
        )
    if ending == ".tar":
        return _found_tars(url, {name_in(url): url}, LeftOut())
    if ending == ".zip":
        return _found_zips(url, {"": url}, LeftOut())
    if ending == ".parquet":
        return _found_tables(url, {"train": open_parquet([url])})
    files, listing = list_url(url)
    packed = _packed_in(url, listing)
    if not packed:
        return _found_images(url, files, listing)
    ((ending, names),) = packed.items()
    urls = {name: files.where(name) for name in names}
    left_out = _next_to(listing, ending)
    if ending == ".tar":
        return _found_tars(url, urls, left_out)
    if ending == ".zip":
        return _found_zips(url, urls, left_out)
    if ending == ".arrow":
        raise InputError(f"{url} holds .arrow files, which cannot be read in place; download them")
    splits, _ = _splits_of_files(urls)
    tables = {split: open_parquet(of_split) for split, of_split in splits.items()}
    return _found_tables(url, tables, left_out)


def _packed_in(folder: str, listing: Listing) -> dict[str, list[str]]:
    """Return the files of many images in a folder by their ending, of which there is at most one.

    ZIP archives count if there is nothing else.

    Raises:
        InputError: there are several kinds, or more image files than such files.
    """
    images = len(listing.images)
    packed = {ending: names for ending, names in listing.packed.items() if names}
    if not images and not packed and listing.zips:
        return {".zip": listing.zips}
    counts = [f"{images} image files"] if images else []
    counts += [f"{len(names)} {ending}" for ending, names in packed.items()]
    if len(packed) > 1 or (packed and sum(map(len, packed.values())) < images):
        raise InputError(f"{folder} holds {' and '.join(counts)}; give one or the other")
    return packed


def _next_to(listing: Listing, ending: str) -> LeftOut:
    """Return what is left out of a folder whose files with an ending are read."""
    left_out = listing.left_out
    if ending == ".zip":
        del left_out.entries[f"files {ending_of(listing.zips[0])}"]
    if len(listing.images):  # A few pictures next to the files that hold the images.
        kind, first = f"image files next to the {ending} files", listing.images[0].as_py()
        left_out.add(kind, first, count=len(listing.images), possible_images=True)
        for file in [*listing.metadata, *listing.annotations]:
            left_out.add(f"files {ending_of(file)}", file)
    return left_out


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


# Step 2: choose splits.


def _requested_splits(config: SourceConfig) -> dict[str, str]:
    settings = {
        "train": config.train_split,
        "validation": config.validation_split,
        "test": config.test_split,
    }
    requested = {split: name for split, name in settings.items() if name is not None}
    if len(set(requested.values())) < len(requested):
        flags = ", ".join(f"--{key}-split {name}" for key, name in requested.items())
        raise InputError(f"one split cannot be used twice: {flags}")
    return requested


def choose(found: Found, requested: Mapping[str, str]) -> Splits:
    """Return the splits to open, by our names; unused splits are left out.

    Args:
        requested: names of the source's splits, by ours. The others are found by their names.

    Raises:
        InputError: there is no such split, no training split, or two for one of ours.
    """
    source, splits = found.source, found.named if requested else found.usual
    names = list(splits.parts)
    chosen = dict(requested)
    for name in requested.values():
        if name not in names:
            raise _no_split(source, name, names)
    for name in names:
        split = SPLIT_NAMES.get(name.lower())
        if split is None or split in requested or name in requested.values():
            continue
        if split in chosen:
            raise InputError(
                f"{source} has two {split} splits, {chosen[split]} and {name}; "
                f"--{split}-split takes one"
            )
        chosen[split] = name
    if not chosen and len(names) == 1:
        chosen = {"train": names[0]}
    if "train" not in chosen:
        raise InputError(
            f"{source} has no training split, only: {', '.join(names)}; --train-split names one"
        )
    left_out = _sum(splits.left_out)
    for name in (name for name in names if name not in chosen.values()):
        kind, count = _size(found, splits.parts[name])
        if count:
            left_out.add(f"{kind} of the split {name}", name, count=count)
    parts = {split: splits.parts[chosen[split]] for split in SPLITS if split in chosen}
    return Splits(parts, left_out, splits.notes)


def _no_split(source: str, name: str, names: Sequence[str]) -> InputError:
    advice = suggest(name, names) if names else "it has none"
    return InputError(f"{source} has no split {name!r}; {advice}")


def _size(found: Found, part: Any) -> tuple[str, int]:
    """Return what a split holds and how many: ("images", 5000)."""
    if found.listing is not None:
        import pyarrow.compute as pc

        return "images", pc.sum(in_folder(found.listing.images, part)).as_py() or 0
    return "tars" if found.kind == "tars" else "images", len(part)


# Step 3: open the chosen splits.


def open_splits(found: Found, parts: Mapping[str, Any], config: ColumnConfig) -> Opened:
    """Return the readers and classes of some splits.

    Args:
        parts: the splits of `found`, by the names they get, "train" among them.

    Raises:
        InputError: an ambiguous or missing column, damaged files, or labels that disagree.
    """
    columns = config.image_column, config.label_column
    if found.kind == "tables":
        return open_tables(parts, found.source, *columns)
    if found.kind == "tars":
        return open_tars(parts, *columns)
    if found.listing is not None:
        assert found.files is not None
        return open_images(found.files, found.listing, parts, *columns)
    return Opened(dict(parts), found.class_names, LeftOut(), [])


def _with_held_out(
    readers: Mapping[str, Reader], config: SourceConfig, source: str
) -> dict[str, Split]:
    train = len(readers["train"])
    missing = [name for name in SPLITS[1:] if name not in readers]
    count = max(1, round(config.held_out * train))
    if missing and train <= count * len(missing):
        raise InputError(
            f"{source} has {train} training images: too few to hold {count} out for "
            f"{' and '.join(missing)}"
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
