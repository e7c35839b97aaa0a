"""Tables of images: Parquet and Arrow files, folders written by `datasets`, and the Hub."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from igpt.data.left_out import COLUMNS, LeftOut, listed
from igpt.data.sources.classes import (
    ClassColumn,
    class_name,
    is_missing,
    require_known,
    sort_classes,
)
from igpt.data.sources.metadata import LABEL
from igpt.data.sources.readers import ParquetRows, Reader, TableRows, opened_parquet
from igpt.data.sources.splits import Opened
from igpt.errors import InputError, suggest
from igpt.files import Stored, read_json, require_regular

_FINE_AND_COARSE = ["coarse_label", "fine_label"]  # CIFAR-100's two sets of classes


@dataclass(frozen=True)
class ArrowTable:
    """A split loaded by `datasets`: memory-mapped, or small and in memory."""

    table: Any

    @property
    def features(self) -> Mapping[str, Any]:
        """The columns and their types."""
        return self.table.features  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self.table)

    def values(self, column: str) -> set[Any]:
        """Return all values of a column, missing ones too."""
        return set(self.table.unique(column))

    def rows(self, image: str, label: ClassColumn | None) -> TableRows:
        """Return a reader of two columns; no other column is read."""
        from datasets import Image

        columns = self.table.select_columns([image, label.name] if label else [image])
        return TableRows(columns.cast_column(image, Image(decode=False)), image, label)


@dataclass(frozen=True)
class ParquetTable:
    """A split in Parquet files, read in place: on this machine or on the Hub."""

    files: tuple[str, ...]
    counts: tuple[int, ...]
    features: Mapping[str, Any]

    @classmethod
    def open(cls, files: Sequence[str], features: Mapping[str, Any] | None) -> "ParquetTable":
        """Read the footers of the files, which hold the number of rows and the columns."""
        from datasets import Features

        def footer(file: str) -> tuple[int, Any]:
            with opened_parquet(file) as parquet:
                return parquet.metadata.num_rows, parquet.schema_arrow

        # A remote file takes a second, and there may be hundreds.
        with ThreadPoolExecutor(16) as threads:
            footers = list(threads.map(footer, files))
        columns = [Features.from_arrow_schema(schema) for _, schema in footers]
        for file, found in zip(files, columns, strict=True):
            if _classes_of(found) != _classes_of(columns[0]):
                raise InputError(
                    f"{file} has other columns than {files[0]}, or other class names: "
                    f"{', '.join(found)}"
                )
        return cls(tuple(files), tuple(count for count, _ in footers), features or columns[0])

    def __len__(self) -> int:
        return sum(self.counts)

    def values(self, column: str) -> set[Any]:
        """Return all values of a column, missing ones too."""
        found = set[Any]()
        for file in self.files:
            with opened_parquet(file) as parquet:
                for batch in parquet.iter_batches(columns=[column], use_threads=False):
                    found |= set(batch[0].unique().to_pylist())
        return found

    def rows(self, image: str, label: ClassColumn | None) -> ParquetRows:
        """Return a reader of two columns; no other column is read."""
        return ParquetRows(self.files, self.counts, image, label)


def _classes_of(features: Mapping[str, Any]) -> dict[str, list[str] | None]:
    return {column: getattr(feature, "names", None) for column, feature in features.items()}


Table = ArrowTable | ParquetTable


def open_tables(
    tables: Mapping[str, Table], source: str, image_column: str | None, label_column: str | None
) -> Opened:
    """Return readers of all splits, "train" among them, and their classes.

    Raises:
        InputError: an ambiguous or missing column, or labels that disagree between splits.
    """
    features = tables["train"].features
    image = _image_column(features, image_column, source)
    label = _label_column(features, label_column, source)
    for split, table in tables.items():
        if image not in table.features or (label is not None and label not in table.features):
            advice = "; --label-column none leaves labels out" if image in table.features else ""
            raise InputError(
                f"{source}: split {split!r} lacks the columns of the training split "
                f"({image}, {label}){advice}"
            )
    names = _class_names(tables, label, source)
    column = None
    if label is not None and names is not None:
        is_numbered = hasattr(features[label], "names")
        column = ClassColumn(label) if is_numbered else ClassColumn.of_names(label, names)
    left_out = LeftOut()
    unused = [name for name in features if name not in (image, label)]
    if unused:
        left_out.add(COLUMNS, listed(unused), count=len(unused))
    notes = list[str]()
    if label is None and label_column is None and unused:
        notes.append(
            f"no labels: {source} has the columns {listed(unused)}; --label-column names one"
        )
    readers: dict[str, Reader] = {}
    for split, table in tables.items():
        readers[split] = table.rows(image, column)
    return Opened(readers, names, left_out, notes)


def _class_names(tables: Mapping[str, Table], label: str | None, source: str) -> list[str] | None:
    if label is None:
        return None
    names: list[str] | None = getattr(tables["train"].features[label], "names", None)
    if names is None:
        words = {}
        for split, table in tables.items():
            values = {value for value in table.values(label) if not is_missing(value)}
            if any(isinstance(value, float) and not value.is_integer() for value in values):
                raise _no_classes(label, tables[split].features[label], source)
            words[split] = set(map(class_name, values))
        require_known(words["train"], words, source)
        return sort_classes(words["train"])
    for split, table in tables.items():
        others = getattr(table.features[label], "names", None)
        if others != names:
            require_known(names, {split: others or []}, source)
            raise InputError(
                f"{source}: the labels disagree between splits: {split} numbers the classes "
                "differently"
            )
    return list(names)


def _is_image(feature: Any) -> bool:
    """Return whether a column has a type of images, or of records with encoded images."""
    from datasets import Image

    return isinstance(feature, Image) or (
        isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    )


def _image_column(features: Mapping[str, Any], wanted: str | None, source: str) -> str:
    if wanted is not None:
        if wanted not in features:
            raise InputError(f"{source} has no column {wanted!r}; {suggest(wanted, features)}")
        # Encoded images or their paths; decoding shows whether they are.
        kind = getattr(features[wanted], "dtype", "")
        is_encoded = kind in ("binary", "large_binary", "string", "large_string")
        if not _is_image(features[wanted]) and not is_encoded:
            raise InputError(f"column {wanted!r} of {source} holds {features[wanted]}, not images")
        return wanted
    images = [name for name, feature in features.items() if _is_image(feature)]
    if len(images) != 1:
        problem = f"several image columns ({', '.join(images)})" if images else "no image column"
        raise InputError(
            f"{source} has {problem}; name one with --image-column from: {', '.join(features)}"
        )
    return images[0]


def _label_column(features: Mapping[str, Any], wanted: str | None, source: str) -> str | None:
    from datasets import ClassLabel

    if wanted == "none":
        return None
    if wanted is not None:
        if wanted not in features:
            raise InputError(
                f"{source} has no column {wanted!r}; {suggest(wanted, [*features, 'none'])}"
            )
        kind = getattr(features[wanted], "dtype", "")
        if not kind.startswith(("int", "uint", "float", "string", "large_string", "bool")):
            raise _no_classes(wanted, features[wanted], source)
        return wanted
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if sorted(labels) == _FINE_AND_COARSE:
        return "fine_label"
    if len(labels) > 1:
        raise InputError(
            f"{source} has several label columns; name one with --label-column from: "
            f"{', '.join(labels)}"
        )
    if labels:
        return labels[0]
    # Floating-point numbers are not taken for classes unless requested.
    kind = getattr(features.get(LABEL), "dtype", "")
    return LABEL if kind.startswith(("int", "uint", "string", "large_string", "bool")) else None


def _no_classes(column: str, feature: Any, source: str) -> InputError:
    return InputError(
        f"column {column!r} of {source} holds {feature}; classes are integers or strings"
    )


def load_file(path: Path) -> dict[str, Table]:
    """Return the one split of a Parquet or Arrow file, "train".

    Raises:
        InputError: it is not readable.
    """
    import datasets

    require_regular(path)
    if path.suffix == ".parquet":
        return {"train": open_parquet([str(path)])}
    datasets.disable_progress_bars()
    with _all_errors(f"{path} is not readable as Arrow"):
        return _build(datasets.load_dataset_builder("arrow", data_files={"train": str(path)}))


def load_folder(path: Path, files: Sequence[str]) -> dict[str, Table]:
    """Return the splits of a folder of Parquet or of Arrow files, by their own names.

    Parquet is read in place.

    Args:
        files: the Parquet or Arrow files in it, relative to it.

    Raises:
        InputError: it cannot be loaded, or some of its files have no split.
    """
    import datasets

    if "[" in str(path):
        raise InputError(
            f"{path}: `datasets` cannot read folders with a '[' in their names; rename it"
        )
    for file in files:
        require_regular(path / file)
    datasets.disable_progress_bars()
    with _all_errors(f"cannot load {str(path)!r}: its files are not readable as images"):
        builder = datasets.load_dataset_builder(str(path.resolve()))
        used = [str(file) for of_split in builder.config.data_files.values() for file in of_split]
        others = [file for file in used if Path(file).suffix not in (".parquet", ".arrow")]
        if others:
            wrong = Path(others[0])
            raise InputError(
                f"{path}: `datasets` takes this for a folder of {wrong.suffix} files "
                f"({wrong.name}); move the {Path(files[0]).suffix} files to another folder"
            )
        tables = _build(builder)
    _require_all(path, files, used)
    return tables


class _SavedDict(Stored):
    splits: list[str]


class _SavedFile(Stored):
    filename: str


class _SavedState(Stored):
    data_files: list[_SavedFile] = Field(alias="_data_files")


class _SavedInfo(Stored):
    features: dict[str, Any]


_DICT, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"


def is_saved(path: Path) -> bool:
    """Return whether a folder was written by `save_to_disk` of `datasets`."""
    return (path / _DICT).exists() or ((path / _STATE).exists() and (path / _INFO).exists())


def load_saved(path: Path) -> dict[str, Table]:
    """Return the splits of a folder that `save_to_disk` of `datasets` wrote, by their own names.

    Raises:
        InputError: one of its files is missing or malformed; names it.
    """
    import datasets

    if not (path / _DICT).exists():
        return {"train": _load_saved(path)}
    saved = read_json(path / _DICT, "list of the splits of a saved data set", _SavedDict)
    for split in saved["splits"]:
        if "/" in split or split in ("", ".", ".."):
            raise InputError(f"{path / _DICT} names the split {split!r}, which cannot be a folder")
    datasets.disable_progress_bars()
    return {split: _load_saved(path / split) for split in saved["splits"]}


def _load_saved(folder: Path) -> Table:
    import datasets

    state = read_json(folder / _STATE, "state of a saved data set", _SavedState)
    read_json(folder / _INFO, "description of a saved data set", _SavedInfo)
    for file in state["_data_files"]:
        name = file["filename"]
        if "/" in name or not (folder / name).exists():
            raise InputError(
                f"{folder / _STATE} names {name!r}, which is not in {folder}; save the data "
                "set again"
            )
        require_regular(folder / name)
    with _all_errors(f"{folder} is not readable as a saved data set"):
        return ArrowTable(datasets.Dataset.load_from_disk(str(folder)))


def load_hub(name: str, config: str, *, stream: bool) -> dict[str, Table]:
    """Return the splits of a data set of the Hub, downloaded or, with `stream`, read in place.

    Raises:
        InputError: it cannot be loaded, or streaming was requested and it is not in Parquet.
    """
    import datasets
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    datasets.disable_progress_bars()
    offline = datasets.config.HF_HUB_OFFLINE
    # Ask the Hub once: without a network, `load_dataset` retries for half a minute with warnings.
    try:
        if not offline:
            HfApi().dataset_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HfHubHTTPError:
        pass  # The Hub has answered; `load_dataset` reports its answer.
    except Exception:  # Networks fail in many ways; the cache may have the data set.
        datasets.config.HF_HUB_OFFLINE = True
    source = f"{name}:{config}" if config else name
    try:
        with _all_errors(
            f"{source!r} is neither a folder nor a data set that could be loaded from the Hub"
        ):
            if stream:
                return _build(datasets.load_dataset_builder(name, config or None), local=False)
            return _arrow(datasets.load_dataset(name, config or None))
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


@contextmanager
def _all_errors(problem: str) -> Iterator[None]:
    """Raise an `InputError` for errors of `datasets`, Arrow and networks, which have any type."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{problem} ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    import datasets

    generation = isinstance(error, datasets.exceptions.DatasetGenerationError)
    shown = (error.__cause__ if generation else None) or error
    words = " ".join(str(shown).split())
    if not words or isinstance(shown, KeyError):
        words = f"{type(shown).__name__} {words}".strip()
    return words[:300]


def _arrow(loaded: Mapping[str, Any]) -> dict[str, Table]:
    return {str(split): ArrowTable(table) for split, table in loaded.items()}


def open_parquet(files: Sequence[str], features: Mapping[str, Any] | None = None) -> ParquetTable:
    """Return a split of Parquet files, local or behind URLs.

    Args:
        features: the columns and their types; those in the files if None.

    Raises:
        InputError: a file is not readable, or their columns differ.
    """
    with _all_errors(f"{files[0]} is not readable as Parquet of `datasets`"):
        return ParquetTable.open(files, features)


def _build(builder: Any, *, local: bool = True) -> dict[str, Table]:
    from datasets.packaged_modules.parquet.parquet import Parquet

    if isinstance(builder, Parquet):
        return {
            str(split): open_parquet(list(files), builder.info.features)
            for split, files in builder.config.data_files.items()
        }
    if not local:
        raise InputError(
            f"{builder.repo_id} is not in Parquet, and only Parquet is streamed; omit --stream"
        )
    builder.download_and_prepare()
    return _arrow(builder.as_dataset())


def _require_all(folder: Path, present: Sequence[str], used: Sequence[str]) -> None:
    """Raise if `datasets` would read only some of the files, or others than those listed."""
    listed_files = {(folder / name).resolve() for name in present}
    strange = next((file for file in used if Path(file).resolve() not in listed_files), None)
    if strange:
        raise InputError(
            f"{folder}: `datasets` would read {strange}, which is in a system folder; remove it"
        )
    if len(present) > len(used):
        names = {Path(file).name for file in used}
        left = next((name for name in present if Path(name).name not in names), present[-1])
        raise InputError(
            f"{folder}: {len(present) - len(used)} of {len(present)} {Path(left).suffix} files "
            f"have no split in their names ({left} is the first), and others do; name all in the "
            "same way, or give one file"
        )
