"""What the commands share: flags made from settings, checks of outputs, one-line errors, exit codes."""

import contextlib
import io
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, fields, make_dataclass
from functools import partial, wraps
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from igpt import __version__
from igpt.config import Config, read_settings
from igpt.errors import InputError, Interrupted, LostRank, suggest
from igpt.files import file_to_write, folder_to_read, read_json, require_folder_name
from igpt.interrupts import Terminated, stop_in_order

if TYPE_CHECKING:
    from igpt.model.transformer import ImageGPT

_MARKERS = (tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName)
_FLAT = (tyro.conf.arg(name="", help_behavior_hint=""),)
_FOLDER = "folder"  # marks outputs that are folders
_O = tyro.conf.arg(aliases=["-o"])
Out = Annotated[Path, _O]
MaybeOut = Annotated[Path | None, _O]
OutFolder = Annotated[Path, _O, _FOLDER]
MaybeOutFolder = Annotated[Path | None, _O, _FOLDER]
# What a command does, and "module:Class" of the settings that are its flags, or the module that it
# begins by importing.
Commands = Mapping[str, tuple[Callable[..., None], str]]
_ROOM = (
    40  # bytes that the names of temporary files, locks and parts have more than the output's own
)
_USUAL_LENGTH = 255  # bytes of a name on most file systems


def flags_of(config: type[Config], besides: set[str]) -> type:
    """Return a data class with an optional flag for every setting; None is one that was not given.

    A setting that is true or false has two flags, --NAME and --no-NAME.
    """
    made = []
    for name, setting in config.model_fields.items():
        if name not in besides:
            default = None if setting.is_required() else setting.get_default()
            help_text = (
                f"{setting.description}{'' if default is None else f' (default: {default})'}"
            )
            optional: Any = setting.annotation
            kind = Annotated[optional | None, tyro.conf.arg(help=help_text, help_behavior_hint="")]
            made.append((name, kind, field(default=None)))
    return make_dataclass(f"{config.__name__}Flags", made, frozen=True)


def given(flags: Any) -> dict[str, Any]:
    """Return the settings that were given as flags."""
    values = {item.name: getattr(flags, item.name) for item in fields(flags)}
    return {name: value for name, value in values.items() if value is not None}


def file_settings(path: Path | None) -> Mapping[str, Any]:
    """Return the settings of a file, or none."""
    return read_settings(path) if path else {}


def parse(
    function: Callable[..., None], settings: str, program: str, words: list[str]
) -> Callable[[], None]:
    """Parse the words of a command; return the call of its function, not yet made.

    Args:
        settings: see `Commands`; the fields of a class become the flags of the parameter `flags`.

    Raises:
        InputError: words that do not fit, or an output that cannot be written.
    """

    @wraps(function)
    def later(*positional: Any, **named: Any) -> partial[None]:
        return partial(function, *positional, **named)

    module, _, name = settings.partition(":")
    annotations = {key: _switch(kind) for key, kind in function.__annotations__.items()}
    if name:
        flags: Any = flags_of(getattr(import_module(module), name), besides=set(annotations))
        annotations["flags"] = Annotated[flags, *_FLAT]
    later.__annotations__ = annotations
    vars(later).pop("__wrapped__")
    parameters = signature(function).parameters.values()
    later.__signature__ = signature(function).replace(  # type: ignore[attr-defined]
        parameters=[
            parameter.replace(annotation=annotations[parameter.name]) for parameter in parameters
        ]
    )
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            call = tyro.cli(later, prog=program, args=words, config=_MARKERS)
    except SystemExit as stop:
        if stop.code:
            raise InputError(_one_line(said.getvalue(), program)) from None
        return lambda: None  # the help is printed
    out = signature(function).bind(*call.args, **call.keywords).arguments.get("out")
    if out is not None:
        is_folder = _FOLDER in getattr(function.__annotations__["out"], "__metadata__", ())
        (require_writable_folder if is_folder else require_writable)(out)
    import_module(module)
    return call


def _switch(kind: Any) -> Any:
    """Return the type of a parameter; one that only switches something on has no second flag that switches it off."""
    return Annotated[bool, tyro.conf.FlagCreatePairsOff] if kind is bool else kind


def _one_line(box: str, program: str) -> str:
    """Return the text of tyro's framed error without its frame, title and pointer to --help."""
    inside = "\n".join(line for line in box.splitlines() if not line.startswith("╭"))
    text = " ".join(re.sub(r"[\u2500-\u257f]", " ", inside).split())
    text = re.sub(r"For full helptext, (run|see).*", "", text)
    text = re.sub(r"^.*?-{10,}", "", text).strip()  # a title above a line
    return f"{text}; see {program} --help"


def model_and_run(path: Path) -> tuple[Path, Path]:
    """The model directory that a run or model directory means, and where its results belong."""
    if (folder_to_read(path / "model") / "config.json").exists():
        return path / "model", path
    if path.name == "model" and (path.parent / "config.yaml").exists():
        return path, path.parent
    return path, Path()


def require_writable(path: Path, kind: str | None = None) -> None:
    """Refuse a file that cannot be written before the work for it is done, and JSON of another kind than `kind`.

    Raises:
        InputError: `path` is no name of a regular file, its folder cannot be written to, or it
            holds something else.
    """
    with _reasons(path):
        target = file_to_write(path)
        _require_new_name(path, target)
        is_there = target.exists()
    if kind and is_there and read_json(target, kind).get("format") != kind:
        raise InputError(
            f"{path} holds something else already ({kind} would be written there); choose another -o"
        )


def require_writable_folder(path: Path) -> None:
    """Refuse a folder that cannot be made or written to, before the work for it is done.

    Raises:
        InputError: `path` has no name of its own, it is a file, or it cannot be written to; if it
            has to be made, the folder that it would lie in cannot be written to.
    """
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
    """Turn what the system says about a name that cannot be used (too long, a loop of links) into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{_short(path)} cannot be written: {reason}") from None


def _require_new_name(path: Path, target: Path) -> None:
    """Refuse what cannot be made at `target`, by the folder it lies in and by the length of its name."""
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
    """The name of a folder beside a file to be written, for what is needed until then.

    It is removed at the end, and if that was cut off, at the next time.
    """
    folder = target.with_name(f".{target.name}.passing")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def announce(line: str) -> None:
    """Print what came out, once: of several processes, only the first one prints."""
    rank = os.environ.get("RANK", "0")
    if not (rank.isdecimal() and int(rank) > 0):
        print(line)


def load_model(path: Path) -> "ImageGPT":
    """The model in a model directory, on a GPU if there is one."""
    import torch

    from igpt.model.transformer import ImageGPT

    return ImageGPT.from_pretrained(path).to("cuda" if torch.cuda.is_available() else "cpu")


def run_command(commands: Commands, words: list[str]) -> int:
    """Run one of the commands; return the exit code.

    A user's mistake ends in one line and exit code 2; Ctrl-C in 130, SIGTERM in 143. A traceback is
    a bug.
    """
    name = f"igpt {words[0]}" if words else "igpt"
    try:
        _dispatch(commands, words)
        sys.stdout.flush()
    except InputError as error:
        return _complain(f"{name}: {error}", 2)
    except LostRank as loss:
        _complain(f"{name}: {loss}", 1)
        sys.stdout.flush()
        os._exit(1)  # an orderly end would wait for the rank that is gone
    except Interrupted as stop:
        by_itself = words[0] in ("demo", "reproduce")  # they go on without being told to
        resume = [] if by_itself or "--resume" in words else ["--resume"]
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


def _dispatch(commands: Commands, words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print(_overview(commands))
    elif words[0] == "--version":
        print(__version__)
    elif words[0] in commands:
        function, settings = commands[words[0]]
        call = parse(function, settings, f"igpt {words[0]}", words[1:])
        stop_in_order()
        call()
    else:
        raise InputError(f"no command {words[0]!r}; {suggest(words[0], commands)}")


def _overview(commands: Commands) -> str:
    lines = [
        f"igpt {__version__}: Generative Pretraining from Pixels",
        "",
        "usage: igpt COMMAND ...",
        "",
    ]
    lines += [
        f"  {name:10} {(function.__doc__ or '').splitlines()[0]}"
        for name, (function, _) in commands.items()
    ]
    return "\n".join([*lines, "", "igpt COMMAND --help says more."])


def _complain(message: str, code: int) -> int:
    """Print a message in one line, whatever the names in it hold; return the exit code."""
    line = " ".join(part.strip() for part in message.splitlines())
    print(line.translate(_ESCAPED), file=sys.stderr)
    return code


# Control characters in names would change the terminal's state.
_ESCAPED = {number: f"\\x{number:02x}" for number in (*range(32), *range(127, 160))}
