"""The colour palette: k-means on RGB, exact nearest colours, and back.

Colours live in [-1, 1] per channel, as in OpenAI's `kmeans_centers.npy`; a pixel is uint8 RGB,
rint(127.5 * (c + 1)). The last entry of a palette can stand for transparent pixels; pixels then
have an alpha channel, and files a fourth column.
Shapes: k colours, ... any leading dimensions, C channels: RGB, or RGBA.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from igpt.builtin_models import find_builtin
from igpt.data.arrays import map_array
from igpt.errors import InputError
from igpt.files import Stored, atomic_file, expanded, read_json, require_schema
from igpt.hub import download

Floats = NDArray[np.float64]
Progress = Callable[[int, int], None]

MAX_COLORS = 65536  # tokens are uint16
OPAQUE = 128  # alpha of a pixel that is at least half opaque, out of 255
_CELL = 8  # edge of the colour cells in which candidates are searched
_AT_ONCE = 2**20  # distances in memory at a time
# Squared 8-bit levels: far above the rounding of float64, far below the differences between float32
# centres.
_TIE = 1e-9
# Colours in one nearest-centre query of a thread, which takes some hundredths of a second.
_QUERIED = 2**15
_BLOCK = 2**15  # pixels looked up at a time: their indices stay in the cache
_COARSE = 50  # cells per colour that the coarse round of k-means needs
_MOMENTUM = 0.9
# With a palette, in the folder of a token data set, a model or a run.
_FILES = ("dataset.json", "preprocessor_config.json", "model/preprocessor_config.json")
_TOLERANCE = 1e-4  # relative error: k-means stops when an iteration gains less

_Color = Annotated[list[float], Field(min_length=3, max_length=3)]
_ColorWithAlpha = Annotated[list[float], Field(min_length=3, max_length=4)]


class StoredPalette(Stored):
    """Schema of the palette in the JSON of a token data set or a plan.

    Centres have three columns, or four with a transparent entry (see `Palette.stored_centers`).
    """

    centers: Annotated[list[_ColorWithAlpha], Field(min_length=1, max_length=MAX_COLORS)]
    fingerprint: str | None = None


class _OurFile(Stored):
    palette: StoredPalette


class HubPalette(Stored):
    """Schema of the palette in a `preprocessor_config.json`.

    `transparent_token` is not one of transformers' settings, and missing without such an entry.
    """

    clusters: Annotated[list[_Color], Field(min_length=1, max_length=MAX_COLORS)] | None = None
    transparent_token: int | None = None


class Palette:
    """A palette of at most `n_colors` colours, with the interface of a scikit-learn estimator.

    Args:
        n_colors: k; 512 in the paper (a 9-bit palette). Data with fewer distinct colours gets
            exactly those.
        max_iter: largest number of iterations; fitting stops when an iteration reduces the error by
            less than 0.01 %. For large data it applies to the coarse and to the full round each.
        seed: of k-means++; the same pixels and seed give the same palette.
        transparent: reserve the last of the colours for transparent pixels.

    Attributes:
        centers_: float32 [k, 3] in [-1, 1], from dark to light (by luma); white for a transparent
            entry.
        transparent: whether there is a transparent entry.
        inertia_: mean over the fitted pixels of the squared distance to their colour, summed over
            RGB, in 8-bit levels.
    """

    centers_: NDArray[np.float32]
    inertia_: float

    def __init__(
        self,
        n_colors: int = 512,
        *,
        max_iter: int = 30,
        seed: int = 0,
        transparent: bool = False,
    ) -> None:
        if not 1 + transparent <= n_colors <= MAX_COLORS:
            raise InputError(
                f"a palette has {1 + transparent} to {MAX_COLORS} colours, not {n_colors}"
            )
        if max_iter < 1 or seed < 0:
            raise InputError(
                f"max_iter is at least 1 and seed at least 0, not {max_iter} and {seed}"
            )
        self.n_colors, self.max_iter, self.seed = n_colors, max_iter, seed
        self.transparent = transparent
        self._table: NDArray[np.uint16] | None = None

    def fit(self, pixels: ArrayLike, *, progress: Progress | None = None) -> Self:
        """Fit the palette to uint8 pixels [..., C]: k-means on weighted distinct colours.

        Transparent pixels are ignored.

        Args:
            progress: called with the number of iterations over all colours so far, and the
                largest possible number.
        """
        array = self._as_pixels(pixels)
        rows = array.reshape(-1, array.shape[-1])
        if array.shape[-1] == 4:
            rows = rows[self.opaque(rows)]
        if rows.size == 0:
            opaque = "opaque " if self.transparent else ""
            raise InputError(f"a palette needs at least one {opaque}pixel to be fitted to")
        count = self.n_colors - self.transparent
        unique, counts = np.unique(
            _pack(rows, np.zeros((len(rows), 8), dtype=np.uint8)), return_counts=True
        )
        if len(unique) <= count:
            centers, self.inertia_ = _unpack(unique), 0.0
        else:
            centers, self.inertia_ = _k_means(
                unique, counts, count, self.max_iter, self.seed, progress
            )
        centers = centers[np.argsort(centers @ (0.299, 0.587, 0.114), kind="stable")]
        if self.transparent:
            centers = np.concatenate([centers, np.full((1, 3), 255.0)])
        return self._set_centers(centers / 127.5 - 1)

    @classmethod
    def from_centers(cls, centers: ArrayLike) -> Self:
        """Return the palette of given colours, [k, 3] in [-1, 1].

        A fourth column makes the last entry the transparent one; see `stored_centers`.
        """
        try:
            # Numbers too large for float32 become infinity, which raises an error below.
            with np.errstate(over="ignore"):
                array = np.asarray(centers, dtype=np.float32)
        except (TypeError, ValueError, OverflowError):
            raise InputError("palette centres are numbers in the shape [k, 3]") from None
        _require_shape(array.shape)
        if not np.isfinite(array).all() or np.abs(array).max() > 1.001:
            raise InputError("palette centres lie in [-1, 1] (8-bit levels / 127.5 - 1)")
        transparent = array.shape[1] == 4
        if transparent and (array[-1, 3] != -1 or (array[:-1, 3] != 1).any()):
            raise InputError(
                "the fourth column of palette centres is 1, and -1 for the transparent entry, "
                "which is the last one"
            )
        if transparent and len(array) == 1:
            raise InputError("a palette with a transparent entry needs another colour")
        return cls(len(array), transparent=transparent)._set_centers(array[:, :3])

    def _set_centers(self, centers: ArrayLike) -> Self:
        self.centers_, self._table = np.ascontiguousarray(centers, dtype="<f4"), None
        return self

    def __len__(self) -> int:
        return len(self.centers_)

    def __repr__(self) -> str:
        if not hasattr(self, "centers_"):
            return "Palette()"
        return f"Palette({len(self)} colours, {self.fingerprint[:12]})"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of `stored_centers` (little-endian float32), which identifies the palette."""
        return hashlib.sha256(self.stored_centers.tobytes()).hexdigest()

    @property
    def stored_centers(self) -> NDArray[np.float32]:
        """The centres as files have them: `centers_`, or [k, 4] with a transparent entry.

        The fourth column is 1 for colours and -1 for the transparent entry.
        """
        if not self.transparent:
            return self.centers_
        opacity = np.ones((len(self), 1), dtype="<f4")
        opacity[-1] = -1
        return np.concatenate([self.centers_, opacity], axis=1)

    @property
    def transparent_token(self) -> int | None:
        """The token of transparent pixels, k - 1; None if the palette has none."""
        return len(self) - 1 if self.transparent else None

    @property
    def opaque_centers(self) -> NDArray[np.float32]:
        """The centres without the transparent entry; their indices are their tokens."""
        return self.centers_[: self.transparent_token]

    @property
    def table(self) -> NDArray[np.uint16]:
        """The nearest colour of every 8-bit RGB value, uint16 [256^3]; built on first use."""
        if self._table is None:
            self._table = _nearest_table(self.opaque_centers)
        return self._table

    def transform(self, pixels: ArrayLike) -> NDArray[np.uint16]:
        """Return the tokens of uint8 pixels: [..., 3] -> uint16 [...].

        A token is the index of the exactly nearest colour; of equally near ones, the lowest.
        Palettes with a transparent entry also take RGBA pixels [..., 4]: those less than half
        opaque become that entry.
        """
        array = self._as_pixels(pixels)
        rows = array.reshape(-1, array.shape[-1])
        tokens = np.empty(len(rows), dtype=np.uint16)
        wide = np.zeros((min(len(rows), _BLOCK), 8), dtype=np.uint8)
        for first in range(0, len(rows), _BLOCK):
            block, out = rows[first : first + _BLOCK], tokens[first : first + _BLOCK]
            # No index is out of range, and "wrap" is the fastest of the three modes.
            np.take(self.table, _pack(block, wide[: len(block)]), out=out, mode="wrap")
        if array.shape[-1] == 4:
            tokens[~self.opaque(rows)] = len(self) - 1
        return tokens.reshape(array.shape[:-1])

    def _as_pixels(self, pixels: ArrayLike) -> NDArray[np.uint8]:
        array = np.asarray(pixels)
        channels = (3, 4) if self.transparent else (3,)
        if array.dtype != np.uint8 or array.ndim < 1 or array.shape[-1] not in channels:
            wanted = (
                "RGB or RGBA last ([..., 3 or 4])" if self.transparent else "RGB last ([..., 3])"
            )
            raise InputError(
                f"pixels are uint8 with {wanted}, not {array.dtype} {list(array.shape)}"
            )
        return array

    @staticmethod
    def opaque(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return which pixels [..., C] are at least half opaque: bool [...]."""
        if pixels.shape[-1] == 3:
            return np.ones(pixels.shape[:-1], dtype=bool)
        return pixels[..., 3] >= OPAQUE

    def inverse_transform(self, tokens: ArrayLike) -> NDArray[np.uint8]:
        """Return the RGB values of tokens: [...] -> uint8 [..., 3].

        With a transparent entry, RGBA values [..., 4]: transparent pixels are white with alpha 0.
        """
        tokens = np.asarray(tokens)
        if tokens.size and (tokens.min() < 0 or tokens.max() >= len(self)):
            raise InputError(
                f"tokens of this palette lie in 0..{len(self) - 1}, not "
                f"{tokens.min()}..{tokens.max()}"
            )
        pixels: NDArray[np.uint8] = self.colors[tokens]
        return pixels

    @property
    def colors(self) -> NDArray[np.uint8]:
        """The colours as 8-bit RGB, or RGBA with a transparent entry: uint8 [k, C]."""
        levels: NDArray[np.uint8] = np.clip(
            np.rint(127.5 * (self.stored_centers + 1)), 0, 255
        ).astype(np.uint8)
        return levels

    def save(self, path: str | Path) -> None:
        """Write `stored_centers` as float32 `.npy`.

        Without a transparent entry, this is the format of OpenAI's `kmeans_centers.npy`.
        """
        with atomic_file(Path(path)) as temporary, temporary.open("wb") as file:
            np.save(file, self.stored_centers)

    def to_hub(self) -> dict[str, Any]:
        """Return the palette as in `preprocessor_config.json`, see `HubPalette`."""
        token = self.transparent_token
        named = {} if token is None else {"transparent_token": token}
        return {"clusters": self.centers_.tolist(), **named}

    @classmethod
    def from_hub(cls, values: Mapping[str, Any]) -> Self:
        """Return the palette of a `preprocessor_config.json`, see `HubPalette`.

        Raises:
            InputError: the clusters are no palette, or another than the last is transparent.
        """
        palette, token = cls.from_centers(values["clusters"]), values.get("transparent_token")
        if token is None:
            return palette
        if token != len(palette) - 1 or not token:
            raise InputError(
                f"transparent_token is {token}, and only the last of several colours can be "
                f"transparent, which is {len(palette) - 1}"
            )
        return cls(len(palette), transparent=True)._set_centers(palette.centers_)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a palette: `.npy` centres, or the JSON file or folder of a data set or model.

        If there is no such file, `path` may be the name of a built-in model ("photos-16"), or the
        id of a Hub model ("openai/imagegpt-small"), whose palette is downloaded.

        Raises:
            InputError: there is no palette at `path`, nor on the Hub.
        """
        path = _locate(path)
        if path.is_dir():
            for name in _FILES:
                if (path / name).exists():
                    return cls.load(path / name)
            raise InputError(
                f"no palette in {path}: neither dataset.json nor preprocessor_config.json is there"
            )
        values = read_json(path, "palette") if path.suffix == ".json" else {}
        fingerprint = None
        try:
            if values.get("clusters") is not None:
                require_schema(values, HubPalette, path)
                palette = cls.from_hub(values)
            elif isinstance(values.get("palette"), dict):
                require_schema(values, _OurFile, path)
                palette = cls.from_centers(values["palette"]["centers"])
                fingerprint = values["palette"].get("fingerprint")
            elif path.suffix == ".json":
                raise InputError(f"{path} holds no palette ('clusters' or 'palette')")
            else:
                palette = cls.from_centers(_centers_in_array(path))
        except InputError as error:
            if str(path) in str(error):
                raise
            raise InputError(f"{path} is not a palette: {error}") from None
        if fingerprint not in (None, palette.fingerprint):
            raise InputError(f"{path}: the palette does not match its fingerprint; was it edited?")
        return palette

    def require_same(self, other: "Palette", what: str, whose: str) -> None:
        """Raise an `InputError` with both names and fingerprints if the palettes differ."""
        if self.fingerprint != other.fingerprint:
            raise InputError(
                f"the palettes differ: {what} has {self.description}, {whose} has "
                f"{other.description}; prepare the images with --palette MODEL"
            )

    @property
    def description(self) -> str:
        """The fingerprint and the number of colours, for messages."""
        last = ", the last one transparent" if self.transparent else ""
        return f"{self.fingerprint[:12]} ({len(self)} colours{last})"


def _require_shape(shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or shape[1] not in (3, 4) or not 1 <= shape[0] <= MAX_COLORS:
        raise InputError(
            f"palette centres have the shape [k, 3], not {list(shape)} ([k, 4] with a transparent "
            "entry)"
        )


def _centers_in_array(path: Path) -> NDArray[Any]:
    """Return the array of a `.npy` file after checking its type and shape, but not its values."""
    if not path.exists():
        raise InputError(f"no palette at {path}")
    try:
        array = map_array(path)
    except InputError as error:
        raise InputError(f"{path} is not a palette: {error}") from None
    # Type and shape come from the header, and are checked before the data are read.
    if array.dtype.kind not in "fiu":
        raise InputError(f"{path} is not a palette: its centres are not numbers but {array.dtype}")
    _require_shape(array.shape)
    return array


def _locate(name: str | Path) -> Path:
    """Return the path of a local or built-in palette, or of one downloaded from the Hub."""
    if builtin := find_builtin(name, _FILES):
        return builtin
    path, given = expanded(name), str(name)
    is_path = (
        given.count("/") != 1
        or given.startswith(("/", ".", "~"))
        or given.endswith((".npy", ".npz", ".json"))
    )
    if is_path or path.exists():
        return path
    return download(given, "palette", "preprocessor_config.json") / "preprocessor_config.json"


def _pack(pixels: NDArray[np.uint8], wide: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Pack RGB into 24-bit numbers, [N, 3] -> [N], in the zero-filled buffer `wide` [N, 8]."""
    wide[:, 2], wide[:, 1], wide[:, 0] = pixels[:, 0], pixels[:, 1], pixels[:, 2]
    return wide.view("<i8")[:, 0]


def _unpack(packed: NDArray[np.int64]) -> Floats:
    return np.stack([packed >> 16, (packed >> 8) & 255, packed & 255], axis=-1).astype(np.float64)


def _k_means(
    packed: NDArray[np.int64],
    weights: NDArray[Any],
    k: int,
    max_iter: int,
    seed: int,
    progress: Progress | None,
) -> tuple[Floats, float]:
    """Return the k-means centres [k, 3] of weighted colours, and the mean squared distance.

    Large data are first replaced by the means of cells of 4^3 or 2^3 colours, for which greedy
    k-means++ and most iterations are cheap; then all colours are iterated. BLAS is not used for
    sums, because its order of addition depends on its threads.
    """
    from sklearn.cluster import kmeans_plusplus
    from threadpoolctl import threadpool_limits

    colors = _unpack(packed)
    coarse, coarse_weights = colors, weights
    for edge in (4, 2):
        _, cells = np.unique(packed & (256 - edge) * 0x010101, return_inverse=True)
        if (n_cells := int(cells.max()) + 1) >= _COARSE * k:
            coarse, coarse_weights = _means(cells, colors, weights, n_cells)
            break
    with threadpool_limits(1):
        centers, _ = kmeans_plusplus(
            coarse, k, sample_weight=coarse_weights, random_state=seed % 2**32
        )
    if len(coarse) < len(colors):
        centers = _lloyd(coarse, coarse_weights, centers, max_iter)
    centers = _lloyd(colors, weights, centers, max_iter, progress)
    return centers, float((weights * _assign(centers, colors)[0] ** 2).sum() / weights.sum())


def _means(
    group: NDArray[np.int64], colors: Floats, weights: NDArray[Any], n: int
) -> tuple[Floats, NDArray[Any]]:
    """Return the weighted means [n, 3] and the weights [n] of groups 0..n-1; of empty groups, 0."""
    weight: NDArray[Any] = np.bincount(group, weights, minlength=n)
    sums = np.stack(
        [np.bincount(group, weights * channel, minlength=n) for channel in colors.T], axis=1
    )
    return sums / np.where(weight == 0, 1, weight)[:, None], weight


def _lloyd(
    colors: Floats,
    weights: NDArray[Any],
    centers: Floats,
    max_iter: int,
    progress: Progress | None = None,
) -> Floats:
    """Return the best means of Lloyd's iterations with momentum, 20 as good as 100 plain ones.

    If the error grows, the last step was too long: the iterations continue from the means, without
    momentum.
    """
    best = before = centers
    least = last = np.inf
    for iteration in range(max_iter):
        if progress:
            progress(iteration, max_iter)
        distance, nearest = _assign(centers, colors)
        losses = weights * distance**2
        error = losses.sum()
        means, weight = _means(nearest, colors, weights, len(centers))
        empty = weight == 0
        if empty.any():
            # A centre without pixels restarts, without momentum, at the pixel of largest error.
            means[empty] = colors[np.argsort(-losses, kind="stable")[: empty.sum()]]
            before = np.where(empty[:, None], means, before)
        if error < least:
            best, least = means, error
        if 0 <= last - error <= _TOLERANCE * error:
            break
        centers = means + _MOMENTUM * (means - before) if error < last else means
        before, last = means, error
    return best


def _assign(centers: Floats, colors: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Return the distance of each colour to its nearest centre, and the index of that, [N]."""
    from scipy.spatial import cKDTree

    query = cKDTree(centers).query
    blocks = [colors[first : first + _QUERIED] for first in range(0, len(colors), _QUERIED)]
    # `query` has its own threads (`workers`), but does not wait for them after Ctrl-C: they would
    # write into freed memory. The threads of this pool end before the interrupt is raised.
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        found = list(threads.map(query, blocks))
    distances, nearest = zip(*found, strict=True)
    return np.concatenate(distances), np.concatenate(nearest)


def _nearest_table(centers: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the nearest centre of all 256^3 colours, in float64; of equally near ones, the lowest.

    The cube is cut into cells of 8^3 colours. Let b be the centre nearest to the middle of a cell.
    Another centre can be nearest to a colour of the cell only if it is nearer than b to some corner
    of the cell; few are. Distances are computed for these candidates only, relative to the middle,
    which keeps the numbers small. Distances that differ by no more than rounding are ties, so that
    all machines build the same table, whatever their order of addition.
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
        # Squared, minus |m|^2.
        distance = (points**2).sum(-1) - 2 * (middles[first : first + rows] @ points.T)
        best = distance.argmin(axis=1)[:, None]
        # |m + o - c|^2 - |m + o - b|^2 = |m - c|^2 - |m - b|^2 - 2 o.(c - b), which is smallest at
        # the corner in the direction of c - b.
        gain = sum(2 * half * np.abs(channel - channel[best]) for channel in points.T)
        reach = distance - np.take_along_axis(distance, best, axis=1) <= gain + 1e-6
        # Stable: candidates stay in the order of their tokens, so that the first of equally near
        # ones is the lowest.
        order = np.argsort(~reach, axis=1, kind="stable")
        widths = reach.sum(axis=1)
        for width in np.unique(widths):
            cells = np.flatnonzero(widths == width)
            for part in np.array_split(
                cells, 1 + len(cells) * int(width) * len(offsets) // _AT_ONCE
            ):
                candidates = order[part, :width]
                relative = points[candidates] - middles[first + part][:, None, :]
                score = (relative**2).sum(-1)[:, :, None] - 2 * (relative @ offsets.T)
                nearest = (score <= score.min(axis=1, keepdims=True) + _TIE).argmax(axis=1)
                flat[first + part] = np.take_along_axis(candidates, nearest, axis=1)
    return np.ascontiguousarray(table.transpose(0, 3, 1, 4, 2, 5)).reshape(-1)


def psnr_db(mse: float) -> float | None:
    """Return the PSNR in dB of a mean squared error in 8-bit levels; None without error."""
    return float(10 * np.log10(255**2 / mse)) if mse else None


def squared_error(
    palette: Palette, pixels: NDArray[np.uint8], tokens: NDArray[np.uint16]
) -> tuple[int, int]:
    """Return the sum of the squared errors of the colours of pixels, and the number of values.

    Transparent pixels do not count.

    Args:
        pixels: uint8 [..., C].
        tokens: of the pixels, [...].
    """
    colors = palette.inverse_transform(tokens)[..., :3]
    error = (pixels[..., :3].astype(np.int64) - colors)[palette.opaque(pixels)]
    return int((error**2).sum()), error.size


def nearest_color_error(palette: Palette, pixels: NDArray[np.uint8]) -> dict[str, Any]:
    """Return the error of the palette on `pixels` [..., C].

    `mse` is the mean squared error per channel in 8-bit levels, `psnr_db` the PSNR in dB (None
    without error), both of opaque pixels; `share` is the share of pixels of each colour.
    """
    tokens = palette.transform(pixels)
    error, count = squared_error(palette, pixels, tokens)
    mse = error / max(1, count)
    share = np.bincount(tokens.reshape(-1), minlength=len(palette)) / tokens.size
    return {"mse": mse, "psnr_db": psnr_db(mse), "share": share.round(6).tolist()}
