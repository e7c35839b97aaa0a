"""Shared by all commands: dispatch, exit codes, one-line errors, checks of output paths."""

import contextlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igpt import __version__
from igpt.errors import InputError, Interrupted, LostRank, suggest
from igpt.interrupts import Terminated, stop_in_order

if TYPE_CHECKING:
    from igpt.cli.parser import Options
    from igpt.model.transformer import ImageGPT

# Temporary files, locks and parts have longer names than the output by at most this many bytes.
_ROOM = 40
_USUAL_LENGTH = 255  # bytes of a name on most file systems


@dataclass(frozen=True)
class Command:
    """A command: "module:Class" of its options (see `parser.Options`), and its line in the help."""

    options: str
    summary: str

    def load(self) -> "type[Options]":
        """Import the module of the command and return its options class."""
        module, _, name = self.options.partition(":")
        options: type[Options] = getattr(import_module(module), name)
        return options


def file_settings(path: Path | None) -> Mapping[str, Any]:
    """Return the settings of a file, or none."""
    from igpt.config import read_settings

    return read_settings(path) if path else {}


def model_and_run(path: Path) -> tuple[Path, Path]:
    """The model directory that a run or model directory means, and where its results belong."""
    from igpt.files import folder_to_read

    if (folder_to_read(path / "model") / "config.json").exists():
        return path / "model", path
    if path.name == "model" and (path.parent / "config.yaml").exists():
        return path, path.parent
    return path, Path()


def require_writable(path: Path, kind: str | None = None) -> None:
    """Raise if a file cannot be written, or is JSON of another kind than `kind`.

    Raises:
        InputError: `path` is no name of a regular file, its folder cannot be written to, or it
            holds something else.
    """
    from igpt.files import file_to_write, read_json

    with _reasons(path):
        target = file_to_write(path)
        _require_new_name(path, target)
        is_there = target.exists()
    if kind and is_there and read_json(target, kind).get("format") != kind:
        raise InputError(
            f"{path} holds something else already ({kind} would be written there); choose another "
            "-o"
        )


def require_writable_folder(path: Path) -> None:
    """Raise if a folder cannot be created or written to.

    Raises:
        InputError: `path` has no name of its own, it is a file, or it cannot be written to; if it
            has to be made, the folder that it would lie in cannot be written to.
    """
    from igpt.files import require_folder_name

    require_folder_name(path)
    with _reasons(path):
        target = path.resolve()
        if target.exists() and not target.is_dir():
            raise InputError(f"{path} is a file; a folder is to be written there")
        if target.is_dir():  # what it lies in may be read-only, as it is around a mounted folder
            _require_permission(path, target)
        else:
            _require_new_name(path, target)


@contextlib.contextmanager
def _reasons(path: Path) -> Iterator[None]:
    """Raise errors of the system about a path (too long, a loop of links) as `InputError`."""
    try:
        yield
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{_short(path)} cannot be written: {reason}") from None


def _require_new_name(path: Path, target: Path) -> None:
    """Raise if `target` cannot be created: permission of its folder, length of its name."""
    # A link that leads nowhere is there, and no folder can be made in its place.
    home = next(parent for parent in target.absolute().parents if os.path.lexists(parent))
    if not home.is_dir():
        raise InputError(f"{path} cannot be written: {home} is not a folder")
    _require_permission(path, home)
    known = os.pathconf(home, "PC_NAME_MAX")
    longest = (known if known > 0 else _USUAL_LENGTH) - _ROOM  # some file systems name no limit
    if any(len(os.fsencode(part)) > longest for part in target.absolute().relative_to(home).parts):
        raise InputError(f"{_short(path)} cannot be written: a name has at most {longest} bytes")


def _require_permission(path: Path, folder: Path) -> None:
    """Refuse the output `path` if nothing can be written in `folder`."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be written: you have no permission to write in {folder}")


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 100 else f"{text[:97]}..."


@contextlib.contextmanager
def passing_folder(target: Path) -> Iterator[Path]:
    """Yield the path of a temporary folder next to a file to be written.

    It is removed at the end, or by the next run if this one is killed.
    """
    folder = target.with_name(f".{target.name}.passing")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def announce(line: str) -> None:
    """Print a result; with several ranks, only the first one prints."""
    rank = os.environ.get("RANK", "0")
    if not (rank.isdecimal() and int(rank) > 0):
        print(line)


def load_model(path: Path) -> "ImageGPT":
    """The model in a model directory, on a GPU if there is one."""
    import torch

    from igpt.model.transformer import ImageGPT

    return ImageGPT.from_pretrained(path).to("cuda" if torch.cuda.is_available() else "cpu")


def run_command(
    commands: Mapping[str, Command], words: list[str], renamed: Mapping[str, str] | None = None
) -> int:
    """Run one of the commands; return the exit code.

    A user error prints one line and returns 2; Ctrl-C returns 130, SIGTERM 143. A traceback is a
    bug.
    """
    name = f"igpt {words[0]}" if words else "igpt"
    try:
        _dispatch(commands, words, renamed or {})
        sys.stdout.flush()
    except InputError as error:
        return _complain(f"{name}: {error}", 2)
    except LostRank as loss:
        _complain(f"{name}: {loss}", 1)
        sys.stdout.flush()
        os._exit(1)  # an orderly end would wait for the rank that is gone
    except Interrupted as stop:
        continues = words[0] in ("demo", "reproduce")  # without a flag
        resume = [] if continues or "--resume" in words else ["--resume"]
        again = f"continue with: {shlex.join(['igpt', *words, *resume])}"
        if "WORLD_SIZE" in os.environ:  # the launcher's words are not known here
            again = f"continue with the same command{' and --resume' if resume else ''}"
        return _complain(f"{name}: {stop}; {again}", 128 + stop.number)
    except Terminated:
        return _complain(f"{name}: terminated; what was finished is kept", 143)
    except KeyboardInterrupt:
        return _complain(f"{name}: interrupted; what was finished is kept", 130)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(
            r"out of memory|can't allocate memory", str(error)
        ):
            raise
        return _complain(f"{name}: out of memory; try fewer or smaller images at a time", 2)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return _complain(
            f"{name}: {error.strerror or error}{where}; nothing was left half-written", 2
        )
    return 0


def _dispatch(
    commands: Mapping[str, Command], words: list[str], renamed: Mapping[str, str]
) -> None:
    if not words or words[0] in ("-h", "--help"):
        print(_overview(commands))
    elif words[0] == "--version":
        print(__version__)
    elif words[0] in renamed:
        raise InputError(f"this command is now: {renamed[words[0]]}")
    elif words[0] in commands:
        _run(commands[words[0]].load(), f"igpt {words[0]}", words[1:])
    else:
        raise InputError(f"no command {words[0]!r}; {suggest(words[0], commands)}")


def _run(options: "type[Options]", program: str, words: list[str]) -> None:
    from igpt.cli.parser import parse

    parsed = parse(options, program, words)
    if parsed is None:
        return
    chosen, given = parsed
    out = getattr(chosen, "out", None)
    if out is not None:
        (require_writable_folder if options.out_is_folder else require_writable)(out)
    import_module(options.settings.partition(":")[0])
    stop_in_order()
    chosen.execute(given)


def _overview(commands: Mapping[str, Command]) -> str:
    lines = [
        f"igpt {__version__}: Generative Pretraining from Pixels",
        "",
        "usage: igpt COMMAND ...",
        "",
    ]
    lines += [f"  {name:10} {command.summary}" for name, command in commands.items()]
    return "\n".join([*lines, "", "igpt COMMAND --help shows the flags of a command."])


def _complain(message: str, code: int) -> int:
    """Print a message in one line, whatever the names in it hold; return the exit code."""
    line = " ".join(part.strip() for part in message.splitlines())
    print(line.translate(_ESCAPED), file=sys.stderr)
    return code


# Control characters in names would change the terminal's state.
_ESCAPED = {number: f"\\x{number:02x}" for number in (*range(32), *range(127, 160))}
