"""Several processes that train one model: started by torchrun, and nothing at all when alone."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from igpt.errors import InputError, Interrupted, LostRank

Told = TypeVar("Told")
_CAUSE = "igpt/cause"  # where the rank that failed first leaves what it has to say
_PATIENCE = 5.0  # seconds to wait for it
_MEETING = timedelta(minutes=10)  # processes of a cluster start at different times


@dataclass(frozen=True)
class Team:
    """This process's place among all.

    Attributes:
        rank, size: 0 .. size - 1, of how many.
        device: what it computes on.
        control: a process group of the CPUs, for words between ranks that no GPU need wait for (None when alone).
        disk: another one, for checkpoints that are written while training goes on.
    """

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    disk: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes files and speaks."""
        return self.rank == 0

    def part(self, batch: Tensor) -> Tensor:
        """This rank's rows of a whole batch, on its device."""
        return batch.tensor_split(self.size)[self.rank].to(self.device, non_blocking=True)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor on the device over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, number: int) -> int:
        """The largest of the numbers that the ranks have; no GPU is waited for."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.control)
        return int(numbers)

    def tell(self, value: Told) -> Told:
        """What the leading rank has, on all ranks."""
        if self.size == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0, group=self.control)
        return told[0]

    def wait(self) -> None:
        """Returns when all ranks have come here."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def mesh(self, shard: int) -> DeviceMesh | None:
        """The ranks in groups of `shard` that share one copy of the weights; several groups are rows of two dimensions.

        None where every rank has a copy of its own.

        Raises:
            InputError: the groups do not come out even.
        """
        if self.size % shard:
            raise InputError(f"--shard {shard} does not divide {self.size} processes; take a divisor of it")
        if shard == 1:
            return None
        if shard == self.size:
            return init_device_mesh(self.device.type, (shard,), mesh_dim_names=("shard",))
        return init_device_mesh(self.device.type, (self.size // shard, shard), mesh_dim_names=("replicate", "shard"))


@contextmanager
def team(device: str = "auto") -> Iterator[Team]:
    """Joins the process group that torchrun's environment describes, or works alone without one.

    When a rank fails, the others learn why: what it raised is told to all through the store they met at.

    Args:
        device: "auto" (a GPU if there is one), "cpu", or "cuda".

    Raises:
        InputError: a GPU is asked for and there is none.
        LostRank: another rank has failed or vanished.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' is asked for and there is no GPU here; use --device cpu or auto")
    gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    if gpu:
        if local_rank >= torch.cuda.device_count():
            raise InputError(f"process {local_rank} of this machine has no GPU; --nproc-per-node is at most its GPUs")
        torch.cuda.set_device(chosen)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Team(0, 1, chosen)
        return
    if not gpu and "OMP_NUM_THREADS" not in os.environ:  # ranks that share a machine share its cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", size))))
    try:
        store, rank, size = next(rendezvous("env://", timeout=_MEETING))
    except dist.DistError:
        raise LostRank(f"not all of {size} processes have come within {_MEETING.seconds // 60} minutes") from None
    try:
        dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=size)
        groups = [dist.new_group(backend="gloo") for _ in range(2)]
        yield Team(rank, size, chosen, *groups)
    except (Interrupted, KeyboardInterrupt):
        raise
    except Exception as error:
        # The groups are left as they are: taking them down would wait for ranks that are gone.
        with _quiet():
            cause = _cause(store, rank, error)
        if cause is None:
            raise
        raise LostRank(cause) from error
    dist.destroy_process_group()


def _cause(store: Any, rank: int, error: Exception) -> str | None:
    """What another rank said of its end, or None when this rank's error is the first one."""
    echo = _is_echo(error)
    try:
        if not echo:
            said = f"rank {rank}: {type(error).__name__}: {error}" if not isinstance(error, InputError) else str(error)
            first = str(store.compare_set(_CAUSE, "", said).decode())
            return None if first == said else first
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            if store.check([_CAUSE]):
                return str(store.get(_CAUSE).decode())
            time.sleep(0.05)
    except RuntimeError:
        pass  # the store is gone with the rank that kept it
    return "another rank is gone: killed, or its machine was lost; its own output may say more" if echo else None


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
    """Whether an error only says that another rank no longer answers."""
    while error is not None:
        words = str(error)
        if isinstance(error, dist.DistError) or any(
            part in words for part in ("gloo", "Connection closed by peer", "NCCL", "Socket")
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
