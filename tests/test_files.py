import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field

from igpt.errors import InputError
from igpt.files import (
    Stored,
    atomic_file,
    atomic_folder,
    expanded,
    folder_to_read,
    read_json,
    recover_folder,
    require_folder_name,
    require_shallow,
    sha256_of,
    write_json,
)

# Replaces a folder, and is killed by the operating system just before the named operation on it.
KILLED = """
import os, signal, sys
from pathlib import Path
from igpt.files import atomic_folder

path, event = Path(sys.argv[1]), sys.argv[2]

def watch(name, arguments):
    put_in_place = name == "os.rename" and Path(arguments[1]) == path
    old = path.with_name(f".{path.name}.old")
    clean_up = name == "shutil.rmtree" and Path(arguments[0]) == old and old.exists()
    if {"put in place": put_in_place, "clean up": clean_up}[event]:
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
with atomic_folder(path) as folder:
    (folder / "content").write_text("new")
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_atomically(tmp_path: Path):
    path = tmp_path / "deep" / "a.txt"
    for text in ("first", "second"):
        with atomic_file(path) as temporary:
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
        assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("problem", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_no_file_and_keeps_the_old_one(
    tmp_path: Path, problem: type[BaseException]
):
    path = tmp_path / "a.txt"
    for before in ([], ["a.txt"]):
        with pytest.raises(problem), atomic_file(path) as temporary:  # noqa: PT012
            temporary.write_text("half")
            raise problem
        assert names(tmp_path) == before
        path.write_text("old")
    assert path.read_text() == "old"


def test_a_folder_is_replaced_atomically(tmp_path: Path):
    path = tmp_path / "deep" / "model"
    with atomic_folder(path) as folder:
        (folder / "a").write_text("first")
        assert not path.exists()
    with atomic_folder(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("second")
        assert (path / "a").read_text() == "first"
    assert names(path) == ["sub"]
    assert (path / "sub" / "b").read_text() == "second"
    assert names(path.parent) == ["model"]


@pytest.mark.parametrize("problem", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_no_folder_and_keeps_the_old_one(
    tmp_path: Path, problem: type[BaseException]
):
    path = tmp_path / "model"
    for before in ([], ["model"]):
        with pytest.raises(problem), atomic_folder(path) as folder:  # noqa: PT012
            (folder / "a").write_text("half")
            raise problem
        assert names(tmp_path) == before
        path.mkdir(exist_ok=True)
        (path / "a").write_text("old")
    assert (path / "a").read_text() == "old"


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path: Path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "a").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_folder(path) as folder:
        folder.rename(tmp_path / "elsewhere")
    assert (path / "a").read_text() == "old"
    assert names(tmp_path) == ["elsewhere", "model"]


def test_a_linked_folder_is_replaced_at_the_target_of_its_link(tmp_path: Path):
    (tmp_path / "disk" / "model").mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "model")
    for text in ("first", "second"):
        with atomic_folder(link) as folder:
            (folder / "a").write_text(text)
        assert link.is_symlink()
        assert (tmp_path / "disk" / "model" / "a").read_text() == text
    assert names(tmp_path) == ["disk", "link"]
    assert names(tmp_path / "disk") == ["model"]


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path):
    (tmp_path / "model").write_text("mine")
    with (
        pytest.raises(InputError, match="is a file; a folder is to be written there"),
        atomic_folder(tmp_path / "model"),
    ):
        pass
    assert (tmp_path / "model").read_text() == "mine"


@pytest.mark.parametrize(
    ("moment", "left", "recovered"),
    [("put in place", {".model.old"}, "old"), ("clean up", {".model.old", "model"}, "new")],
)
def test_a_killed_replacement_is_completed(
    tmp_path: Path, moment: str, left: set[str], recovered: str
):
    path = tmp_path / "model"
    with atomic_folder(path) as folder:
        (folder / "content").write_text("old")
    killed = subprocess.run([sys.executable, "-c", KILLED, path, moment], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert left <= set(names(tmp_path))
    recover_folder(path)
    assert names(tmp_path) == ["model"]
    assert (path / "content").read_text() == recovered
    recover_folder(path)
    assert names(tmp_path) == ["model"]


def test_leftovers_of_a_kill_are_removed_by_the_next_write_and_other_files_stay(tmp_path: Path):
    (tmp_path / ".run[1].0123abcd.tmp").mkdir()
    (tmp_path / ".run[1].b.0123abcd.tmp").mkdir()  # of another process that is writing `run[1].b`
    with atomic_folder(tmp_path / "run[1]") as folder:
        (folder / "a").write_text("a")
    assert names(tmp_path) == [".run[1].b.0123abcd.tmp", "run[1]"]


@pytest.mark.parametrize("text", ['{"a": 1, "b": 2, "a": 3}', '{"b": [{"a": 1, "a": 1}]}'])
def test_a_key_that_occurs_twice_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"a[.]json: the key 'a' occurs twice$"):
        read_json(tmp_path / "a.json", "thing")


def test_json_round_trip_and_refusals(tmp_path: Path):
    path = tmp_path / "a.json"
    value = {"name": "Größe", "values": [1, 2.5, None]}
    write_json(path, value)
    assert read_json(path, "thing") == value
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            write_json(path, {"a": bad})
    assert read_json(path, "thing") == value
    assert names(tmp_path) == ["a.json"]
    path.write_text(json.dumps(value)[:-4])
    with pytest.raises(InputError, match=r"a\.json is not readable as JSON .*cut off"):
        read_json(path, "thing")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not readable as text"):
        read_json(path, "thing")
    path.write_text("[1]")
    with pytest.raises(InputError, match=r"should hold a JSON object \(thing\)"):
        read_json(path, "thing")
    with pytest.raises(InputError, match=r"no thing at .*: b\.json is missing"):
        read_json(tmp_path / "b.json", "thing")
    with pytest.raises(InputError, match="no thing at"):
        read_json(path / "b.json", "thing")
    with pytest.raises(InputError, match="is a folder"):
        read_json(tmp_path, "thing")


def test_checksum(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc")
    assert (
        sha256_of(tmp_path / "a")
        == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_a_file_is_synced_to_disk_before_it_is_renamed(tmp_path: Path):
    events: list[str] = []

    def watch(name: str, arguments: tuple[object, ...]) -> None:
        if watching and name == "os.rename":
            events.append("rename")

    watching = True
    sys.addaudithook(watch)  # cannot be undone: switched off below
    synced = os.fsync
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (events.append("sync"), synced(descriptor)))
        with atomic_file(tmp_path / "a") as temporary:
            temporary.write_text("a")
        with atomic_folder(tmp_path / "b") as folder:
            (folder / "c").write_text("c")
    watching = False
    assert events == ["sync", "rename", "sync", "sync", "sync", "rename", "sync"]


class _Schema(Stored):
    count: int
    parts: list[dict[str, int]] = Field([])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"parts": []}', "the key 'count' is missing"),
        ('{"count": "3"}', "count = '3'"),
        ('{"count": 1, "parts": [{"a": 1}, {"a": null}]}', r"parts\.1\.a = None"),
        ('{"count": ' + "1" * 5000 + "}", "not readable as JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"count": 1, "parts": ' + "[" * 900 + "]" * 900 + "}", "nested too deeply"),
        ('{"count": 1, "parts": ' + "[" * 60 + "]" * 60 + "}", r"parts\.0"),
        ("\ud800".encode("utf-8", "surrogatepass"), "not readable as text"),
    ],
)
def test_a_json_file_that_violates_its_schema_is_refused_with_the_key(
    tmp_path: Path, text: str | bytes, said: str
) -> None:
    path = tmp_path / "thing.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=f"thing.json.*{said}"):
        read_json(path, "thing", _Schema)


def test_keys_that_are_not_in_a_schema_are_accepted(tmp_path: Path) -> None:
    write_json(tmp_path / "thing.json", {"count": 1, "later": 2})
    assert read_json(tmp_path / "thing.json", "thing", _Schema) == {"count": 1, "later": 2}


def test_fifos_devices_and_huge_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(1 << 33)
    for path, said in ((tmp_path / "fifo", "a FIFO"), (Path("/dev/zero"), "a device")):
        with pytest.raises(InputError, match=f"is {said}; a regular file is needed"):
            read_json(path, "thing")
    with pytest.raises(InputError, match="8,589,934,592 bytes"):
        read_json(tmp_path / "huge.json", "thing")


def test_writing_follows_links_and_never_replaces_a_device_or_fifo(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "there" / "real.json")
    write_json(tmp_path / "link.json", {"a": 1})
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "there" / "real.json").read_text()) == {"a": 1}
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(InputError, match="a regular file is needed"):
            write_json(path, {})
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("name", ["/", "", ".", "..", "runs/.."])
def test_a_folder_to_make_needs_a_name(name: str) -> None:
    with pytest.raises(InputError, match="give the name of a folder to make"):
        require_folder_name(Path(name))


def test_deep_nesting_is_refused_before_it_is_traversed(tmp_path: Path) -> None:
    write_json(tmp_path / "fine.json", {"a": [[{"b": [1]}]]})
    assert read_json(tmp_path / "fine.json", "thing")["a"] == [[{"b": [1]}]]
    for depth in (100, 900, 100_000):
        (tmp_path / "deep.json").write_text('{"a": ' + "[" * depth + "]" * depth + "}")
        with pytest.raises(InputError, match=r"deep\.json.* nested too deeply"):
            read_json(tmp_path / "deep.json", "thing", _Schema)


def test_repeated_parts_are_traversed_once() -> None:
    """As YAML's references produce them: 2^60 parts by name, 60 in memory."""
    value: list[object] = []
    for _ in range(60):
        value = [value, value]
    require_shallow(value, "settings")
    value.append(value)
    with pytest.raises(InputError, match="settings is nested too deeply"):
        require_shallow(value, "settings")


def test_a_link_to_itself_is_refused_wherever_a_path_is_read_or_written(tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(link)
    for use in (
        lambda: write_json(link, {}),
        lambda: folder_to_read(link),
        lambda: recover_folder(link),
    ):
        with pytest.raises(InputError, match="leads back to itself"):
            use()
    assert link.is_symlink()
    assert folder_to_read(Path("/")) == Path("/")


def test_the_home_folder_of_an_unknown_user_is_refused() -> None:
    assert expanded("~/x") == Path.home() / "x"
    with pytest.raises(InputError, match="no such user"):
        expanded("~nobody-of-this-name/x")
