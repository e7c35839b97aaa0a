"""A hook of MkDocs that writes tables of the commands' flags and of settings.

The comment `<!-- flags: pretrain -->` in a page is replaced by a table of a command's flags,
`<!-- settings: module:Class -->` by a table of the fields of a settings class, and
`<!-- presets: pretrain -->` by the table of presets of `igpt models`. A command without a
table, a flag without help, a table of an unknown command, and a page that loads anything from
another host are warnings, so `mkdocs build --strict` fails.
"""

import logging
import re
from functools import cache
from importlib import import_module
from typing import Any

from igpt.cli import COMMANDS
from igpt.cli.models import PRESET_COLUMNS, preset_rows
from igpt.cli.parser import Flag, flags_of

_log = logging.getLogger("mkdocs.hooks.flags")
_MARK = re.compile(r"<!-- (flags|settings|presets): (\S+) -->")
_FOREIGN = re.compile(r"<(?!a\b)[^<>]*\b(?:src|href)=\"(?:https?:)?//[^<>]*>")  # links are allowed
_shown: set[str] = set()


@cache
def flags(command: str) -> tuple[Flag, ...]:
    """Return the arguments of a command, positional ones first."""
    found = flags_of(COMMANDS[command].load())
    return tuple(sorted(found, key=lambda flag: bool(flag.names)))


def table(command: str) -> str:
    """Return a Markdown table of the arguments of a command."""
    rows = ["| flag | description | default |", "|---|---|---|"]
    for flag in flags(command):
        if not flag.help:
            _log.warning("igpt %s %s has no help", command, flag.name)
        names = ", ".join(f"`{name}`" for name in flag.names)
        values = [flag.kind] if flag.kind else flag.choices
        several = " ..." if flag.nargs in ("*", "+") else ""
        values_text = ", ".join(f"`{value}{several}`" for value in values)
        default = f"`{flag.default}`" if flag.default else ""
        rows.append(
            f"| {names} {values_text} | {_cell(flag.help)} | {default} |".replace("|  ", "| ")
        )
    return "\n".join(rows)


def settings_table(path: str) -> str:
    """Return a Markdown table of the fields of a settings class, given as "module:Class"."""
    module, _, name = path.partition(":")
    rows = ["| setting | description | default |", "|---|---|---|"]
    for setting, field in getattr(import_module(module), name).model_fields.items():
        if not field.description:
            _log.warning("%s.%s has no description", path, setting)
        default = "" if field.is_required() else f"`{field.get_default()!r}`"
        rows.append(f"| `{setting}` | {_cell(field.description or '')} | {default} |")
    return "\n".join(rows)


def presets_table() -> str:
    """Return a Markdown table of the presets of `igpt pretrain`."""
    rows = [PRESET_COLUMNS, ("---",) * len(PRESET_COLUMNS)]
    rows += [(f"`{name}`", *map(_cell, cells)) for name, *cells in preset_rows()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(words: str) -> str:
    return words.rstrip(".").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def on_config(config: Any) -> None:
    """Forget the tables of the last build; called by MkDocs before a build."""
    _shown.clear()


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the comments of a page by tables; called by MkDocs with every page."""

    def put(asked: re.Match[str]) -> str:
        kind, name = asked.groups()
        if kind == "settings":
            return settings_table(name)
        if kind == "presets":
            return presets_table()
        if name not in COMMANDS:
            _log.warning(
                "%s requests the flags of %r, which is not a command", page.file.src_uri, name
            )
            return ""
        _shown.add(name)
        return table(name)

    return _MARK.sub(put, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Check a page for resources of other hosts; called by MkDocs with every finished page."""
    for loaded in _FOREIGN.findall(output):
        _log.warning("%s loads from another host: %s", page.file.src_uri, loaded)
    return output


def on_post_build(**_: Any) -> None:
    """Warn of commands without a table; called by MkDocs at the end."""
    for command in COMMANDS:
        if command not in _shown:
            _log.warning("no page has the flags of %s: <!-- flags: %s -->", command, command)
