"""WebDataset tars: the samples of many shards are one sequence, the same as from reading the tars
sequentially."""

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from igpt.data.images.decode import open_image
from igpt.data.sources.catalogue import SourceConfig, Split, open_source
from igpt.errors import InputError

Members = Iterable[tuple[str, bytes]]
Picture = Callable[..., bytes]


def write_tar(path: Path, members: Members, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def samples(
    picture: Picture, first: int, last: int, kinds: str | None = "abc"
) -> list[tuple[str, bytes]]:
    """Return images, each named by a number, and their classes."""
    members = []
    for number in range(first, last):
        members.append((f"{number:04d}.png", picture(number)))
        if kinds:
            members.append((f"{number:04d}.cls", kinds[number % len(kinds)].encode()))
    return members


def plainly(*paths: Path) -> list[tuple[bytes, str]]:
    """Return images and class names as `tarfile` finds them, where each image is followed by its
    class."""
    found = []
    for path in paths:
        with tarfile.open(path) as tar:
            contents = [tar.extractfile(member).read() for member in tar.getmembers()]
            found += [
                (image, name.decode())
                for image, name in zip(contents[::2], contents[1::2], strict=True)
            ]
    return found


def read(split: Split) -> list[tuple[dict[str, Any] | None, int]]:
    return list(split.read(np.arange(len(split))))


def whole(
    path: Path, **settings: str
) -> tuple[list[tuple[dict[str, Any] | None, int]], list[str] | None]:
    """Return everything that the reader of the training images finds, including held-out images;
    and the class names."""
    splits, names, *_ = open_source(str(path), SourceConfig(**settings))
    reader = splits["train"].reader
    return list(reader.read(np.arange(len(reader)))), names


def counts(path: Path, **settings: str) -> list[int]:
    splits, *_ = open_source(str(path), SourceConfig(**settings))
    assert list(splits) == ["train", "validation", "test"]
    return [len(split) for split in splits.values()]


def test_a_tar_is_a_source_and_so_is_its_folder(tmp_path: Path, picture: Picture):
    file = write_tar(tmp_path / "images-0000.tar", samples(picture, 0, 20))
    for source in (file, tmp_path):
        assert counts(source) == [16, 2, 2]
        found, names = whole(source)
        assert names == ["a", "b", "c"]
        assert [(image["bytes"], names[label]) for image, label in found] == plainly(file)
        assert [image["path"] for image, _ in found] == [
            f"{number:04d}.png" for number in range(20)
        ]


@pytest.fixture
def shards(tmp_path: Path, picture: Picture) -> Path:
    """Write 40 training images in five shards of different sizes, one of them empty, and 12
    validation images in two."""
    cuts = [0, 7, 7, 8, 30, 40]
    for number, (first, last) in enumerate(pairwise(cuts)):
        write_tar(tmp_path / "set" / f"train-{number:04d}.tar", samples(picture, first, last))
    write_tar(tmp_path / "set" / "val-0000.tar", samples(picture, 100, 105))
    write_tar(tmp_path / "set" / "val-0001.tar", samples(picture, 105, 112))
    return tmp_path / "set"


def test_many_shards_are_one_sequence(shards: Path):
    splits, names, *_ = open_source(str(shards))
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 36,
        "validation": 12,
        "test": 4,
    }
    expected = plainly(*sorted(shards.glob("train-*.tar")))
    for split in (splits["train"], splits["test"]):
        found = [(image["bytes"], names[label]) for image, label in read(split)]
        assert found == [expected[row] for row in split.indices]
    found = [(image["bytes"], names[label]) for image, label in read(splits["validation"])]
    assert found == plainly(*sorted(shards.glob("val-*.tar")))


def test_any_rows_across_shards(shards: Path):
    reader = open_source(str(shards))[0]["train"].reader
    expected = plainly(*sorted(shards.glob("train-*.tar")))
    generator = np.random.default_rng(0)
    choices = [
        np.flatnonzero(generator.random(40) < share)
        for share in (0.05, 0.1, 0.3, 0.5, 0.9)
        for _ in range(5)
    ]
    for rows in [
        *choices,
        np.array([0]),
        np.array([39]),
        np.array([6, 7, 8]),
        np.array([29, 30]),
        np.array([], int),
    ]:
        found = [(image["bytes"], "abc"[label]) for image, label in reader.read(rows)]
        assert found == [expected[row] for row in rows]
    assert reader.name_of(6) == "train-0000.tar: 0006.png"
    assert reader.name_of(7) == "train-0002.tar: 0007.png"
    assert reader.name_of(39) == "train-0004.tar: 0039.png"


@pytest.mark.parametrize(
    "names",
    [
        ("train/0000.tar", "validation/0000.tar"),
        ("train/cats/0000.tar", "val/cats/0000.tar"),
        ("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"),
        ("Train0.tar", "VAL0.tar"),
        ("shards_train_1.tar", "shards_dev_1.tar"),
    ],
)
def test_splits_by_folder_and_by_word(tmp_path: Path, picture: Picture, names: tuple[str, str]):
    source = tmp_path / "test"  # the source's own name contains no split
    write_tar(source / names[0], samples(picture, 0, 20))
    write_tar(source / names[1], samples(picture, 20, 25))
    splits, *_ = open_source(str(source))
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 18,
        "validation": 5,
        "test": 2,
    }
    assert [image["path"] for image, _ in read(splits["validation"])] == [
        f"{number:04d}.png" for number in range(20, 25)
    ]


def test_tars_without_a_split_are_training_images(tmp_path: Path, picture: Picture):
    for number, name in enumerate(("bus", "car", "train")):  # a class may have this name
        write_tar(tmp_path / "set" / f"{name}.tar", samples(picture, 10 * number, 10 * number + 10))
    assert counts(tmp_path / "set") == [24, 3, 3]
    write_tar(
        tmp_path / "set" / "val.tar", samples(picture, 0, 4)
    )  # now it is a split, and others are left out
    assert counts(tmp_path / "set") == [9, 4, 1]
    assert counts(tmp_path / "set", train_split="bus") == [9, 4, 1]


def test_classes_are_sorted_as_numbers_if_all_are(tmp_path: Path, picture: Picture):
    for kinds, expected in (
        (("10", "9", " 100\n"), ["9", "10", "100"]),
        (("10", "9", "x"), ["10", "9", "x"]),
    ):
        members = [
            member
            for number in range(12)
            for member in (
                (f"{number:02d}.png", picture(number)),
                (f"{number:02d}.cls", kinds[number % 3].encode()),
            )
        ]
        found, names = whole(write_tar(tmp_path / f"{len(expected[2])}.tar", members))
        assert names == expected
        assert [names[label] for _, label in found] == [
            kinds[number % 3].strip() for number in range(12)
        ]


def test_no_class_has_the_number_minus_one(tmp_path: Path, picture: Picture):
    members = [
        *samples(picture, 0, 6, "ab"),
        ("6.png", picture(6)),
        ("7.png", picture(7)),
        ("7.cls", b" \n"),
    ]
    found, names = whole(write_tar(tmp_path / "a.tar", [*members, *samples(picture, 8, 10, "ab")]))
    assert names == ["a", "b"]
    assert [label for _, label in found] == [0, 1, 0, 1, 0, 1, -1, -1, 0, 1]
    found, names = whole(tmp_path / "a.tar", label_column="none")
    assert names is None
    assert [label for _, label in found] == [-1] * 10


def test_a_field_of_the_json_as_label(tmp_path: Path, picture: Picture):
    fields = [
        {"kind": 3},
        {"kind": 20},
        {"kind": None},
        {},
        [3],
        {"kind": "3", "more": 1},
        None,
        {"kind": 20},
    ]
    members = []
    for number, value in enumerate(fields):
        content = b"{damaged" if value is None else json.dumps(value).encode()
        members += [
            (f"{number}.json", content),
            (f"{number}.png", picture(number)),
            (f"{number}.txt", b"a caption"),
        ]
    file = write_tar(tmp_path / "a.tar", members)
    found, names = whole(file, label_column="kind")
    assert names == ["3", "20"]
    assert [label for _, label in found] == [0, 1, -1, -1, -1, 0, -1, 1]
    assert whole(file)[1] is None
    assert whole(file, label_column="txt")[1] == ["a caption"]
    with pytest.raises(
        InputError, match=r"no sample of .*a\.tar has a \.knd member or such a field in its \.json"
    ):
        open_source(str(file), SourceConfig(label_column="knd"))


def test_classes_that_training_lacks(tmp_path: Path, picture: Picture):
    write_tar(tmp_path / "set" / "train-0.tar", samples(picture, 0, 20, "ab"))
    write_tar(tmp_path / "set" / "val-0.tar", samples(picture, 20, 30, "bz"))
    with pytest.raises(
        InputError,
        match=r"labels disagree between splits: val\w* has 1 that train does not have \('z'\)",
    ):
        open_source(str(tmp_path / "set"))
    assert counts(tmp_path / "set", label_column="none") == [18, 10, 2]


def test_several_images_in_a_sample(tmp_path: Path, picture: Picture):
    members = []
    for number in range(10):
        members += [
            (f"{number}.left.png", picture(number)),
            (f"{number}.right.JPG", picture(100 + number, "JPEG")),
        ]
    file = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(
        InputError,
        match=r"have several images; name one with --image-column: left\.png, right\.jpg; members",
    ):
        open_source(str(file))
    for column, offset, form in (("left.png", 0, "PNG"), ("right.jpg", 100, "JPEG")):
        found, _ = whole(file, image_column=column)
        assert [image["bytes"] for image, _ in found] == [
            picture(offset + number, form) for number in range(10)
        ]
    with pytest.raises(InputError, match=r"a\.tar holds no images that end in \.middle\.png"):
        open_source(str(file), SourceConfig(image_column="middle.png"))


def test_formats_may_be_mixed(tmp_path: Path, picture: Picture):
    forms = [("jpg", "JPEG"), ("png", "PNG"), ("JPEG", "JPEG"), ("webp", "WEBP")]
    members = []
    for number in range(12):
        ending, form = forms[number % 4]
        members += [(f"{number}.txt", b"a caption"), (f"{number}.{ending}", picture(number, form))]
    found, _ = whole(write_tar(tmp_path / "a.tar", members))
    for number, (image, _) in enumerate(found):
        expected = Image.open(io.BytesIO(picture(number, forms[number % 4][1])))
        assert open_image(image).format == expected.format
        assert open_image(image).tobytes() == expected.tobytes()


def test_a_sample_without_its_image_is_a_bad_image(tmp_path: Path, picture: Picture):
    write_tar(tmp_path / "set" / "0.tar", samples(picture, 0, 10))
    write_tar(
        tmp_path / "set" / "1.tar",
        [*samples(picture, 10, 15), ("x/lost.cls", b"a"), *samples(picture, 15, 20)],
    )
    splits, *_ = open_source(str(tmp_path / "set"))
    reader = splits["train"].reader
    found = list(reader.read(np.arange(21)))
    assert [row for row, (image, _) in enumerate(found) if image is None] == [15]
    assert found[15] == (None, 0)
    assert reader.name_of(15) == "1.tar: x/lost.cls"
    with pytest.raises(InputError, match="there is no image here"):
        open_image(found[15][0])
    write_tar(tmp_path / "set" / "2.tar", [("readme.txt", b"no images at all")])
    with pytest.raises(InputError, match=r"2\.tar holds no images$"):
        open_source(str(tmp_path / "set"))


def test_which_members_form_a_sample(tmp_path: Path, picture: Picture):
    """Consecutive members in one folder whose names agree up to the first dot; a repeated name
    starts a new sample."""
    members = [
        ("a/1.png", picture(0)),
        ("a/1.cls", b"x"),
        ("b/1.png", picture(1)),
        ("b/1.cls", b"y"),
        ("b/1.png", picture(2)),
        ("b/1.png", picture(3)),
        ("b/1.cls", b"x"),
        ("b/._1.png", b"what a Mac leaves"),
        (".DS_Store", b""),
        ("LICENSE", b""),
        ("./b/c/1.5.png", picture(4)),
        ("1.png", picture(5)),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    with tarfile.open(path, "a") as tar:
        for kind, name in ((tarfile.DIRTYPE, "folder.png"), (tarfile.SYMTYPE, "2.png")):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "1.png"
            tar.addfile(entry)
    found, names = whole(path)
    assert [image["bytes"] for image, _ in found] == [picture(number) for number in range(6)]
    assert [label if label < 0 else names[label] for _, label in found] == [
        "x",
        "y",
        -1,
        "x",
        -1,
        -1,
    ]


def test_long_names(tmp_path: Path, picture: Picture):
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        names = [f"{'ä' * 120}/{'n' * 60}/{number:03d}.png" for number in range(5)]
        with tarfile.open(tmp_path / f"{form}.tar", "w", format=form) as tar:
            for number, name in enumerate(names):
                entry = tarfile.TarInfo(name)
                entry.size = len(picture(number))
                tar.addfile(entry, io.BytesIO(picture(number)))
        found, _ = whole(tmp_path / f"{form}.tar")
        assert [(image["path"], image["bytes"]) for image, _ in found] == [
            (name, picture(number)) for number, name in enumerate(names)
        ]


def test_a_truncated_tar_is_refused(tmp_path: Path, picture: Picture):
    """Truncated anywhere: within a header, within an image, or between two members, which `tarfile`
    does not notice."""
    content = write_tar(tmp_path / "whole.tar", samples(picture, 0, 10)).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        last = tar.getmembers()[-1]
        end = last.offset_data + 512
    cut = tmp_path / "cut.tar"
    for length in [*range(0, end, 256), end - 1, end, end + 511]:
        cut.write_bytes(content[:length])
        with pytest.raises(InputError, match="cut off") as caught:
            open_source(str(cut))
        assert "\n" not in str(caught.value)
    for header in (last.offset, end):  # garbage in the position of a header or of the end mark
        cut.write_bytes(content[:header] + b"\xff" * 512 + content[header + 512 :])
        with pytest.raises(InputError, match=f"cut off or damaged after {header} bytes"):
            open_source(str(cut))
    cut.write_bytes(content[: end + 512])
    assert sum(counts(cut)) == 10


@pytest.mark.parametrize("sizes", [(1, 2), (20, 40), (3, 0, 4), (0, 5), (7, 8, 9)])
def test_joined_tars_are_read_to_the_end(tmp_path: Path, picture: Picture, sizes: tuple[int, ...]):
    """`cat a.tar b.tar`: another tar starts after the first end mark."""
    joined, parts, first = b"", [], 0
    for number, size in enumerate(sizes):
        part = write_tar(tmp_path / f"{number}.tar", samples(picture, first, first + size))
        parts.append(part)
        joined += part.read_bytes()
        first += size
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "all.tar").write_bytes(joined)
    reader = open_source(str(tmp_path / "all"), SourceConfig(held_out=0.4) if first < 5 else None)[
        0
    ]["train"].reader
    names = sorted({name for _, name in plainly(*parts)})
    expected = plainly(*parts)
    assert [
        (image["bytes"], names[label]) for image, label in reader.read(np.arange(len(reader)))
    ] == expected
    rows = np.arange(first)[:: max(1, first // 4)]
    assert [image["bytes"] for image, _ in reader.read(rows)] == [expected[row][0] for row in rows]


@pytest.mark.parametrize("tail", [b"\n", b"x" * 512, b"\0" * 300 + b"x"])
def test_trailing_data_that_is_not_a_tar_is_refused(tmp_path: Path, picture: Picture, tail: bytes):
    file = write_tar(tmp_path / "a.tar", samples(picture, 0, 10))
    size = file.stat().st_size
    file.write_bytes(file.read_bytes() + tail)
    with pytest.raises(
        InputError, match=f"a.tar has no end: it is cut off or damaged after {size} bytes"
    ):
        open_source(str(file))
    file.write_bytes(file.read_bytes()[:size] + bytes(5000))
    assert sum(counts(file)) == 10


def test_members_that_are_not_used_are_counted(tmp_path: Path, picture: Picture):
    members = [("LICENSE", b""), ("data", b""), (".DS_Store", b""), ("__MACOSX/0.png", picture(0))]
    for number in range(6):
        members += [
            (f"{number}.png", picture(number)),
            (f"{number}.mask.png", picture(number)),
            (f"{number}.txt", b"a caption"),
            (f"{number}.cls", b"ab"[number % 2 :][:1]),
        ]
    path = write_tar(tmp_path / "a.tar", members)
    with tarfile.open(path, "a") as tar:
        for kind, name in (
            (tarfile.DIRTYPE, "folder"),
            (tarfile.LNKTYPE, "9.png"),
            (tarfile.SYMTYPE, "9.txt"),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "0.png"
            tar.addfile(entry)
    source = open_source(str(path), SourceConfig(image_column="png"))
    assert {
        kind: (entry.count, entry.first) for kind, entry in source.left_out.entries.items()
    } == {
        "tar members named LICENSE, README and the like": (1, "a.tar: LICENSE"),
        "tar members without an ending": (1, "a.tar: data"),
        "hidden and system files": (2, "a.tar: .DS_Store"),
        "further members of samples ending in .png": (6, "a.tar: 0.mask.png"),
        "further members of samples ending in .txt": (6, "a.tar: 0.txt"),
        "tar members that are links or devices ending in .png": (1, "a.tar: 9.png"),
        "tar members that are links or devices ending in .txt": (1, "a.tar: 9.txt"),
    }
    assert source.left_out.possible_images == 2, (
        "the one without a suffix, and the link to an image"
    )


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_a_compressed_tar(tmp_path: Path, picture: Picture, compression: str):
    file = write_tar(tmp_path / "a.tar", samples(picture, 0, 10), f"w:{compression}")
    with pytest.raises(InputError, match="is not readable as an uncompressed tar") as caught:
        open_source(str(file))
    assert "\n" not in str(caught.value)


def test_headers_are_not_kept_in_memory(tmp_path: Path, picture: Picture):
    """10,000 headers of `tarfile` take 15 MB, and the 13 million of ImageNet would take 20 GB."""
    image = picture(0)
    members = (
        (f"{number:04d}.{ending}", image if ending == "png" else b"a")
        for number in range(5000)
        for ending in ("png", "cls")
    )
    file = write_tar(tmp_path / "a.tar", members)
    small = write_tar(tmp_path / "small.tar", samples(picture, 0, 10))
    program = (  # a process of its own, in which no thread of another test allocates memory
        "import sys, tracemalloc, numpy as np\n"
        "from igpt.data.sources.catalogue import open_source\n"
        "open_source(sys.argv[1])\n"  # imports are not counted
        "tracemalloc.start()\n"
        "splits, *_ = open_source(sys.argv[2])\n"
        "((image, label),) = splits['train'].reader.read(np.array([4999]))\n"
        "print(tracemalloc.get_traced_memory()[1], image['path'], label)\n"
    )
    command = [sys.executable, "-c", program, str(small), str(file)]
    peak, name, label = subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.split()
    assert (name, label) == ("4999.png", "0")
    assert (
        int(peak) < 5_000_000
    )  # 0.2 MB, or 2 MB if Python's table of interned strings doubles meanwhile


def test_tars_without_classes_name_their_fields(tmp_path: Path, picture: Picture):
    members = []
    for number in range(10):
        members += [
            (f"{number}.png", picture(number)),
            (f"{number}.txt", b"a cat"),
            (f"{number}.json", b"{}"),
        ]
    file = write_tar(tmp_path / "a.tar", members)
    assert open_source(str(file)).notes == [
        "no labels: no training sample has a .cls member (there are members ending in .txt, "
        ".json); --label-column "
        "names the ending of other members, or a field of the .json members"
    ]
    assert open_source(str(file), SourceConfig(label_column="none")).notes == []


def test_dots_in_the_names_of_images(tmp_path: Path, picture: Picture):
    file = write_tar(
        tmp_path / "a.tar", [(f"img.v1.{number}.png", picture(number)) for number in range(10)]
    )
    with pytest.raises(InputError) as caught:
        open_source(str(file))
    assert str(caught.value) == (
        f"samples of {file} have several images; name one with --image-column: v1.0.png, v1.1.png, "
        "v1.2.png, v1.3.png, "
        "v1.4.png and 5 more; members whose names agree up to the first dot are one sample, such "
        "as img.v1.0.png and "
        "img.v1.1.png"
    )
