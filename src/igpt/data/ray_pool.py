"""Run jobs on the nodes of a Ray cluster, in the manner of `igpt.data.pool`: ordered results, few
jobs in flight, and jobs of a worker or node that dies on another one."""

import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from igpt.errors import InputError

Job = TypeVar("Job")
Result = TypeVar("Result")
_REACHED_WITHIN = 10.0  # seconds
_RETRIES = 10  # of a job whose worker or node dies; a job that needs too much memory kills all


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster, whose nodes have the same file system and igpt.

    Args:
        address: of the cluster, "HOST:PORT", or "auto" for one that this machine is a node of; None
            takes the one in the environment variable RAY_ADDRESS, or starts Ray on this machine.
    """

    address: str | None = None

    @contextmanager
    def running(
        self, work: Callable[[Job], Result], *, on_gpus: bool = False
    ) -> Iterator[Callable[[Iterable[Job]], Iterator[Result]]]:
        """Yield a function that runs jobs on the nodes, each on one core.

        Processes of the nodes receive `work` once, and work in the folder of this process.

        Args:
            on_gpus: if the cluster has GPUs, each job gets one.

        Raises:
            InputError: Ray is not installed, or there is no cluster at the address.
        """
        try:
            import ray
        except ImportError:
            raise InputError("--engine ray needs the extra: pip install 'igpt[ray]'") from None
        is_ours = not ray.is_initialized()
        if is_ours:
            _connect(self.address or os.environ.get("RAY_ADDRESS"))
        try:
            resources = ray.cluster_resources()
            gpus = 1 if on_gpus and resources.get("GPU") else 0
            slots = int(resources.get("GPU" if gpus else "CPU", 1))
            stored = ray.put(work)
            task = ray.remote(_run).options(max_retries=_RETRIES, num_gpus=gpus)
            # In a list, so that Ray does not send it with each job.
            submit = partial(task.remote, [stored], str(Path.cwd()))
            yield partial(_results, submit, slots)
        finally:
            if is_ours:
                ray.shutdown()


def _connect(address: str | None) -> None:
    import ray

    if address and address != "auto":
        _require_reachable(address)
    try:
        # Started here, it needs no address that other machines reach.
        alone = {} if address else {"_node_ip_address": "127.0.0.1"}
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **alone)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"no Ray cluster at {address or 'this machine'} ({reason[:200]}); start one with "
            "ray start --head, or give its --address HOST:PORT"
        ) from None


def _results(submit: Callable[[Job], Any], slots: int, jobs: Iterable[Job]) -> Iterator[Any]:
    import ray

    remaining = iter(jobs)
    waiting = deque(map(submit, islice(remaining, 2 * slots)))
    while waiting:
        try:
            result = ray.get(waiting.popleft())
        except ray.exceptions.RayTaskError as error:
            # Its own message has the traceback of the worker.
            raise error.cause if isinstance(error.cause, InputError) else error from None
        except (
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.NodeDiedError,
            ray.exceptions.OutOfMemoryError,
        ):
            raise InputError(
                f"the workers of a job died {_RETRIES + 1} times, most often for lack of memory"
            ) from None
        waiting.extend(map(submit, islice(remaining, 1)))
        yield result


def _require_reachable(address: str) -> None:
    """Raise an `InputError` if nothing listens at an address; Ray would end the process."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"--address is HOST:PORT of a Ray cluster, or auto, not {address!r}")
    try:
        socket.create_connection((host, int(port)), _REACHED_WITHIN).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"no Ray cluster can be reached at {address} ({error}); start one with ray start "
            "--head, or give another --address"
        ) from None


_works: dict[str, Callable[[Any], Any]] = {}  # in processes of the nodes


def _run(stored: list[Any], folder: str, job: Any) -> Any:
    import ray

    (reference,) = stored
    key = reference.hex()
    if key not in _works:
        try:
            os.chdir(folder)
        except OSError:
            raise InputError(
                f"{socket.gethostname()} has no folder {folder}; the nodes of the Ray cluster need "
                "the file system of the command"
            ) from None
        _works.clear()
        _works[key] = ray.get(reference)
    return _works[key](job)
