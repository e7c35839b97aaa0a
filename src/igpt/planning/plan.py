"""Estimate the memory and time of a training run, and find settings that fit into the GPUs."""

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal, get_args

import torch
from pydantic import Field

from igpt.config import flags
from igpt.environment import memory_limit
from igpt.errors import InputError, suggest
from igpt.model.config import ModelConfig, ShapeConfig
from igpt.model.cost import block_flops, count_parameters, training_flops
from igpt.model.precision import Precision, matmul_rate, resolve_precision
from igpt.progress import duration
from igpt.training.memory import Memory, peak_memory
from igpt.training.optimizer import OptimizerName
from igpt.training.pretrain import PretrainConfig
from igpt.training.settings import MOST, Recomputation, TrainConfig

CPU = "cpu"  # in place of a kind of GPU: the processor of this machine
# Fractions of the peak FLOP/s that training reaches: of data sheets, and of a measured product on a
# CPU (0.35 to 0.49 in runs of width 128 or more, 0.12 to 0.25 at width 64).
_EFFICIENCY, _EFFICIENCY_ON_CPU = 0.4, 0.3
_MIB, _GIB = 2**20, 2**30
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
    """A kind of GPU, by its datasheet, or this machine's CPU, by measurement.

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
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="precision of matrix products; auto: bf16, on a CPU if it has instructions "
        "for it",
    )
    gpus: int = Field(1, ge=1, le=MOST, description="number of GPUs")
    gpu: str = Field(
        "H100",
        description=f"kind of GPU: {', '.join(KINDS)}; or {CPU}: this machine without a GPU, whose "
        "rate of matrix products is measured",
    )
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
    efficiency: float | None = Field(
        None,
        gt=0,
        le=1,
        description="fraction of the peak FLOP/s that training reaches; default: "
        f"{_EFFICIENCY} on GPUs, {_EFFICIENCY_ON_CPU} of the measured rate on a CPU",
    )

    @property
    def on_cpu(self) -> bool:
        """Whether training runs on this machine's CPU."""
        return self.gpu.lower() == CPU

    @property
    def reached(self) -> float:
        """`efficiency`, or its default."""
        return self.efficiency or (_EFFICIENCY_ON_CPU if self.on_cpu else _EFFICIENCY)

    @property
    def products(self) -> Precision:
        """`precision`, with "auto" resolved."""
        if self.precision == "auto" and not self.on_cpu:
            return "bf16"
        return resolve_precision(self.precision, torch.device(CPU))

    @property
    def peak(self) -> float:
        """Peak FLOP/s of a device in the precision of the products."""
        kind = self.kind
        return 1e12 * (kind.bf16 if self.products == "bf16" else kind.fp32)

    @property
    def model(self) -> ModelConfig:
        """Configuration of the model."""
        shared = ModelConfig.model_fields.keys() & type(self).model_fields.keys()
        return ModelConfig.layered(
            {name: getattr(self, name) for name in shared}, where="the model"
        )

    @property
    def kind(self) -> Kind:
        """Kind of the GPUs, or this machine's CPU, with the overrides of the settings.

        Raises:
            InputError: no such kind is known; the nearest is named.
        """
        tflops = self.gpu_tflops
        if self.on_cpu:
            rate = tflops or matmul_rate(self.products, torch.device(CPU)) / 1e12
            return Kind(self.gpu_memory or _memory_here(), rate, rate)
        name = self.gpu.upper().replace("_", "-")
        if name not in KINDS:
            near = f"{suggest(name, KINDS)} (or give --gpu-memory and --gpu-tflops)"
            raise InputError(f"no GPU {self.gpu!r} is known; {near}")
        known = KINDS[name]
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
            precision=self.products,
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
        """GPU-hours of all steps, with the second forward pass of full checkpointing.

        On a CPU, hours.
        """
        settings, config = self.settings, self.settings.model
        again = (
            config.n_layer
            * block_flops(config)
            * (self.training.activation_checkpointing == "full")
        )
        flops = (training_flops(config) + again) * settings.batch_size * settings.steps
        return flops / (settings.reached * settings.peak) / 3600

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
        device = {"device": CPU} if settings.on_cpu else {}
        chosen = {**overriding, "precision": settings.products, **device, **self.layout}
        words = shlex.join(flags(PretrainConfig, chosen, always=chosen))
        return f"{launch} pretrain TOKENS --model {preset} -o RUN {words}"

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
        config, kind, on_cpu = settings.model, settings.kind, settings.on_cpu
        yield (
            f"{preset} at {config.resolution} px: {count_parameters(config) / 1e6:,.1f} M "
            f"parameters, {_scaled(training_flops(config))}FLOP per image"
        )
        at_a_time = f"{training.micro_batch_size or settings.rows} at a time"
        if on_cpu:
            is_measured = "given" if settings.gpu_tflops else "measured now"
            yield (
                f"this CPU, {_scaled(settings.peak)}FLOP/s in {settings.products} ({is_measured}); "
                f"batches of {settings.batch_size}: {at_a_time}"
            )
        else:
            yield (
                f"{settings.gpus} x {settings.gpu.upper()}, batches of {settings.batch_size}: "
                f"{settings.rows} image{'s' * (settings.rows != 1)} per GPU, {at_a_time}, "
                + (
                    f"weights sharded over {training.shard}"
                    if training.shard > 1
                    else "all weights on each"
                )
            )
        chosen = training.activation_checkpointing
        columns = self.memory.values()
        name, unit = ("GiB", _GIB) if self.memory[chosen].total >= _GIB else ("MiB", _MIB)
        yield ""
        where = "" if on_cpu else " per GPU"
        yield f"{name}{where}, for each kind of activation checkpointing"
        yield _row("", [f"{name} (selected)" if name == chosen else name for name in self.memory])
        for part in self.memory[chosen].parts:
            yield _row(
                part.replace("_", " "), [f"{memory.parts[part] / unit:.2f}" for memory in columns]
            )
        yield _row("sum", [f"{memory.total / unit:.2f}" for memory in columns])
        yield f"peak of the selected column at: {self.memory[chosen].moment}"
        rest = "Python and other programs" if on_cpu else "context, NCCL and fragmentation"
        yield f"{kind.usable:.1f} of {kind.memory:.4g} GiB are usable; the rest is for {rest}"
        yield ""
        peak = "that rate" if on_cpu else "peak FLOP/s"
        seconds = self.days * 24 * 3600
        took = f"{self.days:,.0f} days" if self.days >= 100 else duration(max(1.0, seconds))
        if not on_cpu and self.gpu_hours >= 1:
            took += f", {_number(self.gpu_hours)} GPU-hours"
        yield (
            f"{settings.steps:,} steps at {settings.reached:.0%} of {peak}: about {took}, without "
            "validations"
        )
        yield f"this does not fit: {self.remedy}" if self.remedy else self.command(preset, given)


def _row(name: str, cells: list[str]) -> str:
    return f"{name:15}" + "".join(f"{cell:>22}" for cell in cells)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _scaled(value: float) -> str:
    """Return a number of FLOP with three digits and the prefix of its unit: 8.82 T, 543 G, 20 M."""
    scale, prefix = next((one for one in ((1e12, "T"), (1e9, "G")) if value >= one[0]), (1e6, "M"))
    return (
        f"{value / scale:,.0f} {prefix}"
        if value >= 100 * scale
        else f"{value / scale:.3g} {prefix}"
    )


def _memory_here() -> float:
    """Return the memory of this machine in GiB.

    Raises:
        InputError: the system does not tell it.
    """
    limit = memory_limit()
    if limit is None:
        raise InputError("the memory of this machine is not known; give --gpu-memory")
    return limit / _GIB


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
    if settings.on_cpu and gpus > 1:
        raise InputError(f"--gpu {CPU} is this machine without a GPU; leave --gpus {gpus} out")
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
    gpus = settings.batch_size if settings.on_cpu else settings.gpus
    while (gpus := 2 * gpus) <= settings.batch_size:
        tried.append((freed.model_copy(update={"gpus": gpus}), f"on {gpus} GPUs"))
    for name in sorted(KINDS, key=lambda name: KINDS[name].memory):
        tried.append(
            (freed.model_copy(update={"gpu": name, "gpu_memory": None}), f"with --gpu {name}")
        )
    for other, words in tried:
        if (training := _fitting(other)) is not None:
            layout = shlex.join(flags(PretrainConfig, Plan(other, training, {}, None).layout))
            return f"it would {words}: {layout or 'the default ones'}"
    return "it needs more and larger GPUs"
