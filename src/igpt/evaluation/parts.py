"""Values of images, such as scores: computed at once, or in parts that machines make independently.

A part of `OUT` is the folder `OUT.i-of-n`, written atomically:

part.json        what all parts have in common, and what was skipped
values.npy       the values, float [N] or [N, D]
positions.npy    the position of each image in the selection, [N]
rows.npy         the row of each image in the split, [N]
labels.npy       its class, -1 without one, [N]
names.npy        its name, [N]; not of a token data set

N images of the part that decode, D width.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from igpt.data.image_set import ImageSet, Origin, ReadImages, Selection
from igpt.data.left_out import LeftOut
from igpt.data.parts import (
    PartNumber,
    find_parts,
    part_path,
    require_alike,
    require_own_numbers,
    require_unchanged,
)
from igpt.data.prepare import require_new
from igpt.data.ray_pool import RayCluster
from igpt.data.tokens.dataset import TokenSplit
from igpt.errors import InputError
from igpt.files import Stored, atomic_folder, read_json, sha256_of, write_json
from igpt.locks import exclusive
from igpt.model.cost import batches_of, inference_batch_size
from igpt.model.transformer import ImageGPT

FORMAT, VERSION = "igpt-part", 1
PART = "part.json"
_RANGE = 1024  # images of a job on a cluster
Values = Iterable[NDArray[np.floating[Any]]]  # of the images of each batch
Progress = Callable[[int, int], None]  # (images done, images in all)
Measure = Callable[[ImageGPT, ReadImages, Progress | None], Values]

Count = Annotated[int, Field(ge=0, le=2**53)]


class _Origin(Stored):
    source: str
    split: str
    class_names: list[str] | None
    palette_error: dict[str, Any] | None
    skipped: list[str]
    left_out: dict[str, Any]
    notes: list[str]
    prepared: bool


class _Of(Stored):
    kind: str
    images: Count
    batch_size: Annotated[int, Field(ge=1)]


class _Part(Stored):
    """Schema of `part.json`.

    Attributes:
        of: what all parts have in common: the kind of values, the images, the model, the settings.
        result: what the results of the merged parts contain, in addition to those of the images.
        images: number of images of the part that decode.
    """

    part: PartNumber
    of: _Of
    result: dict[str, Any]
    origin: _Origin
    images: Count
    skipped: list[str]
    left_out: dict[str, Any]
    squared_error: Annotated[list[int], Field(min_length=2, max_length=2)]
    sha256: dict[str, str]


@dataclass(frozen=True)
class Merged:
    """The values of all parts.

    Attributes:
        result: see `write_part`.
        images: whose tokens are not stored: the token split has 0 pixels.
        values: as `compute` returns them, batch by batch.
    """

    result: dict[str, Any]
    images: ImageSet
    values: Values


def compute(
    model: ImageGPT,
    selection: Selection,
    measure: Measure,
    *,
    cluster: RayCluster | None = None,
    reading: Progress | None = None,
    measuring: Progress | None = None,
) -> tuple[ImageSet, Values]:
    """Return all images of a selection and their values, which are computed as they are taken.

    On a Ray cluster, they are computed first, some whole batches at a time.

    Raises:
        InputError: the images cannot be used, or the cluster cannot be reached.
    """
    if cluster is None:
        read = selection.read(0, len(selection), progress=reading)
        return selection.origin.image_set([read]), measure(model, read, measuring)
    ranges = list[ReadImages]()
    skipped, values, done = list[str](), list[NDArray[Any]](), 0
    device = model.device
    with cluster.running(_RangeWork(selection, model.cpu(), measure), on_gpus=True) as run:
        for read, batches in run(_ranges(len(selection), inference_batch_size(model.config))):
            ranges.append(read)
            values += batches
            skipped += read.skipped
            selection.require_decoded(skipped)
            done += len(read.rows) + len(read.skipped)
            if measuring:
                measuring(done, len(selection))
    model.to(device)
    return selection.origin.image_set(ranges), values


def _ranges(images: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of whole batches, for as many processes: 32 of them or more, unless too short.

    A range has up to 1,024 images, because some readers find the first one slowly.
    """
    step = size * max(1, min(_RANGE // size, images // size // 32))
    for first in range(0, images, step):
        yield first, min(first + step, images)


@dataclass(frozen=True)
class _RangeWork:
    """Read a range of a selection and compute its values. It is sent once to every process."""

    selection: Selection
    model: ImageGPT
    measure: Measure

    def __call__(self, positions: tuple[int, int]) -> tuple[ReadImages, list[NDArray[Any]]]:
        if torch.cuda.is_available():
            self.model.cuda()
        read = self.selection.read(*positions, total=len(self.selection))
        return read, list(self.measure(self.model, read, None)) if len(read.rows) else []


def write_part(
    out: Path,
    part: tuple[int, int],
    model: ImageGPT,
    selection: Selection,
    measure: Measure,
    *,
    of: Mapping[str, Any],
    result: Mapping[str, Any],
    reading: Progress | None = None,
    measuring: Progress | None = None,
) -> Path:
    """Compute the values of one of n parts: whole batches, so that they are those of one machine.

    Args:
        out: the part is written next to it.
        part: (i, n), the i-th of n, from 1.
        of: what the parts have in common: `kind`, `batch_size`, the model and the settings.
        result: what the results of the merged parts contain, in addition to those of the images.

    Returns:
        The folder of the part, `OUT.i-of-n`.

    Raises:
        InputError: there is no such part, it exists already, or the images cannot be used.
    """
    folder = part_path(out, part)
    require_new(folder)
    first, last = _range(len(selection), of["batch_size"], part)
    with exclusive(folder), atomic_folder(folder) as temporary:
        require_new(folder)
        read = selection.read(first, last, progress=reading)
        arrays: dict[str, NDArray[Any]] = {
            "positions": read.positions,
            "rows": read.rows,
            "labels": read.tokens.labels,
            **({} if read.names is None else {"names": np.array(read.names, dtype=np.str_)}),
        }
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
        if len(read.rows):
            _save(temporary / "values.npy", measure(model, read, measuring), len(read.rows))
        origin = selection.origin
        content = {
            "format": FORMAT,
            "version": VERSION,
            "part": list(part),
            "of": {
                **of,
                "images": len(selection),
                "split": origin.split,
                "class_names": origin.class_names,
                "fingerprints": selection.fingerprints(),
            },
            "result": dict(result),
            "origin": vars(origin) | {"left_out": origin.left_out.to_json()},
            "images": len(read.rows),
            "skipped": read.skipped,
            "left_out": read.left_out.to_json(),
            "squared_error": list(read.squared_error),
            "sha256": {path.name: sha256_of(path) for path in sorted(temporary.iterdir())},
        }
        write_json(temporary / PART, content)
    return folder


def merge(out: Path, kind: str, command: str) -> Merged:
    """Check the parts of `out`, which are next to it, and return their values together.

    Args:
        kind: of values, as in `of` of `write_part`.
        command: how the parts are made, for messages.

    Raises:
        InputError: a part is missing or damaged, or was made from other images, with another model
            or other settings.
    """
    parts = find_parts(out, command)
    contents = [read_json(part / PART, "part of scores or features", _Part) for part in parts]
    for part, content in zip(parts, contents, strict=True):
        if (content.get("format"), content.get("version")) != (FORMAT, VERSION):
            raise InputError(f"{part / PART} is not {FORMAT} of version {VERSION}; make it again")
        if content["of"]["kind"] != kind:
            raise InputError(f"{part} is part of {content['of']['kind']}, not of {kind}")
    require_own_numbers(parts, contents)
    first = contents[0]
    for part, content in zip(parts, contents, strict=True):
        require_alike(first["of"], content["of"], f"{part} and {parts[0]}")
    size = first["of"]["batch_size"]
    ranges = [_read_range(*both) for both in zip(parts, contents, strict=True)]
    for part, content, read in zip(parts, contents, ranges, strict=True):
        begin, end = _range(first["of"]["images"], size, content["part"])
        inside = (read.positions >= begin) & (read.positions < end)
        if not inside.all() or len(read.rows) + len(read.skipped) != end - begin:
            raise InputError(
                f"{part} does not hold the images {begin} to {end - 1} that are its own; "
                "make it again"
            )
    origin = first["origin"]
    left_out = LeftOut.from_json(origin["left_out"], str(parts[0] / PART))
    known = {key: origin[key] for key in _Origin.model_fields} | {"left_out": left_out}
    images = Origin(**known).image_set(ranges)
    return Merged(first["result"], images, _values(parts, contents, ranges))


def _range(images: int, size: int, part: tuple[int, int]) -> tuple[int, int]:
    """Return the first position of a part, and the one after its last: whole batches."""
    batches = -(-images // size)
    first, last = ((part[0] - back) * batches // part[1] * size for back in (1, 0))
    return min(first, images), min(last, images)


def _save(path: Path, values: Values, count: int) -> None:
    """Write consecutive batches of values as one array."""
    with path.open("wb") as file:
        for number, batch in enumerate(values):
            if number == 0:
                header = {
                    "descr": np.lib.format.dtype_to_descr(batch.dtype),
                    "fortran_order": False,
                    "shape": (count, *batch.shape[1:]),
                }
                np.lib.format.write_array_header_1_0(file, header)
            file.write(batch.tobytes())


def _read_range(part: Path, content: Mapping[str, Any]) -> ReadImages:
    for name, checksum in content["sha256"].items():
        require_unchanged(part / name, checksum)
    labels = _array(part, content, "labels")
    return ReadImages(
        TokenSplit(content["of"]["split"], [np.empty((len(labels), 0), np.uint16)], [labels]),
        _array(part, content, "positions"),
        _array(part, content, "rows"),
        None if content["origin"]["prepared"] else _array(part, content, "names").tolist(),
        content["skipped"],
        LeftOut.from_json(content["left_out"], str(part / PART)),
        (content["squared_error"][0], content["squared_error"][1]),
    )


def _values(
    parts: list[Path], contents: list[dict[str, Any]], ranges: list[ReadImages]
) -> Iterator[NDArray[Any]]:
    for part, content, read in zip(parts, contents, ranges, strict=True):
        if len(read.rows):
            values = _array(part, content, "values", mapped=True)
            for batch in batches_of(read.positions, content["of"]["batch_size"]):
                yield np.array(values[batch])


def _array(
    part: Path, content: Mapping[str, Any], name: str, *, mapped: bool = False
) -> NDArray[Any]:
    path = part / f"{name}.npy"
    if path.name not in content["sha256"]:
        raise InputError(f"{part / PART} has no checksum of {path.name}; make that part again")
    try:
        array: NDArray[Any] = np.load(path, "r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error!r:.200}); make that part again") from None
    if len(array) != content["images"]:
        raise InputError(
            f"{path} is of {len(array)} images, not of {content['images']}; make that part again"
        )
    return array
