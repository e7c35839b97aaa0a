"""Four processes, started once per session, that run commands of `igpt` as gloo ranks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..helpers.runs import free_port

Ranks = Callable[..., None]


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Run a command on some ranks, such as `ranks(2, "pretrain", tokens, ...)`; it must succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("worker.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    workers = [subprocess.Popen(command, **pipes) for _ in range(4)]  # type: ignore[call-overload]

    def run(size: int, *words: object) -> None:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        sizes = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        for rank, worker in enumerate(workers[:size]):
            place = {**meeting, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            print(
                json.dumps({"environment": place, "words": [str(word) for word in words]}),
                file=worker.stdin,
                flush=True,
            )
        for worker in workers[:size]:
            answer = json.loads(worker.stdout.readline())
            assert answer["code"] == 0, answer

    yield run
    for worker in workers:
        worker.stdin.close()
        worker.wait(30)
