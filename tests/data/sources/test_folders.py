"""Folders of images: every image is found once, in one order, with the label of its folder."""

import io
import os
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt.data.images.decode import open_image
from igpt.data.sources.catalogue import SourceConfig, Split, open_source
from igpt.errors import InputError

from ...helpers.sample_images import ImageSets

Write = Callable[..., Path]


def read(splits: dict[str, Split]) -> dict[str, dict[str, int]]:
    """Return the label of each image of each split, by its path below the source."""
    found = {}
    for name, split in splits.items():
        assert (np.diff(split.indices) > 0).all()
        images = list(split.read(np.arange(len(split))))
        found[name] = {str(image): label for image, label in images}
        assert len(found[name]) == len(images), "an image occurs twice"
    return found


def everything(folder: Path, **settings: str) -> tuple[dict[str, int], list[str] | None]:
    """Return all images of a source, by their path below it, with their labels; and the class
    names."""
    splits, names, *_ = open_source(str(folder), SourceConfig(**settings))
    found = read(splits)
    assert sum(map(len, found.values())) == len(set().union(*found.values())), (
        "an image is in two splits"
    )
    merged = {path: label for images in found.values() for path, label in images.items()}
    return {str(Path(path).relative_to(folder)): label for path, label in merged.items()}, names


def counts(folder: Path, **settings: str) -> list[int]:
    splits, *_ = open_source(str(folder), SourceConfig(**settings))
    assert list(splits) == ["train", "validation", "test"]
    return [len(split) for split in splits.values()]


def test_photographs_in_class_folders(image_sets: ImageSets):
    images, classes = (100, 100) if image_sets.real else (20, 10)
    folder = image_sets.folder / "imagenet-sample"
    splits, names, *_ = open_source(str(folder))
    assert counts(folder) == [images * 8 // 10, images // 10, images // 10]
    assert names is not None
    assert len(names) == classes
    modes = Counter()
    for split in splits.values():
        for path, label in split.read(np.arange(len(split))):
            modes[open_image(path).mode] += 1
            assert names[label] == path.parent.name
    assert modes == {"RGB": images - 2, "L": 2}


def test_a_flat_folder(write_folder: Write):
    files = [f"{number}.png" for number in range(20)]
    folder = write_folder("flat", *files)
    assert counts(folder) == [16, 2, 2]
    assert everything(folder) == (dict.fromkeys(files, -1), None)


def test_class_folders(write_folder: Write):
    files = {
        f"{kind}/{number}.png": label
        for label, kind in enumerate(("cat", "dog"))
        for number in range(10)
    }
    folder = write_folder("animals", *files)
    assert counts(folder) == [16, 2, 2]
    assert everything(folder) == (files, ["cat", "dog"])
    assert everything(folder, label_column="none") == (dict.fromkeys(files, -1), None)
    with pytest.raises(
        InputError, match="has no column 'kind': the classes of images in folders are their folders"
    ):
        open_source(str(folder), SourceConfig(label_column="kind"))


def test_a_single_folder_is_not_a_class(write_folder: Write):
    files = [f"images/{number}.png" for number in range(10)]
    assert everything(write_folder("one", *files)) == (dict.fromkeys(files, -1), None)


@pytest.mark.parametrize("validation", ["val", "valid", "validation", "dev", "Validation"])
def test_split_folders(write_folder: Write, validation: str):
    files = {
        f"{split}/{kind}/{i}.png"
        for split in ("train", validation)
        for kind in "ab"
        for i in range(10)
    }
    folder = write_folder("splits", *sorted(files))
    assert counts(folder) == [18, 20, 2]
    found, names = everything(folder)
    assert names == ["a", "b"]
    assert found == {file: "ab".index(file.split("/")[1]) for file in files}
    splits, *_ = open_source(str(folder))
    assert all(path.startswith(f"{folder}/{validation}/") for path in read(splits)["validation"])


def test_classes_that_training_lacks(write_folder: Write):
    files = [
        f"{split}/{kind}/{i}.png"
        for split, kinds in (("train", "ab"), ("test", "bcde"))
        for kind in kinds
        for i in range(9)
    ]
    folder = write_folder("strange", *files)
    message = (
        r"labels disagree between splits: test has 3 that train does not have \('c', 'd', 'e'\); "
        r".* --label-column none"
    )
    with pytest.raises(InputError, match=message) as caught:
        open_source(str(folder))
    assert "\n" not in str(caught.value)
    assert counts(folder, label_column="none") == [16, 2, 36]


def test_a_split_without_class_folders_has_no_labels(write_folder: Write):
    files = [f"train/{kind}/{i}.png" for kind in "ab" for i in range(10)] + [
        f"test/{i}.png" for i in range(5)
    ]
    found, names = everything(write_folder("unlabelled", *files))
    assert names == ["a", "b"]
    assert {label for file, label in found.items() if file.startswith("test")} == {-1}
    assert {label for file, label in found.items() if file.startswith("train")} == {0, 1}


def test_two_folders_for_one_split_are_refused(write_folder: Write):
    folder = write_folder(
        "twice",
        *(f"{split}/{i}.png" for split in ("train", "val", "validation") for i in range(10)),
    )
    with pytest.raises(
        InputError, match="two validation splits, val and validation; --validation-split takes one"
    ):
        open_source(str(folder))
    splits, *_ = open_source(str(folder), SourceConfig(validation_split="val"))
    assert {Path(path).parent.name for path in read(splits)["validation"]} == {"val"}
    assert {Path(path).parent.name for path in read(splits)["train"]} == {"train"}


def test_names_of_splits_within_names_of_images_hide_no_image(write_folder: Write):
    """`datasets` alone would take the one file whose name contains the word, and silently drop the
    others."""
    files = [f"{number}.png" for number in range(17)] + [
        "train-station.png",
        "test_1.png",
        "my val 2.png",
    ]
    assert everything(write_folder("named", *files))[0].keys() == set(files)


@pytest.mark.parametrize(
    "kinds", [("bus", "car", "train"), ("bus", "test", "validation"), ("train", "unlabeled")]
)
def test_a_class_may_be_called_train_or_test(write_folder: Write, kinds: tuple[str, ...]):
    files = {
        f"{kind}/{number}.png": label for label, kind in enumerate(kinds) for number in range(10)
    }
    assert everything(write_folder("vehicles", *files)) == (files, list(kinds))


def test_other_splits_are_left_out(write_folder: Write):
    files = [
        f"{split}/{number}.png" for split in ("train", "test", "unlabeled") for number in range(10)
    ]
    folder = write_folder("stl", *files, "overview.png")
    assert counts(folder) == [9, 1, 10]
    assert not any(file.startswith(("unlabeled", "overview")) for file in everything(folder)[0])


def test_other_files_between_the_images(write_folder: Write, picture: Callable[..., bytes]):
    files = [f"{number}.PNG" for number in range(10)] + [
        f"more/{number}.jpeg" for number in range(10)
    ]
    folder = write_folder("mixed", *files)
    for name in ("readme.txt", "notes", "more/labels.json", "more/a.npy"):
        (folder / name).write_text("my images")
    for name in (".hidden.png", "more/.hidden.png", ".thumbnails/1.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(picture(0))
    assert everything(folder) == (dict.fromkeys(files, -1), None)
    (folder / "list.parquet").write_text("perhaps images too")
    with pytest.raises(
        InputError, match=r"mixed holds 20 image files and 1 \.parquet; give one or the other"
    ):
        open_source(str(folder))


def test_pipes_do_not_block(write_folder: Write):
    folder = write_folder("pipes", "0.png", "1.png", "2.png", "3.png")
    os.mkfifo(folder / "4.png")
    with pytest.raises(InputError, match="is a FIFO; a regular file is needed"):
        open_image(folder / "4.png")


def test_a_column_of_files(write_folder: Write):
    folder = write_folder("plain", "0.png", "1.png", "2.png", "3.png")
    with pytest.raises(InputError, match="plain has no column 'photo': it holds files of images"):
        open_source(str(folder), SourceConfig(image_column="photo"))


def test_an_image_next_to_the_one_file_of_images(
    write_parquet: Write, picture: Callable[..., bytes]
):
    images = [{"bytes": picture(number), "path": None} for number in range(10)]
    folder = write_parquet("set/data.parquet", {"image": images}).parent
    (folder / "preview.png").write_bytes(picture(0))
    assert counts(folder) == [8, 1, 1]


def test_changes_in_a_folder_are_seen(write_folder: Write, picture: Callable[..., bytes]):
    folder = write_folder("growing", *(f"{number}.png" for number in range(10)))
    assert sum(counts(folder)) == 10
    (folder / "10.png").write_bytes(picture(10))
    assert sum(counts(folder)) == 11


def test_images_at_any_depth(write_folder: Write):
    deep = "/".join(["d"] * 400)
    files = [
        f"{place}{i}.png"
        for place in ("", "a/", "a/b/c/", "a/b/d/e/f/", "x.png/", f"{deep}/")
        for i in range(3)
    ]
    assert everything(write_folder("nested", *files)) == (dict.fromkeys(files, -1), None)
    files = [f"train/{kind}/{part}/{i}.png" for kind in "ab" for part in "xy" for i in range(5)]
    assert everything(write_folder("parts", *files)) == (
        {file: "ab".index(file[6]) for file in files},
        ["a", "b"],
    )


def test_circular_links_lose_no_image(write_folder: Write):
    files = [f"{place}{i}.png" for place in ("a/", "a/b/", "c/") for i in range(5)]
    folder = write_folder("outer/linked", *files)
    write_folder("outer/other", "1.png")
    (folder / "a" / "b" / "up").symlink_to(folder)
    (folder / "a" / "here").symlink_to(".")
    (folder / "c" / "out").symlink_to("../..")  # to the folder that contains the source
    (folder / "itself").symlink_to("itself")
    (folder / "one").symlink_to("two")
    (folder / "two").symlink_to("one")
    assert everything(folder)[0].keys() == set(files)


def test_links_elsewhere_are_followed(write_folder: Write):
    elsewhere = write_folder("elsewhere", *(f"{i}.png" for i in range(5)))
    folder = write_folder("linked", *(f"cat/{i}.png" for i in range(5)))
    (folder / "dog").symlink_to(elsewhere)
    (folder / "cat" / "another.png").symlink_to(elsewhere / "0.png")
    found, names = everything(folder)
    assert names == ["cat", "dog"]
    cats = [*(f"cat/{i}.png" for i in range(5)), "cat/another.png"]
    assert found == dict.fromkeys(cats, 0) | {f"dog/{i}.png": 1 for i in range(5)}
    (folder.parent / "link").symlink_to(folder)
    assert everything(folder.parent / "link") == (found, names)


def test_a_broken_link_is_a_bad_image(write_folder: Write):
    folder = write_folder("broken", *(f"{i}.png" for i in range(9)))
    (folder / "lost.jpg").symlink_to(folder / "removed.jpg")
    (folder / "itself.jpg").symlink_to("itself.jpg")
    splits, *_ = open_source(str(folder))
    bad = {}
    for split in splits.values():
        for row, (image, _) in zip(split.indices, split.read(np.arange(len(split))), strict=True):
            try:
                open_image(image)
            except InputError as error:
                bad[split.reader.name_of(row)] = str(error)
    assert bad.keys() == {str(folder / "lost.jpg"), str(folder / "itself.jpg")}
    assert bad[str(folder / "lost.jpg")] == f"no such file: {folder / 'lost.jpg'}"
    assert "\n" not in bad[str(folder / "itself.jpg")]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="changes the user, as Linux does")
def test_an_unreadable_folder_is_named(picture: Callable[..., bytes]):
    program = (
        "import os, sys, pyarrow.compute\n"
        "from igpt.data.sources.catalogue import open_source\n"
        "if os.getuid() == 0: os.setuid(65534)\n"  # root may read everything
        "for source in sys.argv[1:]:\n"
        "    try: open_source(source)\n"
        "    except ValueError as error: print(error)\n"
    )
    with (
        tempfile.TemporaryDirectory() as temporary
    ):  # pytest's own folders are closed to other users
        folders = [Path(temporary) / name for name in ("all", "some/a/closed")]
        for folder in folders:
            folder.mkdir(parents=True)
            (folder / "1.png").write_bytes(picture(0))
            folder.chmod(0)
        Path(temporary).chmod(0o755)
        command = [sys.executable, "-c", program, str(folders[0]), str(folders[1].parents[1])]
        done = subprocess.run(command, capture_output=True, text=True)
    assert re.fullmatch(
        f"cannot read {folders[0]}/[^ ]+: Permission denied\ncannot read the folder {folders[1]}: "
        "Permission denied\n",
        done.stdout,
    ), done


def test_a_file_name_that_is_not_unicode(write_folder: Write, picture: Callable[..., bytes]):
    folder = write_folder("latin", *(f"{i}.png" for i in range(9)))
    Path(os.fsdecode(os.fsencode(folder) + b"/gr\xfcn.png")).write_bytes(picture(0))
    with pytest.raises(
        InputError, match=r"the name of the image 'gr\\udcfcn.png' in .* is not UTF-8; rename it"
    ):
        open_source(str(folder))


def test_equal_names_keep_their_own_pixels_and_labels(tmp_path: Path):
    places = [
        "a/1.png",
        "a/01.png",
        "a/1.PNG",
        "A/1.png",
        "b/1.png",
        "b/1.Png",
        "B/1.png",
        "ä/1.png",
        "a\u0308/1.png",
    ]
    for number, place in enumerate(places):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2), (number, 0, 0)).save(tmp_path / place)
    splits, names, *_ = open_source(str(tmp_path))
    assert names == sorted({place.split("/")[0] for place in places})
    found = {}
    for split in splits.values():
        for image, label in split.read(np.arange(len(split))):
            found[open_image(image).getpixel((0, 0))[0]] = label
    assert found == {
        number: names.index(place.split("/")[0]) for number, place in enumerate(places)
    }


def test_the_order_does_not_depend_on_the_machine(tmp_path: Path, picture: Callable[..., bytes]):
    names = [f"{number % 3}/{number}.png" for number in range(2000)]
    orders = []
    for copy in ("one", "two"):
        random.Random(copy).shuffle(names)
        for name in names:
            (tmp_path / copy / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / copy / name).touch()
        reader = open_source(str(tmp_path / copy))[0]["train"].reader
        orders.append(
            [
                str(path.relative_to(tmp_path / copy))
                for path, _ in reader.read(np.arange(len(reader)))
            ]
        )
    assert orders[0] == orders[1] == sorted(names)


def described(write_folder: Write, *files: str) -> Path:
    """Write images, and a `metadata.csv` with the class of each: whether its number is odd."""
    folder = write_folder("described", *files)
    for parent in {(folder / file).parent for file in files}:
        lines = (
            f"{image.name},{'odd' if int(image.stem) % 2 else 'even'}\n"
            for image in parent.glob("*.png")
        )
        (parent / "metadata.csv").write_text("file_name,kind\n" + "".join(lines))
    return folder


@pytest.mark.parametrize("parents", [[""], ["train/", "val/"]])
def test_metadata_next_to_the_images(write_folder: Write, parents: list[str]):
    folder = described(
        write_folder, *(f"{parent}{number}.png" for parent in parents for number in range(20))
    )
    splits, names, *_ = open_source(str(folder), SourceConfig(label_column="kind"))
    assert [len(split) for split in splits.values()] == (
        [16, 2, 2] if len(parents) == 1 else [18, 20, 2]
    )
    assert names == ["even", "odd"]
    for split in splits.values():
        for image, label in split.read(np.arange(len(split))):
            assert int(image.stem) % 2 == label
            assert open_image(image).size == (6, 6)
            assert (
                open_image(image).tobytes() == Image.open(io.BytesIO(image.read_bytes())).tobytes()
            )


def test_an_image_next_to_the_folder_of_the_splits(write_folder: Write):
    files = [
        f"data/{split}/{kind}/{i}.png"
        for split in ("train", "test")
        for kind in "ab"
        for i in range(9)
    ]
    folder = write_folder("covered", *files, "cover.png")
    source = open_source(str(folder))
    assert counts(folder) == [16, 2, 18]
    assert source.class_names == ["a", "b"]
    assert (
        source.left_out.text() == "images outside the folders of the splits: 1 (first: cover.png)"
    )


@pytest.mark.parametrize("cover", [[], ["cover.png"]])
@pytest.mark.parametrize("wrapper", ["plain", "data/plain-1.0", "train/train"])
def test_one_folder_around_the_classes(write_folder: Write, wrapper: str, cover: list[str]):
    files = {f"{wrapper}/{kind}/{i}.png": "abc".index(kind) for kind in "abc" for i in range(9)}
    folder = write_folder("around", *files, *cover)
    found, names = everything(folder)
    assert names == ["a", "b", "c"]
    if wrapper == "train/train" and cover:
        assert found == files
        assert open_source(str(folder)).left_out.possible_images == 1
    else:
        assert found == files | dict.fromkeys(cover, -1)


def test_folders_around_the_classes_of_some_splits(write_folder: Write):
    files = {f"train/train/{kind}/{i}.png": "ab".index(kind) for kind in "ab" for i in range(9)}
    files |= {f"test/{kind}/{i}.png": "ab".index(kind) for kind in "ab" for i in range(9)}
    assert everything(write_folder("mixed", *files)) == (files, ["a", "b"])


def test_splits_in_a_folder_called_train(write_folder: Write):
    files = {
        f"train/{split}/{k}/{i}.png": "ab".index(k)
        for split in ("train", "test")
        for k in "ab"
        for i in range(9)
    }
    folder = write_folder("twice", *files)
    assert everything(folder) == (files, ["a", "b"])
    assert counts(folder) == [16, 2, 18]


def test_one_folder_of_images_is_named_where_there_are_no_labels(write_folder: Write):
    folder = write_folder("one", *(f"images/{number}.png" for number in range(10)))
    assert open_source(str(folder)).notes == [
        f"no labels: the images in {folder} are in one folder, 'images', and classes are two "
        "folders or more; a "
        "metadata.csv with the columns file_name and label gives classes"
    ]


@pytest.mark.parametrize(
    ("train", "other", "split", "expected"),
    [
        ("training_set", "test_set", "test", [16, 2, 18]),
        ("train_images", "val_images", "validation", [16, 18, 2]),
        ("seg_train", "seg_test", "test", [16, 2, 18]),
        ("train", "my test", "test", [16, 2, 18]),
    ],
)
def test_folder_names_that_contain_words_of_splits(
    write_folder: Write, train: str, other: str, split: str, expected: list[int]
):
    files = {
        f"{top}/{kind}/{i}.png": "ab".index(kind)
        for top in (train, other)
        for kind in "ab"
        for i in range(9)
    }
    folder = write_folder("words", *files)
    assert counts(folder) == expected
    assert everything(folder) == (files, ["a", "b"])
    (note,) = open_source(str(folder)).notes
    assert f"{train} as train" in note
    assert f"{other} as {split}" in note


def test_another_folder_next_to_words_of_splits(write_folder: Write):
    files = [
        f"seg_{split}/{kind}/{i}.png"
        for split in ("train", "test", "pred")
        for kind in "ab"
        for i in range(9)
    ]
    source = open_source(str(write_folder("intel", *files)))
    assert source.class_names == ["a", "b"]
    assert source.left_out.text() == "images of the split seg_pred: 18 (first: seg_pred)"


@pytest.mark.parametrize(
    "tops",
    [("bullet_train", "cat", "test_tube"), ("a_test", "a_val"), ("a_train", "b_train", "c_test")],
)
def test_ambiguous_words_of_splits_are_named(write_folder: Write, tops: tuple[str, ...]):
    folder = write_folder("unclear", *(f"{top}/{i}.png" for top in tops for i in range(9)))
    source = open_source(str(folder))
    assert source.class_names == list(tops)
    assert source.notes == [
        f"the names of {', '.join(top for top in tops if top != 'cat')} contain the names of "
        "splits, and they are not "
        "taken as splits; if they are, --train-split, --validation-split and --test-split name them"
    ]
