"""Run one invocation in a process of its own, and judge how it ended.

Importing torch takes seconds, so that a process that has imported everything is forked instead. It
must not have started threads. Each case gets two processes: a supervisor, which makes the folder,
keeps the limits and compares the folder before and after, and the invocation itself, which works in
that folder.
"""

import atexit
import ctypes
import hashlib
import json
import multiprocessing.util
import os
import resource
import shlex
import shutil
import signal
import stat
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

Main = Callable[[list[str]], int]
Arrange = Callable[[Path], object]
HASHED = 4 << 20  # bytes; larger files are compared by size and time
_POLL = 0.01  # seconds
_PAGE = os.sysconf("SC_PAGE_SIZE")
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Case:
    """One wrong invocation.

    Attributes:
        group: "flags", "paths", "files" or "environment".
        kind: what is wrong, without the verb: "out of range", "a FIFO", "dataset.json".
        name: the whole description; unique.
        words: of the command line, after `igpt`. Paths are relative to the folder of the case.
        needs: samples that are copied to that folder.
        arrange: changes the copies.
        environment: variables to set, or to remove (None).
        closed: file descriptors that are closed.
        file_size: largest file that may be written, in bytes.
        privileges: "all", "owner" (modes of files bind root too) or "other" (may read everything,
            owns nothing).
        program: run `python -m igpt` rather than a fork.
    """

    group: str
    kind: str
    name: str
    words: tuple[str, ...]
    needs: tuple[str, ...] = ()
    arrange: tuple[Arrange, ...] = ()
    environment: Mapping[str, str | None] = field(default_factory=dict)
    closed: tuple[int, ...] = ()
    file_size: int | None = None
    privileges: str = "all"
    program: bool = False

    @property
    def verb(self) -> str:
        """Return the command, or "igpt" if there is no such command."""
        return "igpt" if self.kind == "command" else self.words[0]


@dataclass(frozen=True)
class Limits:
    """Limits of an invocation.

    Attributes:
        seconds: of processor time; of wall time, fifteen times as many.
        idle: seconds without any processor time.
        memory: resident bytes.
    """

    seconds: float = 20.0
    idle: float = 10.0
    memory: int = 3 << 30


@dataclass
class Outcome:
    """The result of an invocation.

    Attributes:
        faults: what is wrong with that, of "hang", "memory", "killed", "traceback", "left behind",
            "exit code", "lines" and "processes"; empty where the invocation was refused as it
            should be, or accepted. Unfinished work (OUT.partial) may be left where the message
            names it.
        exit_code: None if it was killed.
        lines: of stderr that are not blank.
        message: the last line of stderr.
        frames: of the innermost exception: the last frame in igpt, and the last of all.
        left: paths that appeared, vanished or changed.
        seconds: of wall time.
    """

    group: str
    kind: str
    verb: str
    name: str
    command: str
    faults: list[str]
    exit_code: int | None
    lines: int
    message: str
    frames: list[str]
    left: list[str]
    seconds: float

    @property
    def verdict(self) -> str:
        """Return the first fault, or "accepted", or "refused"."""
        return self.faults[0] if self.faults else "accepted" if self.exit_code == 0 else "refused"


def run_cases(
    cases: Sequence[Case], samples: Path, folder: Path, main: Main, limits: Limits, jobs: int
) -> Iterator[Outcome]:
    """Run cases, `jobs` at a time, each in FOLDER/NUMBER; yield outcomes as they come.

    Args:
        samples: the folder that `Case.needs` is copied from.
        main: runs the words of a command line and returns its exit code.
    """
    running: dict[int, tuple[Case, Path]] = {}
    waiting = list(enumerate(cases))[::-1]
    while waiting or running:
        while waiting and len(running) < jobs:
            number, case = waiting.pop()
            case_folder = folder / f"{number:05d}"
            sys.stdout.flush()
            sys.stderr.flush()
            process = os.fork()
            if process == 0:
                _supervise_and_exit(case, samples, case_folder, main, limits)
            running[process] = case, case_folder
        process, status = os.wait()
        if process in running:
            case, case_folder = running.pop(process)
            if status:
                raise RuntimeError(f"the case {case.name} could not be run")
            yield Outcome(**json.loads((case_folder / "outcome.json").read_text()))
            remove(case_folder)


def _supervise_and_exit(
    case: Case, samples: Path, folder: Path, main: Main, limits: Limits
) -> NoReturn:
    """Supervise a case and end this process, without running the exit code of the parent's
    stack."""
    code = 1
    try:
        _end_with_the_parent()
        _supervise(case, samples, folder, main, limits)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _end_with_the_parent() -> None:
    """Let the kernel kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


def remove(folder: Path) -> None:
    """Remove a folder, including one whose permissions were removed."""
    for inner, names, _ in os.walk(folder):
        for name in names:
            with suppress(OSError):
                Path(inner, name).chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def make_folder(case: Case, samples: Path, case_folder: Path) -> Path:
    """Make the folder that a case works in, CASE_FOLDER/work."""
    work = case_folder / "work"
    for folder in (work, case_folder / "tmp", case_folder / "home"):
        folder.mkdir(parents=True)
    for name in case.needs:
        source, target = samples / name, work / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True)
        else:
            shutil.copy2(source, target)
    for change in case.arrange:
        change(work)
    return work


def _supervise(case: Case, samples: Path, case_folder: Path, main: Main, limits: Limits) -> None:
    work = make_folder(case, samples, case_folder)
    before = snapshot(case_folder)
    begun = time.monotonic()
    process = os.fork()
    if process == 0:
        _become(case, work, case_folder, main)
    code, stopped = _watch(process, limits)
    seconds = time.monotonic() - begun
    orphans = _kill_group(process, limits)
    outcome = judge(
        case,
        code,
        stopped,
        orphans,
        differences(before, snapshot(case_folder)),
        _text(case_folder / "stderr"),
        seconds,
    )
    (case_folder / "outcome.json").write_text(json.dumps(asdict(outcome)))


def _text(path: Path) -> str:
    if not path.exists():  # it ended before that
        return ""
    with path.open("rb") as file:
        return file.read(1 << 20).decode("utf-8", "replace")


def _watch(process: int, limits: Limits) -> tuple[int | None, str | None]:
    """Return the wait status of a process, or None and the limit that it exceeded."""
    begun = last_work = time.monotonic()
    worked = 0.0
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return status, None
        now, (memory, busy) = time.monotonic(), _used(process)
        if memory > limits.memory:
            return None, "memory"
        if busy > worked:
            worked, last_work = busy, now
        if (
            worked > limits.seconds
            or now - last_work > limits.idle
            or now - begun > 15 * limits.seconds
        ):
            return None, "hang"
        time.sleep(min(0.2, max(_POLL, (now - begun) / 20)))


def _used(process: int) -> tuple[int, float]:
    """Return the resident bytes of the largest process of a session, and seconds of processor time
    of all its live processes."""
    largest, seconds = 0, 0.0
    for other in _session(process):
        with suppress(OSError, IndexError, ValueError):
            values = Path(f"/proc/{other}/stat").read_text().rpartition(")")[2].split()
            seconds += (int(values[11]) + int(values[12])) / _TICKS
            largest = max(largest, int(values[21]) * _PAGE)
    return largest, seconds


def _session(process: int) -> list[int]:
    """Return the processes of a session: its leader and all its descendants."""
    found, waiting = [], [process]
    while waiting:
        one = waiting.pop()
        found.append(one)
        with suppress(OSError):
            waiting += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
    return found


def _kill_group(process: int, limits: Limits) -> bool:
    """Kill the remaining processes of a session; return whether any process but the leader did not
    end soon."""
    with suppress(ChildProcessError):
        if os.waitpid(process, os.WNOHANG)[0] == 0:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    deadline = time.monotonic() + limits.idle
    while time.monotonic() < deadline:
        try:
            os.killpg(process, 0)
        except ProcessLookupError:
            return False
        time.sleep(_POLL)
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    return True


def _become(case: Case, work: Path, case_folder: Path, main: Main) -> NoReturn:
    """Turn this process into the invocation."""
    _end_with_the_parent()
    os.setsid()
    output = os.open(case_folder / "stdout", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    errors = os.open(case_folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(errors, 2)
    cache = case_folder / "cache"
    variables = {
        "TMPDIR": str(case_folder / "tmp"),
        "HOME": str(case_folder / "home"),
        "HF_HOME": str(cache),
        "HF_DATASETS_CACHE": str(cache),
        "MPLCONFIGDIR": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "GRADIO_TEMP_DIR": str(cache),
        **case.environment,
    }
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    os.chdir(work)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    largest = 2 << 30 if case.file_size is None else case.file_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    if case.privileges != "all":
        _drop_privileges(case_folder, case.privileges)
    for descriptor in case.closed:
        os.close(descriptor)
    if case.program:
        os.execv(sys.executable, [sys.executable, "-m", "igpt", *case.words])
    _own_streams(case.closed)
    _own_caches(cache)
    _forget_exit_handlers()
    os._exit(_call(case, main))


def _forget_exit_handlers() -> None:
    """Remove the exit handlers of the forked process, except those that modules register when they
    are imported."""
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    atexit.register(multiprocessing.util._exit_function)


def _own_streams(closed: Sequence[int]) -> None:
    """Set the streams as the interpreter does when it starts: those whose descriptors are closed
    are None."""
    if 0 in closed:
        sys.stdin = None
    for descriptor, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):
        stream = None
        if descriptor not in closed:
            stream = open(descriptor, "w", encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)


def _own_caches(cache: Path) -> None:
    """Let `datasets` and `tempfile` use folders of the case; they have already read the
    environment."""
    import tempfile

    import datasets

    tempfile.tempdir = None
    datasets.config.HF_DATASETS_CACHE = cache


def _call(case: Case, main: Main) -> int:
    """Do what the interpreter does with a program: an exception becomes a traceback and 1; exit
    handlers run."""
    sys.argv = ["igpt", *case.words]
    code: Any = 1
    try:
        code = main(list(case.words))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as an interpreter that ends does
        atexit._run_exitfuncs()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except BaseException:
        traceback.print_exc()
        code = code or 120
    return int(code)


class _Capabilities(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


_OVERRIDE, _READ = 1 << 1, 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
_NOBODY = 65534


def _drop_privileges(case_folder: Path, kind: str) -> None:
    """Let permissions bind root too; other users are bound by them anyway."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (_Capabilities * 2)()
    libc.capget(header, sets)
    wanted = sets[0].permitted & ~_OVERRIDE & ~_READ
    if kind == "other":
        for folder in (case_folder, *(path for path in case_folder.iterdir() if path.is_dir())):
            os.chown(folder, _NOBODY, _NOBODY)
        libc.setfsuid(_NOBODY)
        wanted = _READ
    sets[0].effective = wanted
    sets[0].permitted = wanted | (_READ if kind == "other" else 0)
    if libc.capset(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def snapshot(case_folder: Path) -> dict[str, str]:
    """Return every path below the folders of a case, and in the root folder, with its state."""
    found = {str(path): "in the root folder" for path in Path("/").iterdir()}
    for top in ("work", "tmp", "home"):
        for folder, folders, files in os.walk(case_folder / top):
            for name in (*folders, *files):
                path = Path(folder, name)
                found[
                    str(path.relative_to(case_folder / top if top == "work" else case_folder))
                ] = _state(path)
    return found


def _state(path: Path) -> str:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return f"link to {path.readlink()}"
    if not stat.S_ISREG(status.st_mode):
        return f"type {stat.S_IFMT(status.st_mode):o}"
    if status.st_size > HASHED:
        return f"{status.st_size} bytes of {status.st_mtime_ns}"
    try:
        return hashlib.sha1(path.read_bytes()).hexdigest()
    except PermissionError:
        return f"{status.st_size} bytes"


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Return the paths that appeared (+), vanished (-) or changed (~)."""
    made = [f"+ {path}" for path in after if path not in before]
    gone = [f"- {path}" for path in before if path not in after]
    changed = [f"~ {path}" for path in after if path in before and before[path] != after[path]]
    return [repr(line)[1:-1] for line in sorted(made + gone + changed)]


def judge(
    case: Case,
    status: int | None,
    stopped: str | None,
    orphans: bool,
    left: list[str],
    errors: str,
    seconds: float,
) -> Outcome:
    """Compare how an invocation ended with how it should: accepted, or refused in one line without
    leftovers."""
    lines = [line for line in errors.splitlines() if line.strip()]
    code = os.waitstatus_to_exitcode(status) if status is not None else None
    faults = [stopped] if stopped else []
    if code is not None and code < 0:
        faults.append("killed")
    if "Traceback (most recent call last)" in errors:
        faults.append("traceback")
    if code != 0 and left and not _is_unfinished_work(left, errors):
        faults.append("left behind")
    if code is not None and code > 0 and code != 2:
        faults.append("exit code")
    reported = len(lines) == 1 or 2 in case.closed or "traceback" in faults
    if code is not None and code > 0 and not reported:
        faults.append("lines")
    if orphans and not stopped:
        faults.append("processes")
    return Outcome(
        group=case.group,
        kind=case.kind,
        verb=case.verb,
        name=case.name,
        command=_command(case),
        faults=faults,
        exit_code=code,
        lines=len(lines),
        message=_printable(lines[-1] if lines else "")[:400],
        frames=_frames(errors) if "traceback" in faults else [],
        left=left[:20] if code != 0 else [],
        seconds=round(seconds, 2),
    )


def _is_unfinished_work(left: Iterable[str], errors: str) -> bool:
    """Return whether only a folder of unfinished work, OUT.partial, was left, and the message names
    it."""
    tops = {change[2:].partition("/")[0] for change in left}
    return all(top.endswith(".partial") and top in errors for top in tops)


def _command(case: Case) -> str:
    variables = [
        f"{name}={shlex.quote(value)}" if value is not None else f"env -u {name}"
        for name, value in case.environment.items()
    ]
    closing = [f"{descriptor}>&-" for descriptor in case.closed]
    words = [
        word if len(word) < 120 else f"{word[:20]}... ({len(word)} characters)"
        for word in case.words
    ]
    return _printable(" ".join([*variables, shlex.join(["igpt", *words]), *closing]))


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n")


def _frames(errors: str) -> list[str]:
    """Return the last frame in igpt, and the last frame, of the last traceback."""
    last = errors.rpartition("Traceback (most recent call last)")[2]
    frames = [line.strip() for line in last.splitlines() if line.strip().startswith('File "')]
    ours = [frame for frame in frames if "/igpt/" in frame]
    return [_short(frame) for frame in [*ours[-1:], *frames[-1:]]]


def _short(frame: str) -> str:
    """Return "data/tokens.py:88 rows" of a frame's line."""
    file, _, rest = frame.removeprefix('File "').partition('", line ')
    number, _, function = rest.partition(", in ")
    for root in ("/igpt/", "/site-packages/", "/lib/python"):
        if root in file:
            file = file.rpartition(root)[2]
            break
    return f"{file}:{number} {function}"
