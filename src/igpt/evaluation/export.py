"""Write features of one layer to a file for other programs: NumPy's `.npz` or Parquet.

N images, B of them at a time, D width, L layers.
"""

import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igpt.builtin_models import find_builtin
from igpt.data.image_set import ImageSet, ReadImages
from igpt.errors import InputError
from igpt.evaluation.features import Progress, pooled
from igpt.evaluation.results import read_probe
from igpt.files import atomic_file
from igpt.model.locate import model_and_run
from igpt.model.precision import Precision
from igpt.model.transformer import ImageGPT

FORMAT, VERSION = "igpt-exported-features", 1
Batches = Iterable[NDArray[np.float32]]  # [B, D], in the order of the images
_AT_ONCE = 4096  # names
_GROUPED = 16  # batches per row group of Parquet


def best_layer(run: Path) -> int | None:
    """Return the layer with the best probe accuracy of a run, or None without a probe.

    Raises:
        InputError: the file is not what `igpt probe` writes.
    """
    path = run / "probe.json"
    layer: int | None = read_probe(path).get("best_layer") if path.exists() else None
    return layer


def _layer_of_probe(model: str | os.PathLike[str]) -> int | None:
    """Return the layer with the best probe accuracy of a run or of a built-in model, if any.

    Raises:
        InputError: see `best_layer`.
    """
    path, home = model_and_run(model)
    probed = home if path == home / "model" else find_builtin(path)
    return best_layer(probed) if probed else None


def layer_of(name: object, model: ImageGPT, layer: int | None) -> int:
    """Return the layer whose features are used: the given one, or the best one in a probe.

    Args:
        name: of the model, a run or a built-in one; anything else has no probe.

    Raises:
        InputError: there is no such layer, or none is given and there is no probe.
    """
    last = model.config.n_layer
    if layer is None and isinstance(name, str | os.PathLike):
        layer = _layer_of_probe(name)
    if layer is None:
        raise InputError(
            f"name a layer (--layer 0 to {last}), or run igpt probe first to use the best one"
        )
    require_layer(layer, last)
    return layer


def require_layer(layer: int, last: int) -> None:
    """Refuse a layer that is not one of 0 .. L.

    Raises:
        InputError: there is no such layer.
    """
    if not 0 <= layer <= last:
        raise InputError(f"the model has the layers 0 to {last}, not {layer}")


def layer_features(
    model: ImageGPT,
    images: ReadImages,
    progress: Progress | None,
    *,
    layer: int,
    precision: Precision = "fp32",
) -> Batches:
    """Yield the features of a layer, batch by batch: [B, D].

    Raises:
        InputError: features that are not finite.
    """
    batches = pooled(
        model,
        images.tokens,
        positions=images.positions,
        precision=precision,
        last=layer,
        progress=progress,
    )
    return (_finite(batch[layer]) for batch in batches)


def require_features_file(path: Path) -> None:
    """Refuse to write features to a file that is neither `.npz` nor Parquet.

    Raises:
        InputError: the name has another suffix.
    """
    if path.suffix not in (".npz", ".parquet"):
        raise InputError(f"features are written as .npz or .parquet, not as {path.name}")


def write_features(
    path: Path, images: ImageSet, batches: Batches, metadata: Mapping[str, Any]
) -> None:
    """Write the features of all images, atomically, batch by batch.

    `.npz` has `features` float32 [N, D], `labels` int32 [N] (-1 without one), `names` [N],
    `class_names`, `layer`, and `metadata`, the text of a JSON object. Parquet has the columns
    `image`, `label` and `class` (null without one) and `features` (lists of D float32), and the
    metadata in its schema's, under `igpt`.

    Args:
        metadata: of the features, including `layer` and `width`.
    """
    write = _write_npz if path.suffix == ".npz" else _write_parquet
    with atomic_file(path) as temporary:
        write(temporary, images, batches, metadata)


def _finite(batch: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(batch).all():
        raise InputError("features are not finite; the model's weights are broken")
    return batch


def _write_npz(path: Path, images: ImageSet, batches: Batches, metadata: Mapping[str, Any]) -> None:
    longest = max(len(images.name_of(position)) for position in range(len(images)))
    whole = {
        "labels": images.tokens.labels,
        "class_names": np.array(images.class_names or [], dtype=np.str_),
        "layer": np.array(metadata["layer"]),
        "metadata": np.array(json.dumps(metadata)),
    }
    with zipfile.ZipFile(path, "w") as archive:
        _store(archive, "features", (len(images), metadata["width"]), np.dtype(np.float32), batches)
        _store(archive, "names", (len(images),), np.dtype(f"U{longest}"), _names(images))
        for name, array in whole.items():
            _store(archive, name, array.shape, array.dtype, [array])


def _names(images: ImageSet) -> Iterator[NDArray[np.str_]]:
    for first in range(0, len(images), _AT_ONCE):
        positions = range(first, min(first + _AT_ONCE, len(images)))
        yield np.array([images.name_of(position) for position in positions])


def _store(
    archive: zipfile.ZipFile,
    name: str,
    shape: tuple[int, ...],
    kind: np.dtype[Any],
    parts: Iterable[NDArray[Any]],
) -> None:
    """Write an array of a `.npz` from consecutive parts; `numpy.savez` would need all of it in
    memory."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        header = {
            "descr": np.lib.format.dtype_to_descr(kind),
            "fortran_order": False,
            "shape": shape,
        }
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(part.astype(kind).tobytes())


def _write_parquet(
    path: Path, images: ImageSet, batches: Batches, metadata: Mapping[str, Any]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"image": pa.string(), "label": pa.int32(), "class": pa.string()}
    schema = pa.schema({**columns, "features": pa.list_(pa.float32(), metadata["width"])})
    remaining, done = iter(batches), 0
    with pq.ParquetWriter(path, schema.with_metadata({"igpt": json.dumps(metadata)})) as writer:
        while group := list(islice(remaining, _GROUPED)):
            features = np.concatenate(group)
            positions = np.arange(done, done + len(features))
            labels = images.tokens.labels_of(positions).tolist()
            arrays = [
                pa.array([images.name_of(position) for position in positions.tolist()]),
                pa.array([None if label < 0 else label for label in labels], pa.int32()),
                pa.array([images.class_of(label) for label in labels], pa.string()),
                pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), metadata["width"]),
            ]
            writer.write_batch(pa.record_batch(arrays, schema=writer.schema))
            done += len(features)
