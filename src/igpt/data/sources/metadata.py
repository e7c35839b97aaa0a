"""Metadata files of a folder of images: `metadata.csv`, `.jsonl`, `.parquet`, and annotations.

They are read as text: no column is parsed as numbers, dates or missing values, so "NA", "01" and
"1" are three different words. A metadata file describes the images in its folder and below by the
column `file_name`, which is relative to that folder. N images, R rows.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from igpt.data.left_out import UNLISTED, LeftOut, listed
from igpt.data.sources.classes import class_name, is_missing
from igpt.data.sources.readers import opened_parquet
from igpt.errors import InputError, suggest
from igpt.files import require_regular

FILE_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Tiny ImageNet's file of classes: file name, class and box, separated by tabs.
ANNOTATIONS = "val_annotations.txt"
FILE_NAME, LABEL = "file_name", "label"
_CHUNK = 65536


@dataclass(frozen=True)
class Described:
    """The images of a folder as its metadata files describe them.

    Attributes:
        kept: which images are used, an Arrow array of booleans [N]: those that are listed, and
            those to which no metadata file applies.
        words: the class of each image, an Arrow array of strings [N], null without one; None
            without classes.
        left_out: images that are not listed, and columns, rows and files that are not used.
        columns: the names of the columns, as a sentence.
        further: whether there are columns other than `file_name`.
    """

    kept: Any
    words: Any | None
    left_out: LeftOut
    columns: str
    further: bool


def describe(folder: Path, names: Any, files: Sequence[str], label: str | None) -> Described:
    """Find the images of a folder in its metadata files; the nearest file above an image applies.

    Args:
        names: of all images, relative to the folder, an Arrow array [N].
        files: the metadata files, relative to the folder.
        label: the column of classes; None takes the column `label`, or the only column of Parquet
            with named classes; "none" ignores classes.

    Raises:
        InputError: a file is malformed, lists an image twice, or lists one that is missing; or no
            file has the column `label`.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    columns, left_out = {file: _columns(folder / file) for file in files}, LeftOut()
    if label == "none":
        for file in [file for file in files if FILE_NAME not in columns[file]]:
            left_out.add(f"metadata files without a column {FILE_NAME}", file)
            del columns[file]
    parents = _parents(folder, columns)
    for file, found in columns.items():
        if FILE_NAME not in found:
            raise _no_file_name(folder / file, found)
    column = _label_column(folder, columns, label)
    # Unused columns in their order, by the name of the file.
    unused: dict[str, dict[str, None]] = {}
    for file, names_of_columns in columns.items():
        others = [name for name in names_of_columns if name not in (FILE_NAME, column)]
        unused.setdefault(PurePosixPath(file).name, {}).update(dict.fromkeys(others))
    for file_name, others_of in unused.items():
        if others_of:
            left_out.add(f"columns of {file_name}", listed(list(others_of)), count=len(others_of))
    # The index of each image's row among the rows of all files.
    position = pa.nulls(len(names), pa.int64())
    owned = pc.is_valid(position)
    values, rows = [], 0
    for parent in sorted(parents, key=lambda parent: (-parent.count("/"), parent)):
        file = parents[parent]
        described, words, repeated = _read(
            folder / file, column if column in columns[file] else None
        )
        if repeated:
            rows_of = f"further rows of {PurePosixPath(file).name}"
            left_out.add(rows_of, repeated[0], count=len(repeated))
        inside = pc.starts_with(names, parent)
        own = pc.and_(inside, pc.invert(owned))
        relative = pc.utf8_slice_codeunits(names, len(parent))
        _require_there(folder, file, described, pc.filter(relative, inside), names)
        row = pc.index_in(relative, value_set=described)
        position = pc.if_else(own, pc.add(row.cast(pa.int64()), rows), position)
        owned = pc.or_(owned, own)
        values.append(words)
        rows += len(described)
    kept = pc.or_(pc.is_valid(position), pc.invert(owned))
    dropped = pc.filter(names, pc.invert(kept))
    if len(dropped):
        left_out.add(UNLISTED, dropped[0].as_py(), count=len(dropped), possible_images=True)
    words = pc.take(pa.concat_arrays(values), position) if column else None
    known = _further_columns(columns)
    content = f"the columns {listed(known)}" if known else f"no column but {FILE_NAME}"
    return Described(kept, words, left_out, f"{files[0]} has {content}", bool(known))


def read_annotations(path: Path) -> dict[str, str]:
    """Return the class of each image by its file name, from Tiny ImageNet's `val_annotations.txt`.

    Raises:
        InputError: it is not readable, a line has no second field, or a file is listed twice.
    """
    found: dict[str, str] = {}
    require_regular(path)
    with _utf8(path):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    for number, line in enumerate(lines, 1):
        name, _, rest = line.partition("\t")
        word = rest.split("\t", 1)[0].strip()
        if not line.strip():
            continue
        if not word:
            raise InputError(
                f"{path}, line {number}: a file name, a tab and a class are needed, not "
                f"{line[:80]!r}"
            )
        if name in found:
            raise InputError(f"{path}, line {number}: {name!r} is listed twice")
        found[name] = word
    return found


def _parents(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """Return the metadata file of each folder with one; folders end with a slash or are empty."""
    parents: dict[str, str] = {}
    for file in files:
        parent = file[: file.rfind("/") + 1]
        other = parents.setdefault(parent, file)
        if other != file:
            raise InputError(
                f"{folder / parent} has two metadata files, {other} and {file}; keep one"
            )
    return parents


def _further_columns(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the names of the columns of all files, without the column of file names."""
    names = (name for of_file in columns.values() for name in of_file)
    return [name for name in dict.fromkeys(names) if name != FILE_NAME]


def _label_column(
    folder: Path, columns: Mapping[str, Sequence[str]], label: str | None
) -> str | None:
    known = _further_columns(columns)
    if label == "none":
        return None
    if label is not None:
        if label not in known:
            first, near = folder / next(iter(columns)), suggest(label, [*known, "none"])
            raise InputError(f"{first} has no column {label!r}; {near}")
        return label
    if LABEL in known:
        return LABEL
    parquet = [folder / file for file in columns if file.endswith(".parquet")]
    named = {name for path in parquet for name in _class_names(path)}
    return named.pop() if len(named) == 1 else None


def _require_there(folder: Path, file: str, described: Any, images: Any, names: Any) -> None:
    """Raise if a metadata file lists a file that does not exist.

    Listed files that exist and are not images are left out elsewhere.

    Args:
        described: the file names that the metadata file lists.
        images: the images in its folder and below, relative to it.
        names: the images in the whole folder.
    """
    import pyarrow.compute as pc

    path = folder / file
    for value in pc.filter(described, pc.invert(pc.is_in(described, value_set=images))):
        name = value.as_py()
        inside = not name.startswith("/") and ".." not in name.split("/")
        # `os.path.exists` raises for no name; `Path.exists` does.
        if not inside or not os.path.exists(path.parent / name):  # noqa: PTH110
            base = PurePosixPath(name).name
            same = pc.filter(names, pc.or_(pc.ends_with(names, f"/{base}"), pc.equal(names, base)))
            advice = ""
            if len(same) == 1:
                image = folder / same[0].as_py()
                advice = (
                    f"; {FILE_NAME} is relative to the folder of the metadata file, and {image} "
                    f"has that name: {_where(image, path)}"
                )
            raise InputError(f"{path} lists {name!r}, which is not in {path.parent}{advice}")


def _where(image: Path, metadata: Path) -> str:
    """Return how a metadata file can list an image, as advice."""
    if image.is_relative_to(metadata.parent):
        return f"write {image.relative_to(metadata.parent).as_posix()!r}"
    common = Path(os.path.commonpath([image.parent, metadata.parent]))
    return f"move the metadata file to {common}"


def _columns(path: Path) -> list[str]:
    """Return the names of the columns."""
    require_regular(path)
    if path.suffix == ".parquet":
        with opened_parquet(str(path)) as parquet:
            names = list(parquet.schema_arrow.names)
    elif path.suffix == ".jsonl":
        names = list(dict.fromkeys(name for _, row in _json_rows(path) for name in row))
    else:
        names = next((cells for _, cells in _csv_rows(path)), [])
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"{path} has two columns {twice[0]!r}")
    return names


def _no_file_name(path: Path, names: Sequence[str]) -> InputError:
    found = listed(list(map(repr, names))) or "none"
    wrong = [mark for mark in ";\t|" if len(names) == 1 and mark in names[0]]
    if wrong:
        advice = f"is it separated by {wrong[0]!r}? commas are needed"
    else:
        advice = (
            f"rename the column of file names to {FILE_NAME}, or rename the file if it does not "
            "describe images"
        )
    return InputError(f"{path} has no column {FILE_NAME!r}; its columns: {found}; {advice}")


def _read(path: Path, column: str | None) -> tuple[Any, Any, list[str]]:
    """Return the rows of a metadata file; rows that repeat an image and its class are dropped.

    Returns:
        The file names and their classes, Arrow arrays of strings [R], classes with nulls; and the
        file names of the dropped rows.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = pa.large_string()
    names, words = [pa.array([], kind)], [pa.array([], kind)]
    pairs = _pairs(path, column)
    try:
        while chunk := list(islice(pairs, _CHUNK)):
            names.append(pa.array([name for name, _ in chunk], kind))
            words.append(pa.array([word for _, word in chunk], kind))
    except UnicodeEncodeError as error:
        raise InputError(f"{path} holds {error.object!r}, which is not UTF-8") from None
    described, classes = pa.concat_arrays(names), pa.concat_arrays(words)
    if len(pc.unique(described)) == len(described):
        return described, classes, []
    seen, kept, repeated = dict[str, str | None](), list[int](), list[str]()
    rows = zip(described.to_pylist(), classes.to_pylist(), strict=True)
    for row, (name, word) in enumerate(rows):
        if name not in seen:
            seen[name] = word
            kept.append(row)
        elif seen[name] == word:
            repeated.append(name)
        else:
            raise InputError(
                f"{path} lists {name!r} twice, with the classes {seen[name]!r} and {word!r}; one "
                "class for each image is needed"
            )
    return described.take(pa.array(kept)), classes.take(pa.array(kept)), repeated


def _pairs(path: Path, column: str | None) -> Iterator[tuple[str, str | None]]:
    """Yield the file name and the class of each row."""
    rows: Iterator[tuple[int, dict[str, Any]]]
    class_names: dict[str, list[str]] = {}
    if path.suffix == ".parquet":
        rows, class_names = _parquet_rows(path, column), _class_names(path)
    elif path.suffix == ".jsonl":
        rows = _json_rows(path)
    else:
        rows = _csv_objects(path)
    for number, row in rows:
        name, value = row.get(FILE_NAME), row.get(column) if column else None
        if not isinstance(name, str) or not name:
            raise InputError(
                f"{path}, row {number}: file_name is {name!r}; the name of one file is needed"
            )
        if isinstance(value, dict | list):
            raise InputError(
                f"{path}, row {number}: the column {column!r} holds {str(value)[:60]}; one class "
                "is needed"
            )
        if path.suffix == ".jsonl" and isinstance(value, float):
            value = None if is_missing(value) else str(value)
        yield _normal(name), _word(value, class_names.get(column or ""))


def _word(value: Any, class_names: list[str] | None) -> str | None:
    if is_missing(value):
        return None
    if class_names is not None and isinstance(value, int):
        return class_names[value] if 0 <= value < len(class_names) else None
    return class_name(value).strip() or None


def _normal(name: str) -> str:
    """Return a relative path with slashes and without "." parts."""
    return str(PurePosixPath(name.replace("\\", "/")))


@contextmanager
def _utf8(path: Path) -> Iterator[None]:
    """Raise an `InputError` where a file is not UTF-8."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not readable as UTF-8 ({error.reason} at byte {error.start}); convert it"
        ) from None


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the cells of each row, the header first, without empty lines."""
    try:
        with _utf8(path), path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header: list[str] | None = None
            for cells in reader:
                if not cells or (len(cells) == 1 and not cells[0].strip()):
                    continue
                if header is None:
                    header = cells = [cell.strip() for cell in cells]
                if len(cells) != len(header):
                    advice = "; put cells with commas into quotation marks"
                    raise InputError(
                        f"{path}, line {reader.line_num}: {len(cells)} cells where the header has "
                        f"{len(header)}{advice if len(cells) > len(header) else ''}"
                    )
                yield reader.line_num, cells
    except csv.Error as error:
        raise InputError(
            f"{path} is not readable as CSV: line {reader.line_num}: {error}"
        ) from None


def _csv_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = _csv_rows(path)
    _, header = next(rows)
    for number, cells in rows:
        yield number, dict(zip(header, cells, strict=True))


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the object of each row."""
    number = 0
    try:
        with _utf8(path), path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise InputError(
                        f"{path}, line {number}: a JSON object is needed, not {line.strip()[:60]!r}"
                    )
                yield number, row
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}, line {number}: not readable as JSON ({error}); one object per line is needed"
        ) from None


def _parquet_rows(path: Path, column: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number, from 1, and two columns of each row."""
    columns = [FILE_NAME, *([column] if column else [])]
    with opened_parquet(str(path)) as parquet:
        batches = parquet.iter_batches(_CHUNK, columns=columns, use_threads=False)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


def _class_names(path: Path) -> dict[str, list[str]]:
    """Return the class names of the columns of a Parquet file that have some."""
    from datasets import ClassLabel, Features

    with opened_parquet(str(path)) as parquet:
        features = Features.from_arrow_schema(parquet.schema_arrow)
    return {
        name: list(feature.names)
        for name, feature in features.items()
        if isinstance(feature, ClassLabel)
    }
