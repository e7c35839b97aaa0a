"""Folders of image files and of WebDataset tars: what is in them, which split it belongs to, and the classes."""

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from igpt.data.readers import Column, ImageFiles, Reader, TarSamples, is_image_ending, samples_of
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


def files_below(folder: Path) -> Iterator[str]:
    """The files below a folder, to any depth, as paths relative to it, in an order that is the same everywhere.

    Hidden files and folders are left out. Links are followed, but not back to a folder that holds them.

    Raises:
        InputError: a folder cannot be read.
    """
    waiting: list[tuple[str, frozenset[tuple[int, int]] | None]]  # files have no folders above them here
    waiting = [("", frozenset(map(_identity, folder.resolve().parents)))]
    while waiting:
        name, above = waiting.pop()
        if above is None:
            yield name
            continue
        here = _identity(folder / name)
        if here in above:
            continue
        try:
            with os.scandir(folder / name) as found:
                entries = sorted((entry.name, _is_folder(entry)) for entry in found if not entry.name.startswith("."))
        except OSError as error:
            raise InputError(f"cannot read the folder {folder / name}: {error.strerror}") from None
        inside = above | {here}
        for entry, is_folder in reversed(entries):
            waiting.append((f"{name}{entry}/", inside) if is_folder else (name + entry, None))


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


def split_folders(names: Any, *, asked: bool) -> dict[str, str]:
    """The folders that hold the splits of a folder of images, by their own names: one of all, "train", if none do.

    `train`, `val` and the like name splits as folders at the top, and nowhere else; those beside them are splits too.

    Args:
        names: of all the images in it, relative to it, an Arrow array.
        asked: whether the user named one: then the folders at the top are splits, whatever their names.
    """
    import pyarrow.compute as pc

    inside = pc.filter(names, pc.match_substring(names, "/"))
    tops = sorted(pc.unique(pc.list_element(pc.split_pattern(inside, "/", max_splits=1), 0)).to_pylist())
    told = asked or _are_splits(tops, alone=len(inside) == len(names))
    return {top: top for top in tops} if told else {"train": ""}


def _are_splits(names: Collection[str], *, alone: bool = True) -> bool:
    # A class may be called "train": it is a split where it stands alone, or beside another one.
    named = [SPLIT_NAMES[name.lower()] for name in names if name.lower() in SPLIT_NAMES]
    return "train" in named and (len(named) > 1 or (alone and len(names) == 1))


def open_images(
    folder: Path, names: Any, splits: Mapping[str, str], image: str | None, label: str | None
) -> tuple[dict[str, Reader], list[str] | None]:
    """The splits of a folder of images, and its class names.

    Where all the training images lie in folders directly below their split, two or more, these are the classes.

    Args:
        names: of all the images in it, relative to it, an Arrow array.
        splits: the folder that holds each split, "train" among them.
        image, label: columns that were asked for, of which there are none; the label "none" looks for no classes.

    Raises:
        InputError: labels that disagree between splits.
    """
    import pyarrow.compute as pc

    if image is not None:
        raise InputError(f"{folder} has no column {image!r}: it holds files of images")
    if label not in (None, "none"):
        raise InputError(f"{folder} has no column {label!r}: the classes of images in folders are their folders")
    found = {}
    for split, top in splits.items():
        inside = pc.filter(names, pc.starts_with(names, f"{top}/")) if top else names
        found[split] = folder / top, pc.utf8_slice_codeunits(inside, len(top) + 1 if top else 0)
    kinds = {split: None if label else _class_folders(inside) for split, (_, inside) in found.items()}
    trained = kinds["train"] or []
    if len(trained) < 2:
        return {split: ImageFiles(home, inside, None) for split, (home, inside) in found.items()}, None
    require_known(trained, {split: kind for split, kind in kinds.items() if kind}, str(folder))
    numbers = {name: number for number, name in enumerate(trained)}
    return {
        split: ImageFiles(home, inside, numbers if kinds[split] else None) for split, (home, inside) in found.items()
    }, trained


def _class_folders(names: Any) -> list[str] | None:
    """The folders that the images lie in, if all lie exactly one below the top."""
    import pyarrow.compute as pc

    if not pc.all(pc.equal(pc.count_substring(names, "/"), 1)).as_py():
        return None
    return sorted(pc.unique(pc.list_element(pc.split_pattern(names, "/"), 0)).to_pylist())


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
                f"({shown}); mend them, or leave labels out with --label-column none"
            )


def split_tars(names: Iterable[str], *, asked: bool) -> dict[str, list[str]]:
    """The tars of each split: one of all, "train", if they do not tell.

    Splits are told by the first word of a tar's path that is the name of one (`train/0.tar`, `cats-val-0001.tar`), or
    by its very first word; "dev" only where there is no other.

    Args:
        names: of the tars, relative to their folder.
        asked: whether the user named one: then all are told by their words.
    """
    names, found = list(names), dict[str, list[str]]()
    for name in names:
        words = [word.rstrip("0123456789") for word in re.split(r"[-_./]", name.lower())]
        told = sorted(filter(SPLIT_NAMES.__contains__, words), key="dev".__eq__)  # a word of other meanings: the last
        found.setdefault((told or words)[0], []).append(name)
    return found if asked or _are_splits(found) else {"train": names}


def open_tars(
    splits: Mapping[str, Sequence[Path]], image: str | None, label: str | None
) -> tuple[dict[str, Reader], list[str] | None]:
    """The splits of WebDataset tars, "train" among them, and their class names.

    Classes are the texts of the members that end in `.cls`, or in what `label` says, or that field of `.json`.

    Raises:
        InputError: a tar is cut off, there are no images, or a class that training lacks.
    """
    column = None if label == "none" else label or "cls"
    counts: dict[str, list[int]] = {split: [] for split in splits}
    classes: dict[str, set[str]] = {split: set() for split in splits}
    for split, path in ((split, path) for split, tars in splits.items() for path in tars):
        count, images = 0, 0
        for sample in samples_of(path):
            count += 1
            endings = [ending for ending in sample.members if is_image_ending(ending)]
            if image is None and len(endings) > 1:
                raise InputError(f"samples of {path} have several images; name one with --image-column: {endings}")
            images += bool(endings) if image is None else image in sample.members
            if column and (value := sample.value(column)) is not None:
                classes[split].add(value)
        if count and not images:
            raise InputError(f"{path} holds no images" + (f" that end in .{image}" if image else ""))
        counts[split].append(count)
    names = sort_classes(classes["train"])
    if label not in (None, "none") and not names:
        raise InputError(f"no sample of {splits['train'][0]} has a .{label} member or such a field in its .json")
    require_known(names, classes, str(splits["train"][0].parent))
    numbered = Column(column, {name: number for number, name in enumerate(names)}) if names and column else None
    return {
        split: TarSamples(tuple(tars), tuple(counts[split]), image, numbered) for split, tars in splits.items()
    }, names or None


def sort_classes(names: Iterable[str]) -> list[str]:
    """Class names in order, by number where all are numbers."""
    ordered = sorted(names)  # "1" and "01" too have one order
    try:
        return sorted(ordered, key=int)
    except ValueError:
        return ordered
