"""The world of a training: the processes that torchrun has started, or one process alone."""

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
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.rendezvous import rendezvous

from igpt.errors import InputError, Interrupted, LostRank
from igpt.training.signals import exit_now, watch_signals

Value = TypeVar("Value")
_CAUSE = "igpt/cause"  # key of the store under which the first rank that fails writes its error
_CAUSE_SECONDS = 5.0  # to wait for that
_RENDEZVOUS_TIMEOUT = timedelta(minutes=10)  # processes of a cluster start at different times
_POLL_SECONDS = 0.2  # between checks that the launcher is alive
_GRACE_SECONDS = 5.0  # after the seconds for saving, until a rank without a launcher is ended


@dataclass(frozen=True)
class World:
    """This process among all processes of a training.

    Attributes:
        rank, size: rank of this process, and number of processes.
        device: device of this process.
        control: gloo process group for small objects, for which no GPU has to be waited for; None
            if the size is 1.
        disk: another gloo group, for checkpoints that are written while training continues.
        local_size: number of ranks on this machine.
    """

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    disk: dist.ProcessGroup | None = None
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def local_rows(self, batch: Tensor) -> Tensor:
        """Return this rank's rows of a whole batch, on its device."""
        return batch.tensor_split(self.size)[self.rank].to(self.device, non_blocking=True)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum a tensor on the device over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def all_reduce_max(self, number: int) -> int:
        """Return the maximum of a number over all ranks, without waiting for a GPU."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.control)
        return int(numbers)

    def broadcast(self, value: Value) -> Value:
        """Return the main rank's value on all ranks."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def device_mesh(self, shard: int) -> DeviceMesh | None:
        """Return a mesh whose last dimension has the `shard` ranks that share one copy of weights.

        With several copies the mesh has two dimensions; it is None if every rank has its own copy.

        Raises:
            InputError: `shard` does not divide the world size.
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
class _Launch:
    """The environment variables of torchrun.

    Attributes:
        rank, size: rank of this process, and number of processes.
        local_rank, local_size: the same on this machine.
        port: of the rendezvous; 0 if the size is 1.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    port: int


def _read_number(
    environment: Mapping[str, str], name: str, least: int, below: int | None = None
) -> int:
    """Return the number in an environment variable.

    Raises:
        InputError: it is missing, no number, or out of range.
    """
    value = environment.get(name)
    if value is None:
        raise InputError(
            f"the environment has WORLD_SIZE but not {name}; torchrun sets both, so start ranks "
            "with it"
        )
    is_number = value.isascii() and value.isdecimal() and len(value) < 10
    if not is_number or int(value) < least or (below is not None and int(value) >= below):
        upper = "" if below is None else f" below {below}"
        raise InputError(
            f"the environment has {name}={value[:40]!r}, and a number from {least}{upper} is "
            f"needed; torchrun sets it: start ranks with torchrun, or unset {name} for one process"
        )
    return int(value)


def _read_launch(environment: Mapping[str, str]) -> _Launch:
    """Return torchrun's variables; without WORLD_SIZE there is one process.

    Raises:
        InputError: a variable is missing, or its value is no number in its range. It is named.
    """
    size = _read_number(environment, "WORLD_SIZE", 1) if "WORLD_SIZE" in environment else 1
    local_size = (
        _read_number(environment, "LOCAL_WORLD_SIZE", 1)
        if "LOCAL_WORLD_SIZE" in environment
        else size
    )
    local_rank = _read_number(environment, "LOCAL_RANK", 0) if "LOCAL_RANK" in environment else 0
    if size == 1:
        return _Launch(0, 1, local_rank, 1, 0)
    rank = _read_number(environment, "RANK", 0, below=size)
    port = _read_number(environment, "MASTER_PORT", 1, below=2**16)
    if not environment.get("MASTER_ADDR"):
        raise InputError(
            "the environment has WORLD_SIZE but not MASTER_ADDR; torchrun sets both, so start "
            "ranks with it"
        )
    return _Launch(rank, size, local_rank, local_size, port)


@contextmanager
def distributed_world(device: str = "auto", stop_seconds: float = 25.0) -> Iterator[World]:
    """Join the process group that torchrun's environment describes, or work alone without one.

    When a rank fails, the others raise `LostRank` with its message, which it leaves in the store of
    the rendezvous. When torchrun itself is gone, every rank stops as by SIGTERM: otherwise a
    training that nobody can end would continue.

    Args:
        device: "auto" (a GPU if there is one), "cpu", or "cuda".
        stop_seconds: time to save in when torchrun is gone.

    Raises:
        InputError: there is no GPU but "cuda" is asked for, the environment is not torchrun's, or
            the port is in use.
        LostRank: another rank has failed or vanished.
    """
    launch = _read_launch(os.environ)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device 'cuda' is asked for and there is no GPU here; use --device cpu or auto"
        )
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    chosen = torch.device("cuda", launch.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        if launch.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"process {launch.local_rank} of this machine has no GPU; --nproc-per-node is at "
                "most its GPUs"
            )
        torch.cuda.set_device(chosen)
    if launch.size == 1:
        with _stop_with_launcher(stop_seconds):
            yield World(0, 1, chosen)
        return
    if not on_gpu and "OMP_NUM_THREADS" not in os.environ:
        # Ranks on the same machine share its cores.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // launch.local_size))
    with _stop_with_launcher(stop_seconds):
        store = _rendezvous(launch)
        try:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=store,
                rank=launch.rank,
                world_size=launch.size,
            )
            control, disk = (dist.new_group(backend="gloo") for _ in range(2))
            yield World(launch.rank, launch.size, chosen, control, disk, launch.local_size)
        except (Interrupted, KeyboardInterrupt) as stop:
            if isinstance(stop, Interrupted) and not stop.number:
                dist.destroy_process_group()  # a time limit ends all ranks in good order
            raise
        except Exception as error:
            # The groups are not destroyed: that would wait for ranks that are gone.
            with _native_stderr_discarded():
                cause = _find_cause(store, launch.rank, error)
            if cause is None:
                get_error_handler().record_exception(error)  # for torchrun's summary
                raise
            raise LostRank(cause) from error
        dist.destroy_process_group()


def _rendezvous(launch: _Launch) -> Any:
    """Wait for all ranks; return the store that they share.

    Raises:
        InputError: the port is in use, or the address is wrong.
        LostRank: some ranks have not come in time.
    """
    address = os.environ["MASTER_ADDR"]
    try:
        # The rendezvous is native code, which Ctrl-C does not interrupt.
        with watch_signals(_exit_on_interrupt):
            store, _, _ = next(rendezvous("env://", timeout=_RENDEZVOUS_TIMEOUT))
    except dist.DistError as error:
        if "address already in use" in str(error).lower() or "EADDRINUSE" in str(error):
            raise InputError(
                f"MASTER_PORT={launch.port} is in use on this machine, perhaps by another "
                "training; give torchrun another one with --master-port"
            ) from None
        raise LostRank(
            f"not all of {launch.size} processes have come to {address}:{launch.port} within "
            f"{_RENDEZVOUS_TIMEOUT.seconds // 60} minutes"
        ) from None
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the ranks cannot meet at MASTER_ADDR={address}, MASTER_PORT={launch.port}: {error}"
        ) from None
    return store


def _exit_on_interrupt(number: int) -> None:
    if number == signal.SIGINT:
        exit_now(number, "interrupted while waiting for the other ranks")


@contextmanager
def _stop_with_launcher(seconds: float) -> Iterator[None]:
    """Stop this process by SIGTERM when torchrun is gone, and by force `seconds` later.

    Ranks that were started otherwise keep running: a shell may end before them.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    launcher, done = os.getppid(), Event()

    def watch() -> None:
        while os.getppid() == launcher:
            if done.wait(_POLL_SECONDS):
                return
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(seconds + _GRACE_SECONDS)  # even if `done` is set: the exit may hang as well
        os._exit(128 + signal.SIGTERM)

    Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _find_cause(store: Any, rank: int, error: Exception) -> str | None:
    """Return the message of the rank that failed first, or None if this rank did."""
    is_consequence = _is_consequence(error)
    try:
        if not is_consequence:
            message = str(error)
            if not isinstance(error, InputError):
                message = f"rank {rank}: {type(error).__name__}: {error}"
            first = str(store.compare_set(_CAUSE, "", message).decode())
            return None if first == message else first
        deadline = time.monotonic() + _CAUSE_SECONDS
        while time.monotonic() < deadline:
            if store.check([_CAUSE]):
                return str(store.get(_CAUSE).decode())
            time.sleep(0.05)
    except RuntimeError:
        pass  # the rank that keeps the store is gone
    if not is_consequence:
        return None
    return "another rank is gone: killed, or its machine was lost; its own output may say more"


def _is_consequence(error: BaseException | None) -> bool:
    """Return whether an error only means that another rank no longer answers."""
    if isinstance(error, InputError):
        return False
    while error is not None:
        message = str(error)
        if isinstance(error, dist.DistError) or any(
            part in message for part in ("gloo", "Connection closed by peer", "NCCL", "Socket")
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _native_stderr_discarded() -> Iterator[None]:
    """Discard what native code prints: a store whose host is gone prints its stack frames."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
