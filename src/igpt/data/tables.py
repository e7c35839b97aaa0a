"""Tables of images: Parquet and Arrow files, folders that `datasets` wrote, the Hub; which column is what."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igpt.data.folders import files_below, require_known, sort_classes
from igpt.data.readers import Column, ParquetRows, Reader, TableRows, opened_parquet
from igpt.errors import InputError, suggest

_FINE_AND_COARSE = ["coarse_label", "fine_label"]  # CIFAR-100's two sets of classes


@dataclass(frozen=True)
class ArrowTable:
    """A split that `datasets` holds: memory-mapped, or small and in memory."""

    table: Any

    @property
    def features(self) -> Mapping[str, Any]:
        """The columns and their types."""
        return self.table.features  # type: ignore[no-any-return]

    def values(self, column: str) -> set[str]:
        """All values of a column, as words, but for missing ones."""
        return {str(value) for value in self.table.unique(column) if value is not None}

    def rows(self, image: str, label: Column | None) -> TableRows:
        """A reader of two columns; no other is touched."""
        from datasets import Image

        columns = self.table.select_columns([image, label.name] if label else [image])
        return TableRows(columns.cast_column(image, Image(decode=False)), image, label)


@dataclass(frozen=True)
class ParquetTable:
    """A split in Parquet files, which are read where they lie: on this machine, or on the Hub."""

    files: tuple[str, ...]
    counts: tuple[int, ...]
    features: Mapping[str, Any]

    @classmethod
    def open(cls, files: Iterable[str], features: Mapping[str, Any] | None) -> "ParquetTable":
        """Reads the files' ends, which tell their rows and columns."""
        from datasets import Features

        files = tuple(files)

        def end(file: str) -> tuple[int, Any]:
            with opened_parquet(file) as parquet:
                return parquet.metadata.num_rows, parquet.schema_arrow

        with ThreadPoolExecutor(16) as threads:  # a remote file takes a second, and there may be hundreds
            ends = list(threads.map(end, files))
        columns = [Features.from_arrow_schema(schema) for _, schema in ends]
        for file, found in zip(files, columns, strict=True):
            if _classes_of(found) != _classes_of(columns[0]):
                raise InputError(f"{file} has other columns than {files[0]}, or other class names: {', '.join(found)}")
        return cls(files, tuple(count for count, _ in ends), features or columns[0])

    def values(self, column: str) -> set[str]:
        """All values of a column, as words, but for missing ones."""
        found = set[Any]()
        for file in self.files:
            with opened_parquet(file) as parquet:
                for batch in parquet.iter_batches(columns=[column], use_threads=False):
                    found |= set(batch[0].unique().to_pylist())
        return {str(value) for value in found if value is not None}

    def rows(self, image: str, label: Column | None) -> ParquetRows:
        """A reader of two columns; no other is touched."""
        return ParquetRows(self.files, self.counts, image, label)


def _classes_of(features: Mapping[str, Any]) -> dict[str, list[str] | None]:
    return {column: getattr(feature, "names", None) for column, feature in features.items()}


Table = ArrowTable | ParquetTable


def readers_of(
    tables: Mapping[str, Table], source: str, image_column: str | None, label_column: str | None
) -> tuple[dict[str, Reader], list[str] | None]:
    """Readers of the images of all splits, "train" among them, and the class names.

    Raises:
        InputError: an ambiguous or missing column, or labels that disagree between splits.
    """
    features = tables["train"].features
    image = _image_column(features, image_column, source)
    label = _label_column(features, label_column, source)
    for split, table in tables.items():
        if image not in table.features or (label is not None and label not in table.features):
            raise InputError(f"{source}: split {split!r} lacks the columns of the training split ({image}, {label})")
    names = _class_names(tables, label, source)
    typed = label is not None and hasattr(features[label], "names")
    column = None
    if label is not None and names is not None:
        column = Column(label, None if typed else {name: number for number, name in enumerate(names)})
    return {split: table.rows(image, column) for split, table in tables.items()}, names


def _class_names(tables: Mapping[str, Table], label: str | None, source: str) -> list[str] | None:
    if label is None:
        return None
    names = getattr(tables["train"].features[label], "names", None)
    if names is None:
        values = {split: table.values(label) for split, table in tables.items()}
        require_known(values["train"], values, source)
        return sort_classes(values["train"])
    for split, table in tables.items():
        others = getattr(table.features[label], "names", None)
        if others != names:
            require_known(names, {split: others or []}, source)
            raise InputError(f"{source}: the labels disagree between splits: {split} numbers the classes otherwise")
    return list(names)


def _is_image(feature: Any) -> bool:
    """Whether a column holds images by its type: also the records of encoded images that other tools write."""
    from datasets import Image

    return isinstance(feature, Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _image_column(features: Mapping[str, Any], wanted: str | None, source: str) -> str:
    if wanted is not None:
        if wanted not in features:
            raise InputError(f"{source} has no column {wanted!r}; {suggest(wanted, features)}")
        # Encoded images or their paths; what it is in truth shows when it is decoded.
        kind = getattr(features[wanted], "dtype", "")
        if not _is_image(features[wanted]) and kind not in ("binary", "large_binary", "string", "large_string"):
            raise InputError(f"column {wanted!r} of {source} holds {features[wanted]}, not images")
        return wanted
    images = [name for name, feature in features.items() if _is_image(feature)]
    if len(images) != 1:
        problem = "no image column" if not images else f"several image columns ({', '.join(images)})"
        raise InputError(f"{source} has {problem}; name one with --image-column from: {', '.join(features)}")
    return images[0]


def _label_column(features: Mapping[str, Any], wanted: str | None, source: str) -> str | None:
    from datasets import ClassLabel

    if wanted == "none":
        return None
    if wanted is not None:
        if wanted not in features:
            raise InputError(f"{source} has no column {wanted!r}; {suggest(wanted, [*features, 'none'])}")
        kind = getattr(features[wanted], "dtype", "")
        if not kind.startswith(("int", "uint", "string", "large_string", "bool")):
            raise InputError(f"column {wanted!r} of {source} holds {features[wanted]}; classes are integers or strings")
        return wanted
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if sorted(labels) == _FINE_AND_COARSE:
        return "fine_label"
    if len(labels) > 1:
        raise InputError(f"{source} has several label columns; name one with --label-column from: {', '.join(labels)}")
    return labels[0] if labels else None


def load_tables(source: str, path: Path, files: dict[str, str] | None, *, stream: bool) -> dict[str, Table]:
    """The splits of a Parquet or Arrow file, a folder, or a Hub id ("name/set:config"), by their own names.

    Parquet on this machine is read where it lies. What is on the Hub is downloaded first, or read there (`stream`).

    Args:
        files: patterns of the files of each split, in a folder where `datasets` should not find them by itself.

    Raises:
        InputError: it cannot be loaded, or it is to be streamed and is not in Parquet.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        if path.suffix == ".parquet" and path.is_file():
            return {"train": ParquetTable.open([str(path)], None)}
        if path.is_file():
            return _build(datasets.load_dataset_builder("arrow", data_files={"train": str(path)}))
        if path.is_dir() and any((path / name).exists() for name in ("dataset_dict.json", "dataset_info.json")):
            saved = datasets.load_from_disk(str(path))
            return _arrow(saved if isinstance(saved, dict) else {"train": saved})
        if path.is_dir():
            if "[" in str(path):
                raise InputError(f"{path}: `datasets` cannot read folders with a '[' in their names; rename it")
            tables = _build(datasets.load_dataset_builder(str(path.resolve()), data_files=files))
            _require_all(path, tables)
            return tables
        return _load_from_hub(*source.partition(":")[::2], stream=stream)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        reason = " ".join(str(cause or error).split()) or type(error).__name__
        problem = "its files are not readable as images"
        if not path.exists():
            problem = f"no such folder here and no such data set within reach of the Hub, or {problem}"
        raise InputError(f"cannot load {source!r}: {problem} ({reason[:300]})") from None


def _arrow(loaded: Mapping[str, Any]) -> dict[str, Table]:
    return {str(split): ArrowTable(table) for split, table in loaded.items()}


def _build(builder: Any, *, local: bool = True) -> dict[str, Table]:
    from datasets.packaged_modules.parquet.parquet import Parquet

    if isinstance(builder, Parquet):
        return {
            str(split): ParquetTable.open(files, builder.info.features)
            for split, files in builder.config.data_files.items()
        }
    if not local:
        raise InputError(f"{builder.repo_id} is not in Parquet, and only that is streamed; leave --stream out")
    builder.download_and_prepare()
    return _arrow(builder.as_dataset())


def _require_all(folder: Path, tables: Mapping[str, Table]) -> None:
    """Refuses Parquet files of which `datasets` would use some: it goes by the splits in their names."""
    used = {file for table in tables.values() if isinstance(table, ParquetTable) for file in table.files}
    there = [name for name in files_below(folder) if name.endswith(".parquet")]
    if used and len(there) > len(used):
        names = {Path(file).name for file in used}
        left = next(name for name in there if Path(name).name not in names)
        raise InputError(
            f"{folder}: {len(there) - len(used)} of {len(there)} Parquet files have no split in their names, {left} is "
            "the first, and others do; name them alike, or give one file"
        )


def _load_from_hub(name: str, config: str, *, stream: bool) -> dict[str, Table]:
    import datasets
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    offline = datasets.config.HF_HUB_OFFLINE
    try:  # first of all, once: where there is no network, `load_dataset` tries for half a minute and fills the console
        if not offline:
            HfApi().dataset_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HfHubHTTPError:
        pass  # the Hub has answered; `load_dataset` says what
    except Exception:  # the network fails in many ways, proxies among them; the cache may have the data set
        datasets.config.HF_HUB_OFFLINE = True
    try:
        if stream:
            return _build(datasets.load_dataset_builder(name, config or None), local=False)
        return _arrow(datasets.load_dataset(name, config or None))
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
