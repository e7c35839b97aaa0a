"""Estimate the memory and time of a training run, and find settings that fit into the GPUs."""

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
_BUSY_TOKENS = 4096  # tokens of a micro-batch above which matrix products hardly get faster
_MAX_SIZES = 64  # divisors to try; batches of some thousand images have fewer
_GPUS_PER_NODE = 8  # at most
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
    """A kind of GPU, by its datasheet.

    Attributes:
        memory: in GiB.
        bf16: TFLOP/s of dense bf16 products with fp32 accumulation.
        fp32: TFLOP/s without TF32.
    """

    memory: float
    bf16: float
    fp32: float

    @property
    def usable(self) -> float:
        """GiB for tensors, after a reserve for CUDA, NCCL, fragmentation, driver and ECC."""
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
    """The model to train, and the GPUs to train it on."""

    resolution: int = Field(32, ge=1, le=MOST, description="image side in pixels")
    n_colors: int = Field(512, ge=1, le=MOST, description="palette size")
    optimizer: OptimizerName = Field("adamw", description="optimizer: see `igpt pretrain`")
    batch_size: int = Field(128, ge=1, le=MOST, description="images per step, over all GPUs")
    steps: int = Field(1_000_000, ge=1, le=MOST, description="optimizer steps")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="precision of matrix products")
    gpus: int = Field(1, ge=1, le=MOST, description="number of GPUs")
    gpu: str = Field("H100", description=f"kind of GPU: {', '.join(KINDS)}")
    gpu_memory: float | None = Field(
        None, gt=0, le=1e9, description="memory per GPU in GiB; default: that of the kind"
    )
    gpu_tflops: float | None = Field(
        None, gt=0, le=1e9, description="peak TFLOP/s; default: that of the kind"
    )
    shard: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="GPUs that share one copy of the weights; default: what fits",
    )
    micro_batch_size: int | None = Field(
        None, ge=1, le=MOST, description="images per forward pass on a GPU; default: what fits"
    )
    activation_checkpointing: Recomputation | None = Field(
        None, description="what the backward pass recomputes; default: what fits"
    )
    efficiency: float = Field(
        0.4, gt=0, le=1, description="fraction of the peak FLOP/s that training reaches"
    )

    @property
    def model(self) -> ModelConfig:
        """Configuration of the model."""
        shared = ModelConfig.model_fields.keys() & type(self).model_fields.keys()
        return ModelConfig.layered(
            {name: getattr(self, name) for name in shared}, where="the model"
        )

    @property
    def kind(self) -> Kind:
        """Kind of the GPUs, with the overrides of the settings.

        Raises:
            InputError: no such kind is known; the nearest is named.
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
        """Images per step on one GPU."""
        return -(-self.batch_size // self.gpus)

    def training(
        self, shard: int, micro_batch_size: int, recomputation: Recomputation
    ) -> TrainConfig:
        """Return the training settings of a layout."""
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
    """A layout of a run, with its memory and time.

    Attributes:
        training: the best layout that fits; if none does, the one that needs the least memory.
        memory: per GPU, for each kind of activation checkpointing.
        remedy: a sentence on what would fit, if nothing does.
    """

    settings: PlanConfig
    training: TrainConfig
    memory: Mapping[Recomputation, Memory]
    remedy: str | None

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of all steps, with the second forward pass of full checkpointing."""
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
        """Days from start to end, without validations and checkpoints."""
        return self.gpu_hours / self.settings.gpus / 24

    @property
    def layout(self) -> dict[str, Any]:
        """Settings of the layout for `igpt pretrain`, without those at their defaults."""
        names = ("micro_batch_size", "shard", "activation_checkpointing")
        chosen = {name: getattr(self.training, name) for name in names}
        return {
            name: value
            for name, value in chosen.items()
            if value != TrainConfig.model_fields[name].default
        }

    def command(self, preset: str, given: Mapping[str, Any]) -> str:
        """Return the command line of the run; `given` are the settings that override the preset."""
        settings, gpus = self.settings, self.settings.gpus
        node = max(size for size in range(1, _GPUS_PER_NODE + 1) if gpus % size == 0)
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
        """Return the plan in plain types: memory in bytes, but that of the GPU in GiB."""
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
        """Yield the lines of a report, which ends with the command line of the run."""
        settings, training = self.settings, self.training
        config, kind, name = settings.model, settings.kind, settings.gpu.upper()
        yield (
            f"{preset} at {config.resolution} px: {count_parameters(config) / 1e6:,.1f} M "
            f"parameters, {training_flops(config) / 1e9:,.0f} GFLOP per image"
        )
        yield (
            f"{settings.gpus} x {name}, batches of {settings.batch_size}: {settings.rows} images "
            f"per GPU, {training.micro_batch_size or settings.rows} at a time, "
            + (
                f"weights sharded over {training.shard}"
                if training.shard > 1
                else "all weights on each"
            )
        )
        chosen = training.activation_checkpointing
        columns = self.memory.values()
        yield ""
        yield "GiB per GPU, for each kind of activation checkpointing"
        yield _row("", [f"{name} (selected)" if name == chosen else name for name in self.memory])
        for part in self.memory[chosen].parts:
            yield _row(
                part.replace("_", " "), [f"{memory.parts[part] / _GIB:.2f}" for memory in columns]
            )
        yield _row("sum", [f"{memory.total / _GIB:.2f}" for memory in columns])
        yield f"peak of the selected column at: {self.memory[chosen].moment}"
        yield (
            f"{kind.usable:.1f} of {kind.memory:g} GiB are usable; the rest is for context, NCCL "
            "and fragmentation"
        )
        yield ""
        took = f"{_number(self.gpu_hours)} GPU-hours, {_number(self.days)} days"
        yield f"{settings.steps:,} steps at {settings.efficiency:.0%} of peak FLOP/s: {took}"
        yield f"this does not fit: {self.remedy}" if self.remedy else self.command(preset, given)


def _row(name: str, cells: list[str]) -> str:
    return f"{name:15}" + "".join(f"{cell:>22}" for cell in cells)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _flags(values: Mapping[str, Any]) -> str:
    return shlex.join(
        word
        for name, value in values.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    )


def layouts(settings: PlanConfig) -> Iterator[TrainConfig]:
    """Yield all layouts that the settings leave open, the best first.

    Micro-batches that keep a GPU busy come before smaller ones. Among these, layouts that recompute
    whole blocks (a third more arithmetic) come last. Among these, the order is: least sharding,
    least recomputation, largest micro-batch. Micro-batches divide the images of a GPU; powers of
    two are preferred.

    Raises:
        InputError: GPUs, batch size, sharding and micro-batch size are incompatible.
    """
    gpus, rows = settings.gpus, settings.rows
    if gpus > settings.batch_size:
        raise InputError(
            f"{gpus} GPUs for batches of {settings.batch_size} images: at most one GPU per image"
        )
    if settings.shard and gpus % settings.shard:
        raise InputError(
            f"--shard {settings.shard} does not divide {gpus} GPUs; take a divisor of it"
        )
    if settings.micro_batch_size and settings.micro_batch_size > rows:
        raise InputError(
            f"--micro-batch-size {settings.micro_batch_size} is more than "
            f"the {rows} images of a GPU"
        )
    divisors = _divisors(rows)[::-1]
    twos = [size for size in divisors if size & (size - 1) == 0]
    # Leave out sizes with a power of two a little below: 4 replaces 6, but 1 does not replace 5.
    sizes = [
        size for size in divisors if size == rows or not any(two < size < 2 * two for two in twos)
    ]
    sizes = [settings.micro_batch_size] if settings.micro_batch_size else _few(sizes)
    busy = [
        size for size in sizes if size * settings.model.n_pixels >= _BUSY_TOKENS or size == sizes[0]
    ]
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
    """Return all divisors in ascending order."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return small + [number // size for size in reversed(small) if size * size != number]


def _few(sizes: list[int]) -> list[int]:
    """Return the sizes, or if there are very many, the first one above each power of two."""
    if len(sizes) <= _MAX_SIZES:
        return sizes
    first = {size.bit_length(): size for size in reversed(sizes)}
    return [size for size in sizes if first[size.bit_length()] == size]


def _fitting(settings: PlanConfig) -> TrainConfig | None:
    usable = settings.kind.usable * _GIB
    weights = 4 * count_parameters(settings.model) / (settings.shard or settings.gpus)
    if weights > usable:  # in every layout
        return None
    found = (one for one in layouts(settings) if _total(settings, one) <= usable)
    return next(found, None)


def _total(settings: PlanConfig, training: TrainConfig) -> float:
    return peak_memory(settings.model, training, settings.gpus).total


def plan(settings: PlanConfig) -> Plan:
    """Return the best layout of a run that fits, or the one closest to fitting.

    Raises:
        InputError: the kind of GPU is unknown, or settings are incompatible.
    """
    fits = _fitting(settings)
    training = fits or min(layouts(settings), key=lambda one: _total(settings, one))
    memory: dict[Recomputation, Memory] = {}
    for name in get_args(Recomputation):
        other = training.model_copy(update={"activation_checkpointing": name})
        memory[name] = peak_memory(settings.model, other, settings.gpus)
    return Plan(settings, training, memory, None if fits else _remedy(settings))


def _remedy(settings: PlanConfig) -> str:
    """Return what would fit: other settings, more GPUs, or larger ones."""
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
            flags = _flags(Plan(other, training, {}, None).layout)
            return f"it would {words}: {flags or 'the default ones'}"
    return "it needs more and larger GPUs"
