"""The colour palette: k-means on RGB, exact nearest colours, and back.

Colours live in [-1, 1] per channel, as in OpenAI's `kmeans_centers.npy`; a pixel is uint8 RGB, rint(127.5 * (c + 1)).
Shapes: k colours, ... any leading dimensions.
"""

import hashlib
import zipfile
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from igpt.errors import InputError
from igpt.files import atomic_file, read_json

MAX_COLORS = 65536  # tokens are uint16
_CELL = 8  # edge of the colour cells in which candidates are searched
_AT_ONCE = 2**20  # distances in memory at a time
_TIE = 1e-9  # squared 8-bit levels: far above the rounding of float64, far below what float32 centres differ by
_SAMPLE = 400  # distinct colours a centre in the first round of k-means


class Palette:
    """A palette of at most `n_colors` colours, with the manners of a scikit-learn estimator.

    Args:
        n_colors: k; 512 in the paper (a 9-bit palette). Data with fewer distinct colours gets exactly those.
        max_iter: Lloyd iterations at most; fitting stops earlier when no pixel changes its colour. Large data are
            iterated so often on a sub-sample, then five times as a whole: within 1 % of all iterations on all pixels.
        seed: of the k-means++ start; the same pixels and seed give the same palette.

    Attributes:
        centers_: float32 [k, 3] in [-1, 1], from dark to light (by luma).
        inertia_: mean over the fitted pixels of the squared distance to their colour, summed over RGB, in 8-bit levels.
    """

    centers_: NDArray[np.float32]
    inertia_: float

    def __init__(self, n_colors: int = 512, *, max_iter: int = 30, seed: int = 0) -> None:
        if not 1 <= n_colors <= MAX_COLORS:
            raise InputError(f"a palette has 1 to {MAX_COLORS} colours, not {n_colors}")
        if max_iter < 1 or seed < 0:
            raise InputError(f"max_iter is at least 1 and seed at least 0, not {max_iter} and {seed}")
        self.n_colors, self.max_iter, self.seed = n_colors, max_iter, seed
        self._table: NDArray[np.uint16] | None = None

    def fit(self, pixels: ArrayLike) -> Self:
        """Learns the colours of uint8 RGB pixels [..., 3]: k-means on the distinct ones, weighted by their counts."""
        packed = _pack(_as_pixels(pixels))
        if packed.size == 0:
            raise InputError("a palette needs at least one pixel to be fitted to")
        unique, counts = np.unique(packed, return_counts=True)
        colors = _unpack(unique).astype(np.float64)
        if len(colors) <= self.n_colors:
            centers, self.inertia_ = colors, 0.0
        else:
            weights = counts.astype(np.float64)
            centers, self.inertia_ = _k_means(colors, weights, self.n_colors, self.max_iter, self.seed)
        centers = centers[np.argsort(centers @ (0.299, 0.587, 0.114), kind="stable")]
        self._set_centers(centers / 127.5 - 1)
        return self

    @classmethod
    def from_centers(cls, centers: ArrayLike) -> Self:
        """A palette of given colours, [k, 3] in [-1, 1]."""
        try:
            array = np.asarray(centers, dtype=np.float32)
        except (TypeError, ValueError):
            raise InputError("palette centres are numbers in the shape [k, 3]") from None
        if array.ndim != 2 or array.shape[1] != 3 or not 1 <= len(array) <= MAX_COLORS:
            raise InputError(f"palette centres have the shape [k, 3], not {list(array.shape)}")
        if not np.isfinite(array).all() or np.abs(array).max() > 1.001:
            raise InputError("palette centres lie in [-1, 1] (8-bit levels / 127.5 - 1)")
        palette = cls(len(array))
        palette._set_centers(array)
        return palette

    def _set_centers(self, centers: ArrayLike) -> None:
        self.centers_ = np.ascontiguousarray(centers, dtype="<f4")
        self._table = None

    def __len__(self) -> int:
        return len(self.centers_)

    def __repr__(self) -> str:
        return f"Palette({len(self)} colours, {self.fingerprint[:12]})" if hasattr(self, "centers_") else "Palette()"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the centres (little-endian float32): tokens and models that share it speak of the same colours."""
        return hashlib.sha256(self.centers_.tobytes()).hexdigest()

    @property
    def table(self) -> NDArray[np.uint16]:
        """The nearest colour of every 8-bit RGB value, uint16 [256 * 256 * 256], built on first use (32 MiB)."""
        if self._table is None:
            self._table = _nearest_table(self.centers_)
        return self._table

    def transform(self, pixels: ArrayLike) -> NDArray[np.uint16]:
        """Tokens of uint8 RGB pixels: [..., 3] -> uint16 [...], the exactly nearest colour (ties: the lower token)."""
        tokens: NDArray[np.uint16] = self.table[_pack(_as_pixels(pixels))]
        return tokens

    def inverse_transform(self, tokens: ArrayLike) -> NDArray[np.uint8]:
        """RGB of tokens: [...] -> uint8 [..., 3]."""
        tokens = np.asarray(tokens)
        if tokens.size and (tokens.min() < 0 or tokens.max() >= len(self)):
            raise InputError(f"tokens of this palette lie in 0..{len(self) - 1}, not {tokens.min()}..{tokens.max()}")
        pixels: NDArray[np.uint8] = self.colors[tokens]
        return pixels

    @property
    def colors(self) -> NDArray[np.uint8]:
        """The colours as 8-bit RGB, uint8 [k, 3]."""
        levels: NDArray[np.uint8] = np.clip(np.rint(127.5 * (self.centers_ + 1)), 0, 255).astype(np.uint8)
        return levels

    def save(self, path: str | Path) -> None:
        """Writes the centres as float32 `.npy`, the format of OpenAI's `kmeans_centers.npy`."""
        with atomic_file(Path(path)) as temporary, temporary.open("wb") as file:
            np.save(file, self.centers_)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a palette: `.npy` centres, or the JSON or folder of a token data set, a model or a Hub processor.

        Raises:
            InputError: there is no palette at `path`.
        """
        path = Path(path)
        if path.is_dir():
            for name in ("dataset.json", "preprocessor_config.json", "model/preprocessor_config.json"):
                if (path / name).exists():
                    return cls.load(path / name)
            raise InputError(f"no palette in {path}: neither dataset.json nor preprocessor_config.json is there")
        if path.suffix == ".json":
            values = read_json(path, "palette")
            ours = values.get("palette")
            centers = values.get("clusters", ours.get("centers") if isinstance(ours, dict) else None)
            if centers is None:
                raise InputError(f"{path} holds no palette ('clusters' or 'palette')")
        else:
            try:
                centers = np.load(path, allow_pickle=False)
            except FileNotFoundError:
                raise InputError(f"no palette at {path}") from None
            except (ValueError, EOFError, zipfile.BadZipFile) as error:
                raise InputError(f"{path} is not a palette: {error}") from None
        try:
            return cls.from_centers(centers)
        except InputError as error:
            raise InputError(f"{path} is not a palette: {error}") from None

    def require_same(self, other: "Palette", what: str, whose: str) -> None:
        """Refuses two things whose palettes differ, both named with their fingerprints.

        Raises:
            InputError: the palettes differ.
        """
        if self.fingerprint != other.fingerprint:
            raise InputError(
                f"the palettes differ: {what} has {self.fingerprint[:12]} ({len(self)} colours), {whose} has "
                f"{other.fingerprint[:12]} ({len(other)} colours); prepare the images with --palette MODEL"
            )


def _as_pixels(pixels: ArrayLike) -> NDArray[np.uint8]:
    array = np.asarray(pixels)
    if array.dtype != np.uint8 or array.ndim < 1 or array.shape[-1] != 3:
        raise InputError(f"pixels are uint8 with RGB last ([..., 3]), not {array.dtype} {list(array.shape)}")
    return array


def _pack(pixels: NDArray[np.uint8]) -> NDArray[np.int32]:
    wide = pixels.astype(np.int32)
    packed: NDArray[np.int32] = (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]
    return packed


def _unpack(packed: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.stack([packed >> 16, (packed >> 8) & 255, packed & 255], axis=-1)


def _k_means(
    colors: NDArray[np.float64], counts: NDArray[np.float64], k: int, max_iter: int, seed: int
) -> tuple[NDArray[np.float64], float]:
    """k-means of weighted colours: greedy k-means++ on a few, Lloyd iterations on more, then on all."""
    from sklearn.cluster import kmeans_plusplus

    generator = np.random.default_rng(seed)
    size = min(len(colors), 20 * k)
    few = np.sort(generator.choice(len(colors), size, replace=False, p=counts / counts.sum()))
    centers, _ = kmeans_plusplus(colors[few], k, random_state=seed % 2**32)
    if len(colors) > _SAMPLE * k:
        more = np.sort(generator.choice(len(colors), _SAMPLE * k, replace=False))
        centers = _lloyd(colors[more], counts[more], centers, max_iter)
        max_iter = min(max_iter, 5)
    centers = _lloyd(colors, counts, centers, max_iter)
    distance, _ = _assign(centers, colors)
    return centers, float(counts @ distance**2 / counts.sum())


def _lloyd(
    colors: NDArray[np.float64], counts: NDArray[np.float64], centers: NDArray[np.float64], max_iter: int
) -> NDArray[np.float64]:
    k = len(centers)
    before = np.full(len(colors), -1)
    for _ in range(max_iter):
        distance, nearest = _assign(centers, colors)
        if (nearest == before).all():
            break
        before = nearest
        weight = np.bincount(nearest, counts, minlength=k)
        sums = np.stack([np.bincount(nearest, counts * colors[:, c], minlength=k) for c in range(3)], axis=1)
        empty = weight == 0
        centers = sums / np.where(empty, 1, weight)[:, None]
        if empty.any():  # a colour that lost all its pixels starts anew at the worst-served ones
            centers[empty] = colors[np.argsort(-counts * distance**2, kind="stable")[: empty.sum()]]
    return centers


def _assign(centers: NDArray[np.float64], colors: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    from scipy.spatial import cKDTree

    distance, nearest = cKDTree(centers).query(colors, workers=-1)
    return distance, nearest


def _nearest_table(centers: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The nearest centre of all 256^3 colours, in float64 arithmetic; ties go to the lower token.

    The cube is cut into cells of 8^3 colours. A centre can be nearest to a colour of a cell only if there is a corner
    of the cell to which it is nearer than that centre which is nearest to the cell's middle; few are. Distances are
    taken relative to the middle, which keeps the numbers small, and compared for the remaining candidates alone. What
    differs by no more than rounding is a tie, so that every machine makes the same table, in whatever order it adds.
    """
    points = (np.asarray(centers, dtype=np.float64) + 1) * 127.5
    half = (_CELL - 1) / 2
    edge = np.arange(_CELL) - half
    offsets = np.stack(np.meshgrid(edge, edge, edge, indexing="ij"), axis=-1).reshape(-1, 3)
    per_axis = 256 // _CELL
    axis = np.arange(per_axis) * _CELL + half
    middles = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    table = np.empty((per_axis,) * 3 + (_CELL,) * 3, dtype=np.uint16)
    flat = table.reshape(len(middles), -1)
    rows = max(1, _AT_ONCE // len(points))
    for first in range(0, len(middles), rows):
        block = slice(first, first + rows)
        distance = (points**2).sum(-1) - 2 * (middles[block] @ points.T)  # squared, less |m|^2
        best = distance.argmin(axis=1)[:, None]
        # |m + o - c|^2 - |m + o - b|^2 = |m - c|^2 - |m - b|^2 - 2 o.(c - b), least at the corner along c - b
        gain = sum(2 * half * np.abs(channel - channel[best]) for channel in points.T)
        reach = distance - np.take_along_axis(distance, best, axis=1) <= gain + 1e-6
        # Stable: candidates stay in the order of their tokens, so that the first of equals is the lowest.
        order = np.argsort(~reach, axis=1, kind="stable")
        widths = reach.sum(axis=1)
        for width in np.unique(widths):
            cells = np.flatnonzero(widths == width)
            for part in np.array_split(cells, 1 + len(cells) * int(width) * len(offsets) // _AT_ONCE):
                candidates = order[part, :width]
                relative = points[candidates] - middles[first + part][:, None, :]
                score = (relative**2).sum(-1)[:, :, None] - 2 * (relative @ offsets.T)
                nearest = (score <= score.min(axis=1, keepdims=True) + _TIE).argmax(axis=1)
                flat[first + part] = np.take_along_axis(candidates, nearest, axis=1)
    return np.ascontiguousarray(table.transpose(0, 3, 1, 4, 2, 5)).reshape(-1)


def nearest_color_error(palette: Palette, pixels: NDArray[np.uint8]) -> dict[str, Any]:
    """What the palette costs on `pixels` [..., 3]: mean squared error per channel (8-bit levels) and PSNR in dB."""
    difference = pixels.astype(np.float64) - palette.inverse_transform(palette.transform(pixels))
    mse = float((difference**2).mean())
    return {"mse": mse, "psnr_db": None if mse == 0 else float(10 * np.log10(255**2 / mse))}
