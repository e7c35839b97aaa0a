"""One step of training: forward and backward passes of micro-batches, gradient clipping, optimizer.

The rows of a batch are split among the ranks, and each rank's rows into micro-batches. Sums are
divided by the number of images in the whole batch, so the result does not depend on the split.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from igpt.allocator import keep_freed_memory
from igpt.data.tokens.batches import Batch
from igpt.errors import InputError
from igpt.model.match import palette_of
from igpt.model.precision import autocast
from igpt.model.transformer import Block, ImageGPT
from igpt.training.distributed import World
from igpt.training.optimizer import make_optimizers, step
from igpt.training.parallelize import LossFunction, gradient_sync, parallelize
from igpt.training.settings import TrainConfig
from igpt.training.shared_updates import color_features


class Engine:
    """Train and evaluates a model on whole batches.

    Args:
        model: with weights, or on the meta device, where it gets its initial weights.
        loss: called with the model and the tensors of a micro-batch; returns a summed loss and the
            number of images.

    Raises:
        InputError: the batch has fewer images than there are ranks, `shard` does not divide the
            world size, or `share_color_updates` is set and the model has no palette.
    """

    def __init__(
        self, model: ImageGPT, config: TrainConfig, world: World, loss: LossFunction
    ) -> None:
        if config.batch_size < world.size:
            raise InputError(
                f"a batch of {config.batch_size} leaves some of {world.size} processes idle; "
                "raise --batch-size"
            )
        if world.device.type == "cpu":
            keep_freed_memory()
        self.model, self.config, self.world = model, config, world
        self._loss = loss
        self._train_module = parallelize(model, config, world)
        self._module = self._train_module  # for evaluation, without DDP
        if isinstance(self._train_module, DistributedDataParallel):
            self._module = self._train_module.module
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        features = None
        if config.share_color_updates:
            features = color_features(palette_of(model).opaque_centers)
        self.optimizers = make_optimizers(
            model,
            config.optimizer,
            betas=config.betas,
            weight_decay=config.weight_decay,
            color_features=features,
        )

    def update(self, batch: Batch, rate: float) -> Tensor:
        """Perform one optimizer step on a whole batch, whose tensors' rows are images.

        Nothing here waits for the device.

        Returns:
            float64 [3] on the device: the mean loss of the batch, the gradient norm before
            clipping, and 1 if the step was skipped because one of them is not finite, else 0.
        """
        count, world = len(batch[0]), self.world
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        micro_batches = self._micro_batches(batch, self.config.micro_batch_size)
        for number, (tensors, weight) in enumerate(micro_batches, 1):
            with gradient_sync(self._train_module, last=number == len(micro_batches)):
                with autocast(self.config.precision, world.device):
                    summed, _ = self._train_module(self._loss, *tensors)
                # DDP and FSDP average gradients over the ranks.
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
    def evaluate(self, loss: LossFunction, batch: Batch) -> Tensor:
        """Return the sum of a loss over a whole batch: float64 on the device of every rank."""
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for tensors, weight in self._micro_batches(batch, None):
            with autocast(self.config.precision, self.world.device):
                summed, _ = self._module(loss, *tensors)
            total += summed * weight
        return self.world.all_reduce_sum(total)

    @torch.no_grad()
    def features(self, tokens: Tensor, layer: int) -> Tensor:
        """Return the features of a layer, averaged over positions, for a whole batch.

        Args:
            tokens: [B, n].
            layer: 0 .. L - 1; the features are the normalized input of that block's attention.

        Returns:
            float32 [B, D] on the device of every rank.
        """
        world = self.world
        (((rows,), weight),) = self._micro_batches((tokens,), None)
        with autocast(self.config.precision, world.device):
            pooled = self._module(partial(_pooled, layer=layer), rows)[: weight * len(rows)]
        whole: Tensor = pooled.new_zeros(len(tokens), pooled.shape[1])
        whole.tensor_split(world.size)[world.rank].copy_(pooled)
        return world.all_reduce_sum(whole)

    def evaluation_batch_size(self) -> int:
        """Return four micro-batches per rank in images: nothing is kept for a backward pass."""
        rows = -(-self.config.batch_size // self.world.size)
        return 4 * min(self.config.micro_batch_size or rows, rows) * self.world.size

    def weights(self) -> dict[str, Tensor] | None:
        """Return the whole weights of a sharded model on the CPU; None if it is not sharded.

        All ranks must call it; only the main rank gets the weights, the others an empty dict.
        """
        if self.config.shard == 1:
            return None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        tensors: dict[str, Any] = get_model_state_dict(self.model, options=options)
        return tensors

    def _micro_batches(self, batch: Batch, size: int | None) -> list[tuple[Batch, int]]:
        """Return this rank's micro-batches with their weights, equally many on every rank.

        Every rank must take part in every collective operation: a rank with too few rows gets one
        row of weight 0.
        """
        rows = -(-len(batch[0]) // self.world.size)
        number = -(-rows // (size or rows))
        parts = [self.world.local_rows(tensor).tensor_split(number) for tensor in batch]
        padding = tuple(tensor[:1].to(self.world.device) for tensor in batch)
        return [
            (tensors, 1) if len(tensors[0]) else (padding, 0)
            for tensors in zip(*parts, strict=True)
        ]


def _pooled(model: ImageGPT, tokens: Tensor, layer: int) -> Tensor:
    """Return the features of a layer like `ImageGPT.features`, but of a sharded model too."""
    x, first = model.embed(tokens), None
    for block in model.h[:layer]:
        x, first = block(x, first)
    block = model.h[layer]
    assert isinstance(block, Block)
    if isinstance(block, FSDPModule):  # its weights are gathered only while the whole block runs
        block.unshard()
    pooled = block.ln_1(x).float().mean(dim=1)
    if isinstance(block, FSDPModule):
        block.reshard()
    return pooled  # type: ignore[no-any-return]
