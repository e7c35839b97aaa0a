"""What the commands share: flags made from settings, one-line errors, exit codes, a progress bar."""

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
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from igpt import __version__
from igpt.config import Config, read_settings
from igpt.errors import InputError, Interrupted, LostRank, suggest
from igpt.files import folder_to_read, read_json

if TYPE_CHECKING:
    from igpt.model.transformer import ImageGPT

_MARKERS = (tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName, tyro.conf.FlagCreatePairsOff)
_FLAT = (tyro.conf.arg(name="", help_behavior_hint=""),)
Out = Annotated[Path, tyro.conf.arg(aliases=["-o"])]
MaybeOut = Annotated[Path | None, tyro.conf.arg(aliases=["-o"])]
Show = Callable[[str, int, int], None]  # (what, done, in all)
Commands = Mapping[str, tuple[Callable[..., None], str | None]]  # what it does, and the settings that are its flags


def flags_of(config: type[Config], besides: set[str]) -> type:
    """A data class with an optional flag for every setting, so that one not given is told from one given."""
    made = []
    for name, setting in config.model_fields.items():
        if name not in besides:
            default = None if setting.is_required() else setting.get_default()
            help_text = f"{setting.description}{'' if default is None else f' (default: {default})'}"
            optional: Any = setting.annotation
            kind = Annotated[optional | None, tyro.conf.arg(help=help_text, help_behavior_hint="")]
            made.append((name, kind, field(default=None)))
    return make_dataclass(f"{config.__name__}Flags", made, frozen=True)


def given(flags: Any) -> dict[str, Any]:
    """The settings that were given as flags."""
    values = {item.name: getattr(flags, item.name) for item in fields(flags)}
    return {name: value for name, value in values.items() if value is not None}


def file_settings(path: Path | None) -> Mapping[str, Any]:
    """The settings of a file, or none."""
    return read_settings(path) if path else {}


def parse(function: Callable[..., None], settings: str | None, program: str, words: list[str]) -> Callable[[], None]:
    """Parses the words of a command into a call of its function that is still to be made.

    Args:
        settings: "module:Class" of the settings whose fields become the flags of the parameter `flags`.

    Raises:
        InputError: words that do not fit, told in one line.
    """

    @wraps(function)
    def later(*positional: Any, **named: Any) -> Callable[[], None]:
        return partial(function, *positional, **named)

    if settings:
        module, _, name = settings.partition(":")
        parameters = set(function.__annotations__)
        flags: Any = flags_of(getattr(import_module(module), name), besides=parameters)
        later.__annotations__ = {**function.__annotations__, "flags": Annotated[flags, *_FLAT]}
        vars(later).pop("__wrapped__")
        later.__signature__ = _signature(function, later.__annotations__)  # type: ignore[attr-defined]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            call: Callable[[], None] = tyro.cli(later, prog=program, args=words, config=_MARKERS)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(_one_line(said.getvalue(), program)) from None
    return call


def _signature(function: Callable[..., None], annotations: Mapping[str, Any]) -> Any:
    from inspect import signature

    plain = signature(function)
    return plain.replace(
        parameters=[parameter.replace(annotation=annotations[name]) for name, parameter in plain.parameters.items()]
    )


def _one_line(box: str, program: str) -> str:
    """The text of tyro's framed error without its frame, title and pointer to --help."""
    inside = "\n".join(line for line in box.splitlines() if not line.startswith("╭"))
    text = " ".join(re.sub(r"[^\x20-\x7e]", " ", inside).split())
    text = re.sub(r"For full helptext, (run|see).*", "", text)
    text = re.sub(r"^.*?-{10,}", "", text).strip()  # a title above a line
    return f"{text}; see {program} --help"


@contextlib.contextmanager
def progress_bar() -> Iterator[Show]:
    """A bar for long work, on a terminal only: call it with what is being done, how much of it is, and of how much."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)


def model_and_run(path: Path) -> tuple[Path, Path]:
    """The model directory that a run or model directory means, and where its results belong."""
    if (folder_to_read(path / "model") / "config.json").exists():
        return path / "model", path
    if path.name == "model" and (path.parent / "config.yaml").exists():
        return path, path.parent
    return path, Path()


def require_writable(path: Path, kind: str | None = None) -> None:
    """Refuses a file that cannot be written before the work for it is done, and JSON of another kind than `kind`."""
    home = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir():
        raise InputError(f"{path} is a folder; the name of a file to write is needed")
    if not home.is_dir() or not os.access(home, os.W_OK):
        raise InputError(f"{path} cannot be written: {home} is no folder that may be written to")
    if kind and path.exists() and read_json(path, kind).get("format") != kind:
        raise InputError(f"{path} holds something else already ({kind} would be written there); choose another -o")


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
    """Prints what came out, once: of several processes, the leading one does."""
    if os.environ.get("RANK", "0") == "0":
        print(line)


def load_model(path: Path) -> "ImageGPT":
    """The model in a model directory, on a GPU if there is one."""
    import torch

    from igpt.model.transformer import ImageGPT

    return ImageGPT.from_pretrained(path).to("cuda" if torch.cuda.is_available() else "cpu")


def run_command(commands: Commands, words: list[str]) -> int:
    """Runs one of the commands; the exit code.

    A user's mistake ends in one line and exit code 2; Ctrl-C in 130, SIGTERM in 143. A traceback is a bug.
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
    except KeyboardInterrupt:
        return _complain(f"{name}: interrupted; what was finished is kept", 130)
    except BrokenPipeError:  # `igpt ... | head`: nobody reads on, and Python must not complain at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(r"out of memory|can't allocate memory", str(error)):
            raise
        return _complain(f"{name}: out of memory; try fewer images at a time (--micro-batch-size, --count, --limit)", 2)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return _complain(f"{name}: {error.strerror or error}{where}; nothing was left half-written", 2)
    return 0


def _dispatch(commands: Commands, words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print(_overview(commands))
    elif words[0] == "--version":
        print(__version__)
    elif words[0] in commands:
        function, settings = commands[words[0]]
        parse(function, settings, f"igpt {words[0]}", words[1:])()
    else:
        raise InputError(f"no command {words[0]!r}; {suggest(words[0], commands)}")


def _overview(commands: Commands) -> str:
    lines = [f"igpt {__version__}: Generative Pretraining from Pixels", "", "usage: igpt COMMAND ...", ""]
    lines += [f"  {name:10} {(function.__doc__ or '').splitlines()[0]}" for name, (function, _) in commands.items()]
    return "\n".join([*lines, "", "igpt COMMAND --help says more."])


def _complain(line: str, code: int) -> int:
    print(" ".join(line.split()), file=sys.stderr)
    return code
