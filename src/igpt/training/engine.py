"""One update of a model on this machine: where its weights lie, what is kept for the backward pass, who adds what up.

Rows of a batch are shared out among the ranks, and each rank's rows among micro-batches; sums are
divided by the count of the whole batch, so that the update is the same however they are shared. B
images of a batch, n places.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from igpt.allocator import keep_freed_memory
from igpt.data.tokens.batches import Batch
from igpt.errors import InputError
from igpt.model.objectives import Summed
from igpt.model.precision import autocast
from igpt.model.transformer import ImageGPT
from igpt.training.distributed import World
from igpt.training.optimizer import make_optimizers, step
from igpt.training.settings import Recomputation, TrainConfig

Objective = Callable[..., Summed]

_aten = torch.ops.aten
# Products and attention cost the most to compute again; all between them is recomputed.
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


class _Call(nn.Module):
    """Makes any function of a model a forward pass, which is where DDP and FSDP do their work."""

    def __init__(self, model: ImageGPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Objective, *tensors: Tensor) -> Summed:
        """The sum and the count that the function gives."""
        return function(self.model, *tensors)


def _policy(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _prepare_block(block: nn.Module, recomputation: Recomputation, compiled: bool) -> None:
    """Makes a block compute activations again in the backward pass, and compiles it; its parameters keep their names.

    DDP's and FSDP's hooks stay around what is compiled.
    """
    forward: Callable[..., Any] = block.forward
    if recomputation != "none":
        contexts: dict[str, Any] = {}
        if recomputation == "selective":
            contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)}
        # Nothing in a block is random.
        forward = partial(
            checkpoint, forward, use_reentrant=False, preserve_rng_state=False, **contexts
        )
    block.forward = torch.compile(forward) if compiled else forward


class Engine:
    """Updates a model.

    Args:
        model: with weights, or made on the meta device: then it gets its initial ones, part by
            part, so that one that is sharded need not fit on any device as a whole.
        objective: called with the model and the tensors of a micro-batch; gives a summed loss and a
            count of images.

    Raises:
        InputError: the batch or the sharding does not fit the number of ranks.
    """

    def __init__(
        self, model: ImageGPT, config: TrainConfig, world: World, objective: Objective
    ) -> None:
        if config.batch_size < world.size:
            raise InputError(
                f"a batch of {config.batch_size} leaves some of {world.size} processes idle; raise --batch-size"
            )
        self.model, self.config, self.world = model, config, world
        self._objective = objective
        mesh = world.device_mesh(config.shard)
        if world.device.type == "cpu":
            keep_freed_memory()
        compiled = config.compile == "yes" or (
            config.compile == "auto" and world.device.type == "cuda"
        )
        policy = MixedPrecisionPolicy()
        if config.precision == "bf16":
            policy = MixedPrecisionPolicy(
                torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        for name, part in model.top_modules():
            if any(parameter.is_meta for parameter in part.parameters()):
                model.init_weights(name, world.device)
            else:
                part.to(world.device)
            if name.startswith("h."):
                _prepare_block(part, config.activation_checkpointing, compiled)
                if config.shard > 1:
                    fully_shard(part, mesh=mesh, mp_policy=policy)
        self._call = _Call(model)
        self._training_call: nn.Module = self._call
        if config.shard > 1:
            fully_shard(self._call, mesh=mesh)
        elif world.size > 1:
            self._training_call = DistributedDataParallel(self._call, gradient_as_bucket_view=True)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizers = make_optimizers(
            model, config.optimizer, betas=config.betas, weight_decay=config.weight_decay
        )

    def update(self, batch: Batch, rate: float) -> Tensor:
        """One update with a whole batch, whose tensors' rows are images; nothing here waits for the device.

        Returns:
            the loss (mean over the batch), the gradient's norm before clipping, and whether the
            update was skipped since one of them is not finite (1 or 0): float64 [3] on the device.
        """
        count, world = len(batch[0]), self.world
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        micro_batches = self._shares(batch, self.config.micro_batch_size)
        for number, (share, weight) in enumerate(micro_batches):
            with self._synchronised(number == len(micro_batches) - 1):
                with autocast(self.config.precision, world.device):
                    summed, _ = self._training_call(self._objective, *share)
                # DDP and FSDP average over the ranks.
                torch.autograd.backward(summed * (weight * world.size / count))
            total += summed.detach() * weight
        loss = world.all_reduce_sum(total) / count
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self.config.grad_clip:
            clip_grads_with_norm_(self.parameters, self.config.grad_clip, norm)
        skip = (~(loss.isfinite() & norm.isfinite())).float()
        step(self.optimizers, rate, skip)
        return torch.stack([loss, norm.double(), skip.double()])

    @torch.no_grad()
    def evaluate(self, objective: Objective, batch: Batch) -> Tensor:
        """The sum that an objective gives for a whole batch, float64 on the device, the same on all ranks."""
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for share, weight in self._shares(batch, None):
            with autocast(self.config.precision, self.world.device):
                summed, _ = self._call(objective, *share)
            total += summed * weight
        return self.world.all_reduce_sum(total)

    def evaluation_batch_size(self) -> int:
        """Images, over all ranks, that fit when nothing is kept for a backward pass: four times a micro-batch."""
        share = -(-self.config.batch_size // self.world.size)
        return 4 * min(self.config.micro_batch_size or share, share) * self.world.size

    def weights(self) -> dict[str, Tensor] | None:
        """The whole weights on the CPU of the leading rank, if the model here holds only a part of them.

        All ranks must ask; the others get none.
        """
        if self.config.shard == 1:
            return None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        tensors: dict[str, Any] = get_model_state_dict(self.model, options=options)
        return tensors

    def _shares(self, batch: Batch, micro_batch_size: int | None) -> list[tuple[Batch, int]]:
        """This rank's micro-batches and their weights; as many on every rank, for all take part in every exchange.

        A rank that has too few rows gets one that weighs nothing.
        """
        rows = -(-len(batch[0]) // self.world.size)
        number = -(-rows // (micro_batch_size or rows))
        parts = [self.world.local_rows(tensor).tensor_split(number) for tensor in batch]
        shares = list(zip(*parts, strict=True))
        idle = tuple(tensor[:1].to(self.world.device) for tensor in batch)
        return [(share, 1) if len(share[0]) else (idle, 0) for share in shares]

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Gradients go between the copies of the model with the last micro-batch only.

        Where a copy is sharded, each rank's share is added up every time: all of a copy's gradients
        might not fit.
        """
        call = self._training_call
        if isinstance(call, FSDPModule):
            call.set_is_last_backward(last)
            call.set_requires_all_reduce(last)
            yield
        elif isinstance(call, DistributedDataParallel) and not last:
            with call.no_sync():
                yield
        else:
            yield
