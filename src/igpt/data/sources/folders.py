"""Folders of image files: their content, splits and classes.

A folder is on this machine, in ZIP archives (their members), or behind a URL (objects with a common
prefix). Names of files are relative to the folder and kept in Arrow arrays, since there may be
millions.
"""

import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from igpt.data.left_out import HIDDEN, OUTSIDE, SPECIAL, LeftOut, listed
from igpt.data.sources.classes import require_known, sort_classes
from igpt.data.sources.file_kinds import (
    PACKED,
    ending_of,
    image_endings,
    is_hidden,
    may_hold_images,
)
from igpt.data.sources.metadata import ANNOTATIONS, FILE_NAMES, describe, read_annotations
from igpt.data.sources.readers import ImageFiles, Reader
from igpt.data.sources.splits import SPLIT_NAMES, Opened, Splits, are_splits
from igpt.errors import InputError

# Images next to the folders of splits or classes are ignored when they are fewer than 1 in 10.
_STRAY_FACTOR = 10
_CHUNK = 65536


class Files(Protocol):
    """The place of the files of a folder."""

    def where(self, name: str) -> str:
        """Return the name by which a user finds a file or folder in it; "" is the folder."""

    def local(self, names: Sequence[str]) -> AbstractContextManager[Path]:
        """Return a context with a folder of this machine that has some small files of it."""

    def reader(
        self, top: str, names: Any, positions: NDArray[np.int64], labels: NDArray[np.int32] | None
    ) -> Reader:
        """Return a reader of images [N].

        Args:
            top: the folder they are in.
            names: relative to `top`, an Arrow array [N].
            positions: see `Listing`.
            labels: see `ImageFiles`.
        """


@contextmanager
def copies(source: str, contents: Mapping[str, bytes]) -> Iterator[Path]:
    """Yield a temporary folder with some files of another folder; errors name that, `source`."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, content in contents.items():
            if ".." in name.split("/"):
                raise InputError(f"{source} has a file {name!r}; rename it")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        try:
            yield folder
        except InputError as error:
            raise InputError(str(error).replace(str(folder), source)) from None


@dataclass(frozen=True)
class LocalFiles:
    """A folder of this machine."""

    folder: Path

    def where(self, name: str) -> str:
        """See `Files`."""
        return str(self.folder / name)

    def local(self, names: Sequence[str]) -> AbstractContextManager[Path]:
        """See `Files`."""
        return nullcontext(self.folder)

    def reader(
        self, top: str, names: Any, positions: NDArray[np.int64], labels: NDArray[np.int32] | None
    ) -> Reader:
        """See `Files`."""
        return ImageFiles(self.folder / top, names, labels)


@dataclass(frozen=True)
class Listing:
    """The files below a folder, by kind; all names are relative to it.

    Attributes:
        images: files whose endings Pillow reads, an Arrow array [N].
        positions: of the images among all entries of the folder, int64 [N], ascending.
        packed: files of many images, by their endings (see `PACKED`).
        metadata: files that describe images.
        annotations: Tiny ImageNet's files of classes.
        zips: ZIP archives, which are also in `left_out`.
        left_out: all other files.
    """

    images: Any
    positions: NDArray[np.int64]
    packed: dict[str, list[str]]
    metadata: list[str]
    annotations: list[str]
    zips: list[str]
    left_out: LeftOut


def list_folder(folder: Path) -> Listing:
    """Return the files below a folder by kind; no file is opened.

    Raises:
        InputError: a folder cannot be read, or the name of an image is not UTF-8.
    """
    return listing_of(_walk(folder), str(folder))


Kind = Literal["file", "hidden", "special", "ignored"]


def with_kinds(names: Iterable[str]) -> Iterator[tuple[str, Kind]]:
    """Yield names of files, relative to their folder, with their kinds.

    A hidden or system folder is yielded once, with a slash at the end; its other files, and names
    of folders, are "ignored".
    """
    seen = set[str]()
    for name in names:
        parts = name.split("/")
        depth = next((depth for depth, part in enumerate(parts, 1) if is_hidden(part)), None)
        hidden = "/".join(parts[:depth]) + ("/" if depth and depth < len(parts) else "")
        if name.endswith("/") or (depth and hidden in seen):
            yield name, "ignored"
        elif depth:
            seen.add(hidden)
            yield hidden, "hidden"
        else:
            yield name, "file"


def listing_of(entries: Iterable[tuple[str, Kind]], folder: str) -> Listing:
    """Return the entries of a folder by kind.

    Raises:
        InputError: the name of an image is not UTF-8.
    """
    import pyarrow as pa

    chunks, names, positions = [pa.array([], pa.large_string())], list[str](), array("q")
    packed: dict[str, list[str]] = {ending: [] for ending in PACKED}
    metadata, annotations, left_out = list[str](), list[str](), LeftOut()
    zips = list[str]()
    endings = image_endings()
    for position, (name, kind) in enumerate(entries):
        if kind == "ignored":
            continue
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
            positions.append(position)
            if len(names) == _CHUNK:
                chunks.append(_utf8(names, folder))
                names = []
        else:
            left_out.add(f"files {ending_of(file)}", name, possible_images=may_hold_images(file))
            if ending == ".zip":
                zips.append(name)
    chunks.append(_utf8(names, folder))
    images = pa.concat_arrays(chunks)
    if not len(images):  # Without images, metadata files describe nothing.
        packed[".parquet"] += [name for name in metadata if name.endswith(".parquet")]
        for name in [*(name for name in metadata if not name.endswith(".parquet")), *annotations]:
            left_out.add(f"files {ending_of(name)}", name)
        metadata, annotations = [], []
    where = np.array(positions, np.int64)
    return Listing(images, where, packed, metadata, annotations, zips, left_out)


def _utf8(names: list[str], folder: str) -> Any:
    import pyarrow as pa

    try:
        return pa.array(names, pa.large_string())
    except UnicodeEncodeError as error:
        raise InputError(
            f"the name of the image {error.object!r} in {folder} is not UTF-8; rename it"
        ) from None


def _walk(folder: Path) -> Iterator[tuple[str, Kind]]:
    """Yield the files below a folder, at any depth, in the same order on every machine.

    Hidden and system folders are yielded with a slash at the end, and their files are not. Links
    are followed, except back to a folder that contains them. FIFOs, sockets and devices are
    "special".

    Raises:
        InputError: a folder cannot be read.
    """
    # Each entry has the identities of the folders that contain it, or None if it is not entered.
    parents = frozenset(map(_identity, folder.resolve().parents))
    waiting: list[tuple[str, Kind, frozenset[tuple[int, int]] | None]] = [("", "file", parents)]
    while waiting:
        name, kind, parents_or_none = waiting.pop()
        if parents_or_none is None:
            yield name, kind
            continue
        identity = _identity(folder / name)
        if identity in parents_or_none:
            continue
        try:
            with os.scandir(folder / name) as scanned:
                entries = sorted((entry.name, *_type_of(entry)) for entry in scanned)
        except OSError as error:
            raise InputError(f"cannot read the folder {folder / name}: {error.strerror}") from None
        for entry, is_folder, is_special in reversed(entries):
            path = f"{name}{entry}{'/' if is_folder else ''}"
            if is_hidden(entry):
                waiting.append((path, "hidden", None))
            elif is_folder:
                waiting.append((path, "file", parents_or_none | {identity}))
            else:
                waiting.append((path, "special" if is_special else "file", None))


def _identity(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror}") from None
    return status.st_dev, status.st_ino


def _type_of(entry: os.DirEntry[str]) -> tuple[bool, bool]:
    """Return whether an entry is a folder, and whether it is a FIFO, a socket or a device.

    Links to FIFOs and the like count as files; opening them raises.
    """
    try:
        if entry.is_dir():
            return True, False
        return False, not (entry.is_file() or entry.is_symlink())
    except OSError:  # A link to itself counts as a file; opening it raises.
        return False, False


class _Level(NamedTuple):
    """A folder that holds all images, or almost all.

    Attributes:
        folder: its name, "" or with a slash at the end.
        tops: the folders in it.
        alone: whether (almost) all of its images are in these folders.
    """

    folder: str
    tops: list[str]
    alone: bool


def split_folders(names: Any) -> tuple[Splits, Splits]:
    """Return the folders of the splits: by their names, and where the user names a split.

    Folders called `train`, `val` and the like are splits at the top, or below a folder that holds
    everything; the folders next to them are splits too. Folders whose names contain such a word
    (`training_set`, `test_set`) are splits where the meaning is clear. Images above the splits are
    ignored when they are fewer than one in ten. Without folders of splits, the split `train` is
    the whole folder; where the user names a split, every folder at the top is one.

    Args:
        names: of all images, an Arrow array.
    """
    levels = _levels(names)
    last = levels[-1]
    known = [level for level in levels if len(level.tops) == 1]
    known = [level for level in known if are_splits(level.tops, alone=level.alone)]
    if len(last.tops) > 1 and are_splits(last.tops):
        known = [last]
    if known:
        folders = {top: f"{known[0].folder}{top}" for top in known[0].tops}
        splits = Splits(folders, _outside(names, folders))
        return splits, splits
    folders, notes = _splits_by_words(last)
    named = {top: top for top in levels[0].tops}
    return Splits(folders, _outside(names, folders), notes), Splits(named, _outside(names, named))


def _levels(names: Any) -> list[_Level]:
    """Return the folder, and the only folders in it that hold (almost) all images."""
    import pyarrow.compute as pc

    levels, folder = list[_Level](), ""
    while True:
        inside = pc.filter(names, pc.match_substring(names, "/"))
        tops = sorted(pc.unique(_first_parts(inside)).to_pylist())
        strays = len(names) - len(inside)
        alone = not strays or strays * _STRAY_FACTOR < len(names)
        levels.append(_Level(folder, tops, alone))
        if len(tops) != 1 or not alone:
            return levels
        names = pc.utf8_slice_codeunits(inside, len(tops[0]) + 1)
        folder += f"{tops[0]}/"


def _splits_by_words(level: _Level) -> tuple[dict[str, str], list[str]]:
    """Return the folders of the splits by words in their names, and notes.

    The meaning is clear with one folder for each split, training among them. Other folders are
    further splits where the names of the splits differ in these words only, such as `seg_train`,
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
        return {"train": ""}, []
    one_each = "train" in found and sum(map(len, found.values())) == len(found) == len(named)
    if one_each and (len(named) == len(level.tops) or len(rests) == 1):
        splits_of = {tops[0]: split for split, tops in found.items()}
        used = ", ".join(f"{level.folder}{top} as {split}" for top, split in splits_of.items())
        note = (
            f"folders taken as splits by the words in their names: {used}; "
            "--train-split names another"
        )
        return {splits_of.get(top, top): f"{level.folder}{top}" for top in level.tops}, [note]
    source = f"give the folder {level.folder} and " if level.folder else ""
    note = (
        f"the names of {listed(named)} contain the names of splits, and they are not taken as "
        f"splits; if they are, {source}--train-split, --validation-split and --test-split name them"
    )
    return {"train": ""}, [note]


def _outside(names: Any, folders: Mapping[str, str]) -> LeftOut:
    """Return the images that are in none of the folders of the splits."""
    import pyarrow.compute as pc

    left_out = LeftOut()
    outside = names
    for folder in folders.values():
        outside = pc.filter(outside, pc.invert(in_folder(outside, folder)))
    # Without any folder, choosing a split raises.
    if len(outside) and folders:
        left_out.add(OUTSIDE, outside[0].as_py(), count=len(outside), possible_images=True)
    return left_out


def _first_parts(names: Any) -> Any:
    import pyarrow.compute as pc

    return pc.list_element(pc.split_pattern(names, "/", max_splits=1), 0)


def in_folder(names: Any, folder: str) -> Any:
    """Return which names are below a folder, an Arrow array of booleans; all are below ""."""
    import pyarrow.compute as pc

    return pc.starts_with(names, f"{folder}/" if folder else "")


def open_images(
    files: Files, listing: Listing, splits: Mapping[str, str], image: str | None, label: str | None
) -> Opened:
    """Open the splits of a folder of images and find its classes.

    If the metadata files have a column of classes, it gives the classes. Otherwise the class of an
    image is the first folder below its split, if the training images are in two or more; a single
    folder around these is ignored. A few images outside these folders have no label.

    Args:
        splits: the folder of each split, "train" among them.
        image, label: requested columns; the label "none" ignores classes.

    Raises:
        InputError: malformed metadata, no such column, or labels that disagree between splits.
    """
    import pyarrow.compute as pc

    if image is not None:
        raise InputError(f"{files.where('')} has no column {image!r}: it holds files of images")
    if label not in (None, "none") and not listing.metadata:
        raise InputError(
            f"{files.where('')} has no column {label!r}: the classes of images in folders are "
            "their folders"
        )

    # 1. The images that metadata files list, and their classes.
    names, positions = listing.images, listing.positions
    left_out, notes = LeftOut(), list[str]()
    described = words = None
    if listing.metadata:
        with files.local(listing.metadata) as folder:
            described = describe(folder, names, listing.metadata, label)
        left_out.update(described.left_out)
        names = pc.filter(names, described.kept)
        positions = positions[_mask(described.kept)]
        if described.words is not None:
            words = pc.filter(described.words, described.kept)

    # 2. The images of each split, relative to its folder.
    masks = {split: in_folder(names, top) for split, top in splits.items()}
    inside = {
        split: pc.utf8_slice_codeunits(pc.filter(names, masks[split]), len(top) + 1 if top else 0)
        for split, top in splits.items()
    }

    # 3. The class of each image, by metadata or by folder.
    classes, annotated = dict[str, Any](), dict[str, str]()
    trained = list[str]()
    if words is not None:
        classes = {split: pc.filter(words, masks[split]) for split in splits}
        trained = sort_classes(_values(classes["train"]))
    elif label is None:
        found = {f"{splits[split]}/{ANNOTATIONS}": split for split in splits if split != "train"}
        annotated = {found[file]: file for file in listing.annotations if file in found}
        classes, notes = _folder_classes(files, splits, inside, annotated)
        trained = sorted(_values(classes["train"])) if classes else []
        if described:
            advice = "--label-column names a column of classes"
            if trained:
                notes.append(f"the classes are the folders: {described.columns}; {advice}")
            else:
                further = "; --label-column names one" if described.further else ""
                notes = [f"no labels: {described.columns}{further}"]
    for file in listing.annotations:
        if not classes or file not in annotated.values():
            left_out.add(f"files {ending_of(file)}", file)
    found_in = {split: _values(words) for split, words in classes.items()}
    require_known(trained, found_in, files.where(""))

    # 4. Readers.
    numbers = {name: number for number, name in enumerate(trained)}
    readers: dict[str, Reader] = {
        split: files.reader(
            top,
            inside[split],
            positions[_mask(masks[split])],
            _numbered(classes[split], numbers) if trained else None,
        )
        for split, top in splits.items()
    }
    return Opened(readers, trained or None, left_out, notes)


def _folder_classes(
    files: Files, splits: Mapping[str, str], inside: Mapping[str, Any], annotated: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the class of each image of each split, null without one, and notes.

    There are no splits where there are no classes.

    Args:
        inside: the names of each split's images, relative to it.
        annotated: the files of classes of some splits.
    """
    import pyarrow as pa

    levels, notes = {split: _class_levels(names) for split, names in inside.items()}, list[str]()
    home, words = levels["train"][-1]
    trained = _values(words)
    top = files.where(splits["train"])
    others = [split for split in splits if split != "train"]
    if len(trained) < 2:
        with_classes = [split for split in others if len(_values(levels[split][-1][1])) > 1]
        if with_classes:
            other = files.where(splits[with_classes[0]])
            notes.append(f"no labels: {other} has folders of classes, and {top} has none")
        elif trained:
            notes.append(
                f"no labels: the images in {top} are in one folder, {home + trained.pop()!r}, and "
                "classes are two folders or more; a metadata.csv with the columns file_name and "
                "label gives classes"
            )
        return {}, notes
    if words.null_count * _STRAY_FACTOR >= len(words):
        first = inside["train"][words.is_null().index(True).as_py()]
        inner = files.where(f"{splits['train']}/{home}".strip("/"))
        notes.append(
            f"no labels: {words.null_count} of {len(words)} images are directly in {inner}, next "
            f"to its {len(trained)} folders (first: {first})"
        )
        return {}, notes
    classes = {split: _level_of_classes(of_split, trained) for split, of_split in levels.items()}
    for split in others:
        names, known = inside[split], _values(classes[split])
        if split in annotated:
            with files.local([annotated[split]]) as folder:
                classes[split] = _annotated(folder / annotated[split], names)
        elif len(known) == 1 and not known & trained and not classes[split].null_count:
            classes[split] = pa.nulls(len(names), pa.large_string())
            notes.append(
                f"no labels in {files.where(splits[split])}: all its images are in one folder, "
                f"{known.pop()!r}, which is not a class of the training images"
            )
    return classes, notes


def _class_levels(names: Any) -> list[tuple[str, Any]]:
    """Return the possible classes of the images of a split, at each level of nested folders.

    Returns:
        Pairs of a folder, "" or with a slash at the end, and the folder in it of each image, an
        Arrow array with nulls. Only the last level can have two folders or more.
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
    """Return the classes at the outermost level with a class of training, or with two folders."""
    for _, words in levels:
        if _values(words) & trained:
            return words
    return levels[-1][1] if len(_values(levels[-1][1])) > 1 else levels[0][1]


def _annotated(path: Path, names: Any) -> Any:
    """Return the class of each image by a file of annotations, an Arrow array with nulls."""
    import pyarrow as pa

    found = read_annotations(path)
    files = [name.as_py().rsplit("/", 1)[-1] for name in names]
    missing = sorted(found.keys() - set(files))
    if missing:
        raise InputError(
            f"{path} lists {missing[0]!r}, which is not among the images in {path.parent}"
        )
    return pa.array([found.get(file) for file in files], pa.large_string())


def _mask(chosen: Any) -> NDArray[np.bool_]:
    """Return an Arrow array of booleans as NumPy's."""
    mask: NDArray[np.bool_] = chosen.to_numpy(zero_copy_only=False)
    return mask


def _values(words: Any) -> set[str]:
    """Return the distinct values of an Arrow array."""
    import pyarrow.compute as pc

    return set(pc.unique(words.drop_null()).to_pylist())


def _numbered(words: Any, numbers: Mapping[str, int]) -> NDArray[np.int32]:
    """Return the number of each image's class, -1 without one."""
    encoded = words.dictionary_encode()
    of_words = np.array([*(numbers[word] for word in encoded.dictionary.to_pylist()), -1], np.int32)
    indices = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    numbered: NDArray[np.int32] = of_words[indices]
    return numbered
