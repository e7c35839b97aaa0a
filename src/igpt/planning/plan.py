"""What a run needs, told before a GPU is rented: memory, arithmetic, time, and the settings that fit."""

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal, get_args

from pydantic import Field

from igpt.errors import InputError, suggest
from igpt.model.config import ModelConfig, ShapeConfig
from igpt.model.cost import block_flops, count_parameters, training_flops
from igpt.training.memory import Memory, peak_memory
from igpt.training.optimizer import OptimizerName
from igpt.training.settings import MOST, Recomputation, TrainConfig

_GIB = 2**30
_ENOUGH = 4096  # places of a micro-batch from which on products hardly run faster
_MANY = 64  # divisors; batches of some thousand images have fewer
_NODE = 8  # GPUs of a machine, at most
_OVERRIDING = {
    "resolution",
    "n_layer",
    "n_embd",
    "n_head",
    "objective",
    "optimizer",
    "batch_size",
    "steps",
}


@dataclass(frozen=True)
class Kind:
    """A kind of GPU by its datasheet: GiB, and TFLOP/s of dense products, bf16 summed in fp32, fp32 without TF32."""

    memory: float
    bf16: float
    fp32: float

    @property
    def usable(self) -> float:
        """GiB for tensors: less a reserve for the CUDA context, NCCL, fragments, and what driver and ECC take."""
        return 0.94 * self.memory - 1.5


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


class PlanConfig(ShapeConfig):
    """What is to be trained, and on what."""

    resolution: int = Field(32, ge=1, le=MOST, description="image side in pixels")
    n_colors: int = Field(512, ge=1, le=MOST, description="palette size")
    optimizer: OptimizerName = Field("adamw", description="as `igpt pretrain` has it")
    batch_size: int = Field(128, ge=1, le=MOST, description="images of an update, over all GPUs")
    steps: int = Field(1_000_000, ge=1, le=MOST, description="updates")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="of products")
    gpus: int = Field(1, ge=1, le=MOST, description="number of GPUs")
    gpu: str = Field("H100", description=f"their kind: {', '.join(KINDS)}")
    gpu_memory: float | None = Field(
        None, gt=0, le=1e9, description="GiB of a GPU, in place of the kind's"
    )
    gpu_tflops: float | None = Field(
        None, gt=0, le=1e9, description="peak TFLOP/s, in place of the kind's"
    )
    shard: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="GPUs that share one copy of the weights; default: what fits",
    )
    micro_batch_size: int | None = Field(
        None, ge=1, le=MOST, description="images at a time on a GPU; default: what fits"
    )
    activation_checkpointing: Recomputation | None = Field(
        None, description="what the backward pass computes again; default: what fits"
    )
    efficiency: float = Field(
        0.4, gt=0, le=1, description="share of the GPU's peak that training reaches"
    )

    @property
    def model(self) -> ModelConfig:
        """The model's configuration."""
        shared = ModelConfig.model_fields.keys() & type(self).model_fields.keys()
        return ModelConfig.layered(
            {name: getattr(self, name) for name in shared}, where="the model"
        )

    @property
    def kind(self) -> Kind:
        """The GPU.

        Raises:
            InputError: none of that name is known; the nearest is named.
        """
        name = self.gpu.upper().replace("_", "-")
        if name not in KINDS:
            near = f"{suggest(name, KINDS)} (or give --gpu-memory and --gpu-tflops)"
            raise InputError(f"no GPU {self.gpu!r} is known; {near}")
        known = KINDS[name]
        tflops = self.gpu_tflops
        return Kind(self.gpu_memory or known.memory, tflops or known.bf16, tflops or known.fp32)

    @property
    def rows(self) -> int:
        """Images of an update on one GPU."""
        return -(-self.batch_size // self.gpus)

    def training(
        self, shard: int, micro_batch_size: int, recomputation: Recomputation
    ) -> TrainConfig:
        """Settings of a run that is laid out so."""
        return TrainConfig(
            batch_size=self.batch_size,
            micro_batch_size=micro_batch_size if micro_batch_size < self.rows else None,
            steps=self.steps,
            optimizer=self.optimizer,
            precision=self.precision,
            shard=shard,
            activation_checkpointing=recomputation,
        )


@dataclass(frozen=True)
class Plan:
    """What was found.

    Attributes:
        training: the first layout that fits; if none does, the one that needs least.
        memory: on a GPU, with each kind of activation checkpointing.
        remedy: what would fit, if nothing does.
    """

    settings: PlanConfig
    training: TrainConfig
    memory: Mapping[Recomputation, Memory]
    remedy: str | None

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of all updates; the blocks' second forward pass, if there is one, is counted."""
        config, kind = self.settings.model, self.settings.kind
        again = (
            config.n_layer
            * block_flops(config)
            * (self.training.activation_checkpointing == "full")
        )
        flops = (training_flops(config) + again) * self.settings.batch_size * self.settings.steps
        peak = kind.bf16 if self.settings.precision == "bf16" else kind.fp32
        return flops / (self.settings.efficiency * peak * 1e12) / 3600

    @property
    def days(self) -> float:
        """Days from start to end, validations and checkpoints apart."""
        return self.gpu_hours / self.settings.gpus / 24

    @property
    def layout(self) -> dict[str, Any]:
        """The settings of `igpt pretrain` that lay the run out on its GPUs, but for those at their defaults."""
        names = ("micro_batch_size", "shard", "activation_checkpointing")
        chosen = {name: getattr(self.training, name) for name in names}
        return {
            name: value
            for name, value in chosen.items()
            if value != TrainConfig.model_fields[name].default
        }

    def command(self, preset: str, given: Mapping[str, Any]) -> str:
        """The command line that runs it: `given` are the settings that override the preset's."""
        settings, gpus = self.settings, self.settings.gpus
        node = max(size for size in range(1, _NODE + 1) if gpus % size == 0)
        nodes = (
            f"--nnodes {gpus // node} --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
            if gpus > node
            else ""
        )
        launch = f"torchrun {nodes}--nproc-per-node {node} -m igpt" if gpus > 1 else "igpt"
        overriding = {name: value for name, value in given.items() if name in _OVERRIDING}
        flags = _flags({**overriding, "precision": settings.precision, **self.layout})
        return f"{launch} pretrain TOKENS --model {preset} -o RUN {flags}"

    def to_json(self) -> dict[str, Any]:
        """All of it in plain types; memory in bytes, but a GPU's own in GiB."""
        settings = self.settings
        return {
            "settings": settings.model_dump(mode="json"),
            "parameters": count_parameters(settings.model),
            "training_flops_per_image": training_flops(settings.model),
            "gpu": {**asdict(settings.kind), "usable": settings.kind.usable},
            "fits": self.remedy is None,
            "remedy": self.remedy,
            "shard": self.training.shard,
            "micro_batch_size": self.training.micro_batch_size or settings.rows,
            "activation_checkpointing": self.training.activation_checkpointing,
            "memory": {
                name: {**asdict(memory), "total": memory.total}
                for name, memory in self.memory.items()
            },
            "gpu_hours": self.gpu_hours,
            "days": self.days,
        }

    def lines(self, preset: str, given: Mapping[str, Any]) -> Iterator[str]:
        """A report for people, with the command line that runs it."""
        settings, training = self.settings, self.training
        config, kind, name = settings.model, settings.kind, settings.gpu.upper()
        yield (
            f"{preset} at {config.resolution} px: {count_parameters(config) / 1e6:,.1f} M parameters, "
            f"{training_flops(config) / 1e9:,.0f} GFLOP an image"
        )
        yield (
            f"{settings.gpus} x {name}, batches of {settings.batch_size}: {settings.rows} images a GPU, "
            f"{training.micro_batch_size or settings.rows} at a time, "
            f"{f'weights shared by {training.shard}' if training.shard > 1 else 'all weights on each'}"
        )
        chosen = training.activation_checkpointing
        columns = self.memory.values()
        yield ""
        yield _row("GiB a GPU", [f"{'* ' * (name == chosen)}{name}" for name in self.memory])
        for part in self.memory[chosen].parts:
            yield _row(
                part.replace("_", " "), [f"{memory.parts[part] / _GIB:.2f}" for memory in columns]
            )
        yield _row("sum", [f"{memory.total / _GIB:.2f}" for memory in columns])
        yield f"* this activation checkpointing; most is needed at: {self.memory[chosen].moment}"
        yield f"{kind.usable:.1f} of {kind.memory:g} GiB are counted on; the rest is for context, NCCL and fragments"
        yield ""
        took = f"{_number(self.gpu_hours)} GPU-hours, {_number(self.days)} days"
        yield f"{settings.steps:,} updates at {settings.efficiency:.0%} of the peak: {took}"
        yield f"this does not fit: {self.remedy}" if self.remedy else self.command(preset, given)


def _row(name: str, cells: list[str]) -> str:
    return f"{name:15}" + "".join(f"{cell:>13}" for cell in cells)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _flags(values: Mapping[str, Any]) -> str:
    return shlex.join(
        word
        for name, value in values.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    )


def layouts(settings: PlanConfig) -> Iterator[TrainConfig]:
    """All ways to lay a run out that the settings leave open, the best first.

    Micro-batches that keep a GPU busy come before smaller ones; among them, layouts that compute no
    block twice (a third more arithmetic) before those that do; among them, the least sharding, then
    the least to compute again, then the largest micro-batch. Micro-batches divide a GPU's images,
    and powers of two are preferred.

    Raises:
        InputError: GPUs, batch, sharding and micro-batches do not go together.
    """
    gpus, rows = settings.gpus, settings.rows
    if gpus > settings.batch_size:
        raise InputError(
            f"{gpus} GPUs for batches of {settings.batch_size} images: at most one GPU an image"
        )
    if settings.shard and gpus % settings.shard:
        raise InputError(
            f"--shard {settings.shard} does not divide {gpus} GPUs; take a divisor of it"
        )
    if settings.micro_batch_size and settings.micro_batch_size > rows:
        raise InputError(
            f"--micro-batch-size {settings.micro_batch_size} is more than the {rows} images of a GPU"
        )
    divisors = _divisors(rows)[::-1]
    twos = [size for size in divisors if size & (size - 1) == 0]
    # 4 is taken for 6, but not 1 for 5
    sizes = [
        size for size in divisors if size == rows or not any(two < size < 2 * two for two in twos)
    ]
    sizes = [settings.micro_batch_size] if settings.micro_batch_size else _few(sizes)
    busy = [size for size in sizes if size * settings.model.n_pixels >= _ENOUGH or size == sizes[0]]
    given = settings.activation_checkpointing
    recomputations: tuple[Recomputation, ...] = (given,) if given else get_args(Recomputation)
    shards = [settings.shard] if settings.shard else _few(_divisors(gpus))
    for some in (busy, sizes[len(busy) :]):
        for twice in (False, True):
            again = [
                recomputation
                for recomputation in recomputations
                if (recomputation == "full") == twice
            ]
            yield from (
                settings.training(shard, size, one)
                for shard, one, size in product(shards, again, some)
            )


def _divisors(number: int) -> list[int]:
    """Return all divisors, the smallest first."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return small + [number // size for size in reversed(small) if size * size != number]


def _few(sizes: list[int]) -> list[int]:
    """Return the sizes, but of very many one for every power of two: the first."""
    if len(sizes) <= _MANY:
        return sizes
    first = {size.bit_length(): size for size in reversed(sizes)}
    return [size for size in sizes if first[size.bit_length()] == size]


def _fitting(settings: PlanConfig) -> TrainConfig | None:
    usable = settings.kind.usable * _GIB
    weights = 4 * count_parameters(settings.model) / (settings.shard or settings.gpus)
    if weights > usable:  # no layout can change that
        return None
    found = (one for one in layouts(settings) if _total(settings, one) <= usable)
    return next(found, None)


def _total(settings: PlanConfig, training: TrainConfig) -> float:
    return peak_memory(settings.model, training, settings.gpus).total


def plan(settings: PlanConfig) -> Plan:
    """Plans a run.

    Raises:
        InputError: an unknown kind of GPU, or settings that do not go together.
    """
    fits = _fitting(settings)
    training = fits or min(layouts(settings), key=lambda one: _total(settings, one))
    memory: dict[Recomputation, Memory] = {}
    for name in get_args(Recomputation):
        other = training.model_copy(update={"activation_checkpointing": name})
        memory[name] = peak_memory(settings.model, other, settings.gpus)
    return Plan(settings, training, memory, None if fits else _remedy(settings))


def _remedy(settings: PlanConfig) -> str:
    """What would fit where nothing does: leaving more open, more GPUs, or larger ones."""
    freed = settings.model_copy(
        update={"shard": None, "micro_batch_size": None, "activation_checkpointing": None}
    )
    tried = [(freed, "with other settings")]
    gpus = settings.gpus
    while (gpus := 2 * gpus) <= settings.batch_size:
        tried.append((freed.model_copy(update={"gpus": gpus}), f"on {gpus} GPUs"))
    for name in sorted(KINDS, key=lambda name: KINDS[name].memory):
        tried.append(
            (freed.model_copy(update={"gpu": name, "gpu_memory": None}), f"with --gpu {name}")
        )
    for other, words in tried:
        if (training := _fitting(other)) is not None:
            return f"it would {words}: {_flags(Plan(other, training, {}, None).layout) or 'the default ones'}"
    return "it needs more and larger GPUs"
