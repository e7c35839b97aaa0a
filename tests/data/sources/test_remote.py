"""Sources behind URLs give the same images as on this machine: an object store and a web server."""

import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from igpt.data.prepare import PrepareConfig, prepare
from igpt.data.sources.catalogue import SourceConfig, open_source
from igpt.errors import InputError
from igpt.remote import name_in, url_of

pytest.importorskip("moto", reason="the lowest versions are tested without extras")
from ...helpers.stores import object_store, web_server
from .test_tars import samples, write_tar
from .test_zips import images, write_zip

Picture = Callable[..., bytes]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def store() -> Iterator[Any]:
    with object_store("pictures") as system:
        yield system


@pytest.fixture
def folders(tmp_path: Path, picture: Picture) -> Path:
    """Write the same kinds of images as files, in a ZIP, in tars and in Parquet."""
    import datasets

    members = images(picture, ["cats/", "dogs/"], 15)
    for name, content in members.items():
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_bytes(content)
    (tmp_path / "files" / "notes.txt").write_text("n")
    (tmp_path / "files" / ".git").mkdir()
    (tmp_path / "files" / ".git" / "config").write_text("c")
    write_zip(tmp_path / "zips" / "pictures.zip", members)
    write_tar(tmp_path / "tars" / "train-0.tar", samples(picture, 0, 20))
    write_tar(tmp_path / "tars" / "train-1.tar", samples(picture, 20, 30))
    write_tar(tmp_path / "tars" / "test-0.tar", samples(picture, 30, 40))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(2)})
    (tmp_path / "tables").mkdir()
    for split, rows in (("train", range(30)), ("test", range(30, 40))):
        table = datasets.Dataset.from_list(
            [{"image": {"bytes": picture(row), "path": None}, "label": row % 2} for row in rows],
            features=features,
        )
        table.to_parquet(tmp_path / "tables" / f"{split}-00000-of-00001.parquet")
    return tmp_path


def everything(source: str, **settings: Any) -> tuple[Any, ...]:
    """Return the bytes and labels of each split, the class names, and what is left out."""
    opened = open_source(source, SourceConfig(**settings))
    found = {}
    for name, split in opened.splits.items():
        found[name] = [
            (image["bytes"] if isinstance(image, dict) else Path(image).read_bytes(), label)
            for image, label in split.read(np.arange(len(split)))
        ]
    return found, opened.class_names, opened.left_out.to_json()


@pytest.mark.parametrize(
    "name",
    [
        *["files", "zips", "tars", "tables"],
        *["zips/pictures.zip", "tars/train-0.tar", "tables/train-00000-of-00001.parquet"],
    ],
)
def test_a_source_in_a_bucket(store: Any, folders: Path, name: str):
    store.put(str(folders), "pictures/sets", recursive=True)
    assert everything(f"s3://pictures/sets/{name}") == everything(str(folders / name))
    store.rm("pictures/sets", recursive=True)


@pytest.mark.parametrize("name", ["zips/pictures.zip", "tars/train-0.tar"])
def test_a_file_of_a_web_server(folders: Path, name: str):
    with web_server(folders) as (address, _):
        assert everything(f"{address}/{name}") == everything(str(folders / name))


def test_only_what_is_needed_of_a_zip_and_of_parquet_is_sent(tmp_path: Path, picture: Picture):
    large = {f"{number}.png": picture(number, side=300) for number in range(60)}
    file = write_zip(tmp_path / "p.zip", large)
    with web_server(tmp_path) as (address, sent):
        reader = open_source(f"{address}/p.zip").splits["train"].reader
        ((image, _),) = reader.read(np.array([3]))
        assert image["bytes"] == large["3.png"]
        assert sum(sent) < 2 * 5 * 2**20 + 2**17 < file.stat().st_size  # fsspec reads 5 MiB ahead


def test_workers_open_the_store_themselves(
    store: Any, folders: Path, monkeypatch: pytest.MonkeyPatch
):
    store.put(str(folders / "files"), "pictures/work", recursive=True)
    monkeypatch.setattr("igpt.data.prepare.MIN_IMAGES_FOR_WORKERS", 1)
    config = PrepareConfig(size=4, colors=8)
    there = prepare("s3://pictures/work", folders / "there", config, workers=2)
    here = prepare(str(folders / "files"), folders / "here", config)
    assert there.manifest["source"] == "s3://pictures/work"
    for split in here:
        assert (
            there[split].rows(np.arange(len(there[split])))
            == here[split].rows(np.arange(len(here[split])))
        ).all()
        assert (there[split].labels == here[split].labels).all()


def test_preparing_goes_on_after_the_server_failed(tmp_path: Path, picture: Picture):
    """Take the archive away after the first shard, and bring it back."""
    members = {f"{number:04}.png": picture(number) for number in range(1500)}
    file, out = write_zip(tmp_path / "p.zip", members), tmp_path / "tokens"
    config = PrepareConfig(size=4, colors=8)
    with web_server(tmp_path) as (address, _):
        with pytest.raises(InputError, match=r"p\.zip is not there"):
            prepare(
                f"{address}/p.zip",
                out,
                config,
                progress=lambda done, total: file.rename(tmp_path / "away"),
            )
        first = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*-00000.tokens.npy")}
        assert first
        assert not out.exists()
        (tmp_path / "away").rename(file)
        made = prepare(f"{address}/p.zip", out, config)
    assert {path.name: (out / path.name).stat().st_mtime_ns for path in first} == {
        path.name: time for path, time in first.items()
    }
    assert made.manifest["made"]["skipped"] == []
    assert sum(len(made[split]) for split in made) == 1500


def test_metadata_in_a_bucket(store: Any, picture: Picture):
    for number in range(20):
        store.pipe_file(f"pictures/listed/{number:02}[x].png", picture(number))
    rows = "".join(f"{number:02}[x].png,{'ab'[number % 2]}\n" for number in range(20))
    store.pipe_file("pictures/listed/metadata.csv", f"file_name,label\n{rows}".encode())
    found, class_names, _ = everything("s3://pictures/listed")
    assert class_names == ["a", "b"]
    of_images = {image: label for split in found.values() for image, label in split}
    assert [of_images[picture(number)] for number in range(20)] == [0, 1] * 10
    store.pipe_file("pictures/listed/metadata.csv", b"file_name,label\nx.png,a\n")
    with pytest.raises(
        InputError, match=r"s3://pictures/listed/metadata\.csv lists 'x\.png', which is not in"
    ):
        open_source("s3://pictures/listed")


def test_an_image_that_was_removed_is_a_bad_image(store: Any, folders: Path):
    store.put(str(folders / "files"), "pictures/changing", recursive=True)
    reader = open_source("s3://pictures/changing").splits["train"].reader
    store.rm_file("pictures/changing/cats/03.png")
    found = [image["bytes"] for image, _ in reader.read(np.arange(5))]
    assert [type(one) for one in found] == [bytes, bytes, bytes, InputError, bytes]


def refused(source: str) -> str:
    with pytest.raises(InputError) as caught:
        open_source(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_read_is_told_in_one_line(
    store: Any, folders: Path, monkeypatch: pytest.MonkeyPatch
):
    assert "s3://nowhere/a is not there (The specified bucket does not exist)" in refused(
        "s3://nowhere/a"
    )
    assert "s3://pictures/nothing is not there" in refused("s3://pictures/nothing")
    assert "s3://pictures/no.tar" in refused("s3://pictures/no.tar")
    assert "s3://pictures/no.zip is not there" in refused("s3://pictures/no.zip")
    assert "Protocol not known: abc" in refused("abc://pictures/sets")
    store.pipe_file("pictures/odd/a.arrow", b"x")
    assert "cannot be read in place" in refused("s3://pictures/odd")
    store.pipe_file("pictures/texts/a.txt", b"x")
    assert "holds no images that can be read" in refused("s3://pictures/texts")
    with web_server(folders) as (address, _):
        assert "cannot be read in place" in refused(f"{address}/files")
        assert "is not there" in refused(f"{address}/no.zip")
    assert "cannot be read" in refused(f"{address}/zips/pictures.zip")  # the server has stopped
    with web_server(folders, ranges=False) as (address, _):
        write_zip(folders / "large.zip", {"a.txt": bytes(12 * 2**20)}, zipfile.ZIP_STORED)
        assert "cannot be read" in refused(f"{address}/large.zip")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    type(store).clear_instance_cache()
    said = refused("s3://pictures/sets")
    assert "Unable to locate credentials; for S3, set AWS_ACCESS_KEY_ID" in said


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("s3://pictures/a", "pip install 'igpt[remote]'"),
        ("https://127.0.0.1/a.zip", "pip install 'igpt[remote]'"),
        ("gs://pictures/a", "pip install gcsfs"),
    ],
)
def test_a_missing_package_is_named(url: str, advice: str):
    """Block the packages in another process."""
    script = (
        "import sys\n"
        "for name in ('s3fs', 'aiohttp', 'gcsfs'):\n"
        "    sys.modules[name] = None\n"
        "from igpt.cli import main\n"
        f"sys.exit(main(['prepare', {url!r}, '-o', 'never']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().endswith(f"needs a package that is not installed: {advice}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("s3://a/b", "s3://a/b"),
        (Path("s3://a/b"), "s3://a/b"),
        ("S3://a/B", "s3://a/B"),
        ("https://a/b?c=d", "https://a/b?c=d"),
        ("a/b", None),
        ("id/name:config", None),
        ("c:/a", None),
        ("/a:b/c", None),
        ("s3:", None),
    ],
)
def test_urls_are_recognised(name: str | Path, url: str | None):
    assert url_of(name) == url


def test_names_of_files_behind_urls():
    assert name_in("https://a/b/c.zip?key=x/y.tar") == "c.zip"
    assert name_in("s3://a/b?c.png") == "b?c.png"
