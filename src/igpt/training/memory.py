"""Estimate the memory of training on one GPU, by part, from the settings alone.

The estimate counts the tensors that `Engine` keeps alive, operation by operation, at the moments
when there are most of them; compiled blocks keep no more. Workspace of kernels and fragmentation
come on top. `benchmarks/plan.py` compares it with measurements. It covers the paper's model, not
the variants. All numbers are bytes. t tokens of a micro-batch, D width, V colours, L layers, H
heads; c bytes of a number in matrix products.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from igpt.environment import memory_limit
from igpt.errors import InputError
from igpt.model.config import ModelConfig
from igpt.model.cost import block_parameters, count_parameters, root_parameters
from igpt.training.distributed import World
from igpt.training.settings import TrainConfig

# Micro-batches that are validated at a time, see `Engine.evaluation_batch_size`.
_VALIDATED = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU by part, at one moment of a step.

    Attributes:
        weight_copies: bf16 copies of autocast, or weights gathered by FSDP.
        activations: kept for the backward pass.
        temporaries: logits, losses and their gradients, or gradients within a block.
    """

    moment: str
    weights: float
    optimizer: float
    gradients: float
    weight_copies: float
    activations: float
    temporaries: float

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by part."""
        return {name: value for name, value in vars(self).items() if name != "moment"}

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(self.parts.values())


def state_bytes(config: ModelConfig, settings: TrainConfig, frozen: int = 0) -> int:
    """Return the bytes of weights, gradients and optimizer state, before sharding.

    Args:
        frozen: number of parameters that are not trained.
    """
    parameters = count_parameters(config)
    # Muon keeps one moment, not two.
    muon = 12 * config.n_embd**2 * config.n_layer * (settings.optimizer == "muon")
    return 4 * parameters + 12 * (parameters - frozen) - 4 * muon


def require_memory(
    config: ModelConfig, settings: TrainConfig, world: World, frozen: int = 0
) -> None:
    """Raise if a model or a batch cannot fit into memory, before it is created.

    The estimate is a lower bound: weights, gradients and optimizer state, the tokens of a batch,
    and half of the activations by `kept_by_block`, because compiled blocks may keep fewer.

    Raises:
        InputError: the estimate exceeds the memory of the machine or the GPU; both are named.
    """
    on_gpu = world.device.type == "cuda"
    limit = (
        torch.cuda.get_device_properties(world.device).total_memory if on_gpu else memory_limit()
    )
    if limit is None:
        return
    ranks, machine = (1, "a GPU here") if on_gpu else (world.local_size, "this machine")
    rows = -(-settings.batch_size // world.size)
    micro = min(settings.micro_batch_size or rows, rows)
    state = ranks * state_bytes(config, settings, frozen) // settings.shard
    tokens = ranks * 8 * settings.batch_size * config.n_pixels
    # At the end of a forward pass there are no gradients yet.
    gradients = 4 * ranks * (count_parameters(config) - frozen) // settings.shard
    kept = ranks * config.n_layer * kept_by_block(config, settings, micro * config.n_pixels) // 2
    forward = state - gradients + tokens + kept
    has = f"{machine} has {_readable(limit)}"
    together = f" for the {ranks} ranks on this machine" if ranks > 1 else ""
    if state > limit:
        raise InputError(
            f"the model ({count_parameters(config):,} parameters) needs at least "
            f"{_readable(state)} for weights, gradients and optimizer state{together}, and {has}; "
            "choose a smaller model, or share it with --shard"
        )
    if state + tokens > limit:
        raise InputError(
            f"a batch of {settings.batch_size:,} images needs at least "
            f"{_readable(state + tokens)} with the model{together}, and {has}; lower --batch-size"
        )
    if forward > limit:
        advice = (
            "lower --micro-batch-size"
            if micro > 1
            else "choose a smaller model or --activation-checkpointing full"
        )
        raise InputError(
            f"{micro:,} images at a time need at least {_readable(forward)}{together}, and {has}; "
            f"{advice}"
        )


def _readable(count: int) -> str:
    """Return a number of bytes in GiB, or in a larger unit if there are more than 1,024."""
    value, units = count / 2**30, ["GiB", "TiB", "PiB", "EiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:,.1f} {units[0]}"


def kept_by_block(config: ModelConfig, settings: TrainConfig, t: int) -> int:
    """Return the bytes that a block keeps from its forward pass to its backward pass.

    Per token: with "none", the inputs of both norms in fp32 (2 D); in the type of the products, the
    outputs of the norms (2 D), queries, keys and values (3 D), the output of attention (D), and the
    hidden layer of the MLP before and after its activation (8 D); one sum per head and per norm.
    With "selective", the input of the block, and the outputs of products and attention (10 D). With
    "full", the input of the block.
    """
    c, unit = _bytes(settings), t * config.n_embd
    return {
        "none": (8 + 14 * c) * unit + (4 * config.n_head + 8) * t,
        "selective": (4 + 10 * c) * unit + 4 * config.n_head * t,
        "full": 4 * unit,
    }[settings.activation_checkpointing]


def _bytes(settings: TrainConfig) -> int:
    return 4 if settings.precision == "fp32" else 2


def peak_memory(config: ModelConfig, settings: TrainConfig, ranks: int) -> Memory:
    """Return the peak memory on one of `ranks` GPUs, over a step and validation."""
    return max(_moments(config, settings, ranks), key=lambda memory: memory.total)


def _moments(config: ModelConfig, settings: TrainConfig, ranks: int) -> Iterator[Memory]:
    """Yield the moments that can be the peak; which one is depends on the shape."""
    rows = -(-settings.batch_size // ranks)
    micro = min(settings.micro_batch_size or rows, rows)
    recomputation, shard, c = settings.activation_checkpointing, settings.shard, _bytes(settings)
    width, layers, head = config.n_embd, config.n_layer, config.n_colors * config.n_embd
    block, root = block_parameters(config), root_parameters(config)
    t = micro * config.n_pixels
    unit = t * width

    kept = kept_by_block(config, settings, t)
    whole = kept_by_block(
        config, settings.model_copy(update={"activation_checkpointing": "none"}), t
    )
    end = (4 + c) * unit + 4 * t  # input and output of the final norm

    sharded, half = shard > 1, c == 2
    cast, head_cast = 24 * width**2 * (half and not sharded), 2 * head * half
    gathered, gathered_root = c * block * sharded, 4 * root * sharded
    # DDP keeps its buckets, and the gradients of earlier micro-batches next to them until both are
    # summed. With FSDP, sharded gradients grow block by block and stay between micro-batches. On
    # one GPU, gradients appear during the backward pass.
    accumulates, replicated = micro < rows, ranks > 1 and not sharded
    weights = 4 * count_parameters(config) / shard
    buckets, earlier = weights * replicated, weights * accumulates
    resting = buckets + earlier
    muon = 12 * width**2 * layers * (settings.optimizer == "muon")
    moments = 2 * weights - 4 * muon / shard

    def at(
        moment: str, gradients: float, copies: float, activations: float, temporaries: float
    ) -> Memory:
        return Memory(moment, weights, moments, gradients, copies, activations, temporaries)

    if (
        recomputation != "none"
    ):  # activations that are not kept exist for a moment, next to all casts
        copies = layers * cast + gathered_root + gathered
        inside = (4 + (8 if recomputation == "selective" else 9) * c) * unit
        yield at("forward pass of the last block", resting, copies, layers * kept, inside)
    # Logits in fp32 and their log-softmax; then the latter, its gradient, and that of the logits.
    copies = head_cast + gathered_root
    yield at("loss", resting, layers * cast + copies, layers * kept + end, 8 * config.n_colors * t)
    copies += layers * cast * (recomputation == "none")
    yield at(
        "backward pass of the loss", resting, copies, layers * kept + end, 12 * config.n_colors * t
    )

    # Between these blocks everything grows or falls linearly.
    ends = {number for number in (layers, layers - 1, 2, 1) if 1 <= number <= layers}
    for number in sorted(ends):
        coming = 4 * block * (layers - number) / shard
        gradients = resting - coming * bool(buckets and earlier) if resting else coming
        gradients += 4 * head * (sharded or not resting)
        copies = (
            cast * (number if recomputation == "none" else 1)
            + gathered_root
            + gathered * min(number, 2)
        )
        activations = (number - 1) * kept + whole + c * unit * (recomputation == "selective")
        # Gradients of the residual, of its cast, of the hidden layer of the MLP, and of its second
        # matrix.
        temporaries = (4 + c * half + 4 * c) * unit + 4 * c * width**2
        # Gradients in fp32 being reduced: of the next block, or the root of the last micro-batch.
        if sharded:
            temporaries += 4 * block if number < layers else 4 * root * accumulates
        yield at(
            f"backward pass of block {number} of {layers}",
            gradients,
            copies,
            activations,
            temporaries,
        )

    copies = layers * cast + head_cast + gathered_root + 2 * gathered
    inside = _VALIDATED * max((8 + 9 * c) * unit, 8 * config.n_colors * t)
    yield at("validation", buckets, copies, 0, inside)
