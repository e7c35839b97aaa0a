"""The commands' flags as tables, from `igpt COMMAND --help` itself: a hook of MkDocs.

A page asks for a table by a comment, `<!-- flags: pretrain -->`; `<!-- settings: module:Class -->`
is a table of a class of settings, from its fields. What is missing (a command without a table, a
flag without a word of help, a table of no command) is a warning, at which `mkdocs build --strict`
stops; so is a page that would load anything from another host.
"""

import contextlib
import io
import logging
import os
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple
from unittest import mock

from igpt.cli import COMMANDS, main

_log = logging.getLogger("mkdocs.hooks.flags")
_MARK = re.compile(r"<!-- (flags|settings): (\S+) -->")
_FOREIGN = re.compile(r"<(?!a\b)[^<>]*\b(?:src|href)=\"(?:https?:)?//[^<>]*>")  # links are fine
_shown: set[str] = set()


class Flag(NamedTuple):
    """An argument of a command: its names, the kind of its value, its help, its default."""

    names: tuple[str, ...]
    value: str
    words: str
    default: str


@cache
def flags(command: str) -> tuple[Flag, ...]:
    """The arguments of a command, first those without a name of their own, as its --help has them."""
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # for the frames' lines
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "150"}),  # wider, and the help comes in two columns
        contextlib.redirect_stdout(said),
        contextlib.suppress(SystemExit),
    ):
        main([command, "--help"])
    said.seek(0)
    return tuple(_parsed(said.read()))


def _parsed(text: str) -> Iterator[Flag]:
    lines = [line.strip("│").rstrip() for line in text.splitlines() if line.startswith("│")]
    entries: list[list[str]] = []
    for line in lines:
        if line.startswith("  "):  # the help goes on
            entries[-1][1] += f" {line.strip()}"
        else:
            head, _, words = line.strip().partition("  ")
            entries.append([head, words.strip()])
    for head, words in entries:
        if head.startswith("-h,"):
            continue
        words = words.replace(" (required)", "").replace(" (default: None)", "")
        words, _, default = words.partition(" (default: ")
        names = tuple(re.findall(r"(?<!\S)--?[a-z][\w-]*", head))
        default = default.removesuffix(")")
        yield Flag(
            names,
            _value(head),
            words.strip(),
            "" if default in ("False", "True", "()", "''") else default,
        )


def _value(head: str) -> str:
    """The kind of a value: INT, "INT ..." for several, or the words to choose from."""
    kinds = re.findall(r"[A-Z][A-Z_]*", re.sub(r"(?<!\S)--?[a-z][\w-]*", "", head))
    choices = re.findall(r"\{([a-z][^{}]*)\}", head)
    several = (
        f"{kinds[0]} ..."
        if "..." in head
        else " ".join(kinds)
        if "{FLOAT" in head
        else "".join(kinds[:1])
    )
    return ",".join(filter(None, [several, *choices]))


def table(command: str) -> str:
    """A Markdown table of a command's arguments."""
    rows = ["| flag | what | default |", "|---|---|---|"]
    for flag in flags(command):
        if not flag.words:
            _log.warning("igpt %s %s has no help", command, " ".join(flag.names) or flag.value)
        names = ", ".join(f"`{name}`" for name in flag.names)
        names += " " + ", ".join(f"`{value}`" for value in flag.value.split(",") if value)
        rows.append(
            f"| {names.strip()} | {_cell(flag.words)} | {f'`{flag.default}`' if flag.default else ''} |"
        )
    return "\n".join(rows)


def settings_table(place: str) -> str:
    """A Markdown table of the fields of a class of settings, given as "module:Class"."""
    module, _, name = place.partition(":")
    rows = ["| setting | what | default |", "|---|---|---|"]
    for setting, field in getattr(import_module(module), name).model_fields.items():
        if not field.description:
            _log.warning("%s.%s has no description", place, setting)
        default = "" if field.is_required() else f"`{field.get_default()!r}`"
        rows.append(f"| `{setting}` | {_cell(field.description or '')} | {default} |")
    return "\n".join(rows)


def _cell(words: str) -> str:
    return words.rstrip(".").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def on_config(config: Any) -> None:
    """Called by MkDocs before a build."""
    _shown.clear()


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs with every page: puts the tables where they are asked for."""

    def put(asked: re.Match[str]) -> str:
        kind, name = asked.groups()
        if kind == "settings":
            return settings_table(name)
        if name not in COMMANDS:
            _log.warning(
                "%s asks for the flags of %r, which is no command", page.file.src_uri, name
            )
            return ""
        _shown.add(name)
        return table(name)

    return _MARK.sub(put, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Called by MkDocs with every page as it will be written."""
    for loaded in _FOREIGN.findall(output):
        _log.warning("%s loads from another host: %s", page.file.src_uri, loaded)
    return output


def on_post_build(**_: Any) -> None:
    """Called by MkDocs at the end."""
    for command in COMMANDS:
        if command not in _shown:
            _log.warning("no page has the flags of %s: <!-- flags: %s -->", command, command)
