"""Prepare a model for training: initialize, checkpoint activations, compile, replicate or shard.

`parallelize` returns the module that the engine calls. Its order matters: every block first gets
its weights, then activation checkpointing, then compilation, then FSDP, so that a sharded model
never has to fit on one device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from igpt.model.objectives import Summed
from igpt.model.transformer import ImageGPT
from igpt.training.distributed import World
from igpt.training.settings import Recomputation, TrainConfig

LossFunction = Callable[..., Summed]

_aten = torch.ops.aten
# Selective activation checkpointing keeps the results of matrix products and attention, which cost
# the most to recompute, and recomputes everything else.
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


class _LossModule(nn.Module):
    """A module whose forward pass is a loss: DDP and FSDP do their work around forward passes."""

    def __init__(self, model: ImageGPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: LossFunction, *tensors: Tensor) -> Summed:
        """Return the summed loss and the number of images."""
        return function(self.model, *tensors)


def parallelize(model: ImageGPT, config: TrainConfig, world: World) -> nn.Module:
    """Move a model to its device, initialize it if it is on the meta device, and wrap it.

    Returns:
        a module that is called with a loss function and the tensors of a micro-batch. Parameters
        keep their names in `model`.

    Raises:
        InputError: `config.shard` does not divide the world size.
    """
    mesh = world.device_mesh(config.shard)
    on_gpu = world.device.type == "cuda"
    compiled = config.compile == "yes" or (config.compile == "auto" and on_gpu)
    policy = MixedPrecisionPolicy()
    if config.precision == "bf16":
        policy = MixedPrecisionPolicy(
            torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for name, module in model.top_modules():
        if any(parameter.is_meta for parameter in module.parameters()):
            model.init_weights(name, world.device)
        else:
            module.to(world.device)
        if name.startswith("h."):
            # Only `forward` is replaced: names stay, and the hooks of DDP and FSDP are outside.
            module.forward = _checkpointed(module.forward, config.activation_checkpointing)
            if compiled:
                module.forward = torch.compile(module.forward)
            if config.shard > 1:
                fully_shard(module, mesh=mesh, mp_policy=policy)
    loss = _LossModule(model)
    if config.shard > 1:
        fully_shard(loss, mesh=mesh)
    elif world.size > 1:
        return DistributedDataParallel(loss, gradient_as_bucket_view=True)
    return loss


def _checkpointed(forward: Callable[..., Any], recomputation: Recomputation) -> Callable[..., Any]:
    if recomputation == "none":
        return forward
    contexts: dict[str, Any] = {}
    if recomputation == "selective":
        contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)}
    # Nothing in a block is random.
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False, **contexts)


def _policy(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def gradient_sync(module: nn.Module, last: bool) -> Iterator[None]:
    """All-reduce gradients between copies of the model after the last micro-batch only.

    With FSDP, gradients are reduce-scattered within a copy after every micro-batch: all gradients
    of a copy might not fit.
    """
    if isinstance(module, FSDPModule):
        module.set_is_last_backward(last)
        module.set_requires_all_reduce(last)
        yield
    elif isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
    else:
        yield
