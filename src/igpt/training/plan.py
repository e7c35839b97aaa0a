"""What a run needs, told before a GPU is rented: memory by part, arithmetic, time, and the settings that fit.

Memory is that of the tensors which `Engine` keeps alive in an update on one GPU, operation by operation, at the moments
when they are most; compiled blocks need less. `benchmarks/plan.py` compares it with what is measured.
t places of a micro-batch, D width, V colours, L layers, H heads; c bytes of a number that products are computed in.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import Field

from igpt.config import Config
from igpt.errors import InputError, suggest
from igpt.model.cost import block_flops, block_parameters, count_parameters, root_parameters, training_flops
from igpt.model.transformer import ModelConfig, Objective
from igpt.training.optimizer import OptimizerName
from igpt.training.settings import Recomputation

GIB = 2**30
_ENOUGH = 4096  # places of a micro-batch from which on a GPU's products hardly gain from more
_VALIDATED = 4  # times a micro-batch are validated at a time
_NODE = 8  # GPUs of a machine


@dataclass(frozen=True)
class Kind:
    """A kind of GPU by its datasheet: memory, and the peak of dense products (fp32: without tensor cores, no TF32)."""

    memory: float  # GiB
    bf16: float  # TFLOP/s, summed in fp32
    fp32: float

    @property
    def usable(self) -> float:
        """GiB for tensors: less a reserve for the CUDA context, NCCL, fragments, and what the driver and ECC take."""
        return self.memory - 1.5 - 0.06 * self.memory


KINDS: Mapping[str, Kind] = {
    "B200": Kind(180, 2250, 75),
    "H200": Kind(141, 989, 67),
    "H100": Kind(80, 989, 67),
    "H100-NVL": Kind(94, 835, 60),
    "H100-PCIE": Kind(80, 756, 51),
    "A100-80": Kind(80, 312, 19.5),
    "A100-40": Kind(40, 312, 19.5),
    "L40S": Kind(48, 362, 91.6),
    "A6000": Kind(48, 154.8, 38.7),
    "L4": Kind(24, 121, 30.3),
    "A10": Kind(24, 125, 31.2),
    "RTX-5090": Kind(32, 209.5, 104.8),
    "RTX-4090": Kind(24, 165.2, 82.6),
    "RTX-3090": Kind(24, 71, 35.6),
}


class PlanConfig(Config):
    """What is to be trained, and on what."""

    resolution: int = Field(32, ge=1, description="image side in pixels")
    n_colors: int = Field(512, ge=1, description="palette size")
    n_layer: int = Field(24, ge=1, description="blocks")
    n_embd: int = Field(512, ge=1, description="width")
    n_head: int = Field(8, ge=1, description="attention heads")
    objective: Objective = Field("autoregressive", description="next pixel, or masked pixels")
    optimizer: OptimizerName = Field("adamw", description="as `igpt pretrain` has them")
    batch_size: int = Field(128, ge=1, description="images of an update, over all GPUs")
    steps: int = Field(1_000_000, ge=1, description="updates")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="of products")
    gpus: int = Field(1, ge=1, description="number of GPUs")
    gpu: str = Field("H100", description=f"their kind: {', '.join(KINDS)}")
    gpu_memory: float | None = Field(None, gt=0, description="GiB of a GPU, in place of the kind's")
    gpu_tflops: float | None = Field(None, gt=0, description="TFLOP/s of its products, in place of the kind's")
    shard: int | None = Field(None, ge=1, description="GPUs that share one copy of the weights; the least that fits")
    micro_batch_size: int | None = Field(None, ge=1, description="images at a time on a GPU; the most that fit")
    activation_checkpointing: Recomputation | None = Field(
        None, description="what the backward pass computes again; the least that fits"
    )
    efficiency: float = Field(0.4, gt=0, le=1, description="share of the GPU's peak that training reaches")

    @property
    def model(self) -> ModelConfig:
        """The model's configuration."""
        shape = {name: getattr(self, name) for name in ModelConfig.model_fields if name in type(self).model_fields}
        return ModelConfig.layered(shape, where="the model")

    @property
    def kind(self) -> Kind:
        """The GPU.

        Raises:
            InputError: none of that name is known; the nearest is named.
        """
        name = self.gpu.upper().replace("_", "-").replace(" ", "-")
        if name not in KINDS:
            hint = f"{suggest(name, KINDS)}, or give any with --gpu-memory and --gpu-tflops"
            raise InputError(f"no GPU {self.gpu!r} is known; {hint}")
        known = KINDS[name]
        peak = (self.gpu_tflops,) * 2 if self.gpu_tflops else (known.bf16, known.fp32)
        return Kind(self.gpu_memory or known.memory, *peak)

    @property
    def share(self) -> int:
        """Images of an update on one GPU."""
        return -(-self.batch_size // self.gpus)


@dataclass(frozen=True)
class Setup:
    """How a run is laid out on its GPUs."""

    shard: int
    micro_batch_size: int
    activation_checkpointing: Recomputation


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU by part, at the moment of an update when there are most."""

    moment: str
    weights: float
    optimizer: float
    gradients: float
    weight_copies: float  # autocast's bf16 casts, or what FSDP has gathered
    activations: float  # kept for the backward pass
    temporaries: float  # logits, their losses and gradients, or those of the block at hand

    @property
    def parts(self) -> dict[str, float]:
        """The parts by name."""
        return {name: value for name, value in vars(self).items() if name != "moment"}

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(self.parts.values())


def peak_memory(settings: PlanConfig, setup: Setup) -> Memory:
    """The memory of an update, or of the validation after it, at the moment that needs most."""
    return max(_moments(settings, setup), key=lambda memory: memory.total)


def _moments(settings: PlanConfig, setup: Setup) -> Iterator[Memory]:
    """The moments that can be the worst; which one is depends on the shape.

    A block keeps for its backward pass, in numbers of a place and a width: two residuals in fp32 (the norms' inputs),
    two norms' outputs, queries, keys and values, attention's output, and four each of the MLP's inside before and after
    the activation; besides, fp32 sums of attention and norms. "selective" keeps the products' and attention's outputs
    (queries, keys, values, attention, two residual branches, the MLP's inside) and the block's input.
    """
    config, recomputation = settings.model, setup.activation_checkpointing
    width, layers = config.n_embd, config.n_layer
    t, c = setup.micro_batch_size * config.n_places, 2 if settings.precision == "bf16" else 4
    unit = t * width
    whole = (8 + 14 * c) * unit + (4 * config.n_head + 8) * t
    kept = {"none": whole, "selective": (4 + 10 * c) * unit + 4 * config.n_head * t, "full": 4 * unit}[recomputation]
    end = (4 + c) * unit + 4 * t  # the final norm's input and output

    sharded, half = setup.shard > 1, c == 2
    block, root = block_parameters(config), root_parameters(config)
    everything, head = count_parameters(config), config.n_colors * width
    cast, head_cast = 24 * width**2 * (half and not sharded), 2 * head * half
    gathered, gathered_root = c * block * sharded, 4 * root * sharded
    accumulates = setup.micro_batch_size < settings.share
    # DDP's buckets never go; FSDP's shards grow block by block; without either, gradients come as the backward pass goes.
    always = accumulates or (settings.gpus > 1 and not sharded)
    orthogonalised = 12 * width**2 * layers if settings.optimizer == "muon" else 0
    fixed = (4 * everything / setup.shard, (8 * everything - 4 * orthogonalised) / setup.shard)
    resting = 4 * everything / setup.shard * always

    def at(moment: str, gradients: float, copies: float, activations: float, temporaries: float) -> Memory:
        return Memory(moment, *fixed, gradients, copies, activations, temporaries)

    if recomputation != "none":  # what is not kept is there for a moment, while all casts are held
        inside = (4 + (8 if recomputation == "selective" else 9) * c) * unit
        yield at(
            "forward pass of the last block", resting, layers * cast + gathered_root + gathered, layers * kept, inside
        )
    # Logits in fp32 and their log-softmax; then this, its gradient, and the logits' gradient.
    copies = head_cast + gathered_root
    yield at("loss", resting, layers * cast + copies, layers * kept + end, 8 * config.n_colors * t)
    held = layers * cast * (recomputation == "none") + copies
    yield at("backward pass of the loss", resting, held, layers * kept + end, 12 * config.n_colors * t)
    for number in sorted({layers, max(1, layers - 1), 1}):
        # The residual's gradient, its cast, the gradient inside the MLP and that of its second matrix.
        temporaries = (4 + c * half + 4 * c) * unit + 4 * c * width**2
        if (
            sharded
        ):  # fp32 sums on their way to their owners: of the block after this, or of the last micro-batch's root
            temporaries += 4 * block if number < layers else 4 * root * accumulates
        gradients = resting or 4 * block * (layers - number) / setup.shard
        gradients += 4 * head * (sharded or not always)
        held = cast * (number if recomputation == "none" else 1) + gathered_root + gathered * min(number, 2)
        activations = (number - 1) * kept + whole + c * unit * (recomputation == "selective")
        yield at(f"backward pass of block {number}", gradients, held, activations, temporaries)
    held = layers * cast + head_cast + gathered_root + 2 * gathered
    inside = _VALIDATED * (8 + 9 * c) * unit
    yield at("validation", resting * (not sharded and settings.gpus > 1), held, 0, inside)
