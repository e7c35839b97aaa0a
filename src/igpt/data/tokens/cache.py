"""Token data sets of object stores, in a folder of this machine of limited size.

CACHE/KEY/       the files of a data set; KEY is the start of the SHA-256 of its `dataset.json`,
                 which is written last
CACHE/KEY.lock   locked by the processes that read the data set, together, and by one alone that
                 fetches or removes it

Data sets are written once, so that a copy stays valid. Of those that no process reads, the least
recently used ones are removed where there is too little room.
"""

import fcntl
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from igpt.data.tokens.manifest import MANIFEST, Shard, require_manifest
from igpt.errors import InputError
from igpt.files import read_json, sha256_of
from igpt.progress import progress_bar
from igpt.remote import file_system, reasons

_LIMIT = "IGPT_CACHE_GB"
_USUAL_LIMIT = 50.0  # GB, 10^9 bytes
_THREADS = 8
_FETCHED = ".dataset.json"  # until all other files are there
_PROBE = ".igpt-write-test"
Phase = Callable[[str, int, int], None]
_locks = dict[Path, int]()  # of the data sets that this process reads, until it ends


def cache_folder(kind: str) -> Path:
    """Return the folder of one kind of igpt's files in the user's cache, `~/.cache` by default."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "igpt" / kind


def local_copy(url: str) -> Path:
    """Return a folder with the data set behind a URL; fetch it where it is not there.

    Every file is checked against its checksum in `dataset.json` when it is fetched. Interrupted
    fetching goes on where it was.

    Raises:
        InputError: there is no data set, a file has changed, or it is larger than the cache.
    """
    system, path = file_system(url)
    with reasons(f"{url}/{MANIFEST}"):
        content: bytes = system.cat_file(f"{path}/{MANIFEST}")
    folder = _folder(content)
    try:
        _lock(folder, fcntl.LOCK_SH)
        # While one lock is exchanged for the other, another process may fetch or remove it.
        while not (folder / MANIFEST).exists():
            _lock(folder, fcntl.LOCK_EX)
            if not (folder / MANIFEST).exists():
                folder.mkdir(exist_ok=True)
                (folder / _FETCHED).write_bytes(content)
                _fetch(system, path, url, folder)
                (folder / _FETCHED).rename(folder / MANIFEST)
            _lock(folder, fcntl.LOCK_SH)
        os.utime(folder / MANIFEST)
    except BaseException:
        os.close(_locks.pop(folder))
        raise
    return folder


def keep_copy(made: Path) -> None:
    """Move a data set that was sent to a store from its folder to the cache."""
    folder = _folder((made / MANIFEST).read_bytes())
    if (folder / MANIFEST).exists():
        shutil.rmtree(made)
        return
    _lock(folder, fcntl.LOCK_EX)
    shutil.rmtree(folder, ignore_errors=True)  # of interrupted fetching
    made.rename(folder)
    _lock(folder, fcntl.LOCK_SH)


def make_room(size: int, what: str) -> None:
    """Remove the least recently used data sets until `size` bytes more fit into the cache.

    Raises:
        InputError: they do not fit; names `what` and the variable that sets the limit.
    """
    cache = cache_folder("tokens")
    cache.mkdir(parents=True, exist_ok=True)
    text = os.environ.get(_LIMIT)
    try:
        limit = 1e9 * (_USUAL_LIMIT if text is None else float(text))
    except ValueError:
        limit = math.nan
    if not limit > 0:
        raise InputError(f"{_LIMIT}={text} should be a positive number of GB")
    folders = [path for path in cache.iterdir() if path.is_dir()]
    sizes = {folder: _size(folder) for folder in folders}
    for folder in sorted(folders, key=_last_use):
        if sum(sizes.values()) + size <= limit:
            return
        if size <= limit and _remove(folder):
            del sizes[folder]
    if sum(sizes.values()) + size > limit:
        raise InputError(
            f"{what} has {size / 1e9:.3g} GB, and the cache {cache}, which is limited to "
            f"{limit / 1e9:.3g} GB, has no room for it; set {_LIMIT} to a larger number"
        )


def require_free(url: str) -> None:
    """Raise if a data set cannot be written behind a URL, by writing and removing an empty object.

    Raises:
        InputError: there is one, the place does not exist, or it may not be written to.
    """
    if url.startswith(("http", "hf:")):
        raise InputError(
            f"{url}: data sets are not written to web servers and the Hub; give a folder or s3://"
        )
    system, path = file_system(url)
    system.invalidate_cache()
    with reasons(url, "written"):
        if system.exists(f"{path}/{MANIFEST}"):
            raise InputError(f"{url} has a token data set already; remove it or choose another -o")
        system.pipe_file(f"{path}/{_PROBE}", b"")
        system.rm_file(f"{path}/{_PROBE}")


def send(folder: Path, url: str, further: Sequence[str], phase: Phase | None = None) -> None:
    """Write a data set behind a URL, `dataset.json` last, and never over another one.

    Args:
        further: names of files to write besides its shards.
        phase: called with ("sending shards", files done, in all).

    Raises:
        InputError: the store does not take them, there is a data set by now, or it would not fit
            into the cache.
    """
    system, path = file_system(url)
    names = [*_files(read_json(folder / MANIFEST, "token data set")), *further]
    make_room(sum((folder / name).stat().st_size for name in names), url)

    def put(name: str) -> None:
        with reasons(f"{url}/{name}", "written"):
            system.put_file(str(folder / name), f"{path}/{name}")

    for done in _in_threads(put, names):
        if phase:
            phase("sending shards", done, len(names))
    with reasons(f"{url}/{MANIFEST}", "written"):
        try:
            system.pipe_file(f"{path}/{MANIFEST}", (folder / MANIFEST).read_bytes(), mode="create")
        except FileExistsError:
            raise InputError(
                f"{url} has a token data set by now, of another process; choose another -o"
            ) from None


def _folder(manifest: bytes) -> Path:
    folder = cache_folder("tokens") / hashlib.sha256(manifest).hexdigest()[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def _lock(folder: Path, kind: int) -> None:
    if folder not in _locks:
        file = folder.with_name(f"{folder.name}.lock")
        _locks[folder] = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    fcntl.flock(_locks[folder], kind)


def _remove(folder: Path) -> bool:
    """Remove a data set unless a process reads it; return whether it was removed."""
    if folder in _locks:
        return False
    lock = os.open(folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def _last_use(folder: Path) -> float:
    with suppress(OSError):
        return (folder / MANIFEST).stat().st_mtime
    return folder.stat().st_mtime


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _fetch(system: Any, path: str, url: str, folder: Path) -> None:
    try:
        manifest = read_json(folder / _FETCHED, "token data set")
    except InputError as error:
        raise InputError(str(error).replace(str(folder / _FETCHED), f"{url}/{MANIFEST}")) from None
    require_manifest(manifest, url, f"{url}/{MANIFEST}")
    files = _files(manifest)
    missing = {name: entry for name, entry in files.items() if not (folder / name).exists()}
    make_room(sum(size for size, _ in missing.values()), url)

    def fetch(name: str) -> None:
        temporary = folder / f".{name}.tmp"
        with reasons(f"{url}/{name}"):
            system.get_file(f"{path}/{name}", str(temporary))
        size, checksum = missing[name]
        if temporary.stat().st_size != size or sha256_of(temporary) != checksum:
            temporary.unlink()
            raise InputError(
                f"{url}/{name} has changed since it was written; prepare the data set again"
            )
        temporary.replace(folder / name)

    with progress_bar() as show:
        for done in _in_threads(fetch, missing):
            show("fetching shards", len(files) - len(missing) + done, len(files))


def _in_threads(work: Callable[[str], None], names: Collection[str]) -> Iterator[int]:
    """Do some work for each name, eight at a time; yield how many are done. Errors end it soon."""
    with ThreadPoolExecutor(_THREADS) as threads:
        try:
            for done, _ in enumerate(threads.map(work, names), 1):
                yield done
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def _files(manifest: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Return the size and the SHA-256 of each file of a data set.

    Raises:
        InputError: one of them is not recorded.
    """
    found = {}
    for split in manifest["splits"].values():
        for shard in (Shard(**entry) for entry in split["shards"]):
            for name in (shard.tokens, shard.labels):
                if name not in shard.bytes or name not in shard.sha256:
                    raise InputError(
                        f"{MANIFEST} has no size or checksum of {name}, which data sets behind a "
                        "URL need"
                    )
                found[name] = (shard.bytes[name], shard.sha256[name])
    return found
