import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

from igpt.data.images.palette import Palette, _lloyd, nearest_color_error
from igpt.data.tokens.manifest import write_manifest
from igpt.errors import InputError

from ...helpers.reading import connections
from ...helpers.sample_images import ImageSets

GREY = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
RANDOM_RGB = np.random.default_rng(0).integers(0, 256, (20000, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def fitted(made_sets: ImageSets) -> Palette:
    return Palette(64).fit(made_sets.small_images())


@pytest.fixture(scope="module")
def grey() -> Palette:
    return Palette(512).fit(GREY)


def mean_squared_distance(centers: NDArray[np.float64], pixels: NDArray[np.uint8]) -> float:
    return float((cKDTree(centers).query(pixels.reshape(-1, 3))[0] ** 2).mean())


def test_the_same_pixels_and_seed_give_the_same_bits(made_sets: ImageSets):
    small_images = made_sets.small_images()
    first, again = (Palette(64).fit(small_images) for _ in range(2))
    assert again.centers_.tobytes() == first.centers_.tobytes()
    assert again.inertia_ == first.inertia_
    assert Palette(64, seed=1).fit(small_images).fingerprint != first.fingerprint
    shuffled = np.random.default_rng(0).permutation(small_images.reshape(-1, 3))
    assert Palette(64).fit(shuffled).fingerprint == first.fingerprint
    for threads in (1, 2, 3):
        with threadpool_limits(threads):
            assert Palette(64).fit(small_images).fingerprint == first.fingerprint


def test_grey_data_get_exactly_their_levels(grey: Palette):
    levels = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
    digits = np.repeat(levels[..., None], 3, axis=-1)
    palette = Palette(512).fit(digits)
    assert len(palette) == 17
    assert palette.inertia_ == 0
    assert palette.transform(digits).shape == (1797, 8, 8)
    np.testing.assert_array_equal(palette.inverse_transform(palette.transform(digits)), digits)
    assert len(grey) == 256
    np.testing.assert_array_equal(grey.colors, GREY)
    np.testing.assert_array_equal(grey.transform(GREY), np.arange(256))


def test_more_levels_than_colours_are_clustered():
    palette = Palette(16).fit(GREY)
    assert len(palette) == 16
    assert (np.diff(palette.colors, axis=1) == 0).all()
    assert (
        0 < palette.inertia_ < 3 * 16**2 / 12 * 1.3
    )  # for equal intervals, a cluster's variance is width^2 / 12


def test_counts_are_weights():
    pixels = np.array([[0, 0, 0]] * 97 + [[10, 10, 10]] + [[200, 200, 200]] * 2, np.uint8)
    centers = (Palette(2).fit(pixels).centers_ + 1) * 127.5
    np.testing.assert_allclose(centers[:, 0], [10 / 98, 200], atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_inertia_is_correct_and_no_worse_than_scikit_learns(image_sets: ImageSets, seed: int):
    """Compare with all 300 of its iterations; 64 colours are first iterated on a coarse grid.

    CIFAR-10: 0.1 to 0.6 % below. The made images, of which one in ten has three distant colours:
    0.5 to 1.6 % above.
    """
    pixels = image_sets.small_images().reshape(-1, 3)
    palette = Palette(64, seed=seed).fit(pixels)
    ours = mean_squared_distance((palette.centers_.astype(np.float64) + 1) * 127.5, pixels)
    assert palette.inertia_ == pytest.approx(ours, rel=1e-5)
    reference = KMeans(64, n_init=1, random_state=seed).fit(pixels.astype(np.float32))
    limit = 1.005 if image_sets.real else 1.02
    assert ours <= limit * mean_squared_distance(reference.cluster_centers_, pixels)


def test_small_data_are_fitted_without_coarsening(small_images: NDArray[np.uint8]):
    pixels = small_images[:8].reshape(-1, 3)
    palette = Palette(256, max_iter=100).fit(pixels)
    reference = KMeans(256, n_init=1, max_iter=100, tol=0, random_state=0).fit(
        pixels.astype(np.float32)
    )
    assert palette.inertia_ <= 1.03 * mean_squared_distance(reference.cluster_centers_, pixels)
    assert palette.inertia_ < Palette(256, max_iter=1).fit(pixels).inertia_


def test_a_centre_without_pixels_is_moved_to_the_largest_error():
    colors = np.random.default_rng(3).integers(0, 100, (500, 3)).astype(np.float64)
    colors[0] = 255
    away = np.array([[0, 0, 0], [50, 50, 50], [99, 99, 99], [-900, 0, 0], [-900, 1, 0]], np.float64)
    centers = _lloyd(colors, np.ones(500), away, 20)
    assert len(np.unique(cKDTree(centers).query(colors)[1])) == 5
    assert (centers == 255).all(axis=1).any()


def test_colours_are_sorted_from_dark_to_light(fitted: Palette):
    assert (np.diff(fitted.centers_ @ np.array([0.299, 0.587, 0.114], np.float32)) >= -1e-6).all()


def brute_force(
    centers: NDArray[np.float32], pixels: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the nearest centre in float64, the lower one of ties, and how many centres tie."""
    points = (centers.astype(np.float64) + 1) * 127.5
    nearest, tied = [], []
    for part in np.array_split(pixels.astype(np.float64), 1 + len(pixels) * len(points) // 10**7):
        distance = ((part[:, None] - points) ** 2).sum(-1)
        equal = distance <= distance.min(axis=1, keepdims=True) + 1e-9
        nearest.append(equal.argmax(axis=1))
        tied.append(equal.sum(axis=1))
    return np.concatenate(nearest), np.concatenate(tied)


def test_the_table_is_the_brute_force_nearest(fitted: Palette, grey: Palette):
    generator = np.random.default_rng(1)
    corners = (
        np.array(np.meshgrid([0, 7, 8, 255], [0, 7, 8, 255], [0, 7, 8, 255]))
        .reshape(3, -1)
        .T.astype(np.uint8)
    )
    pixels = np.concatenate([RANDOM_RGB, corners, fitted.colors, GREY])
    dark = Palette.from_centers(
        generator.uniform(-1, -0.9, (300, 3))
    )  # at a great distance all are nearly equally near
    for palette in (fitted, dark, grey, Palette.from_centers([[0.1, 0.2, 0.3]])):
        assert palette.table.shape == (256**3,)
        np.testing.assert_array_equal(
            palette.transform(pixels), brute_force(palette.centers_, pixels)[0]
        )


def test_no_colour_of_the_cube_has_a_nearer_centre(fitted: Palette):
    every_37th = np.arange(0, 256**3, 37)
    pixels = np.stack([every_37th >> 16, (every_37th >> 8) & 255, every_37th & 255], axis=1)
    points = (fitted.centers_.astype(np.float64) + 1) * 127.5
    chosen = np.sqrt(((pixels - points[fitted.table[every_37th]]) ** 2).sum(-1))
    np.testing.assert_allclose(chosen, cKDTree(points).query(pixels)[0], rtol=0, atol=1e-9)


def test_ties_go_to_the_lower_token():
    """Permuted and duplicated centres tie on the grey diagonals, as computed with exact
    integers."""
    generator = np.random.default_rng(2)
    triples = generator.uniform(0.02, 1, (25, 3)) * generator.choice([-1, 1], (25, 3))
    centers = np.concatenate(
        [triples, triples[:, [1, 0, 2]], triples[:, [0, 2, 1]], triples[:, [2, 1, 0]], triples]
    )
    palette = Palette.from_centers(generator.permutation(centers))
    pixels = RANDOM_RGB[:3000].copy()
    pixels[:1000, 1] = pixels[:1000, 0]
    pixels[1000:2000, 2] = pixels[1000:2000, 1]
    pixels[2000:, 0] = pixels[2000:, 2]
    whole = (palette.centers_.astype(np.float64) * 2**30).astype(np.int64).astype(object)
    assert (whole.astype(np.float64) / 2**30 == palette.centers_).all()  # nothing was clipped
    levels = pixels.astype(object)[:, None] * 2**31 - (whole + 2**30) * 255
    distance = (levels**2).sum(axis=-1)
    ties = (distance == distance.min(axis=1, keepdims=True)).sum(axis=1) > 1
    assert ties.sum() > 500
    np.testing.assert_array_equal(palette.transform(pixels), distance.argmin(axis=1).astype(int))


def test_pixels_of_any_layout_and_number(fitted: Palette):
    """More than one block of pixels, none, one, and strided views."""
    expected = fitted.table[RANDOM_RGB.astype(int) @ (65536, 256, 1)]
    many = np.broadcast_to(RANDOM_RGB, (5, 20000, 3))
    np.testing.assert_array_equal(fitted.transform(many), np.broadcast_to(expected, (5, 20000)))
    np.testing.assert_array_equal(fitted.transform(RANDOM_RGB[::-3]), expected[::-3])
    reversed_channels = np.ascontiguousarray(RANDOM_RGB[:, ::-1])
    np.testing.assert_array_equal(fitted.transform(reversed_channels[:, ::-1]), expected)
    assert fitted.transform(RANDOM_RGB[0]) == expected[0]
    assert fitted.transform(RANDOM_RGB[0]).shape == ()
    assert fitted.transform(np.zeros((4, 0, 3), np.uint8)).shape == (4, 0)


def test_levels_are_the_rounded_centres(fitted: Palette):
    tokens = np.arange(64).reshape(8, 8)
    exact = 127.5 * (
        fitted.centers_.astype(np.float64) + 1
    )  # float32 may round the middle between two levels up or down
    np.testing.assert_allclose(
        fitted.inverse_transform(tokens).reshape(64, 3), exact, rtol=0, atol=0.5 + 1e-4
    )
    assert fitted.inverse_transform(tokens).dtype == np.uint8
    assert fitted.transform(RANDOM_RGB).dtype == np.uint16
    edges = Palette.from_centers([[-1.0005, 0, 1.0005]])  # within the tolerance of a float16 file
    np.testing.assert_array_equal(edges.colors, [[0, 128, 255]])


def test_round_trips_through_every_file(tmp_path: Path, fitted: Palette):
    fitted.save(tmp_path / "new" / "kmeans_centers.npy")
    centers = np.load(tmp_path / "new" / "kmeans_centers.npy")
    assert (centers.dtype, centers.shape) == (np.float32, (64, 3))
    write_manifest(
        tmp_path,
        resolution=8,
        palette=fitted,
        class_names=None,
        splits={"train": []},
        source="none",
        made={},
    )
    (tmp_path / "model").mkdir()
    processor = tmp_path / "model" / "preprocessor_config.json"
    processor.write_text(json.dumps({"clusters": fitted.centers_.tolist()}))
    places = [
        "new/kmeans_centers.npy",
        "dataset.json",
        ".",
        "model/preprocessor_config.json",
        "model",
    ]
    for place in places:
        loaded = Palette.load(tmp_path / place)
        assert loaded.centers_.tobytes() == fitted.centers_.tobytes()
        assert loaded.fingerprint == fitted.fingerprint
    np.testing.assert_array_equal(
        Palette.load(str(tmp_path)).transform(RANDOM_RGB), fitted.transform(RANDOM_RGB)
    )


def test_the_fingerprint_is_stable_and_differs_between_palettes():
    centers = np.array([[-1, -1, -1], [0, 0.5, 1]], np.float32)
    palette = Palette.from_centers(centers)
    # SHA-256 of the six little-endian float32; after a change here no data set or model would match
    # an existing one
    assert palette.fingerprint == "259b9a46ce253ea3d288f25d13f4c1e98d3e6e57ab949bda36ba6ac2351fbee0"
    assert Palette.from_centers(centers.astype(np.float64)).fingerprint == palette.fingerprint
    moved = centers.copy()
    moved[1, 1] = np.nextafter(moved[1, 1], np.float32(1))
    assert Palette.from_centers(moved).fingerprint != palette.fingerprint
    assert Palette.from_centers(centers[::-1]).fingerprint != palette.fingerprint


def test_different_palettes_are_refused_with_both_named(fitted: Palette):
    other = Palette.from_centers([[0, 0, 0]])
    fitted.require_same(Palette.from_centers(fitted.centers_), "tokens", "run/model")
    with pytest.raises(InputError) as caught:
        fitted.require_same(other, "tokens", "run/model")
    for part in (
        fitted.fingerprint[:12],
        other.fingerprint[:12],
        "64 colours",
        "1 colours",
        "--palette MODEL",
    ):
        assert part in str(caught.value)


def test_the_cost_of_the_palette(fitted: Palette, grey: Palette, small_images: NDArray[np.uint8]):
    error = nearest_color_error(fitted, small_images)
    decoded = fitted.inverse_transform(fitted.transform(small_images)).astype(float)
    assert error["mse"] == pytest.approx(((decoded - small_images) ** 2).mean())
    assert error["psnr_db"] == pytest.approx(10 * np.log10(255**2 / error["mse"]))
    assert error["share"] == pytest.approx(
        np.bincount(fitted.transform(small_images).reshape(-1)) / 200 / 1024, abs=1e-6
    )
    unused = Palette.from_centers([[-1, -1, -1], [1, 1, 1], [0, 0, 0]])
    pixels = np.array([[0, 0, 0], [0, 0, 0], [255, 255, 255]], np.uint8)
    assert nearest_color_error(unused, pixels) == {
        "mse": 0.0,
        "psnr_db": None,
        "share": [0.666667, 0.333333, 0.0],
    }
    json.dumps(nearest_color_error(grey, GREY), allow_nan=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_colors": 0}, "1 to 65536 colours, not 0"),
        ({"n_colors": 65537}, "1 to 65536 colours, not 65537"),
        ({"max_iter": 0}, "max_iter is at least 1"),
        ({"seed": -1}, "seed at least 0"),
    ],
)
def test_settings_out_of_range(arguments: dict[str, int], message: str):
    with pytest.raises(InputError, match=message):
        Palette(**arguments)


def test_a_large_seed_is_accepted():
    assert len(Palette(4, seed=2**40).fit(GREY)) == 4


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((2, 3)),
        np.zeros((2, 4), np.uint8),
        np.zeros((2, 3), np.int64),
        np.uint8(3),
        [[0, 0, 0]],
    ],
)
def test_arrays_that_are_not_pixels_are_refused(pixels: object):
    palette = Palette.from_centers([[0, 0, 0]])
    for method in (Palette(2).fit, palette.transform):
        with pytest.raises(InputError, match="pixels are uint8 with RGB last"):
            method(pixels)


def test_fitting_no_pixels_is_refused():
    with pytest.raises(InputError, match="at least one pixel"):
        Palette().fit(np.zeros((0, 3), np.uint8))


@pytest.mark.parametrize("tokens", [[64], [-1], [[0, 1], [2, 300]]])
def test_tokens_of_another_palette_are_refused(fitted: Palette, tokens: list[object]):
    with pytest.raises(InputError, match=r"lie in 0\.\.63"):
        fitted.inverse_transform(tokens)


@pytest.mark.parametrize(
    ("centers", "message", "in_json"),
    [
        (
            np.zeros((4, 2)),
            r"shape \[k, 3\], not \[4, 2\]",
            r"clusters\.0 = \[0\.0, 0\.0\]: List should have at least 3",
        ),
        (np.zeros(3), r"shape \[k, 3\]", r"clusters\.0 = 0\.0: Input should be a valid list"),
        (np.zeros((0, 3)), r"shape \[k, 3\]", r"clusters = \[\]: List should have at least 1"),
        ([[0, 0, 200]], r"lie in \[-1, 1\]", r"is not a palette: .*lie in \[-1, 1\]"),
        ([[0, 0, float("nan")]], r"lie in \[-1, 1\]", r"is not a palette: .*lie in \[-1, 1\]"),
        ([[0, 0, float("inf")]], r"lie in \[-1, 1\]", r"is not a palette: .*lie in \[-1, 1\]"),
        ([[0, 0, 1e300]], r"lie in \[-1, 1\]", r"is not a palette: .*lie in \[-1, 1\]"),
        ([[0, 0, 10**400]], r"numbers in the shape", r"clusters\.0\.2 = 10000.*: "),
        (
            [[0, 0, 0], [1]],
            r"numbers in the shape \[k, 3\]",
            r"clusters\.1 = \[1\]: List should have at least 3",
        ),
        (
            [["a", "b", "c"]],
            r"numbers in the shape \[k, 3\]",
            r"clusters\.0\.0 = 'a': Input should be a valid number",
        ),
        (
            {"a": 1},
            r"numbers in the shape \[k, 3\]",
            r"clusters = \{'a': 1\}: Input should be a valid list",
        ),
    ],
)
@pytest.mark.filterwarnings("error")
def test_invalid_centres_are_refused(tmp_path: Path, centers: object, message: str, in_json: str):
    with pytest.raises(InputError, match=message):
        Palette.from_centers(centers)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"clusters": centers}, default=np.ndarray.tolist))
    with pytest.raises(InputError, match=rf"preprocessor_config\.json:? {in_json}") as caught:
        Palette.load(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("palette", "message"),
    [
        ({}, r"the key 'palette\.centers' is missing"),
        ({"centers": 5}, r"palette\.centers = 5: Input should be a valid list"),
        (
            {"centers": [[0, 0, "0"]]},
            r"palette\.centers\.0\.2 = '0': Input should be a valid number",
        ),
        (
            {"centers": [[0, 0, 0]], "fingerprint": 7},
            r"palette\.fingerprint = 7: Input should be a valid string",
        ),
        (
            {"centers": [[0, 0, 0]], "fingerprint": "0"},
            "the palette does not match its fingerprint; was it edited",
        ),
    ],
)
def test_a_malformed_palette_of_a_data_set_is_named_with_its_key(
    tmp_path: Path, palette: object, message: str
):
    (tmp_path / "dataset.json").write_text(json.dumps({"palette": palette}))
    with pytest.raises(InputError, match=rf"dataset\.json: {message}"):
        Palette.load(tmp_path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([["a", "b", "c"]]), "its centres are not numbers but <U1"),
        (np.zeros((4, 3), complex), "its centres are not numbers but complex128"),
        (np.zeros((0, 3)), r"centres have the shape \[k, 3\], not \[0, 3\]"),
        (np.zeros((3, 5)), r"centres have the shape \[k, 3\], not \[3, 5\]"),
        (np.full((4, 3), np.nan), r"lie in \[-1, 1\]"),
        (np.full((4, 3), 1e300), r"lie in \[-1, 1\]"),
        (np.array([[None, 1, 2]]), "not readable as a .npy array"),  # pickled objects
    ],
)
@pytest.mark.filterwarnings("error")
def test_an_array_that_is_not_a_palette_is_refused(tmp_path: Path, array: np.ndarray, message: str):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=rf"a\.npy is not a palette: .*{message}") as caught:
        Palette.load(tmp_path / "a.npy")
    assert "\n" not in str(caught.value)


def claiming(path: Path, shape: tuple[int, ...], size: int) -> None:
    """Write a `.npy` file of float32 that claims a shape, sparse and up to a size in bytes."""
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + size)


def test_gigabytes_are_refused_without_reading_them(tmp_path: Path):
    claiming(tmp_path / "a.npy", (2**32, 3), 12 * 2**32)
    with pytest.raises(
        InputError, match=r"a\.npy is not a palette: palette centres have the shape \[k, 3\]"
    ):
        Palette.load(tmp_path / "a.npy")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(2**40, 3), (2**62, 2**62), (-1, 3)])
def test_an_array_that_claims_more_than_its_file_holds_is_refused(
    tmp_path: Path, shape: tuple[int, ...]
):
    claiming(tmp_path / "a.npy", shape, 100)
    with pytest.raises(InputError, match=r"a\.npy is not a palette: .* \(.*\); is it cut off"):
        Palette.load(tmp_path / "a.npy")


@pytest.mark.parametrize("name", ["a.npy", "a.json", "a/dataset.json"])
def test_a_fifo_is_refused_without_blocking(tmp_path: Path, name: str):
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="is a FIFO; a regular file is needed"):
        Palette.load(tmp_path / name.removesuffix("/dataset.json"))


def test_a_device_is_refused():
    with pytest.raises(InputError, match="/dev/zero is a device; a regular file is needed"):
        Palette.load("/dev/zero")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", b"", "a.npy is not a palette"),
        ("a.npy", b"no array", "a.npy is not a palette"),
        ("a.npy", b"PK\x03\x04 and no more", "a.npy is not a palette"),
        ("a.npy", b"\x80\x04\x95.", "a.npy is not a palette"),
        ("a.json", b"{}", "a.json holds no palette"),
        ("a.json", b'{"palette": null}', "a.json holds no palette"),
        ("a.json", b'{"palette": "file.npy"}', "a.json holds no palette"),
        ("a.json", b'{"clust', "cut off"),
    ],
)
def test_files_that_are_not_palettes_are_refused(
    tmp_path: Path, name: str, content: bytes, message: str
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        Palette.load(tmp_path / name)


def test_an_archive_of_arrays_is_refused(tmp_path: Path):
    np.savez(tmp_path / "a.npz", centers=np.zeros((2, 3)))
    with pytest.raises(InputError, match=r"a\.npz is not a palette"):
        Palette.load(tmp_path / "a.npz")


def test_a_missing_palette(tmp_path: Path):
    with pytest.raises(InputError, match=r"no palette at .*nowhere\.npy"):
        Palette.load(tmp_path / "nowhere.npy")
    with pytest.raises(
        InputError, match=r"neither dataset\.json nor preprocessor_config\.json is there"
    ):
        Palette.load(tmp_path)


# The Hub.


def fill_cache(cache: Path, name: str, content: dict[str, object]) -> Path:
    """Write a Hub cache that has a model's preprocessor_config.json, in the layout of
    huggingface_hub."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    (snapshot / "preprocessor_config.json").write_text(json.dumps(content))
    return snapshot


@pytest.fixture
def hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return an empty Hub cache, without access to the Hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_a_hub_model_that_was_downloaded_before_is_read_from_the_cache(
    hub_cache: Path, fitted: Palette
):
    fill_cache(hub_cache, "openai/imagegpt-small", {"clusters": fitted.centers_.tolist()})
    assert Palette.load("openai/imagegpt-small").fingerprint == fitted.fingerprint


def test_a_local_path_has_priority_over_the_hub(hub_cache: Path, fitted: Palette, grey: Palette):
    fill_cache(hub_cache, "openai/imagegpt-small", {"clusters": fitted.centers_.tolist()})
    local = Path("openai/imagegpt-small")  # relative to the folder of the test
    grey.save(local)
    assert Palette.load("openai/imagegpt-small").fingerprint == grey.fingerprint
    assert Palette.load(local).fingerprint == grey.fingerprint


def test_a_hub_model_without_a_palette(hub_cache: Path):
    snapshot = fill_cache(hub_cache, "someone/model", {"do_resize": True})
    with pytest.raises(InputError, match="holds no palette"):
        Palette.load("someone/model")
    (snapshot / "preprocessor_config.json").unlink()
    with pytest.raises(
        InputError, match="no palette someone/model here, and the Hub cannot give it"
    ):
        Palette.load("someone/model")


@pytest.mark.parametrize(
    "name",
    ["runs/centers.npy", "a/b/c", "nowhere", "./a", "/a", "~/nowhere", "tokens/dataset.json"],
)
def test_invalid_hub_ids_are_not_requested(hub_cache: Path, name: str):
    with pytest.raises(InputError, match="no palette at ") as caught:
        Palette.load(name)
    assert "Hub" not in str(caught.value)


def test_a_network_without_answers_is_given_up_soon(tmp_path: Path):
    """Use a server that accepts connections and never answers; `hf_hub_download` would wait for
    minutes.

    The connections are counted, because seconds depend on the load of the machine.
    """
    program = (
        "from igpt.data.images.palette import Palette\n"
        "try: Palette.load('someone/model')\n"
        "except ValueError as error: print(error)\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment |= {
            "HF_ENDPOINT": endpoint,
            "HF_HUB_ETAG_TIMEOUT": "1",
            "HF_HOME": str(tmp_path),
        }
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert 1 <= connections(server) <= 2
    assert "no palette someone/model here, and the Hub cannot give it" in done.stdout
    assert done.stdout.count("\n") == 1


INTERRUPTED = """
import signal, threading
import numpy as np
from igpt.data.images.palette import _assign

generator = np.random.default_rng(0)
centers, colors = generator.uniform(0, 255, (512, 3)), generator.uniform(0, 255, (1_000_000, 3))
_assign(centers, colors[:10])
signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, 0.1)
try:
    _assign(centers, colors)
    print("finished")
except KeyboardInterrupt:
    print("interrupted", threading.active_count())
"""


def test_an_interrupted_fit_leaves_no_threads():
    """Regression: they wrote into freed memory, which ended in a segmentation fault."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted 1\n", "")
