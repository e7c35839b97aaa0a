"""Entry point of `igpt`, `python -m igpt` and `torchrun -m igpt`: signals, streams, the command.

Only light modules are imported before Ctrl-C is taken care of.
"""

import os
import sys

from igpt.interrupts import exit_at_once


def main() -> int:
    """Run the command of this process's command line; return the exit code."""
    exit_at_once()
    _leave_ascii()
    _share_cores()
    from igpt.console import close_streams, open_streams, settle_caches

    open_streams()
    settle_caches()
    from igpt.cli import main as run

    try:
        code = run()
    finally:
        exit_at_once()  # nothing is left to do that could be interrupted
        complete = close_streams()
    return code if complete else code or 2


def _share_cores() -> None:
    """Let waiting threads of GNU OpenMP sleep after microseconds, unless the user configured them.

    By default they spin for milliseconds. Next to other busy processes, that makes training steps
    twice as slow and more (benchmarks/waiting.py). OpenMP reads these variables when it is loaded,
    with torch.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"


def _leave_ascii() -> None:
    """Restart Python in UTF-8 mode if file names are ASCII; it would mangle other names.

    Python does so by itself in the C locale, unless it is configured not to.
    """
    if sys.getfilesystemencoding() == "ascii" and "utf8" not in sys._xoptions and sys.executable:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
