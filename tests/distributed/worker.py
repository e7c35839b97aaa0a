"""A process that runs commands of `igpt` as one of several ranks: JSON lines in, JSON lines out."""

import contextlib
import io
import json
import os
import sys

import igpt.training.pretrain  # noqa: F401  what every command needs
from igpt.cli import main

answers = os.fdopen(
    os.dup(sys.stdout.fileno()), "w"
)  # output of native code must not mix with the answers
os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
for line in sys.stdin:
    job = json.loads(line)
    os.environ.update(job["environment"])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(job["words"])
    print(
        json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}),
        file=answers,
        flush=True,
    )
