"""Features for probes: normalized activations of all layers, averaged over positions.

They are written to disk batch by batch, one file per layer, so memory does not depend on the number
of images. N images, B of them at a time, n positions, L layers, D width.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from igpt.allocator import keep_freed_memory
from igpt.data.images.palette import Palette
from igpt.data.tokens.dataset import TokenSplit
from igpt.errors import InputError
from igpt.files import atomic_folder, read_json, require_regular, write_json
from igpt.model.classifier import MASKED
from igpt.model.cost import batches_of, inference_batch_size
from igpt.model.directory import weights_sha256
from igpt.model.precision import Precision, autocast
from igpt.model.transformer import ImageGPT

FORMAT, VERSION = "igpt-features", 1
MANIFEST = "features.json"
Progress = Callable[[int, int], None]  # (images done, images in all)


@dataclass(frozen=True)
class Masking:
    """Masks as in the training of a BERT model (paper, section 4.6), sampled by seed.

    Attributes:
        draw: index of the mask of each image.
    """

    draw: int = 0
    probability: float = MASKED
    seed: int = 0


@torch.inference_mode()
def pooled(
    model: ImageGPT,
    split: TokenSplit,
    *,
    masking: Masking | None = None,
    precision: Precision = "fp32",
    batch_size: int | None = None,
    positions: NDArray[np.int64] | None = None,
    last: int | None = None,
    progress: Progress | None = None,
) -> Iterator[NDArray[np.float32]]:
    """Yield the mean-pooled features of all layers (paper, section 2.3): batches [L + 1, B, D].

    Entry l is the normalized input of block l's attention, the last one the final norm's output.
    `precision` is that of the products; norms, residuals and means are always fp32.

    Args:
        masking: masks of a BERT model; None for no masks.
        positions: of the images in their selection, which decide on the batches (see `batches_of`);
            by default there is an image at each.
        last: the layer after which to stop; None: L.
    """
    model.eval()
    count = None if last is None else last + 1
    device = model.device
    if device.type == "cpu":
        keep_freed_memory()
    size = batch_size or inference_batch_size(model.config)
    if progress:
        progress(0, len(split))
    for rows in batches_of(np.arange(len(split)) if positions is None else positions, size):
        tokens = torch.from_numpy(split.rows(rows).astype(np.int64)).to(device)
        mask = None
        if masking:
            drawn = model.config.trained_as.masks_of_rows(
                rows, tokens.shape[1], masking.probability, (masking.seed, masking.draw)
            )
            mask = torch.from_numpy(drawn).to(device)
        with autocast(precision, device):
            layers = [n.float().mean(dim=1) for n in islice(model.features(tokens, mask), count)]
        yield torch.stack(layers).cpu().numpy()
        if progress:
            progress(int(rows[-1]) + 1, len(split))


def stored(
    model: ImageGPT,
    split: TokenSplit,
    folder: Path,
    *,
    of: Mapping[str, Any],
    masking: Masking | None = None,
    precision: Precision = "fp32",
    progress: Progress | None = None,
) -> list[NDArray[np.float32]]:
    """Return the features of all layers, memory-mapped from files: L + 1 arrays [N, D].

    Files that are missing are written first.

    Args:
        folder: gets `layer-LLL.npy` and `features.json`; it is whole or absent, whatever interrupts
            the work.
        of: what else than the model and these settings the features depend on: the images.

    Raises:
        InputError: the folder holds features of something else.
    """
    what = {
        "format": FORMAT,
        "version": VERSION,
        "shape": model.config.model_dump(mode="json"),
        "model_sha256": weights_sha256(model.state_dict()),
        "images": len(split),
        "masking": asdict(masking) if masking else None,
        "precision": precision,
        **of,
    }
    files = [f"layer-{layer:03d}.npy" for layer in range(model.config.n_layer + 1)]
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name another folder for the features")
    if folder.exists() and not (folder / MANIFEST).exists() and any(folder.iterdir()):
        raise InputError(f"{folder} holds something else than features; name another folder")
    if (folder / MANIFEST).exists():
        found = read_json(folder / MANIFEST, "features")
        # As JSON, True and 1 differ, and 0.15 is 0.15.
        ours, theirs = (
            {(key, json.dumps(one[key], sort_keys=True)) for key in one} for one in (what, found)
        )
        if other := sorted({key for key, _ in ours ^ theirs}):
            raise InputError(
                f"{folder} holds features of another model or of other images "
                f"({', '.join(other)[:200]} in {MANIFEST} differ); name another folder"
            )
    else:
        shape = (len(split), model.config.n_embd)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        batches = pooled(model, split, masking=masking, precision=precision, progress=progress)
        with atomic_folder(folder) as temporary:
            with ExitStack() as stack:
                opened = [stack.enter_context((temporary / name).open("wb")) for name in files]
                for file in opened:
                    np.lib.format.write_array_header_1_0(file, header)
                for batch in batches:
                    for file, layer in zip(opened, batch.astype("<f4"), strict=True):
                        file.write(layer.tobytes())
            write_json(temporary / MANIFEST, what)
    return [_mapped(folder / name, (len(split), model.config.n_embd)) for name in files]


def _mapped(path: Path, shape: tuple[int, int]) -> NDArray[np.float32]:
    require_regular(path)
    remedy = f"remove {path.parent}, and its features are made again"
    try:
        array: NDArray[np.float32] = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # for a damaged header, NumPy raises many kinds of errors
        raise InputError(
            f"{path} is missing, cut off or damaged ({error!r:.200}); {remedy}"
        ) from None
    if array.shape != shape or array.dtype != np.dtype("<f4") or not array.flags.c_contiguous:
        raise InputError(
            f"{path} holds {array.dtype} {list(array.shape)}, not float32 {list(shape)}; {remedy}"
        )
    return array


@dataclass(frozen=True)
class Pixels:
    """The colours of images as features in [-1, 1], decoded when they are read: [N, 3 n]."""

    split: TokenSplit
    palette: Palette
    positions: int

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Rows`."""
        return len(self), 3 * self.positions

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        wanted = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        colors = self.palette.centers_[self.split.rows(wanted)]
        return colors.reshape(len(wanted), 3 * self.positions)  # there may be no rows


class Rows(Protocol):
    """Features [N, D] of which some rows are read at a time: an array, or a view of one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (N, D)."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> NDArray[np.float32]:
        """Return a slice of the rows, or the rows with some indices."""


def read_blocks(features: Rows, device: torch.device, size: int) -> Iterator[torch.Tensor]:
    """Yield features [N, D] in blocks of `size` rows, as float32 on a device."""
    for first in range(0, len(features), size):
        yield torch.from_numpy(np.array(features[first : first + size], np.float32)).to(device)


@dataclass(frozen=True)
class ConcatenatedColumns:
    """Several features of the same images, concatenated: [N, D_1 + D_2 + ...]."""

    parts: Sequence[Rows]

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Rows`."""
        return len(self), sum(part.shape[1] for part in self.parts)

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        return np.concatenate([part[rows] for part in self.parts], axis=1)


@dataclass(frozen=True)
class ConcatenatedRows:
    """The same features of two sets of images, one after the other: [N_1 + N_2, D]."""

    first: Rows
    second: Rows

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Rows`."""
        return len(self), self.first.shape[1]

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        wanted = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        found = np.empty((len(wanted), self.shape[1]), np.float32)
        early = wanted < len(self.first)
        found[early] = self.first[wanted[early]]
        found[~early] = self.second[wanted[~early] - len(self.first)]
        return found
