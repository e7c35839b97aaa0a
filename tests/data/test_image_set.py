"""Image sets for a model: the selected images, their names, and the error of the palette."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt.data.image_set import ImageSet, ImageSetConfig, source_images, stored_images
from igpt.data.images.palette import Palette, nearest_color_error
from igpt.data.images.transform import load_square
from igpt.data.prepare import PrepareConfig, prepare
from igpt.data.sources.catalogue import SourceConfig, open_source
from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError

Write = Callable[..., Path]
ALL = ImageSetConfig()


@pytest.fixture(scope="module")
def palette() -> Palette:
    return Palette.from_centers(np.random.default_rng(0).uniform(-1, 1, (32, 3)))


def refusal(source: Path | str, palette: Palette, **settings: object) -> str:
    with pytest.raises(InputError) as caught:
        source_images(str(source), palette, 6, ImageSetConfig(**settings)).image_set()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_all_images_of_a_source_without_splits(write_folder: Write, palette: Palette) -> None:
    folder = write_folder("plain", *(f"{letter}.png" for letter in "dacb"))
    steps = []
    found = source_images(str(folder), palette, 6, ALL).image_set(
        lambda *counts: steps.append(counts)
    )
    assert (found.split, len(found), found.class_names, found.skipped) == ("all", 4, None, [])
    assert found.rows.tolist() == [0, 1, 2, 3]
    assert found.names == [str(folder / f"{letter}.png") for letter in "abcd"]
    squares = np.stack([load_square(name, 6) for name in found.names])
    np.testing.assert_array_equal(
        found.tokens.rows(np.arange(4)), palette.transform(squares).reshape(4, 36)
    )
    expected = nearest_color_error(palette, squares)
    assert found.palette_error["mse"] == pytest.approx(expected["mse"], rel=1e-12)
    assert found.palette_error["psnr_db"] == pytest.approx(expected["psnr_db"], rel=1e-12)
    assert found.tokens.labels.tolist() == [-1] * 4
    assert steps == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_test_split_is_the_default_and_others_can_be_named(
    write_folder: Write, palette: Palette
) -> None:
    names = [
        f"{split}/{kind}/{index}.png"
        for split in ("train", "test", "unlabeled")
        for kind in "ab"
        for index in "01"
    ]
    folder = write_folder("split", *names, "test/b/2.png")

    def gathered(split: str | None) -> ImageSet:
        return source_images(str(folder), palette, 6, ImageSetConfig(split=split)).image_set()

    test = gathered(None)
    assert (test.split, len(test), test.class_names) == ("test", 5, ["a", "b"])
    assert test.tokens.labels.tolist() == [0, 0, 1, 1, 1]
    assert [Path(name).relative_to(folder).parts[0] for name in test.names] == ["test"] * 5
    assert (gathered("train").split, len(gathered("train"))) == ("train", 4)
    assert (gathered("unlabeled").split, len(gathered("unlabeled"))) == ("unlabeled", 4)
    assert "has no split 'tset'; did you mean 'test'?" in refusal(folder, palette, split="tset")


def test_classes_are_numbered_as_in_training(
    write_parquet: Write, palette: Palette, picture: Callable[..., bytes]
) -> None:
    for split, classes in (("train", ["cat", "dog", "eel"]), ("test", ["eel", "dog"])):
        images = [
            {"bytes": picture(seed), "path": f"{split}-{seed}.png"} for seed in range(len(classes))
        ]
        folder = write_parquet(f"set/{split}.parquet", {"image": images, "kind": classes}).parent
    found = source_images(str(folder), palette, 6, ImageSetConfig(label_column="kind")).image_set()
    assert found.class_names == ["cat", "dog", "eel"]
    assert found.tokens.labels.tolist() == [2, 1]
    assert [found.class_of(label) for label in (2, -1)] == ["eel", None]
    assert found.names == ["test-0.png", "test-1.png"]
    whole = source_images(str(folder), palette, 6, ImageSetConfig(label_column="none")).image_set()
    assert whole.class_names is None


def test_a_source_with_only_a_test_split(
    write_parquet: Write, palette: Palette, picture: Callable[..., bytes]
) -> None:
    images = [{"bytes": picture(seed), "path": None} for seed in range(3)]
    folder = write_parquet("only/test.parquet", {"image": images}).parent
    found = source_images(str(folder), palette, 6, ALL).image_set()
    assert (found.split, found.names) == ("test", ["row 0", "row 1", "row 2"])
    with pytest.raises(InputError, match="has no training split"):
        open_source(str(folder))


def test_splits_without_a_test_split_are_concatenated(
    write_parquet: Write, palette: Palette, picture: Callable[..., bytes]
) -> None:
    for split, seeds in (("train", (0, 1, 2)), ("validation", (3, 4))):
        images = [{"bytes": picture(seed), "path": None} for seed in seeds]
        folder = write_parquet(f"two/{split}.parquet", {"image": images}).parent
    found = source_images(str(folder), palette, 6, ALL).image_set()
    assert (found.split, found.names) == ("all", [f"row {row}" for row in range(5)])
    squares = np.stack([np.asarray(Image.open(io.BytesIO(picture(seed)))) for seed in range(5)])
    np.testing.assert_array_equal(
        found.tokens.rows(np.arange(5)), palette.transform(squares).reshape(5, 36)
    )
    subset = source_images(str(folder), palette, 6, ImageSetConfig(limit=3, seed=1)).image_set()
    np.testing.assert_array_equal(subset.tokens.rows(np.arange(3)), found.tokens.rows(subset.rows))
    assert subset.names == [f"row {row}" for row in subset.rows]
    assert subset.rows.tolist() == sorted(set(subset.rows.tolist()))
    assert {
        tuple(
            source_images(str(folder), palette, 6, ImageSetConfig(limit=3, seed=seed))
            .image_set()
            .rows
        )
        for seed in range(8)
    } > {tuple(subset.rows)}


def test_samples_of_a_tar_are_named_by_their_member(
    tmp_path: Path, palette: Palette, picture: Callable[..., bytes]
) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name, content in (
            ("a.png", picture(0)),
            ("a.cls", b"x"),
            ("b\udcff.png", picture(1)),
            ("b\udcff.cls", b"y"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    found = source_images(str(tmp_path / "set.tar"), palette, 6, ALL).image_set()
    assert found.names == ["a.png", "b\\udcff.png"]
    assert found.tokens.labels.tolist() == [0, 1]


def test_nothing_is_held_out_of_the_digits(digits: TokenDataset) -> None:
    found = source_images("digits", digits.palette, 8, ALL).image_set()
    assert (found.split, len(found)) == ("all", 1797)
    assert found.palette_error == {"mse": 0.0, "psnr_db": None, "measured_on": "these images"}
    splits, *_ = open_source("digits", SourceConfig())
    held = splits["test"].indices
    np.testing.assert_array_equal(found.tokens.rows(held), digits["test"].rows(np.arange(180)))
    np.testing.assert_array_equal(found.tokens.labels_of(held), digits["test"].labels)


def test_bad_images_are_listed_or_refused(write_folder: Write, palette: Palette) -> None:
    folder = write_folder("bad", *(f"{index}.png" for index in range(5)))
    (folder / "2.png").write_text("no picture")
    said = refusal(folder, palette)
    assert "images that do not decode: 1, where --max-bad 0.01 allows 0" in said
    assert f"{folder}/2.png: not an image in a known format" in said
    found = source_images(str(folder), palette, 6, ImageSetConfig(max_bad=0.2)).image_set()
    assert found.skipped == [f"{folder}/2.png: not an image in a known format"]
    assert found.rows.tolist() == [0, 1, 3, 4]
    assert [Path(name).stem for name in found.names] == ["0", "1", "3", "4"]
    for index in range(5):
        (folder / f"{index}.png").write_text("no picture")
    assert "no image of" in refusal(folder, palette, max_bad=1)


def test_what_a_token_data_set_left_out_is_reported(
    write_folder: Write, tmp_path: Path, palette: Palette
) -> None:
    folder = write_folder("some", *(f"{number}.png" for number in range(20)))
    (folder / "notes.txt").write_text("of the images")
    (folder / "07.png").write_bytes(b"broken")
    data = prepare(str(folder), tmp_path / "tokens", PrepareConfig(size=4, colors=8, max_bad=0.1))
    made = data.manifest["made"]
    found = stored_images(data, ImageSetConfig(limit=1)).image_set().to_json()
    counts = {kind: entry["count"] for kind, entry in found["left_out"].items()}
    assert counts == {"files ending in .txt": 1, "images that do not decode": 1}
    assert {key: found[key] for key in ("skipped", "left_out", "warnings")} == {
        key: made[key] for key in ("skipped", "left_out", "warnings")
    }
    assert len(found["skipped"]) == 1
    assert found["left_out_of"] == "the token data set, all splits"
    (folder / "07.png").unlink()
    assert (
        source_images(str(folder), palette, 6, ALL).image_set().to_json()["left_out_of"]
        == "these images"
    )


def test_a_malformed_list_of_left_out_images_is_named(digits: TokenDataset, tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    shutil.copytree(digits.path, folder)
    manifest = json.loads((folder / "dataset.json").read_text())
    manifest["made"] |= {"left_out": {"files": 3}, "warnings": ["dark"]}
    (folder / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"dataset\.json: left_out\.files: .*") as caught:
        stored_images(TokenDataset(folder), ALL).image_set()
    assert "\n" not in str(caught.value)
    manifest["made"]["left_out"] = {}
    (folder / "dataset.json").write_text(json.dumps(manifest))
    assert stored_images(TokenDataset(folder), ALL).image_set().to_json()["warnings"] == ["dark"]


def test_frames_after_the_first_are_counted(tmp_path: Path, palette: Palette) -> None:
    for name, count in (("a.png", 1), ("b.gif", 3), ("c.tif", 5)):
        frames = [
            Image.fromarray(np.full((6, 6, 3), 40 * number, np.uint8)) for number in range(count)
        ]
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    found = source_images(str(tmp_path), palette, 6, ImageSetConfig(max_bad=0)).image_set()
    assert found.to_json()["left_out"] == {
        "further frames of images": {
            "count": 6,
            "first": str(tmp_path / "b.gif"),
            "possible_images": False,
        }
    }


def test_paths_that_are_not_sources(tmp_path: Path, palette: Palette, write_folder: Write) -> None:
    assert "no folder or file" in refusal(tmp_path / "nowhere", palette)
    (tmp_path / "empty").mkdir()
    assert "is an empty folder" in refusal(tmp_path / "empty", palette)
    assert "has no split 'dogs'; it has none" in refusal(
        write_folder("flat", "a.png"), palette, split="dogs"
    )
    assert "has no split 'test'; choose from: train" in refusal(
        tmp_path / "flat", palette, split="test"
    )
    assert "has no column 'picture'" in refusal(tmp_path / "flat", palette, image_column="picture")


def test_token_arrays_are_used_if_they_have_the_palette(tmp_path: Path, palette: Palette) -> None:
    """OpenAI's arrays: any of the three splits, of any integer type, next to kmeans_centers.npy."""
    generator = np.random.default_rng(0)
    parts = {
        short: generator.integers(0, 32, (count, 36)) for short, count in (("tr", 20), ("te", 7))
    }
    np.save(tmp_path / "kmeans_centers.npy", palette.centers_.astype(np.float64))
    np.save(tmp_path / "set_teX.npy", parts["te"])
    np.save(tmp_path / "set_teY.npy", np.arange(7) % 3)
    found = source_images(str(tmp_path / "set"), palette, 6, ALL).image_set()
    np.testing.assert_array_equal(found.tokens.rows(np.arange(7)), parts["te"])
    assert (found.split, found.palette_error, found.class_names, found.name_of(2)) == (
        "test",
        None,
        list("012"),
        "row 2",
    )
    assert found.tokens.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    np.save(tmp_path / "set_trX.npy", parts["tr"].astype(np.uint8))
    assert (
        len(
            source_images(
                str(tmp_path / "set"), palette, 6, ImageSetConfig(split="train")
            ).image_set()
        )
        == 20
    )
    assert len(source_images(str(tmp_path / "set"), palette, 6, ALL).image_set()) == 7
    few = source_images(
        str(tmp_path / "set"), palette, 6, ImageSetConfig(limit=3, seed=1)
    ).image_set()
    np.testing.assert_array_equal(few.tokens.rows(np.arange(3)), parts["te"][few.rows])


def test_other_token_arrays_are_refused(tmp_path: Path, palette: Palette) -> None:
    source = tmp_path / "set"
    np.save(tmp_path / "set_teX.npy", np.zeros((5, 36), np.int64))
    assert "set holds tokens without their palette; put kmeans_centers.npy next to them" in refusal(
        source, palette
    )
    np.save(tmp_path / "kmeans_centers.npy", palette.centers_[::-1])
    said = refusal(source, palette)
    assert "kmeans_centers.npy has " in said
    assert f"the model has {palette.fingerprint[:12]} (32 colours)" in said
    np.save(tmp_path / "kmeans_centers.npy", palette.centers_)
    assert "has no split 'train'; " in refusal(source, palette, split="train")
    for wrong in (-1, 32):
        np.save(tmp_path / "set_teX.npy", np.array([[0] * 36, [wrong] * 36]))
        said = refusal(source, palette, max_bad=1)
        assert f"set_teX.npy row 1: tokens {wrong} to {wrong} in a palette of 32 colours" in said
    np.save(tmp_path / "set_teX.npy", np.zeros((5, 16), np.int64))
    assert "set holds tokens of 4 px, and the model's are of 6 px" in refusal(source, palette)


def test_tokens_of_a_data_set_stay_on_disk(digits: TokenDataset, tmp_path: Path) -> None:
    found = stored_images(digits, ALL).image_set()
    assert (found.split, len(found), found.name_of(3), found.names) == ("test", 180, "row 3", None)
    assert found.palette_error == {"mse": 0.0, "psnr_db": None, "measured_on": "training images"}
    assert (
        stored_images(digits, ImageSetConfig(split="train")).image_set().tokens.nbytes
        == digits["train"].nbytes
    )
    subset = stored_images(digits, ImageSetConfig(limit=7, seed=3)).image_set()
    np.testing.assert_array_equal(
        subset.tokens.rows(np.arange(7)), digits["test"].rows(subset.rows)
    )
    np.testing.assert_array_equal(subset.tokens.labels, digits["test"].labels[subset.rows])
    assert subset.name_of(2) == f"row {subset.rows[2]}"
    with pytest.raises(InputError, match="has no split 'dev'"):
        stored_images(digits, ImageSetConfig(split="dev")).image_set()
    with pytest.raises(InputError, match="holds tokens: --image-column"):
        stored_images(digits, ImageSetConfig(image_column="image")).image_set()


def test_the_palettes_error_of_token_arrays_is_unknown(tmp_path: Path) -> None:
    for short, count in (("tr", 30), ("va", 5), ("te", 5)):
        np.save(
            tmp_path / f"set_{short}X.npy",
            np.random.default_rng(0).integers(0, 6, (count, 16)).astype(np.uint8),
        )
    np.save(
        tmp_path / "kmeans_centers.npy",
        np.random.default_rng(1).uniform(-1, 1, (6, 3)).astype(np.float32),
    )
    data = prepare(str(tmp_path / "set"), tmp_path / "tokens", PrepareConfig(size=4))
    assert stored_images(data, ALL).image_set().palette_error is None


def test_the_same_images_as_prepared_ones(photographs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(photographs / "train", folder / "train")
    shutil.copytree(photographs / "train", folder / "test")
    data = prepare(str(folder), tmp_path / "tokens", PrepareConfig(size=8, colors=20))
    found = source_images(str(folder), data.palette, 8, ALL).image_set()
    np.testing.assert_array_equal(
        found.tokens.rows(np.arange(48)), data["test"].rows(np.arange(48))
    )
    np.testing.assert_array_equal(found.tokens.labels, data["test"].labels)
    assert found.class_names == data.class_names
