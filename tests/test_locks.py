"""Only one process writes a folder at a time; the error of the second one names the first."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread

import pytest

from igpt import locks
from igpt.errors import InputError
from igpt.locks import exclusive, exclusive_folder

HOLDER = """
import sys, time
from pathlib import Path
from igpt.locks import exclusive_folder
with exclusive_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def refused(said: str) -> "pytest.RaisesExc[InputError]":
    return pytest.raises(InputError, match=said)


def hold(folder: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_with_the_first_ones_host_and_process_id(folder: Path) -> None:
    process = hold(folder)
    try:
        with (
            refused(rf"written by process {process.pid} on {socket.gethostname()}"),
            exclusive_folder(folder),
        ):
            pass
        assert (folder / ".lock").exists(), (
            "the refused process must not remove the lock of the first"
        )
    finally:
        process.kill()
        process.wait()


def test_the_lock_of_a_killed_process_is_taken_over(folder: Path) -> None:
    process = hold(folder)
    process.kill()
    process.wait()
    assert (folder / ".lock").exists()
    with exclusive_folder(folder):
        assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()
    assert not any(folder.iterdir())


def test_a_lock_is_released_after_an_error_and_written_files_stay(folder: Path) -> None:
    def write_and_fail() -> None:
        with exclusive_folder(folder):
            (folder / "a").write_text("a")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_and_fail()
    assert [file.name for file in folder.iterdir()] == ["a"]
    with exclusive_folder(folder):
        pass


def test_one_process_may_take_its_own_lock_again(folder: Path) -> None:
    with exclusive(folder), exclusive(folder):
        lock = folder.with_name(".run.lock")
        assert lock.exists()
    assert not lock.exists()


def test_a_lock_of_another_host_holds_as_long_as_its_owner_updates_its_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_TOUCHED_EVERY", 0.3)
    lock = folder.with_name(".run.lock")
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "command": "igpt pretrain"}))
    ended = Event()

    def touch() -> None:
        while not ended.wait(0.05):
            os.utime(lock)

    owner = Thread(target=touch)
    owner.start()
    try:
        with refused(r"process 1 on elsewhere \(igpt pretrain\)"), exclusive(folder):
            pass
    finally:
        ended.set()
        owner.join()
    with exclusive(
        folder
    ):  # no longer updated: a job that was restarted on another machine may continue
        assert json.loads(lock.read_text())["host"] == socket.gethostname()


def test_a_folder_in_which_no_lock_can_be_made_is_refused() -> None:
    with refused("cannot be locked"), exclusive(Path("/proc/new")):
        pass


@pytest.mark.parametrize("content", ["", "[]", '{"host": 1'])
def test_a_lock_that_was_truncated_by_a_kill_is_taken_over(folder: Path, content: str) -> None:
    lock = folder.with_name(".run.lock")
    lock.write_text(content)
    with exclusive(folder):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_without_file_system_locks_the_process_id_decides(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(descriptor: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lock = folder.with_name(".run.lock")
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": process.pid, "command": "x"}))
    with refused(f"process {process.pid} "), exclusive(folder):
        pass
    process.communicate(b"\n")
    with exclusive(folder):
        pass


def test_folders_made_for_a_lock_are_removed_with_it_unless_they_contain_files(
    tmp_path: Path,
) -> None:
    for take in (exclusive, exclusive_folder):
        with take(tmp_path / "a" / "b" / "c"):
            assert (tmp_path / "a" / "b").is_dir()
        assert not (tmp_path / "a").exists()
    with exclusive(tmp_path / "a" / "b" / "c"):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]
    (tmp_path / "there").mkdir()
    with exclusive(tmp_path / "there" / "file"):
        pass
    assert (tmp_path / "there").is_dir(), "it existed before"
