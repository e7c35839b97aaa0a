"""Where images come from: the bundled digits, a folder, files, an archive, or a hub id; splits and classes settled."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from igpt.config import Config
from igpt.data.archives import open_archive
from igpt.data.folders import SPLIT_NAMES, files_below, open_images, open_tars, split_folders, split_tars
from igpt.data.readers import Reader, image_endings
from igpt.data.tables import ArrowTable, load_tables, readers_of
from igpt.data.tokens import SPLITS
from igpt.errors import InputError, suggest

DIGITS = "digits"
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of `datasets`' folders of images


class ColumnConfig(Config):
    """How a source is read."""

    image_column: str | None = Field(None, description="column of images; found by type when there is one")
    label_column: str | None = Field(None, description="column of classes; found by type; 'none' ignores labels")
    stream: bool = Field(False, description="read Parquet on the Hub where it lies, and store nothing here")


class SourceConfig(ColumnConfig):
    """Which images of a source are taken, and what for."""

    train_split: str | None = Field(None, description="the source's split to train on, such as STL-10's unlabeled")
    validation_split: str | None = Field(None, description="the source's split to validate on")
    test_split: str | None = Field(None, description="the source's split to test on: validation, of ImageNet")
    held_out: float = Field(0.1, gt=0, lt=0.5, description="share split off for a missing validation or test split")
    seed: int = Field(0, ge=0, lt=2**63, description="of the palette, of the splits and of random crops")


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


@dataclass(frozen=True)
class _Choice:
    """Which of a source's splits are opened.

    Attributes:
        asked: whether the user named one.
        settle: takes all there are, by their own names; returns those to open, "train" among them: by it columns are
            found and classes numbered.
    """

    asked: bool
    settle: Callable[[Mapping[str, Any]], dict[str, Any]]


def open_source(source: str, config: SourceConfig | None = None) -> tuple[dict[str, Split], list[str] | None]:
    """Opens a source and settles its splits.

    Train, validation and test splits are taken by their names, or as the settings say; others, such as STL-10's
    unlabelled one, are left aside. `held_out` of the training images are split off, by seed, for a missing validation
    split, and as many for a missing test split (10 %, for ImageNet 4 %; paper, section 3.1).

    Args:
        source: "digits" (scikit-learn's 1,797 handwritten digits); a folder of images, Parquet files or WebDataset
            tars; a `.parquet`, `.arrow` or `.tar` file; an archive as its site ships it (see `open_archive`); or a hub
            id, with a configuration after a colon ("name/set:config").

    Returns:
        the splits, and the class names (None without labels).

    Raises:
        InputError: nothing there, no images in it, an ambiguous column, or labels that disagree between splits.
    """
    config = config or SourceConfig()
    choice = _Choice(bool(_asked(config)), partial(_named, config=config, source=source))
    readers, class_names = _open(source, config, choice)
    if len(readers["train"]) == 0:
        raise InputError(f"{source} is empty: there is no image in its training split")
    return _with_held_out(readers, config, source), class_names


def open_whole(source: str, config: ColumnConfig, split: str | None) -> tuple[str, list[Reader], list[str] | None]:
    """Opens one split as the source has it, or all its images; nothing is held out.

    Args:
        source: see `open_source`.
        split: its name in the source, or train, validation or test; None takes the test split, and all splits of a
            source without one.

    Returns:
        the split's name ("all" for all of them), its readers, and the class names (None without labels).

    Raises:
        InputError: see `open_source`; or there is no such split.
    """
    wanted = dict[str, str]()  # what it is called here -> its own name

    def settle(found: Mapping[str, Any]) -> dict[str, Any]:
        known = {SPLIT_NAMES.get(name.lower(), name): name for name in found} | {name: name for name in found}
        if split is not None and split not in known:
            raise InputError(f"{source} has no split {split!r}; {suggest(split, known) if known else 'it has none'}")
        reference = known.get("train", next(iter(found)))
        taken = list(found) if split is None and "test" not in known else [known[split or "test"]]
        wanted.update({"train" if name == reference else name: name for name in taken})
        return {"train": found[reference]} | {key: found[name] for key, name in wanted.items()}

    asked = split is not None and split.lower() not in SPLIT_NAMES
    readers, class_names = _open(source, config, _Choice(asked, settle))
    chosen = [readers[key] for key in wanted]
    if sum(map(len, chosen)) == 0:
        raise InputError(f"{source} is empty: there is no image in it")
    name = next(iter(wanted.values()))
    told = split is not None or SPLIT_NAMES.get(name.lower()) == "test"
    return name if told else "all", chosen, class_names


def _open(source: str, config: ColumnConfig, choice: _Choice) -> tuple[dict[str, Reader], list[str] | None]:
    try:
        return _opened(source, config, choice)
    except PermissionError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from None


def _opened(source: str, config: ColumnConfig, choice: _Choice) -> tuple[dict[str, Reader], list[str] | None]:
    if source == DIGITS:
        return readers_of(choice.settle({"train": _digits()}), source, config.image_column, config.label_column)
    path = Path(source).expanduser()
    archive = open_archive(str(path), config.label_column)
    if archive:
        return choice.settle(archive[0]), archive[1]
    if path.is_dir():
        return _open_folder(path, config, choice, source)
    if path.is_file():
        if path.suffix == ".tar":
            return _open_tars(path.parent, [path.name], config, choice)
        if path.suffix not in (".parquet", ".arrow"):
            raise InputError(
                f"{path} is a {path.suffix or 'nameless'} file; give a folder of images or a .parquet, .arrow or .tar"
            )
    elif source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise InputError(f"no folder or file {source}")
    return _open_tables(path, config, choice, source)


def _open_folder(
    path: Path, config: ColumnConfig, choice: _Choice, source: str
) -> tuple[dict[str, Reader], list[str] | None]:
    import pyarrow as pa

    kinds, tars, described = Counter[str](), list[str](), False

    def images() -> Iterator[str]:
        nonlocal described
        for name in files_below(path):
            file = PurePosixPath(name)
            ending = file.suffix.lower()
            kinds[ending if ending not in image_endings() else "image"] += 1
            described |= file.name in _METADATA
            if ending == ".tar":
                tars.append(name)
            elif ending in image_endings():
                yield name

    found = images()
    chunks = iter(lambda: list(islice(found, 65536)), [])
    try:
        names = pa.chunked_array([pa.array(chunk, pa.large_string()) for chunk in chunks], pa.large_string())
    except UnicodeEncodeError as error:
        raise InputError(f"the name of the image {error.object!r} in {path} is not UTF-8; rename it") from None
    if not kinds:
        raise InputError(f"{path} is an empty folder; there are no images in it")
    packed = max((".parquet", ".arrow", ".tar"), key=kinds.__getitem__)
    if not kinds["image"] or kinds[packed] >= kinds["image"]:  # a picture may lie beside the file of the images
        if kinds[".tar"]:
            return _open_tars(path, tars, config, choice)
        return _open_tables(path, config, choice, source)
    if kinds[packed] and not described:
        raise InputError(
            f"{path} holds {kinds['image']} image files and {kinds[packed]} {packed}; give one or the other"
        )
    names = names.combine_chunks()
    splits = choice.settle(split_folders(names, asked=choice.asked))
    if not described:
        return open_images(path, names, splits, config.image_column, config.label_column)
    files = {split: f"{top}/**".lstrip("/") for split, top in splits.items()}
    tables = load_tables(source, path, files, stream=False)  # `datasets` knows what their metadata say
    return readers_of(tables, source, config.image_column, config.label_column)


def _open_tars(
    folder: Path, tars: list[str], config: ColumnConfig, choice: _Choice
) -> tuple[dict[str, Reader], list[str] | None]:
    splits = choice.settle(split_tars(tars, asked=choice.asked))
    paths = {split: [folder / name for name in names] for split, names in splits.items()}
    return open_tars(paths, config.image_column, config.label_column)


def _open_tables(
    path: Path, config: ColumnConfig, choice: _Choice, source: str
) -> tuple[dict[str, Reader], list[str] | None]:
    tables = choice.settle(load_tables(source, path, None, stream=config.stream))
    return readers_of(tables, source, config.image_column, config.label_column)


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
    wanted = {"train": config.train_split, "validation": config.validation_split, "test": config.test_split}
    asked = {split: name for split, name in wanted.items() if name is not None}
    if len(set(asked.values())) < len(asked):
        raise InputError(
            f"one split cannot be two: {', '.join(f'--{key}-split {name}' for key, name in asked.items())}"
        )
    return asked


def _named(found: Mapping[str, Any], config: SourceConfig, source: str) -> dict[str, Any]:
    """The splits to use, by our names: those that the settings name, and the others by theirs."""
    asked = _asked(config)
    taken = dict(asked)
    for name in asked.values():
        if name not in found:
            raise InputError(f"{source} has no split {name!r}; {suggest(name, found)}")
    for name in found:
        split = SPLIT_NAMES.get(name.lower())
        if split is None or split in asked or name in asked.values():
            continue
        if split in taken:
            raise InputError(f"{source} has two {split} splits, {taken[split]} and {name}; --{split}-split takes one")
        taken[split] = name
    if not taken and len(found) == 1:
        taken = {"train": next(iter(found))}
    if "train" not in taken:
        raise InputError(f"{source} has no training split, only: {', '.join(found)}; --train-split names one")
    return {split: found[taken[split]] for split in SPLITS if split in taken}


def _with_held_out(readers: Mapping[str, Reader], config: SourceConfig, source: str) -> dict[str, Split]:
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
            splits[name] = Split(readers["train"], np.sort(order[number * count : (number + 1) * count]))
        splits["train"] = Split(readers["train"], np.sort(order[len(missing) * count :]))
    return {name: splits[name] for name in SPLITS}
