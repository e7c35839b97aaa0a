"""Several processes that train one model: started by torchrun, and nothing at all when alone.

Every rank holds the whole model and takes its part of each batch; gradients are summed once an update.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from igpt.errors import InputError


@dataclass(frozen=True)
class Team:
    """This process's place among all: rank 0 .. size - 1, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes files and speaks."""
        return self.rank == 0

    def part(self, batch: Tensor) -> Tensor:
        """This rank's rows of a whole batch, on its device."""
        return batch.tensor_split(self.size)[self.rank].to(self.device, non_blocking=True)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def sum_gradients(self, model: nn.Module) -> None:
        """Adds up the gradients of all ranks; each must have been divided by the count of the whole batch."""
        if self.size > 1:
            for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
                if parameter.grad is None:  # a rank without rows in this batch
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)

    def agree(self, value: bool) -> bool:
        """What the leading rank says, on all ranks."""
        return bool(self.sum(torch.tensor(int(value and self.leads), device=self.device)))

    def wait(self) -> None:
        """Returns when all ranks have come here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def team(device: str = "auto") -> Iterator[Team]:
    """Joins the process group that torchrun's environment describes, or works alone without one.

    Args:
        device: "auto" (a GPU if there is one), "cpu", or "cuda".

    Raises:
        InputError: a GPU is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' is asked for and there is no GPU here; use --device cpu or auto")
    gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(chosen)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Team(0, 1, chosen)
        return
    if not gpu and "OMP_NUM_THREADS" not in os.environ:  # ranks that share a machine share its cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", size))))
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield Team(dist.get_rank(), size, chosen)
    finally:
        dist.destroy_process_group()
