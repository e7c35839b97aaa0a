"""Exact memory of the tensors that are alive during a step, on a CPU or with fake tensors.

For benchmarks and tests of memory. With fake tensors (PyTorch's tensors that have shapes and no
contents) nothing is computed, and ranks are simulated without other processes, so iGPT-XL on 64
ranks can be measured too.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from igpt.model import cpu, norm
from igpt.model.config import ModelConfig
from igpt.model.transformer import ImageGPT
from igpt.training.distributed import World
from igpt.training.engine import Engine
from igpt.training.settings import TrainConfig


class LiveTensors(TorchDispatchMode):
    """Count the bytes of all tensor storages that are alive, and record the maximum.

    A storage counts from the operation that made it until it is freed, in the backward pass and in
    an optimizer too. What a kernel takes and gives back while it runs is not seen.

    Attributes:
        bytes: alive now.
        peak: the most that were alive after any operation.
        at_peak: bytes at that moment, by the operation that made them.
        operation: after which there were so many.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._patch: Any = None
        self.bytes = 0
        self.restart()

    def restart(self) -> None:
        """Forget the recorded maximum."""
        self.peak, self.operation = 0, ""
        self.at_peak: Counter[str] = Counter()

    def __enter__(self) -> Any:
        resize, mode = torch.UntypedStorage.resize_, self

        def noted(
            storage: torch.UntypedStorage, size: int
        ) -> Any:  # FSDP frees and refills storages in place
            done = resize(storage, size)
            if (known := mode._alive.pop(storage._cdata, None)) is not None:
                mode.bytes -= known[1]
            mode._note(storage, known[2] if known else "resize_")
            return done

        self._patch = patch.object(torch.UntypedStorage, "resize_", noted)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patch.stop()
        super().__exit__(*error)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if DTensor in types:  # it is returned with its local tensors; its own storage is empty
            return NotImplemented
        made = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage(), str(operation))
        return made

    def _note(self, storage: torch.UntypedStorage, origin: str) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = (
                weakref.ref(storage, lambda _: self._free(key)),
                storage.nbytes(),
                origin,
            )
            self.bytes += storage.nbytes()
        if self.bytes > self.peak:
            self.peak, self.operation = self.bytes, origin
            self.at_peak = Counter()
            for _, size, made_by in self._alive.values():
                self.at_peak[made_by] += size

    def _free(self, key: int) -> None:
        self.bytes -= self._alive.pop(key)[1]


class _Rank0(World):
    """Rank 0 of a world without other processes."""

    def device_mesh(self, shard: int) -> Any:
        return _MESHES.get(shard)


_MESHES: dict[int, DeviceMesh] = {}  # made before tensors are fake: a mesh has contents


@contextmanager
def _ranks(size: int, shard: int) -> Iterator[World]:
    """Yield rank 0 of a process group whose collective operations do nothing."""
    if size == 1:
        yield _Rank0(0, 1, torch.device("cpu"))
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        _MESHES[shard] = World(0, size, torch.device("cpu")).device_mesh(shard)
        yield _Rank0(0, size, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Use the operations of a GPU; its fused norm keeps what the CPU's lean one keeps."""
    with (
        patch.object(cpu, "trains_on_cpu", lambda x: False),
        patch.object(
            norm.RMSNorm, "forward", lambda self, x: cpu.lean_norm(x, self.weight, self.eps)
        ),
    ):
        yield


def _pretended(model: ImageGPT, name: str, device: torch.device) -> None:
    """Give a part of a model weights without contents."""
    for module in model.get_submodule(name).modules():
        for inner, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, inner, nn.Parameter(torch.empty(parameter.shape, device=device)))


def measure_update(
    model: ModelConfig,
    settings: TrainConfig,
    world: World | None = None,
    *,
    ranks: int = 1,
    pretend: bool = False,
    validate: bool = True,
) -> LiveTensors:
    """Return the tensors alive on a rank during its second step and during validation.

    Args:
        settings: its batch is that of all ranks; not compiled.
        world: this process among real ranks; otherwise rank 0 of `ranks` that do not exist.
        pretend: compute nothing.
        validate: whether validation is looked at too.
    """
    with ExitStack() as stack:
        world = world or stack.enter_context(_ranks(ranks, settings.shard))
        if pretend:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(patch.object(ImageGPT, "init_weights", _pretended))
        live = stack.enter_context(LiveTensors())
        for _ in update_twice(model, settings, world, validate=validate):
            live.restart()
    return live


def update_twice(
    model: ModelConfig, settings: TrainConfig, world: World, *, validate: bool
) -> Iterator[None]:
    """Yield between the first and the second step of a new engine; validation may follow."""
    with torch.device("meta"):
        made = ImageGPT(model)
    engine = Engine(made, settings, world, model.trained_as.loss)
    images = max(settings.batch_size, engine.evaluation_batch_size() * validate)
    tokens = torch.zeros(images, model.n_pixels, dtype=torch.long, device=world.device)
    whole = (tokens, tokens == 0) if model.trained_as.masked else (tokens,)
    batch = tuple(tensor[: settings.batch_size] for tensor in whole)
    engine.update(batch, 1e-3)
    yield
    engine.update(batch, 1e-3)
    if validate:
        engine.evaluate(
            model.trained_as.loss,
            tuple(tensor[: engine.evaluation_batch_size()] for tensor in whole),
        )
