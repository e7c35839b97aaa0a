"""Command lines parsed into options and settings: argparse, with flags made from pydantic fields.

A command is a subclass of `Options`. Its fields are its positional arguments and flags. The fields
of the settings class that it names become further flags; of these, only the given ones are
returned, so that they override presets and files, and defaults do not.
"""

import argparse
import reprlib
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Union, get_args, get_origin

from pydantic import Field
from pydantic.fields import FieldInfo

from igpt.config import Config, flag_of
from igpt.errors import InputError

_POSITIONAL: dict[str, Any] = {"positional": True}
_NUMBERS: dict[Any, str] = {int: "INT", float: "FLOAT"}


class Options(Config, ABC):
    """Base of the options of a command.

    Attributes:
        settings: "module:Class" of the settings whose fields are flags as well, or only the module
            that does the work. It is imported before Ctrl-C is handled by the command.
        example: shown by --help.
        one_of: flags of which one is needed.
        groups: headings of the help, and the names of the flags below each, in order. Other flags
            come first if they are the command's own, and last if they are settings.
        out_is_folder: whether `out` names a folder.
        out_may_be_url: whether `out` may be a URL.
    """

    settings: ClassVar[str]
    example: ClassVar[str]
    one_of: ClassVar[tuple[str, ...]] = ()
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    out_is_folder: ClassVar[bool] = False
    out_may_be_url: ClassVar[bool] = False

    @classmethod
    def recipe(cls, words: Sequence[str]) -> tuple[str, Mapping[str, Any]]:
        """Return a name and the settings that a command line has before files and flags.

        The help shows them as defaults. By default there are none.

        Args:
            words: of the command line.

        Raises:
            InputError: there is no such preset.
        """
        return "", {}

    @abstractmethod
    def execute(self, given: dict[str, Any]) -> None:
        """Run the command.

        Args:
            given: the settings that were given as flags.
        """


def argument(description: str, default: Any = ...) -> Any:
    """Return a field that is a positional argument."""
    return Field(default, description=description, json_schema_extra=_POSITIONAL)


@dataclass(frozen=True)
class Flag:
    """A positional argument or a flag of a command.

    Attributes:
        name: the field's name.
        names: as written on the command line, such as ("--flip", "--no-flip"); () if positional.
        kind: the kind of its value for the help, such as "INT"; "" if it takes none.
        convert: converts a word to the value.
        choices: the words that it accepts, () for any.
        nargs: number of values in argparse's notation; None for one.
        help: one sentence.
        default: as the help shows it, "" if there is none.
        required: whether it must be given.
        is_setting: whether it belongs to the settings class.
        recipe: name of the preset whose default it is, "" for igpt's own.
    """

    name: str
    names: tuple[str, ...]
    kind: str
    convert: Callable[[str], Any]
    choices: tuple[str, ...]
    nargs: str | int | None
    help: str
    default: str
    required: bool
    is_setting: bool
    recipe: str = ""


def flags_of(options: type[Options]) -> list[Flag]:
    """Return the arguments of a command, its own ones before those of its settings."""
    found = [_flag(name, field, False) for name, field in options.model_fields.items()]
    settings = settings_class(options)
    if settings:
        own = options.model_fields.keys()
        fields = settings.model_fields.items()
        found += [_flag(name, field, True) for name, field in fields if name not in own]
    return found


def settings_class(options: type[Options]) -> type[Config] | None:
    """Return the settings class that a command names, if it names one."""
    module, _, name = options.settings.partition(":")
    found: type[Config] | None = getattr(import_module(module), name) if name else None
    return found


def parse(
    options: type[Options], program: str, words: Sequence[str]
) -> tuple[Options, dict[str, Any]] | None:
    """Return the options and the given settings of a command line, or None if it asked for help.

    Args:
        program: "igpt VERB", for messages.

    Raises:
        InputError: an unknown flag (the nearest one is named), a missing or a wrong value.
    """
    flags = flags_of(options)
    if {"-h", "--help"} & set(words):
        name, recipe = options.recipe(words)
        flags = [_of_recipe(flag, name, recipe) for flag in flags]
        note = f"{name} sets the defaults that are marked with its name." if recipe else ""
        _parser(options, program, flags, note).print_help()
        return None
    parser = _parser(options, program, flags)
    _require_known(words, {name for flag in flags for name in flag.names}, program)
    namespace, unused = parser.parse_known_intermixed_args(list(words))
    if unused:
        parser.error(f"unexpected argument {reprlib.repr(unused[0])}")
    values = vars(namespace)
    values = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in values.items()
        if value is not None  # an optional positional argument that was not given
    }
    settings = {flag.name for flag in flags if flag.is_setting}
    own = {key: value for key, value in values.items() if key not in settings}
    # Values are converted already. Validation would refuse file names that are not UTF-8.
    return options.model_construct(**own), {key: values[key] for key in values if key in settings}


class _Formatter(argparse.HelpFormatter):
    """Keeps words in one piece, and the line breaks of the example."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26)

    def _split_lines(self, text: str, width: int) -> list[str]:
        words = " ".join(text.split())
        return textwrap.wrap(words, width, break_on_hyphens=False, break_long_words=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()
        return "\n".join(
            line if line.startswith(" ") else "\n".join(self._split_lines(line, width))
            for line in lines
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise the message instead of printing the usage and exiting."""
        message = message.removeprefix("argument ")
        raise InputError(f"{message}; see {self.prog} --help")


def value_of(words: Sequence[str], flag: str) -> str | None:
    """Return the value of a flag in a command line that asks for help, or None without one."""
    for word, following in zip(words, [*words[1:], "-"], strict=True):
        name, equals, value = word.partition("=")
        if name == flag and (equals or not following.startswith("-")):
            return value if equals else following
    return None


def _of_recipe(flag: Flag, name: str, recipe: Mapping[str, Any]) -> Flag:
    """Return a flag with the default of a preset."""
    if flag.name not in recipe:
        return flag
    return replace(flag, default=_shown(recipe[flag.name]) or "off", recipe=name)


def _parser(
    options: type[Options], program: str, flags: Sequence[Flag], note: str = ""
) -> argparse.ArgumentParser:
    words = [_usage(flag) for flag in flags if not flag.names]
    required = [f"{flag.names[0]} {flag.kind}" for flag in flags if flag.required]
    choices = [flag.names[0] for flag in flags if flag.name in options.one_of]
    required += [f"({' | '.join(choices)})"] if choices else []
    parser = _Parser(
        program,
        usage=" ".join([program, *words, *required, "[flags]"]),
        description=f"{options.__doc__} {note}".strip(),
        epilog=f"example:\n  {options.example}",
        formatter_class=_Formatter,
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    by_name = {flag.name: flag for flag in flags}
    order = [name for names in options.groups.values() for name in names if name in by_name]
    rest = [flag for flag in flags if flag.name not in order]
    sections = {"flags": [flag for flag in rest if flag.names and not flag.is_setting]}
    for title, names in options.groups.items():
        sections[title] = [by_name[name] for name in names if name in by_name]
    sections["settings"] = [flag for flag in rest if flag.is_setting]
    for flag in flags:
        if not flag.names:
            _add(parser, flag)
    for title, members in sections.items():
        group = parser.add_argument_group(title)  # not shown if it stays empty
        for flag in members:
            _add(group, flag)
        if title == "flags":
            group.add_argument("-h", "--help", action="help", help="show this help and exit")
    return parser


def _add(group: argparse._ActionsContainer, flag: Flag) -> None:
    """Add a flag or a positional argument to a group of the help."""
    of = f" of {flag.recipe}" if flag.recipe else ""
    notes = ["one or more"] if flag.nargs == "+" else []
    notes += [f"default{of}: {flag.default}"] if flag.default else []
    text = f"{flag.help} ({'; '.join(notes)})" if notes else flag.help
    # argparse adds the name of a negation itself.
    names = [name for name in flag.names if not name.startswith("--no-")] or [flag.name]
    group.add_argument(*names, help=text.replace("%", "%%"), **_details(flag))


def _usage(flag: Flag) -> str:
    """Return a positional argument as the usage shows it."""
    if flag.nargs in ("*", "+"):
        return f"[{flag.kind} ...]" if flag.nargs == "*" else f"{flag.kind} ..."
    return f"[{flag.kind}]" if flag.nargs == "?" else flag.kind


def _details(flag: Flag) -> dict[str, Any]:
    """Return the arguments of argparse's `add_argument` that depend on the kind of value."""
    if not flag.kind and not flag.choices:
        return {"action": argparse.BooleanOptionalAction if flag.is_setting else "store_true"}
    details: dict[str, Any] = {"type": flag.convert, "nargs": flag.nargs}
    if flag.names:
        details |= {"dest": flag.name, "required": flag.required}
    elif flag.nargs == "?":
        details["default"] = None  # argparse would convert SUPPRESS, which is a text
    return details | ({"metavar": flag.kind} if flag.kind else {"choices": flag.choices})


def _require_known(words: Sequence[str], known: set[str], program: str) -> None:
    """Raise for the first unknown flag, and name the nearest known one."""
    for word in words:
        name = word.partition("=")[0]
        if name == "--":
            return
        if name.startswith("--") and name not in known:
            shown = reprlib.repr(name)[1:-1]
            near = get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"unknown flag {shown} (see {program} --help){hint}")


def _flag(name: str, field: FieldInfo, is_setting: bool) -> Flag:
    kind, choices, nargs, convert = _kind(field.annotation)
    positional = field.json_schema_extra == _POSITIONAL
    long = flag_of(name, field)
    names: tuple[str, ...] = (long,)
    if positional:
        names = ()
        kind = name.upper() if kind in ("PATH", "TEXT") else kind
        nargs = nargs or (None if field.is_required() else "?")
    elif name == "out":
        names = ("-o", "--out")
    elif field.annotation is bool and is_setting:
        names = (long, f"--no-{long[2:]}")
    if nargs == "*" and (names or field.is_required()):
        nargs = "+"
    return Flag(
        name=name,
        names=names,
        kind=kind,
        convert=convert,
        choices=choices,
        nargs=nargs,
        help=field.description or "",
        default=_shown(None if field.is_required() else field.get_default()),
        required=field.is_required() and not positional and not is_setting,
        is_setting=is_setting,
    )


def _shown(default: Any) -> str:
    """Return a default as the help shows it."""
    if default is None or default is False or default == () or default == "":
        return ""
    if default is True:
        return "on"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _kind(annotation: Any) -> tuple[str, tuple[str, ...], str | int | None, Callable[[str], Any]]:
    """Return the kind of value, the choices, the number of values and the converter of a type."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kind(get_args(annotation)[0])
    if origin is tuple:
        items = get_args(annotation)
        kind, choices, _, convert = _kind(items[0])
        return kind, choices, "*" if Ellipsis in items else len(items), convert
    if origin in (Union, UnionType):
        parts = [_kind(part) for part in get_args(annotation) if part is not NoneType]
        if len(parts) == 1:
            return parts[0]
        (kind, _, _, convert), (_, choices, _, _) = parts  # a number or one of some words
        return "|".join([kind, *choices]), choices, None, _number_or_word(convert, choices)
    if origin is Literal:
        return "", get_args(annotation), None, str
    if annotation is bool:
        return "", (), None, bool
    if annotation in _NUMBERS:
        return _NUMBERS[annotation], (), None, _number(annotation)
    return ("PATH" if annotation is Path else "TEXT"), (), None, annotation


def _number(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    def convert(word: str) -> int | float:
        try:
            return kind(word)
        except ValueError:
            needed = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{reprlib.repr(word)} is not {needed}") from None

    return convert


def _number_or_word(convert: Callable[[str], Any], words: Sequence[str]) -> Callable[[str], Any]:
    def either(word: str) -> Any:
        return word if word in words else convert(word)

    return either
