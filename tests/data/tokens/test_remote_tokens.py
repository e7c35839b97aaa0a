"""Token data sets in an object store: written once and last, and read through a bounded cache."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from igpt.data.prepare import PrepareConfig, prepare, prepare_part
from igpt.data.tokens import cache
from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError

pytest.importorskip("moto", reason="the lowest versions are tested without extras")
from ...helpers.stores import object_store

Run = Callable[..., subprocess.CompletedProcess[str]]
CONFIG = PrepareConfig(size=4, colors=8, limit=300)


@pytest.fixture(scope="module")
def store() -> Iterator[Any]:
    with object_store("tokens") as system:
        yield system


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a cache of its own for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "igpt"


def forget(home: Path) -> None:
    """Remove the cache, as on another machine."""
    release()
    shutil.rmtree(home, ignore_errors=True)


def release() -> None:
    """Give the data sets free that this process reads, as at its end."""
    for lock in cache._locks.values():
        os.close(lock)
    cache._locks.clear()


@pytest.fixture(scope="module")
def copy(store: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a function that writes a data set in the store under a name; its URL."""
    made = prepare("digits", tmp_path_factory.mktemp("made") / "tokens", CONFIG)

    def write(name: str) -> str:
        for file in made.path.glob("*.npy"):
            store.put_file(str(file), f"tokens/{name}/{file.name}")
        manifest = made.manifest | {"source": name}
        store.pipe_file(f"tokens/{name}/dataset.json", json.dumps(manifest).encode())
        return f"s3://tokens/{name}"

    return write


@contextmanager
def failing(store: Any, method: str, error: type[BaseException], calls: int) -> Iterator[list[str]]:
    """Let a method of the file system fail after some calls; yield the files of these."""
    kind, names = type(store), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        of_all = getattr(kind, method)

        def call(self: Any, one: str, other: str, **options: Any) -> None:
            if len(names) == calls:
                raise error("the store does not answer")
            names.append(Path(one).name)
            of_all(self, one, other, **options)

        patch.setattr(kind, method, call)
        patch.setattr(cache, "_THREADS", 1)
        kind.clear_instance_cache()  # an instance has methods of its own
        yield names
    kind.clear_instance_cache()


def same(one: TokenDataset, other: TokenDataset) -> bool:
    return one.manifest == other.manifest and all(
        (
            one[split].rows(np.arange(len(one[split])))
            == other[split].rows(np.arange(len(other[split])))
        ).all()
        and (one[split].labels == other[split].labels).all()
        for split in one
    )


def test_it_is_the_same_data_set_as_in_a_folder(store: Any, home: Path, tmp_path: Path):
    here = prepare("digits", tmp_path / "here", CONFIG)
    there = prepare("digits", Path("s3://tokens/same"), CONFIG)
    assert same(here, there)
    names = {Path(name).name for name in store.find("tokens/same")}
    assert names == {path.name for path in (tmp_path / "here").iterdir()}
    assert not list(home.glob("prepare/*"))
    forget(home)
    fetched = TokenDataset("s3://tokens/same/")
    assert same(here, fetched)
    fetched.verify()
    before = {path: path.stat().st_mtime_ns for path in fetched.path.glob("*.npy")}
    assert TokenDataset("s3://tokens/same").path == fetched.path
    assert {path: path.stat().st_mtime_ns for path in fetched.path.glob("*.npy")} == before


def test_a_data_set_that_is_there_is_not_replaced(store: Any, copy: Callable[[str], str]):
    url = copy("once")
    before = store.cat_file("tokens/once/dataset.json")
    with pytest.raises(InputError, match="s3://tokens/once has a token data set already"):
        prepare("digits", Path(url), CONFIG)
    assert store.cat_file("tokens/once/dataset.json") == before


def test_a_data_set_of_another_process_is_not_replaced(store: Any, monkeypatch: pytest.MonkeyPatch):
    store.pipe_file("tokens/race/dataset.json", b"{}")
    monkeypatch.setattr("igpt.data.prepare.require_free", lambda url: None)
    with pytest.raises(InputError, match="s3://tokens/race has a token data set by now"):
        prepare("digits", Path("s3://tokens/race"), CONFIG)
    assert store.cat_file("tokens/race/dataset.json") == b"{}"


def test_interrupted_sending_goes_on(store: Any, home: Path):
    with (
        failing(store, "put_file", ConnectionError, 1) as sent,
        pytest.raises(InputError, match=r"cannot be written: the store does not answer"),
    ):
        prepare("digits", Path("s3://tokens/cut"), CONFIG)
    assert [Path(name).name for name in store.find("tokens/cut")] == sent
    with pytest.raises(InputError, match=r"s3://tokens/cut/dataset\.json is not there"):
        TokenDataset("s3://tokens/cut")
    shards = {path: path.stat().st_mtime_ns for path in home.rglob("*.tokens.npy")}
    assert shards
    made = prepare("digits", Path("s3://tokens/cut"), CONFIG)
    kept = {made.path / path.name: time for path, time in shards.items()}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # nothing was made again
    made.verify()


def test_a_killed_process_leaves_no_data_set(store: Any, home: Path):
    """Kill a process while it sends the shards."""
    script = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from s3fs import S3FileSystem\n"
        "from igpt.data.prepare import PrepareConfig, prepare\n"
        "S3FileSystem.put_file = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "config = PrepareConfig(size=4, colors=8, limit=300)\n"
        "prepare('digits', Path('s3://tokens/killed'), config)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert not store.exists("tokens/killed/dataset.json")
    prepare("digits", Path("s3://tokens/killed"), CONFIG).verify()


def test_interrupted_fetching_goes_on(store: Any, home: Path, copy: Callable[[str], str]):
    url = copy("slow")
    with (
        failing(store, "get_file", KeyboardInterrupt, 2) as fetched,
        pytest.raises(KeyboardInterrupt),
    ):
        TokenDataset(url)
    (folder,) = (path for path in (home / "tokens").iterdir() if path.is_dir())
    assert not (folder / "dataset.json").exists()
    times = {name: (folder / name).stat().st_mtime_ns for name in fetched}
    assert len(times) == 2
    TokenDataset(url).verify()
    assert {name: (folder / name).stat().st_mtime_ns for name in fetched} == times
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_shard_that_has_changed_is_not_used(store: Any, home: Path, copy: Callable[[str], str]):
    url = copy("changed")
    name = next(path for path in store.find("tokens/changed") if path.endswith("tokens.npy"))
    content = bytearray(store.cat_file(name))
    content[-1] ^= 1
    store.pipe_file(name, bytes(content))
    with pytest.raises(InputError, match=rf"s3://{name} has changed since"):
        TokenDataset(url)
    assert not list(home.rglob("dataset.json"))


def test_the_least_recently_used_data_sets_are_removed(
    home: Path, copy: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
):
    urls = [copy(f"lru-{number}") for number in range(3)]
    first = TokenDataset(urls[0]).path
    size = sum(path.stat().st_size for path in first.iterdir())
    monkeypatch.setenv("IGPT_CACHE_GB", str(2.5 * size / 1e9))
    second = TokenDataset(urls[1]).path
    TokenDataset(urls[0])
    with pytest.raises(InputError, match="has no room for it; set IGPT_CACHE_GB"):
        TokenDataset(urls[2])  # this process uses both
    release()
    third = TokenDataset(urls[2]).path
    assert [path.exists() for path in (first, second, third)] == [True, False, True]


def test_data_sets_that_do_not_fit_are_refused(
    store: Any, home: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("IGPT_CACHE_GB", "1e-6")
    with pytest.raises(InputError, match=r"s3://tokens/large has .* GB, and the cache .* no room"):
        prepare("digits", Path("s3://tokens/large"), CONFIG)
    assert not store.exists("tokens/large")
    for wrong in ("much", "nan", "-1"):
        monkeypatch.setenv("IGPT_CACHE_GB", wrong)
        with pytest.raises(InputError, match=f"IGPT_CACHE_GB={wrong} should be a positive number"):
            prepare("digits", Path("s3://tokens/large"), CONFIG)


def test_training_and_probing(
    igpt: Run, store: Any, home: Path, tmp_path: Path, short_flags: list[str]
):
    done = igpt("prepare", "digits", "--size", 8, "--limit", 600, "-o", "s3://tokens/digits")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("s3://tokens/digits: 600 train, ")
    forget(home)
    run = tmp_path / "run"
    flags = ["--model", "tiny", *short_flags]
    done = igpt("pretrain", "s3://tokens/digits", "-o", run, *flags, "--steps", 6)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((run / "config.yaml").read_text())["tokens"] == "s3://tokens/digits"
    done = igpt("pretrain", "s3://tokens/digits", "-o", run, "--resume", "--steps", 8)
    assert done.returncode == 0, done.stderr
    for words in (
        ["probe", run, "s3://tokens/digits"],
        ["score", run, "s3://tokens/digits"],
        ["report", run],
    ):
        done = igpt(*words)
        assert done.returncode == 0, done.stderr
    done = igpt("inspect", "s3://tokens/digits", "-o", tmp_path / "sheet.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("s3://tokens/digits: 8 px, ")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["prepare", "digits", "-o", "s3://nowhere/a"], "The specified bucket does not exist"),
        (["prepare", "digits", "-o", "https://localhost/a"], "not written to web servers"),
        (["prepare", "digits", "-o", "hf://datasets/a/b"], "not written to web servers"),
        (["prepare", "digits", "-o", "s3://tokens/a", "--shard", "1/2"], "give one with -o"),
        (["prepare", "--merge", "-o", "s3://tokens/a"], "give one with -o"),
        (
            ["pretrain", "s3://tokens/none", "-o", "r", "--model", "tiny"],
            "s3://tokens/none/dataset.json is not there",
        ),
        (["pretrain", "digits", "-o", "s3://tokens/run"], "only igpt prepare writes to a URL"),
        (["palette", "digits", "-o", "s3://tokens/p.npy"], "only igpt prepare writes to a URL"),
    ],
)
def test_one_line_for_what_cannot_be_done(
    igpt: Run, store: Any, words: list[str], reason: str, tmp_path: Path, monkeypatch: Any
):
    monkeypatch.chdir(tmp_path)
    done = igpt(*words)
    assert done.returncode == 2
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.rglob("*.npy"))


def test_parts_are_not_sent(store: Any):
    with pytest.raises(InputError, match="parts are made and merged in a folder"):
        prepare_part("digits", Path("s3://tokens/p"), CONFIG, (1, 2))
