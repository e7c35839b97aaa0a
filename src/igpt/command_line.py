"""What the commands share: flags made from settings, parsing with one-line errors, a progress bar."""

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, fields, make_dataclass
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import tyro

from igpt.config import Config, read_settings
from igpt.errors import InputError

_MARKERS = (tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName, tyro.conf.FlagCreatePairsOff)
_FLAT = (tyro.conf.arg(name="", help_behavior_hint=""),)
Show = Callable[[str, int, int], None]  # (what, done, in all)


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
    text = re.sub(r"For full helptext, (run|see).*", "", text).strip()
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
