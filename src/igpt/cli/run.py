"""Shared by all commands: dispatch, exit codes, one-line errors."""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from igpt import __version__
from igpt.errors import InputError, Interrupted, LostRank, suggest
from igpt.interrupts import Terminated, stop_in_order

if TYPE_CHECKING:
    from igpt.cli.parser import Options


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


def is_first_rank() -> bool:
    """Return whether this process prints the results; with several ranks, only the first does."""
    rank = os.environ.get("RANK", "0")
    return not (rank.isdecimal() and int(rank) > 0)


def run_command(
    commands: Mapping[str, Command], words: list[str], renamed: Mapping[str, str] | None = None
) -> int:
    """Run one of the commands; return the exit code.

    A user error prints one line and returns 2; Ctrl-C returns 130, SIGTERM 143, and the end of a
    time limit, which is no failure, 0. A traceback is a bug.
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
        if not stop.number:
            if is_first_rank():
                print(f"{stop}; {again}")
            return 0
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
    from igpt.outputs import require_writable, require_writable_folder
    from igpt.remote import url_of

    parsed = parse(options, program, words)
    if parsed is None:
        return
    chosen, given = parsed
    out = getattr(chosen, "out", None)
    if out is not None and not (options.out_may_be_url and url_of(out)):
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
