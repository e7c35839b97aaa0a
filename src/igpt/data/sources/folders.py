"""Folders of image files and of WebDataset tars: what is in them, which split it belongs to, and the classes."""

import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from igpt.data.left_out import ARCHIVES, HIDDEN, SPECIAL, LeftOut, listed
from igpt.data.sources.metadata import ANNOTATIONS, FILE_NAMES, describe, read_annotations
from igpt.data.sources.readers import (
    Column,
    ImageFiles,
    Reader,
    Sample,
    StrayMember,
    TarSamples,
    entries_of,
    image_endings,
    is_hidden,
    is_image_ending,
)
from igpt.errors import InputError

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
PACKED = (".parquet", ".arrow", ".tar")  # files that hold many images
# Texts and tables that people keep with their images: named when they are left out, and never taken
# for images.
_ACCOMPANYING = frozenset(
    [
        ".bib",
        ".cfg",
        ".conf",
        ".css",
        ".csv",
        ".dvc",
        ".htm",
        ".html",
        ".ini",
        ".ipynb",
        ".js",
        ".json",
        ".jsonl",
        ".lock",
        ".log",
        ".lst",
        ".md",
        ".md5",
        ".names",
        ".ndjson",
        ".py",
        ".rst",
        ".rtf",
        ".sh",
        ".sha1",
        ".sha256",
        ".sql",
        ".tex",
        ".toml",
        ".tsv",
        ".txt",
        ".url",
        ".xml",
        ".xmp",
        ".yaml",
        ".yml",
    ]
)
_ACCOMPANYING_NAMES = frozenset(
    [
        "authors",
        "changelog",
        "changes",
        "citation",
        "contributing",
        "copying",
        "dockerfile",
        "license",
        "licence",
        "makefile",
        "notice",
        "readme",
        "requirements",
        "version",
    ]
)
_COVERS = 10  # images directly below a split are covers where they are fewer than one in so many
_CHUNK = 65536
_LONGEST_ENDING = 12


class Found(NamedTuple):
    """A file below a folder, by its path relative to it, or a hidden file or folder."""

    name: str
    kind: Literal["file", "hidden", "special"]


@dataclass(frozen=True)
class Listing:
    """What is below a folder; all names are relative to it.

    Attributes:
        images: files that Pillow reads by their endings, an Arrow array.
        packed: files of many images, by their endings (see `PACKED`).
        metadata: files that describe images.
        annotations: Tiny ImageNet's files of classes.
        left_out: everything else.
    """

    images: Any
    packed: dict[str, list[str]]
    metadata: list[str]
    annotations: list[str]
    left_out: LeftOut


def list_folder(folder: Path) -> Listing:
    """Sort everything below a folder by what it is; no file is opened.

    Raises:
        InputError: a folder cannot be read, or the name of an image is not UTF-8.
    """
    import pyarrow as pa

    chunks, names = [pa.array([], pa.large_string())], list[str]()
    packed: dict[str, list[str]] = {ending: [] for ending in PACKED}
    metadata, annotations, left_out = list[str](), list[str](), LeftOut()
    endings = image_endings()
    for name, kind in walk(folder):
        file = name[name.rfind("/") + 1 :]
        ending = PurePosixPath(file).suffix.lower()
        if kind == "hidden":
            left_out.add(HIDDEN, name)
        elif file in FILE_NAMES:
            metadata.append(name)
        elif file == ANNOTATIONS:
            annotations.append(name)
        elif ending in packed:
            packed[ending].append(name)
        elif kind == "special":
            left_out.add(
                f"{SPECIAL} {ending_of(file)}", name, possible_images=may_hold_images(file)
            )
        elif ending in endings:
            names.append(name)
            if len(names) == _CHUNK:
                chunks.append(_utf8(names, folder))
                names = []
        else:
            left_out.add(f"files {ending_of(file)}", name, possible_images=may_hold_images(file))
    chunks.append(_utf8(names, folder))
    images = pa.concat_arrays(chunks)
    if not len(images):  # then there is nothing that they describe
        packed[".parquet"] += [name for name in metadata if name.endswith(".parquet")]
        for name in [*(name for name in metadata if not name.endswith(".parquet")), *annotations]:
            left_out.add(f"files {ending_of(name)}", name)
        metadata, annotations = [], []
    return Listing(images, packed, metadata, annotations, left_out)


def _utf8(names: list[str], folder: Path) -> Any:
    import pyarrow as pa

    try:
        return pa.array(names, pa.large_string())
    except UnicodeEncodeError as error:
        raise InputError(
            f"the name of the image {error.object!r} in {folder} is not UTF-8; rename it"
        ) from None


def ending_of(name: str) -> str:
    """Return how a file's name ends, in words: "ending in .tar.gz", or "without an ending".

    Numbers and long words are no endings, or there would be thousands of them.
    """
    path = PurePosixPath(name.lower())
    if path.name in _ACCOMPANYING_NAMES:
        return "named LICENSE, README and the like"
    if not any(map(str.isalpha, path.suffix)) or len(path.suffix) > _LONGEST_ENDING:
        return "without an ending"
    tar = ".tar" if path.suffix in ARCHIVES and path.stem.endswith(".tar") else ""
    return f"ending in {tar}{path.suffix}"


def may_hold_images(name: str) -> bool:
    """Return whether a file may be or hold images, by its name: everything but known kinds of text may."""
    path = PurePosixPath(name.lower())
    return path.suffix not in _ACCOMPANYING if path.suffix else path.name not in _ACCOMPANYING_NAMES


def walk(folder: Path) -> Iterator[Found]:
    """Yield the files below a folder, to any depth, in an order that is the same everywhere.

    Hidden and system files and folders are yielded, folders with a slash at the end, and not looked
    into. Links are followed, but not back to a folder that holds them; FIFOs, sockets and devices
    are "special".

    Raises:
        InputError: a folder cannot be read.
    """
    waiting: list[
        tuple[Found, frozenset[tuple[int, int]] | None]
    ]  # files have no folders above them here
    waiting = [(Found("", "file"), frozenset(map(_identity, folder.resolve().parents)))]
    while waiting:
        found, above = waiting.pop()
        if above is None:
            yield found
            continue
        here = _identity(folder / found.name)
        if here in above:
            continue
        try:
            with os.scandir(folder / found.name) as entries:
                inside = sorted(
                    (entry.name, _is_folder(entry), _is_special(entry)) for entry in entries
                )
        except OSError as error:
            raise InputError(
                f"cannot read the folder {folder / found.name}: {error.strerror}"
            ) from None
        for entry, is_folder, is_special in reversed(inside):
            name = f"{found.name}{entry}{'/' if is_folder else ''}"
            if is_hidden(entry):
                waiting.append((Found(name, "hidden"), None))
            elif is_folder:
                waiting.append((Found(name, "file"), above | {here}))
            else:
                waiting.append((Found(name, "special" if is_special else "file"), None))


def _identity(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror}") from None
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; as a file, it is named when it is opened
        return False


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a FIFO, a socket or a device; links to these are refused when they are opened."""
    try:
        return not (entry.is_file() or entry.is_dir() or entry.is_symlink())
    except OSError:
        return False


class SplitFolders(NamedTuple):
    """The folders that hold the splits of a folder of images.

    Attributes:
        tops: the folder of each split, by the name of the split; {"train": ""} without any.
        notes: which folders are taken for splits although their names are longer, or may be splits
            and are not taken.
    """

    tops: dict[str, str]
    notes: list[str]


class _Level(NamedTuple):
    """One of the nested folders that each hold all images below one folder.

    Attributes:
        folder: its name, "" or with a slash at the end.
        tops: the folders in it.
        alone: whether (almost) all of its images lie in these folders.
    """

    folder: str
    tops: list[str]
    alone: bool


def split_folders(names: Any, *, asked: bool) -> SplitFolders:
    """Return the folders that hold the splits of a folder of images, by their own names, or {"train": ""}.

    `train`, `val` and the like name splits as folders at the top, or below one folder that holds
    everything; the other folders there are splits too. Names that contain such a word
    (`training_set`, `test_set`) name splits where it is clear which is which. A few images above
    the splits, fewer than one in ten, do not matter.

    Args:
        names: of all the images in it, relative to it, an Arrow array.
        asked: whether the user named one: then the folders at the top are splits, whatever their
            names.
    """
    levels = _levels(names)
    last = levels[-1]
    if len(last.tops) > 1 and _are_splits(last.tops):
        return SplitFolders({top: f"{last.folder}{top}" for top in last.tops}, [])
    for level in levels:
        if len(level.tops) == 1 and _are_splits(level.tops, alone=level.alone):
            return SplitFolders({top: f"{level.folder}{top}" for top in level.tops}, [])
    if asked:
        return SplitFolders({top: top for top in levels[0].tops}, [])
    return _splits_by_words(last)


def _levels(names: Any) -> list[_Level]:
    """Return the folder itself, and the folders below it while each is the only one and holds almost all images."""
    import pyarrow.compute as pc

    levels, folder = list[_Level](), ""
    while True:
        inside = pc.filter(names, pc.match_substring(names, "/"))
        tops = sorted(pc.unique(_first_parts(inside)).to_pylist())
        strays = len(names) - len(inside)
        alone = not strays or strays * _COVERS < len(names)
        levels.append(_Level(folder, tops, alone))
        if len(tops) != 1 or not alone:
            return levels
        names = pc.utf8_slice_codeunits(inside, len(tops[0]) + 1)
        folder += f"{tops[0]}/"


def _splits_by_words(level: _Level) -> SplitFolders:
    """Return the splits of folders whose names contain the words of splits; none where it is not clear which is which.

    It is clear where there is one folder for each split, and training is one of them. Other folders
    are further splits where the names of the splits differ in these words only, as `seg_train`,
    `seg_test` and `seg_pred`.
    """
    found, rests = dict[str, list[str]](), set[tuple[str, ...]]()
    for top in level.tops:
        words = re.split(r"[-_. ]", top.lower())
        splits = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
        for split in splits:
            found.setdefault(split, []).append(top)
        if splits:
            rests.add(tuple(word for word in words if word not in SPLIT_NAMES))
    named = [top for top in level.tops if any(top in tops for tops in found.values())]
    if len(named) < 2:
        return SplitFolders({"train": ""}, [])
    one_each = "train" in found and sum(map(len, found.values())) == len(found) == len(named)
    if one_each and (len(named) == len(level.tops) or len(rests) == 1):
        splits_of = {tops[0]: split for split, tops in found.items()}
        told = ", ".join(f"{level.folder}{top} as {split}" for top, split in splits_of.items())
        note = f"folders taken as splits by the words in their names: {told}; --train-split names another"
        return SplitFolders(
            {splits_of.get(top, top): f"{level.folder}{top}" for top in level.tops}, [note]
        )
    source = f"give the folder {level.folder} and " if level.folder else ""
    note = (
        f"the names of {listed(named)} contain the names of splits, and they are not taken as splits; if they are, "
        f"{source}--train-split, --validation-split and --test-split name them"
    )
    return SplitFolders({"train": ""}, [note])


def _first_parts(names: Any) -> Any:
    import pyarrow.compute as pc

    return pc.list_element(pc.split_pattern(names, "/", max_splits=1), 0)


def _are_splits(names: Collection[str], *, alone: bool = True) -> bool:
    # A class may be called "train": it is a split where it stands alone, or beside another one.
    named = [SPLIT_NAMES[name.lower()] for name in names if name.lower() in SPLIT_NAMES]
    return "train" in named and (len(named) > 1 or (alone and len(names) == 1))


def in_folder(names: Any, top: str) -> Any:
    """Return which of some names lie below a folder, an Arrow array of booleans; all lie below ""."""
    import pyarrow.compute as pc

    return pc.starts_with(names, f"{top}/" if top else "")


class Opened(NamedTuple):
    """Readers of the splits of a source, its class names, and what it has that is not used.

    Attributes:
        readers: of the chosen splits.
        class_names: None without classes.
        left_out: found while the splits were opened.
        notes: what a person should know of them, a line each.
    """

    readers: dict[str, Reader]
    class_names: list[str] | None
    left_out: LeftOut
    notes: list[str]


def open_images(
    folder: Path, listing: Listing, splits: Mapping[str, str], image: str | None, label: str | None
) -> Opened:
    """Open the splits of a folder of images, and find its classes.

    Metadata files name the classes where they have a column of classes. Otherwise the class of an
    image is the first folder below its split, at any depth, where the training images lie in two or
    more; one folder around these does not matter. A few images outside these folders have no label.

    Args:
        splits: the folder that holds each split, "train" among them.
        image, label: columns that were asked for; the label "none" looks for no classes.

    Raises:
        InputError: malformed metadata, no such column, or labels that disagree between splits.
    """
    import pyarrow.compute as pc

    if image is not None:
        raise InputError(f"{folder} has no column {image!r}: it holds files of images")
    if label not in (None, "none") and not listing.metadata:
        raise InputError(
            f"{folder} has no column {label!r}: the classes of images in folders are their folders"
        )
    names, words, left_out, notes = listing.images, None, LeftOut(), list[str]()
    columns, further = "", False
    if listing.metadata:
        described = describe(folder, names, listing.metadata, label)
        left_out.update(described.left_out)
        columns, further = described.columns, described.further
        names = pc.filter(names, described.kept)
        if described.words is not None:
            words = pc.filter(described.words, described.kept)
    parts = {split: in_folder(names, top) for split, top in splits.items()}
    inside = {
        split: pc.utf8_slice_codeunits(pc.filter(names, parts[split]), len(top) + 1 if top else 0)
        for split, top in splits.items()
    }
    classes = dict[str, Any]()
    annotated = dict[str, str]()
    if words is not None:
        classes = {split: pc.filter(words, parts[split]) for split in splits}
        trained = sort_classes(_values(classes["train"]))
    elif label is None:
        of_splits = {
            f"{top}/{ANNOTATIONS}": split for split, top in splits.items() if split != "train"
        }
        annotated = {of_splits[file]: file for file in listing.annotations if file in of_splits}
        classes, found = _folder_classes(folder, splits, inside, annotated)
        notes += found
        trained = sorted(_values(classes["train"])) if classes else []
        if listing.metadata and trained:
            notes.append(
                f"the classes are the folders: {columns}; --label-column names a column of classes"
            )
        elif listing.metadata:
            notes = [
                f"no labels: {columns}; --label-column names one"
                if further
                else f"no labels: {columns}"
            ]
    else:
        trained = []
    for file in listing.annotations:
        if not classes or file not in annotated.values():
            left_out.add(f"files {ending_of(file)}", file)
    require_known(trained, {split: _values(words) for split, words in classes.items()}, str(folder))
    numbers = {name: number for number, name in enumerate(trained)}
    readers: dict[str, Reader] = {
        split: ImageFiles(
            folder / top, inside[split], _numbered(classes[split], numbers) if trained else None
        )
        for split, top in splits.items()
    }
    return Opened(readers, trained or None, left_out, notes)


def _folder_classes(
    folder: Path, splits: Mapping[str, str], inside: Mapping[str, Any], annotated: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the class of each image of each split, null without one, and notes; no splits where there are no classes.

    Args:
        inside: the names of each split's images, relative to it.
        annotated: the files of classes of some splits.
    """
    import pyarrow as pa

    levels, notes = (
        {split: _classes_of_levels(names) for split, names in inside.items()},
        list[str](),
    )
    home, words = levels["train"][-1]
    trained = _values(words)
    top = folder / splits["train"]
    if len(trained) < 2:
        other = next(
            (
                split
                for split in splits
                if split != "train" and len(_values(levels[split][-1][1])) > 1
            ),
            None,
        )
        if other:
            notes.append(
                f"no labels: {folder / splits[other]} has folders of classes, and {top} has none"
            )
        elif trained:
            notes.append(
                f"no labels: the images in {top} lie in one folder, {home + trained.pop()!r}, and classes are two "
                "folders or more; a metadata.csv with the columns file_name and label gives classes"
            )
        return {}, notes
    if words.null_count * _COVERS >= len(words):
        first = inside["train"][words.is_null().index(True).as_py()]
        notes.append(
            f"no labels: {words.null_count} of {len(words)} images lie directly in {top / home} beside "
            f"its {len(trained)} folders (first: {first})"
        )
        return {}, notes
    classes = {split: _level_of_classes(of_split, trained) for split, of_split in levels.items()}
    for split in (split for split in splits if split != "train"):
        names, known = inside[split], _values(classes[split])
        if split in annotated:
            classes[split] = _annotated(folder / annotated[split], names)
        elif len(known) == 1 and not known & trained and not classes[split].null_count:
            classes[split] = pa.nulls(len(names), pa.large_string())
            notes.append(
                f"no labels in {folder / splits[split]}: all its images lie in one folder, {known.pop()!r}, which is "
                "no class of the training images"
            )
    return classes, notes


def _classes_of_levels(names: Any) -> list[tuple[str, Any]]:
    """Return the classes that the folders of a split may be, for each of the nested folders that hold all others.

    Returns:
        The folder, "" or with a slash at the end, and the folder in it of each image, an Arrow
        array, null without one. The last one has two folders or more, if there is any such.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    found = list[tuple[str, Any]]()
    for level in _levels(names):
        below = pc.utf8_slice_codeunits(names, len(level.folder))
        nested = pc.and_(in_folder(names, level.folder.rstrip("/")), pc.match_substring(below, "/"))
        words = pc.if_else(nested, _first_parts(below), pa.scalar(None, pa.large_string()))
        if level.tops or not found:
            found.append((level.folder, words))
    return found


def _level_of_classes(levels: Sequence[tuple[str, Any]], trained: set[str]) -> Any:
    """Return the classes of a split: the outermost folders with a class of training, or with two folders."""
    for _, words in levels:
        if _values(words) & trained:
            return words
    return levels[-1][1] if len(_values(levels[-1][1])) > 1 else levels[0][1]


def _annotated(path: Path, names: Any) -> Any:
    """Return the class of each image by a file of annotations, an Arrow array, null where it lists none."""
    import pyarrow as pa

    found = read_annotations(path)
    files = [name.as_py().rsplit("/", 1)[-1] for name in names]
    missing = sorted(found.keys() - set(files))
    if missing:
        raise InputError(
            f"{path} lists {missing[0]!r}, which is not among the images in {path.parent}"
        )
    return pa.array([found.get(file) for file in files], pa.large_string())


def _values(words: Any) -> set[str]:
    """Return the different classes of an Arrow array."""
    import pyarrow.compute as pc

    return set(pc.unique(words.drop_null()).to_pylist())


def _numbered(words: Any, numbers: Mapping[str, int]) -> NDArray[np.int32]:
    """Return the number of each image's class, -1 without one."""
    encoded = words.dictionary_encode()
    of_words = np.array([*(numbers[word] for word in encoded.dictionary.to_pylist()), -1], np.int32)
    numbered: NDArray[np.int32] = of_words[
        encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    ]
    return numbered


def require_known(trained: Iterable[str], others: Mapping[str, Iterable[str]], source: str) -> None:
    """Refuses classes that a split has and the training split has not.

    Raises:
        InputError: there are such classes.
    """
    for split, classes in others.items():
        strange = sorted(set(classes) - set(trained))
        if strange:
            shown = ", ".join(map(repr, strange[:3])) + (", ..." if len(strange) > 3 else "")
            raise InputError(
                f"{source}: the labels disagree between splits: {split} has {len(strange)} that train has not "
                f"({shown}{_other_form(strange, trained)}); mend them, or leave labels out with --label-column none"
            )


def _other_form(strange: Iterable[str], trained: Iterable[str]) -> str:
    """Return which class of training has the same letters in another Unicode form as a strange one, in words."""
    known = {unicodedata.normalize("NFC", name) for name in trained}
    same = next((name for name in strange if unicodedata.normalize("NFC", name) in known), None)
    return (
        f"; {same!r} has the same letters as a class of train in another Unicode form"
        if same
        else ""
    )


def split_tars(names: Iterable[str], *, asked: bool) -> dict[str, list[str]]:
    """The tars of each split: one of all, "train", if they do not tell.

    Splits are told by the first word of a tar's path that is the name of one (`train/0.tar`,
    `cats-val-0001.tar`), or by its very first word; "dev" only where there is no other.

    Args:
        names: of the tars, relative to their folder.
        asked: whether the user named one: then all are told by their words.
    """
    names, found = list(names), dict[str, list[str]]()
    for name in names:
        words = [word.rstrip("0123456789") for word in re.split(r"[-_./]", name.lower())]
        told = sorted(
            filter(SPLIT_NAMES.__contains__, words), key="dev".__eq__
        )  # a word of other meanings: the last
        found.setdefault((told or words)[0], []).append(name)
    return found if asked or _are_splits(found) else {"train": names}


def open_tars(splits: Mapping[str, Sequence[Path]], image: str | None, label: str | None) -> Opened:
    """Open the splits of WebDataset tars, "train" among them, and find their classes.

    Classes are the texts of the members that end in `.cls`, or in what `label` says, or that field
    of `.json`.

    Raises:
        InputError: a tar is cut off, there are no images, or a class that training lacks.
    """
    column = None if label == "none" else label or "cls"
    counts: dict[str, list[int]] = {split: [] for split in splits}
    classes: dict[str, set[str]] = {split: set() for split in splits}
    left_out = LeftOut()
    further = dict[
        str, None
    ]()  # the endings of members that are not used, in the order of their first ones
    for split, path in ((split, path) for split, tars in splits.items() for path in tars):
        count, images = 0, 0
        for entry in entries_of(path):
            if not isinstance(entry, Sample):
                _add_stray(left_out, path, entry)
                continue
            count += 1
            endings = [ending for ending in entry.members if is_image_ending(ending)]
            if image is None and len(endings) > 1:
                raise InputError(
                    f"samples of {path} have several images; name one with --image-column: {listed(endings, 5)}; "
                    f"members whose names agree up to the first dot are one sample, such as "
                    f"{' and '.join(entry.members[ending].name for ending in endings[:2])}"
                )
            has_image = bool(endings) if image is None else image in entry.members
            images += has_image
            value = entry.value(column) if column else None
            if value is not None:
                classes[split].add(value)
            used = {
                image or next(iter(endings), ""),
                *entry.sources_of(column if value is not None else None),
            }
            for ending in (ending for ending in entry.members if has_image and ending not in used):
                name = f"{path.name}: {entry.members[ending].name}"
                left_out.add(f"further members of samples {ending_of(name)}", name)
                further.setdefault(ending, None)
        if count and not images:
            raise InputError(
                f"{path} holds no images" + (f" that end in .{image}" if image else "")
            )
        counts[split].append(count)
    names = sort_classes(classes["train"])
    if label not in (None, "none") and not names:
        raise InputError(
            f"no sample of {splits['train'][0]} has a .{label} member or such a field in its .json"
        )
    require_known(names, classes, str(splits["train"][0].parent))
    numbered = (
        Column(column, {name: number for number, name in enumerate(names)})
        if names and column
        else None
    )
    readers: dict[str, Reader] = {
        split: TarSamples(tuple(tars), tuple(counts[split]), image, numbered)
        for split, tars in splits.items()
    }
    notes = list[str]()
    if label is None and not names:
        found = (
            f" (there are members ending in {listed([f'.{ending}' for ending in further])})"
            if further
            else ""
        )
        notes.append(
            f"no labels: no training sample has a .cls member{found}; --label-column names the ending of other "
            "members, or a field of the .json ones"
        )
    return Opened(readers, names or None, left_out, notes)


def _add_stray(left_out: LeftOut, path: Path, member: StrayMember) -> None:
    """Count a member of a tar that belongs to no sample."""
    name, place = f"{path.name}: {member.name}", PurePosixPath(member.name)
    if any(map(is_hidden, place.parts)):
        left_out.add(HIDDEN, name)
    elif not member.is_file:
        kind = f"tar members that are links or devices {ending_of(place.name)}"
        left_out.add(kind, name, possible_images=may_hold_images(place.name))
    else:
        left_out.add(
            f"tar members {ending_of(place.name)}",
            name,
            possible_images=may_hold_images(place.name),
        )


def sort_classes(names: Iterable[str]) -> list[str]:
    """Class names in order, by number where all are numbers."""
    ordered = sorted(names)  # "1" and "01" too have one order
    try:
        return sorted(ordered, key=int)
    except ValueError:
        return ordered
