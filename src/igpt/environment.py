"""Versions, machine, command and commit of a result, recorded with every published number."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from igpt import __version__
from igpt.files import Stored, read_json

RunKind = Literal["pretrain", "finetune"]


class Environment(Stored):
    """Schema of a run's environment.json: the result of `describe`, and checksums of the inputs."""

    kind: RunKind | None = None  # igpt 0.1.0 did not record it, see `run_kind`
    tokens_sha256: str | None = None
    model_sha256: str | None = None
    probe_tokens_sha256: str | None = None
    igpt: str | None = None
    commit: str | None = None
    command: str | None = None
    started: str | None = None
    python: str | None = None
    torch: str | None = None
    numpy: str | None = None
    platform: str | None = None
    processor: str | None = None
    cores: int | None = None
    gpu: str | None = None


def read_environment(path: Path) -> dict[str, Any]:
    """Return what a run's environment.json holds, as `Environment` describes it.

    Raises:
        InputError: it is missing, damaged, or has a value of another type.
    """
    return read_json(path, "run", Environment)


def run_kind(environment: Mapping[str, Any], settings: Mapping[str, Any]) -> RunKind:
    """Return the kind of a run.

    environment.json records it. In runs of igpt 0.1.0, which did not record it, only fine-tuning
    has the setting `generation_weight`.
    """
    old: RunKind = "finetune" if "generation_weight" in settings else "pretrain"
    return environment.get("kind") or old


def describe() -> dict[str, Any]:
    """Return versions, machine, command, source commit (None outside a checkout) and time."""
    import torch

    return {
        "igpt": __version__,
        "commit": _commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def memory_limit() -> int | None:
    """Return the bytes of memory that processes may use: RAM (or the cgroup's limit) and swap.

    None where the system does not tell.
    """
    try:
        limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_cgroup_limits()]
    except (OSError, ValueError):
        return None
    return min(limits) + _swap()


def _cgroup_limits() -> list[int]:
    """Return the limits of this process's cgroup and of those above it, of version 2 or 1."""
    root, limits = Path("/sys/fs/cgroup"), []
    for line in _lines_of(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, name = (
            (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        )
        folder = top / path.lstrip("/")
        for each in (folder, *folder.parents):
            if each.is_relative_to(top):
                limits += [int(text) for text in _lines_of(each / name) if text.isdecimal()]
    return limits


def _swap() -> int:
    for line in _lines_of(Path("/proc/meminfo")):
        if line.startswith("SwapTotal:"):
            return int(line.split()[1]) << 10
    return 0


def _lines_of(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        ours = subprocess.run(
            ["git", "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True
        )
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True
        )
    except OSError:  # git is not installed
        return None
    return found.stdout.strip() or None if ours.returncode == 0 and found.returncode == 0 else None
