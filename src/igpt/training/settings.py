"""Settings that every kind of training has, and which of them say how, not what, is computed."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from igpt.config import Config
from igpt.training.optimizer import OptimizerName, Schedule

MOST = 10**9  # images or steps; more of both would not fit into 64 bits as a count of images
HIGHEST_RATE = 1000.0
_A_WEEK = 604_800.0  # seconds

Beta = Annotated[float, Field(ge=0, lt=1)]
Recomputation = Literal["none", "selective", "full"]


class TrainConfig(Config):
    """How to train; the defaults are the paper's where it states them (section 3.3)."""

    # These may change when a run is resumed: they decide where and how fast, and nothing but
    # rounding of the result.
    of_the_machine: ClassVar[frozenset[str]] = frozenset(
        {
            "micro_batch_size",
            "device",
            "shard",
            "activation_checkpointing",
            "compile",
            "checkpoint_every",
            "keep_checkpoints",
            "max_skipped",
            "stop_seconds",
        }
    )

    batch_size: int = Field(128, ge=1, le=MOST, description="images of an update, over all ranks")
    micro_batch_size: int | None = Field(
        None, ge=1, le=MOST, description="images at a time on a rank; the rest accumulates"
    )
    steps: int = Field(1_000_000, ge=1, le=MOST, description="updates")
    optimizer: OptimizerName = Field(
        "adamw", description="muon orthogonalises the updates of the blocks' matrices"
    )
    learning_rate: float = Field(3e-3, gt=0, le=HIGHEST_RATE, description="peak learning rate")
    warmup_steps: Annotated[int, Field(ge=0, le=MOST)] | Literal["epoch"] = Field(
        0,
        description="updates over which the learning rate rises; epoch: as many as show every image once",
    )
    schedule: Schedule = Field("cosine", description="how the learning rate goes on from its peak")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="Adam's")
    weight_decay: float = Field(0.0, ge=0, le=1000, description="of the matrices")
    grad_clip: float = Field(
        1.0, ge=0, le=1e9, description="largest norm of the gradient; 0 does not clip"
    )
    max_skipped: int = Field(
        10, ge=0, le=MOST, description="updates skipped for a loss or gradient that is not finite"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="of products; auto: bf16 if the processor has it"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto takes a GPU if there is one"
    )
    shard: int = Field(
        1,
        ge=1,
        le=MOST,
        description="ranks that share one copy of weights and optimiser: 1 is DDP, all FSDP, between HSDP",
    )
    activation_checkpointing: Recomputation = Field(
        "none",
        description="what the backward pass computes again: nothing, all but products, or whole blocks",
    )
    compile: Literal["auto", "yes", "no"] = Field(
        "auto", description="compile every block; auto does on a GPU"
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="of the weights, the order of the images and their variations",
    )
    log_every: int = Field(50, ge=1, le=MOST, description="updates between lines of metrics.jsonl")
    validate_every: int = Field(
        1000, ge=1, le=MOST, description="updates between validations; the best model is kept"
    )
    checkpoint_every: int = Field(1000, ge=1, le=MOST, description="updates between checkpoints")
    keep_checkpoints: int = Field(
        2, ge=1, le=MOST, description="newest checkpoints to keep, beside the best one"
    )
    snapshots: tuple[Annotated[int, Field(ge=0, le=MOST)], ...] = Field(
        (),
        description="updates after which the model is validated and kept in RUN/snapshots; 0: as it was drawn",
    )
    stop_seconds: float = Field(
        25,
        gt=0,
        le=_A_WEEK,
        description="after Ctrl-C or SIGTERM, time to save before the run is ended",
    )
    patience: int | None = Field(
        None, ge=1, le=MOST, description="stop after so many validations without a better one"
    )

    @model_validator(mode="after")
    def _snapshots_are_reached(self) -> Self:
        if beyond := [step for step in self.snapshots if step > self.steps]:
            raise ValueError(
                f"a snapshot after {beyond[0]} steps is asked for, and there are {self.steps}"
            )
        return self

    def warmup(self, images: int) -> int:
        """Updates of warm-up, for a training split of so many images."""
        return -(-images // self.batch_size) if self.warmup_steps == "epoch" else self.warmup_steps
