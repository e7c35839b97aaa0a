"""Try wrong invocations of every command: count those refused in one line, and print the others.

Goal: no traceback, no hang, nothing left behind. A refusal is exit code 2, one line on stderr, and
an unchanged folder. Cases that exit with 0 are printed as "accepted", for a person to judge. Cases
are generated from the commands, their flags and the kinds of files that they read
(`tests/helpers/invocations`), and run in forked processes, each in its own folder; a small sample
also runs as real programs. There is no access to the network.
"""

import gc
import os
import pkgutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Set before any import that reads them. The proxy is a closed port of this machine.
_CLOSED = "http://127.0.0.1:9"
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_ENDPOINT": _CLOSED,
    "HTTP_PROXY": _CLOSED,
    "HTTPS_PROXY": _CLOSED,
    "http_proxy": _CLOSED,
    "https_proxy": _CLOSED,
    "GRADIO_ANALYTICS_ENABLED": "False",
    "PYTHONDONTWRITEBYTECODE": "1",
}
sys.path.insert(0, str(Path(__file__).parents[1]))


def import_everything() -> None:
    """Import everything that any command needs, so that a fork does not; no threads are started."""
    import torch

    import igpt
    from igpt.environment import describe

    torch.set_num_threads(1)
    modules = [module.name for module in pkgutil.walk_packages(igpt.__path__, "igpt.")]
    for name in [*modules, "datasets", "gradio", "onnx"]:
        if not name.endswith("__main__") and find_spec(name):
            import_module(name)
    describe()


def igpt(words: list[str]) -> int:
    """Do what the program `igpt` does with these words."""
    from igpt.__main__ import main as program

    sys.argv = ["igpt", *words]
    return program()


def threads() -> list[str]:
    """Return the names of this process's threads that a fork would lose."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if name != "jemalloc_bg_thd"][1:]


FAULTS = ("traceback", "hang", "memory", "killed", "left behind", "exit code", "lines", "processes")
COLUMNS = ("cases", "refused", "accepted", "faulty", *FAULTS)


def summary(outcomes: Sequence[Any], key: str) -> dict[str, dict[str, int]]:
    """Count the outcomes of each value of a key; a faulty one may have several faults."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for one in outcomes:
        counts[getattr(one, key)].update(
            ["cases", "faulty" if one.faults else one.verdict, *one.faults]
        )
    return {name: dict(counts[name]) for name in sorted(counts)}


def table(outcomes: Sequence[Any], key: str) -> list[list[object]]:
    counts = summary(outcomes, key)
    total: Counter[str] = Counter()
    for one in counts.values():
        total.update(one)
    rows = {**counts, "all": total}.items()
    return [[name, *(one.get(column, 0) or "" for column in COLUMNS)] for name, one in rows]


def main(
    every: int = 4,
    most: int = 48,
    jobs: int = 2,
    seconds: float = 20.0,
    programs: int = 12,
    only: str | None = None,
    verb: str | None = None,
    quick: bool = False,
    folder: Path | None = None,
    out: Path | None = None,
) -> None:
    """Try wrong invocations of every command.

    Args:
        every: take one of so many cases only, always the same.
        most: cases of a damaged file and the first command that reads it, at most; a quarter of
            them for others.
        jobs: cases at a time.
        seconds: after which a case counts as one that never ends.
        programs: so many of the cases run as programs of their own too.
        only: take the cases whose names contain this, and print what they printed.
        verb: take the cases of this command only.
        quick: of `demo` and `reproduce`, try only what is refused before any work.
        folder: where cases work; a temporary folder by default.
        out: JSON to write; benchmarks/results/wrong-invocations.json by default, nothing with
            --only or --verb.
    """
    from common import RESULTS, show
    from tests.helpers.invocations.cases import VALID_AND_LONG, all_cases, spread, subset
    from tests.helpers.invocations.execution import Limits, remove, run_cases
    from tests.helpers.invocations.samples import make_samples

    from igpt.cli import COMMANDS
    from igpt.environment import describe
    from igpt.files import write_json

    began = time.monotonic()
    import_everything()
    home = Path(
        tempfile.mkdtemp(dir=folder, prefix="wrong-")
    )  # not an object that removes it when a fork ends
    try:
        make_samples(home / "samples", long_work=not quick)
        if left := threads():
            raise SystemExit(f"threads run already, which a fork would lose: {', '.join(left)}")
        gc.collect()
        gc.freeze()  # so that a garbage collection in a fork does not copy all memory
        made = time.monotonic()
        cases = all_cases(COMMANDS, home / "samples", most)
        generated = len(cases)
        if only is not None:
            cases = [case for case in cases if only in case.name]
        if verb is not None:
            cases = [case for case in cases if case.verb == verb]
        cases = subset(cases, every)
        plain = [case for case in cases if not case.program and case.privileges == "all"]
        cases += [
            replace(case, name=f"{case.name} (as a program)", program=True)
            for case in spread(plain, programs)
        ]
        print(f"omitted, because they are valid and would take long: {', '.join(VALID_AND_LONG)}")
        print(
            f"{len(cases)} of {generated} cases; samples made in {made - began:.0f} s", flush=True
        )
        outcomes = []
        for outcome in run_cases(
            cases, home / "samples", home / "cases", igpt, Limits(seconds=seconds), jobs
        ):
            outcomes.append(outcome)
            if outcome.faults or only is not None:
                verdict = ", ".join(outcome.faults) or outcome.verdict
                where = f" [{' <- '.join(reversed(outcome.frames))}]" if outcome.frames else ""
                print(f"{verdict}: {outcome.name}: {outcome.message[:200]}{where}", flush=True)
            if len(outcomes) % 200 == 0:
                print(
                    f"-- {len(outcomes)} of {len(cases)} in {time.monotonic() - made:.0f} s",
                    flush=True,
                )
    finally:
        remove(home)
    outcomes.sort(key=lambda one: one.name)
    accepted = [one for one in outcomes if one.verdict == "accepted"]
    print("\naccepted (exit code 0), for a person to judge:")
    for one in accepted:
        print(f"  {one.name}: {one.command}")
    show("by command", ["", *COLUMNS], table(outcomes, "verb"))
    show("by what is wrong", ["", *COLUMNS], table(outcomes, "kind"))
    show("by group", ["", *COLUMNS], table(outcomes, "group"))
    spent = time.monotonic() - began
    print(f"\n{len(outcomes)} cases in {spent:.0f} s")
    if out is None and (only is not None or verb is not None):
        return
    result = {
        "n": len(outcomes),
        "generated": generated,
        "seconds": round(spent),
        "limit_seconds": seconds,
        "by_group": summary(outcomes, "group"),
        "by_command": summary(outcomes, "verb"),
        "by_kind": summary(outcomes, "kind"),
        "faulty": [asdict(one) for one in outcomes if one.faults],
        "accepted": [one.name for one in accepted],
        "environment": {**describe(), "omp_num_threads": os.environ.get("OMP_NUM_THREADS")},
    }
    target = out or RESULTS / "wrong-invocations.json"
    write_json(target, result)
    print(f"\nwritten to {target}")


if __name__ == "__main__":
    from common import run

    run(main)
