"""Where images come from: the bundled digits, a folder or file, or a hub id, all as `datasets.Dataset` splits."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igpt.data.tokens import SPLITS
from igpt.errors import InputError, suggest

DIGITS = "digits"
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class Source:
    """Images of one split: undecoded, so that a broken one is an error of that image alone.

    Attributes:
        rows: a `datasets.Dataset`, of the image column alone.
        indices: which of its rows belong to the split.
        labels: int32 [len(indices)], -1 where there is none.
    """

    rows: Any
    image_column: str
    indices: NDArray[np.int64]
    labels: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, position: int) -> Any:
        """The undecoded image at a position: `{"bytes", "path"}`."""
        return self.rows[int(self.indices[position])][self.image_column]

    def images(self, positions: NDArray[np.int64]) -> Iterator[Any]:
        """The undecoded images at some positions; read in slices, which is faster than one by one."""
        for first in range(0, len(positions), 256):
            yield from self.rows[self.indices[positions[first : first + 256]]][self.image_column]

    def name_of(self, position: int) -> str:
        """How a person finds the image: its path, or its row."""
        record = self.image(position)
        row = f"row {self.indices[position]}"
        return f"{row} ({record['path']})" if record and record.get("path") else row


def open_source(
    source: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    held_out: float = 0.1,
    seed: int = 0,
) -> tuple[dict[str, Source], list[str] | None]:
    """Opens a source and settles its splits.

    Existing train, validation and test splits are kept; `held_out` of the training images are split off, by seed, for
    a validation split that is missing, and as many for a missing test split (10 %, paper section 3.1). Splits by other
    names (such as STL-10's unlabelled one) are left aside. In a folder of images, `train`, `val` and the like name
    splits as sub-folders at the top, and nowhere else.

    Args:
        source: "digits" (scikit-learn's 1,797 handwritten digits), a folder or file that `datasets.load_dataset`
            reads (Parquet, image folders, WebDataset tars), or a hub id, with a configuration after a colon
            ("name/set:config").
        image_column: the column of images; found by type when there is one only.
        label_column: the column of classes; found by type likewise. "none" ignores the labels.

    Returns:
        the splits, and the class names (None without labels).

    Raises:
        InputError: nothing there, no images in it, or an ambiguous column.
    """
    loaded = _digits() if source == DIGITS else _load(source)
    named = {_SPLIT_NAMES[name]: rows for name, rows in loaded.items() if name in _SPLIT_NAMES}
    if not named and len(loaded) == 1:
        named = {"train": next(iter(loaded.values()))}
    if "train" not in named:
        raise InputError(f"{source} has no training split, only: {', '.join(loaded)}")
    features = named["train"].features
    image = _image_column(features, image_column, source)
    label = _label_column(features, label_column, source)
    for name, rows in named.items():
        if image not in rows.features or (label is not None and label not in rows.features):
            raise InputError(f"{source}: split {name!r} lacks the columns of the training split ({image}, {label})")
    class_names = _class_names(list(named.values()), label)
    opened = {}
    for name, rows in named.items():
        labels = _labels(rows, label, class_names)
        opened[name] = Source(_undecoded(rows, image), image, np.arange(len(rows)), labels)
    if len(opened["train"]) == 0:
        raise InputError(f"{source} is empty: there is no image in its training split")
    return _with_held_out(opened, held_out, seed, source), class_names


def _digits() -> dict[str, Any]:
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as Pillow
    from sklearn.datasets import load_digits

    bunch = load_digits()
    levels = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # 17 levels, 0..16
    names = [str(digit) for digit in bunch.target_names]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    rows = {"image": [Pillow.fromarray(image) for image in levels], "label": bunch.target.tolist()}
    return {"train": Dataset.from_dict(rows, features=features)}


def _load(source: str) -> Mapping[str, Any]:
    import datasets

    datasets.disable_progress_bars()
    path = Path(source).expanduser()
    try:
        if path.is_file():
            kind = {".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix)
            if kind is None:
                raise InputError(f"{path} is a {path.suffix or 'nameless'} file; give a folder of images or a .parquet")
            loaded = datasets.load_dataset(kind, data_files={"train": str(path)})
        elif path.is_dir():
            loaded = _load_folder(path.resolve())
        elif source.startswith(("/", ".", "~")) or source.count("/") > 1:
            raise InputError(f"no folder or file {source}")
        else:
            loaded = _load_from_hub(*source.partition(":")[::2])
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        reason = " ".join(str(cause or error).split()) or type(error).__name__
        problem = "its files are not readable as images"
        if not path.exists():
            problem = f"no such folder here and no such data set within reach of the Hub, or {problem}"
        raise InputError(f"cannot load {source!r}: {problem} ({reason[:300]})") from None
    return dict(loaded)


def _load_folder(path: Path) -> Mapping[str, Any]:
    import datasets
    from PIL import Image

    if not any(path.iterdir()):
        raise InputError(f"{path} is an empty folder; there are no images in it")
    if "[" in str(path):
        raise InputError(f"{path}: `datasets` cannot read folders with a '[' in their names; rename it")
    kinds = Counter(os.path.splitext(name)[1].lower() for _, _, names in os.walk(path) for name in names)  # noqa: PTH122
    kinds = Counter({kind: count for kind, count in kinds.items() if kind})
    if not kinds or kinds.most_common(1)[0][0] not in Image.registered_extensions():
        return datasets.load_dataset(str(path))  # type: ignore[no-any-return]
    # `datasets` would look for the names of splits anywhere in the images' paths, and leave out every image without
    # one: a file named train-station.jpg, or a class named train, and all the others were gone.
    folders = {child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")}
    splits = {name for name in folders if name.lower() in _SPLIT_NAMES}
    trains = {name for name in splits if _SPLIT_NAMES[name.lower()] == "train"}
    if trains and (splits > trains or folders == trains):
        files = {name.lower(): f"{name}/**" for name in splits}
    else:
        files = {"train": "**"}
    return datasets.load_dataset(str(path), data_files=files)  # type: ignore[no-any-return]


def _load_from_hub(name: str, config: str) -> Mapping[str, Any]:
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
        return datasets.load_dataset(name, config or None)  # type: ignore[no-any-return]
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _undecoded(rows: Any, column: str) -> Any:
    from datasets import Image

    return rows.select_columns([column]).cast_column(column, Image(decode=False))


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

    if wanted is not None:
        if wanted != "none" and wanted not in features:
            raise InputError(f"{source} has no column {wanted!r}; {suggest(wanted, [*features, 'none'])}")
        if wanted == "none":
            return None
        kind = getattr(features[wanted], "dtype", "")
        if not kind.startswith(("int", "uint", "string", "large_string", "bool")):
            raise InputError(f"column {wanted!r} of {source} holds {features[wanted]}; classes are integers or strings")
        return wanted
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if len(labels) > 1:
        raise InputError(f"{source} has several label columns; name one with --label-column from: {', '.join(labels)}")
    return labels[0] if labels else None


def _class_names(splits: list[Any], column: str | None) -> list[str] | None:
    if column is None:
        return None
    names = getattr(splits[0].features[column], "names", None)
    if names:
        return list(names)
    return [str(value) for value in sorted({value for rows in splits for value in rows[column]} - {None})]


def _labels(rows: Any, column: str | None, class_names: list[str] | None) -> NDArray[np.int32]:
    if column is None or class_names is None:
        return np.full(len(rows), -1, dtype=np.int32)
    values = rows[column][:]
    if hasattr(rows.features[column], "names"):
        return np.array([-1 if value is None else value for value in values], dtype=np.int32)
    index = {name: number for number, name in enumerate(class_names)}
    return np.array([-1 if value is None else index[str(value)] for value in values], dtype=np.int32)


def _with_held_out(opened: dict[str, Source], held_out: float, seed: int, source: str) -> dict[str, Source]:
    train = opened["train"]
    missing = [name for name in ("validation", "test") if name not in opened]
    count = max(1, round(held_out * len(train)))
    if missing and len(train) <= count * len(missing):
        raise InputError(
            f"{source} has {len(train)} training images: too few to hold {count} out for {' and '.join(missing)}"
        )
    order = np.random.default_rng(seed).permutation(len(train))
    for number, name in enumerate(missing):
        opened[name] = _part(train, np.sort(order[number * count : (number + 1) * count]))
    opened["train"] = _part(train, np.sort(order[len(missing) * count :]))
    return {name: opened[name] for name in SPLITS}


def _part(source: Source, chosen: NDArray[np.int64]) -> Source:
    return Source(source.rows, source.image_column, source.indices[chosen], source.labels[chosen])
