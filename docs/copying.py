"""A hook of MkDocs: the copy button of a `console` block copies its commands alone.

The theme copies the text of the attribute `data-copy`, if a block has one.
"""

import html
import logging
import re
from typing import Any

from examples import BLOCK, commands

_log = logging.getLogger("mkdocs.hooks.copying")
_SHOWN = re.compile(r'<div class="(?:[\w-]+ )*language-console(?: [\w-]+)*"')


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Add the commands to the console blocks of a page; called by MkDocs with every page."""
    blocks = BLOCK.findall(page.markdown)
    if len(blocks) != len(_SHOWN.findall(content)):
        _log.warning("%s: not every console block is a block of its page", page.file.src_path)
        return content
    found = iter(blocks)

    def with_commands(shown: re.Match[str]) -> str:
        text = html.escape("\n".join(commands(next(found)))).replace("\n", "&#10;")
        return f'{shown[0]} data-copy="{text}"'

    return _SHOWN.sub(with_commands, content)
