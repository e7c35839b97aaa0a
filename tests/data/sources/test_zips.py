"""ZIP archives are read like the folder that they would be unpacked to."""

import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from igpt.data.images.decode import open_image
from igpt.data.prepare import PrepareConfig, prepare
from igpt.data.sources.catalogue import SourceConfig, open_source
from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError

Picture = Callable[..., bytes]


def write_zip(path: Path, members: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def unpack(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    return folder


def images(picture: Picture, folders: Iterable[str], count: int = 12) -> dict[str, bytes]:
    """Return images in each of some folders."""
    return {
        f"{folder}{number:02}.png": picture(number + 100 * place)
        for place, folder in enumerate(folders)
        for number in range(count)
    }


def content(source: Path, **settings: Any) -> tuple[list[tuple[str, bytes, str | None]], Any]:
    """Return the split, the bytes and the class name of all images, in order of bytes; and what is
    left out."""
    opened = open_source(str(source), SourceConfig(**settings))
    found = []
    for name, split in opened.splits.items():
        for image, label in split.read(np.arange(len(split))):
            encoded = image["bytes"] if isinstance(image, dict) else Path(image).read_bytes()
            found.append((name, encoded, opened.class_names[label] if label >= 0 else None))
    return sorted(found, key=lambda entry: entry[1]), opened.left_out.to_json()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    "folders",
    [
        ["cats/", "dogs/"],
        ["all/train/cats/", "all/train/dogs/", "all/test/cats/", "all/test/dogs/"],
        ["train/", "test/"],
    ],
)
def test_a_zip_is_read_like_the_folder_of_its_members(
    tmp_path: Path, picture: Picture, folders: list[str], method: int
):
    members = images(picture, folders) | {
        "notes.txt": b"n",
        "__MACOSX/._00.png": b"x",
        "__MACOSX/._01.png": b"x",
        f"{folders[0]}more.heic": b"y",
    }
    file = write_zip(tmp_path / "pictures.zip", members, method)
    folder = unpack(file, tmp_path / "pictures")
    settings = {"test_split": "test"} if "test" in folders[-1] else {}
    assert content(file, **settings)[1] == content(folder, **settings)[1]
    if settings:  # held-out images depend on the order of the members
        assert content(file, **settings)[0][0] == content(folder, **settings)[0][0]
    classes = [{entry[1:] for entry in content(one, **settings)[0]} for one in (file, folder)]
    assert classes[0] == classes[1]
    assert len(classes[0]) == len(folders) * 12


def test_metadata_in_a_zip(tmp_path: Path, picture: Picture):
    members = images(picture, [""], 20)
    rows = "".join(f"{name},{'ab'[place % 2]}\n" for place, name in enumerate(members))
    file = write_zip(
        tmp_path / "p.zip", members | {"metadata.csv": f"file_name,label\n{rows}".encode()}
    )
    assert open_source(str(file)).class_names == ["a", "b"]
    of_images = {encoded: name for _, encoded, name in content(file)[0]}
    assert [of_images[encoded] for encoded in members.values()] == ["a", "b"] * 10
    wrong = write_zip(
        tmp_path / "q.zip", members | {"metadata.csv": b"file_name,label\nnone.png,a\n"}
    )
    with pytest.raises(
        InputError, match=r"q\.zip/metadata\.csv lists 'none\.png', which is not in"
    ):
        open_source(str(wrong))


def test_a_folder_of_zips(tmp_path: Path, picture: Picture):
    names = ["cats/", "dogs/"]
    write_zip(tmp_path / "set" / "train-0.zip", images(picture, names))
    write_zip(tmp_path / "set" / "train-1.zip", images(lambda seed: picture(seed + 500), names))
    write_zip(tmp_path / "set" / "test.zip", images(lambda seed: picture(seed + 900), names))
    opened = open_source(str(tmp_path / "set"), SourceConfig(validation_split=None))
    assert {name: len(split) for name, split in opened.splits.items()} == {
        "train": 43,
        "validation": 5,
        "test": 24,
    }
    assert opened.class_names == ["cats", "dogs"]
    assert not opened.left_out
    reader = opened.splits["test"].reader
    assert reader.name_of(0) == "test.zip: test/cats/00.png".replace("test/", "", 1)


def test_workers_read_the_same(tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch):
    file = write_zip(tmp_path / "p.zip", images(picture, ["cats/", "dogs/"], 30))
    monkeypatch.setattr("igpt.data.prepare.MIN_IMAGES_FOR_WORKERS", 1)
    made = [
        prepare(
            str(file), tmp_path / f"t{workers}", PrepareConfig(size=4, colors=8), workers=workers
        )
        for workers in (1, 2)
    ]
    for split in made[0]:
        assert (made[0][split].rows([0, 1]) == made[1][split].rows([0, 1])).all()
        assert (made[0][split].labels == made[1][split].labels).all()


def damaged(file: Path, name: str, content: bytes) -> None:
    """Overwrite the last bytes of a stored member."""
    with zipfile.ZipFile(file) as archive:
        member = archive.getinfo(name)
        end = member.header_offset + 30 + len(name) + member.compress_size
    with file.open("r+b") as stream:
        stream.seek(end - len(content))
        stream.write(content)


def test_damaged_members_are_counted(tmp_path: Path, picture: Picture):
    members = images(picture, ["cats/", "dogs/"], 30)
    file = write_zip(tmp_path / "p.zip", members, zipfile.ZIP_STORED)
    damaged(file, "cats/03.png", b"!!!!")
    with pytest.raises(InputError, match=r"1, where --max-bad 0.01 allows 0.*p\.zip: cats/03\.png"):
        prepare(str(file), tmp_path / "t", PrepareConfig(size=4, colors=8))
    made = prepare(str(file), tmp_path / "u", PrepareConfig(size=4, colors=8, max_bad=0.1))
    (skipped,) = made.manifest["made"]["skipped"]
    assert skipped.endswith(
        "p.zip: cats/03.png: damaged in the ZIP archive: its checksum is another"
    )
    assert sum(len(made[split]) for split in made) == 59


def test_deflated_data_that_are_damaged(tmp_path: Path, picture: Picture):
    members = {f"{name}.png": picture(3) for name in "abcdefghijklmnop"}
    file = write_zip(tmp_path / "p.zip", members)
    damaged(file, "c.png", b"\xff" * 90)
    reader = open_source(str(file)).splits["train"].reader
    (image, _), (whole, _) = reader.read(np.array([2, 3]))
    with pytest.raises(InputError, match="damaged in the ZIP archive"):
        open_image(image)
    assert open_image(whole).size == (6, 6)


def test_the_last_of_several_members_of_one_name_counts(tmp_path: Path, picture: Picture):
    file = write_zip(tmp_path / "p.zip", images(picture, [""], 15))
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("03.png", picture(77))
    found = [encoded for _, encoded, _ in content(file)[0]]
    assert len(found) == 15
    assert picture(77) in found
    assert picture(3) not in found


def encrypted(path: Path, members: Mapping[str, bytes]) -> Path:
    """Write a ZIP whose members are marked as encrypted."""
    write_zip(path, members, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        start = -1
        while (start := data.find(signature, start + 1)) >= 0:
            data[start + offset] |= 1
    path.write_bytes(data)
    return path


def test_archives_that_cannot_be_read(tmp_path: Path, picture: Picture):
    members = images(picture, ["cats/", "dogs/"])
    cut = write_zip(tmp_path / "cut.zip", members)
    cut.write_bytes(cut.read_bytes()[:-40])
    cases = {
        encrypted(tmp_path / "e.zip", members): r"e\.zip is encrypted \(cats/00\.png\); unpack it",
        cut: r"cut\.zip is not readable as a ZIP: .*; is it cut off\?",
        write_zip(
            tmp_path / "b.zip", members, zipfile.ZIP_BZIP2
        ): r"compressed by method 12 \(cats/00",
        write_zip(tmp_path / "n.zip", {"a.txt": b"a"}): r"n\.zip holds no images that can be read",
        write_zip(tmp_path / "z.zip", {}): r"z\.zip is an empty folder",
    }
    for file, reason in cases.items():
        with pytest.raises(InputError, match=reason) as caught:
            open_source(str(file))
        assert "\n" not in str(caught.value)


def test_names_cannot_leave_the_folder(tmp_path: Path, picture: Picture):
    members = images(picture, ["cats/", "dogs/"]) | {"../metadata.csv": b"file_name\n"}
    with pytest.raises(InputError, match=r"has a file '\.\./metadata\.csv'; rename it"):
        open_source(str(write_zip(tmp_path / "in" / "p.zip", members)))
    assert not (tmp_path / "metadata.csv").exists()


def test_a_zip_can_be_prepared_again_from_another_place(tmp_path: Path, picture: Picture):
    file = write_zip(tmp_path / "p.zip", images(picture, ["cats/", "dogs/"]))
    one, other = (open_source(str(file)).splits["train"].reader for _ in range(2))
    assert one.fingerprint() == other.fingerprint()
    changed = write_zip(
        tmp_path / "q.zip", images(lambda seed: picture(seed + 1), ["cats/", "dogs/"])
    )
    assert open_source(str(changed)).splits["train"].reader.fingerprint() != one.fingerprint()
    assert isinstance(prepare(str(file), tmp_path / "t", PrepareConfig(size=4)), TokenDataset)
