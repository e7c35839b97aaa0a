"""Several processes that train one model, started by torchrun; or one process by itself."""

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from threading import Event, Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from igpt.errors import InputError, Interrupted, LostRank
from igpt.training.signals import exit_now, watch_signals

Told = TypeVar("Told")
_CAUSE = "igpt/cause"  # where the rank that failed first leaves what it has to say
_PATIENCE = 5.0  # seconds to wait for it
_MEETING = timedelta(minutes=10)  # processes of a cluster start at different times
_POLLED_EVERY = 0.2  # seconds between looks for the launcher
_GRACE = 5.0  # seconds after those for saving, until a rank without a launcher is ended


@dataclass(frozen=True)
class World:
    """This process's place among all.

    Attributes:
        rank, size: 0 .. size - 1, of how many.
        device: what it computes on.
        control: a process group of the CPUs, for words between ranks that no GPU need wait for
            (None when alone).
        disk: another one, for checkpoints that are written while training goes on.
        local_size: ranks of this machine.
    """

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    disk: dist.ProcessGroup | None = None
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files and speaks."""
        return self.rank == 0

    def local_rows(self, batch: Tensor) -> Tensor:
        """This rank's rows of a whole batch, on its device."""
        return batch.tensor_split(self.size)[self.rank].to(self.device, non_blocking=True)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor on the device over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def all_reduce_max(self, number: int) -> int:
        """The largest of the numbers that the ranks have; no GPU is waited for."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.control)
        return int(numbers)

    def broadcast(self, value: Told) -> Told:
        """What the leading rank has, on all ranks."""
        if self.size == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0, group=self.control)
        return told[0]

    def barrier(self) -> None:
        """Returns when all ranks have come here."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def device_mesh(self, shard: int) -> DeviceMesh | None:
        """The ranks in groups of `shard` that share one copy of the weights; several groups are rows of two dimensions.

        None where every rank has a copy of its own.

        Raises:
            InputError: the groups do not come out even.
        """
        if self.size % shard:
            raise InputError(
                f"--shard {shard} does not divide {self.size} processes; take a divisor of it"
            )
        if shard == 1:
            return None
        if shard == self.size:
            return init_device_mesh(self.device.type, (shard,), mesh_dim_names=("shard",))
        return init_device_mesh(
            self.device.type, (self.size // shard, shard), mesh_dim_names=("replicate", "shard")
        )


@dataclass(frozen=True)
class _Place:
    """A process's place by the environment that torchrun sets.

    Attributes:
        rank, size: 0 .. size - 1, of how many.
        local_rank, local_size: the same among those of this machine.
        port: of this machine or another, where all meet (0 when alone).
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    port: int


def _number(
    environment: Mapping[str, str], name: str, least: int, beyond: int | None = None
) -> int:
    """Return a number of the environment, at least `least` and below `beyond`.

    Raises:
        InputError: it is missing, no number, or out of its range.
    """
    value = environment.get(name)
    if value is None:
        raise InputError(
            f"the environment has WORLD_SIZE but not {name}; torchrun sets both, so start ranks with it"
        )
    plain = value.isascii() and value.isdecimal() and len(value) < 10
    if not plain or int(value) < least or (beyond is not None and int(value) >= beyond):
        upper = "" if beyond is None else f" below {beyond}"
        raise InputError(
            f"the environment has {name}={value[:40]!r}, and a number from {least}{upper} is needed; torchrun sets it: "
            f"start ranks with torchrun, or unset {name} for one process"
        )
    return int(value)


def _place(environment: Mapping[str, str]) -> _Place:
    """Return the place that the environment gives this process: alone without WORLD_SIZE, or if that is 1.

    Raises:
        InputError: a variable is missing, or its value is no number in its range; the message names
            it.
    """
    size = _number(environment, "WORLD_SIZE", 1) if "WORLD_SIZE" in environment else 1
    local_size = (
        _number(environment, "LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in environment else size
    )
    local_rank = _number(environment, "LOCAL_RANK", 0) if "LOCAL_RANK" in environment else 0
    if size == 1:
        return _Place(0, 1, local_rank, 1, 0)
    rank = _number(environment, "RANK", 0, beyond=size)
    port = _number(environment, "MASTER_PORT", 1, beyond=2**16)
    if not environment.get("MASTER_ADDR"):
        raise InputError(
            "the environment has WORLD_SIZE but not MASTER_ADDR; torchrun sets both, so start ranks with it"
        )
    return _Place(rank, size, local_rank, local_size, port)


@contextmanager
def distributed_world(device: str = "auto", stop_seconds: float = 25.0) -> Iterator[World]:
    """Join the process group that torchrun's environment describes, or work alone without one.

    When a rank fails, the others learn why: what it raised is told to all through the store they
        met at. When torchrun
    itself is gone, every rank stops as by SIGTERM, so that no training goes on that nobody can end.

    Args:
        device: "auto" (a GPU if there is one), "cpu", or "cuda".
        stop_seconds: time to save in when torchrun is gone.

    Raises:
        InputError: a GPU is asked for and there is none, the environment is not one that torchrun
            makes, or the port is in use.
        LostRank: another rank has failed or vanished.
    """
    place = _place(os.environ)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device 'cuda' is asked for and there is no GPU here; use --device cpu or auto"
        )
    gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    chosen = torch.device("cuda", place.local_rank) if gpu else torch.device("cpu")
    if gpu:
        if place.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"process {place.local_rank} of this machine has no GPU; --nproc-per-node is at most its GPUs"
            )
        torch.cuda.set_device(chosen)
    if place.size == 1:
        with _ending_with_launcher(stop_seconds):
            yield World(0, 1, chosen)
        return
    if (
        not gpu and "OMP_NUM_THREADS" not in os.environ
    ):  # ranks that share a machine share its cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.local_size))
    with _ending_with_launcher(stop_seconds):
        store = _meet(place)
        try:
            dist.init_process_group(
                "nccl" if gpu else "gloo", store=store, rank=place.rank, world_size=place.size
            )
            control, disk = (dist.new_group(backend="gloo") for _ in range(2))
            yield World(place.rank, place.size, chosen, control, disk, place.local_size)
        except (Interrupted, KeyboardInterrupt):
            raise
        except Exception as error:
            # The groups are left as they are: taking them down would wait for ranks that are gone.
            with _quiet():
                cause = _cause(store, place.rank, error)
            if cause is None:
                raise
            raise LostRank(cause) from error
        dist.destroy_process_group()


def _meet(place: _Place) -> Any:
    """Return the store at which all ranks have met.

    Raises:
        InputError: the port is in use.
        LostRank: some ranks have not come in time.
    """
    address = os.environ["MASTER_ADDR"]
    try:
        # The rendezvous is native code, which Ctrl-C does not interrupt.
        with watch_signals(_exit_on_interrupt):
            store, _, _ = next(rendezvous("env://", timeout=_MEETING))
    except dist.DistError as error:
        if "address already in use" in str(error).lower() or "EADDRINUSE" in str(error):
            raise InputError(
                f"MASTER_PORT={place.port} is in use on this machine, perhaps by another training; give torchrun "
                "another one with --master-port"
            ) from None
        raise LostRank(
            f"not all of {place.size} processes have come to {address}:{place.port} within {_MEETING.seconds // 60} "
            "minutes"
        ) from None
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the ranks cannot meet at MASTER_ADDR={address}, MASTER_PORT={place.port}: {error}"
        ) from None
    return store


def _exit_on_interrupt(number: int) -> None:
    if number == signal.SIGINT:
        exit_now(number, "interrupted while waiting for the other ranks")


@contextmanager
def _ending_with_launcher(seconds: float) -> Iterator[None]:
    """Stop this process when torchrun, which started it, is gone: by SIGTERM, and `seconds` later in any case.

    Ranks that something else has started are left alone: a shell may end before them.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    done = Event()
    Thread(target=_stop_without_launcher, args=(os.getppid(), seconds, done), daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _stop_without_launcher(launcher: int, seconds: float, done: Event) -> None:
    while os.getppid() == launcher:
        if done.wait(_POLLED_EVERY):
            return
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(seconds + _GRACE)  # not `done`: the end of a process may hang as well
    os._exit(128 + signal.SIGTERM)


def _cause(store: Any, rank: int, error: Exception) -> str | None:
    """What another rank said of its end, or None when this rank's error is the first one."""
    echo = _is_echo(error)
    try:
        if not echo:
            said = (
                f"rank {rank}: {type(error).__name__}: {error}"
                if not isinstance(error, InputError)
                else str(error)
            )
            first = str(store.compare_set(_CAUSE, "", said).decode())
            return None if first == said else first
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            if store.check([_CAUSE]):
                return str(store.get(_CAUSE).decode())
            time.sleep(0.05)
    except RuntimeError:
        pass  # the store is gone with the rank that kept it
    return (
        "another rank is gone: killed, or its machine was lost; its own output may say more"
        if echo
        else None
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps native code from writing to stderr: a store whose keeper is gone prints a page of its frames."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _is_echo(error: BaseException | None) -> bool:
    """Return whether an error only says that another rank no longer answers."""
    if isinstance(error, InputError):
        return False
    while error is not None:
        words = str(error)
        if isinstance(error, dist.DistError) or any(
            part in words for part in ("gloo", "Connection closed by peer", "NCCL", "Socket")
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
