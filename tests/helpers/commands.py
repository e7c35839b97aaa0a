"""A program for the runner's tests, used instead of `igpt`.

Its commands: `write FILE`, `need FILE`, `fail WORDS`, `wait FILE` (until it exists), `threads
FILE`, `slow FILE`, `kill`.
"""

import os
import signal
import sys
import time
from pathlib import Path

PROGRAM = (sys.executable, __file__)


def main(words: list[str]) -> int:
    """Run a command; return its exit code."""
    verb, name = words[:2]
    path = Path(name)
    if verb == "write":
        path.write_text(path.read_text() + "again\n" if path.exists() else "once\n")
    elif verb == "prepare":
        path.write_text(words[2])
    elif verb == "need":
        return 0 if path.exists() else 2
    elif verb == "fail":
        print(" ".join(words[1:]))
        return 2
    elif verb == "wait":
        end = time.monotonic() + 60
        while not path.exists():
            if time.monotonic() > end:
                return 1
            time.sleep(0.02)
    elif verb == "threads":
        import torch

        path.write_text(str(torch.get_num_threads()))
    elif verb == "slow":
        try:
            path.write_text(str(os.getpid()))
            time.sleep(60)
        except KeyboardInterrupt:
            path.with_suffix(".stopped").write_text(" ".join(words))
            return 130
    else:
        signal.raise_signal(signal.SIGKILL)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
