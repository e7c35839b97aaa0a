"""Settings shared by pretraining and fine-tuning."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from igpt.config import Config
from igpt.environment import RunKind
from igpt.training.optimizer import OptimizerName, Schedule
from igpt.training.trackers import TrackerName

MOST = 10**9  # images or steps; the product of two larger ones would not fit into 64 bits
HIGHEST_RATE = 1000.0
_WEEK = 604_800.0  # seconds

Beta = Annotated[float, Field(ge=0, lt=1)]
Recomputation = Literal["none", "selective", "full"]


class TrainConfig(Config):
    """Settings of training. The defaults are the paper's where it states them (section 3.3)."""

    kind: ClassVar[RunKind]
    # Settings that may change when a run is resumed: they decide where and how fast it is computed,
    # and affect the result only by rounding.
    changeable: ClassVar[frozenset[str]] = frozenset(
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
            "track",
        }
    )

    # Settings that may be changed when a run is resumed, and are recorded then. They decide when it
    # ends; steps that are done already do not depend on them.
    ending: ClassVar[frozenset[str]] = frozenset({"patience"})

    # Settings that may be increased when a run is resumed, and are recorded then.
    extendable: ClassVar[frozenset[str]] = frozenset()

    batch_size: int = Field(128, ge=1, le=MOST, description="images per step, over all ranks")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="images per forward pass of a rank; gradients of a batch are accumulated",
    )
    steps: int = Field(1_000_000, ge=1, le=MOST, description="optimizer steps")
    optimizer: OptimizerName = Field(
        "adamw", description="muon: orthogonalized updates for the matrices of the blocks"
    )
    share_color_updates: bool = Field(
        False,
        description="the updates of a colour in the embeddings and in the output matrix also "
        "change near colours",
    )
    learning_rate: float = Field(3e-3, gt=0, le=HIGHEST_RATE, description="peak learning rate")
    warmup_steps: Annotated[int, Field(ge=0, le=MOST)] | Literal["epoch"] = Field(
        0, description="steps of linear warm-up; epoch: one pass over the training images"
    )
    schedule: Schedule = Field("cosine", description="learning-rate schedule after the warm-up")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="coefficients of Adam")
    weight_decay: float = Field(0.0, ge=0, le=1000, description="weight decay of matrices")
    grad_clip: float = Field(1.0, ge=0, le=1e9, description="maximum gradient norm; 0: no clipping")
    max_skipped: int = Field(
        10,
        ge=0,
        le=MOST,
        description="stop if more steps than this are skipped, because the loss or gradient is "
        "not finite",
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="precision of matrix products; auto: bf16 if the processor supports it"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a GPU if there is one"
    )
    shard: int = Field(
        1,
        ge=1,
        le=MOST,
        description="ranks that share one copy of weights and optimizer state; 1: DDP; the "
        "number of ranks: FSDP; a divisor of it: HSDP",
    )
    activation_checkpointing: Recomputation = Field(
        "none",
        description="recompute in the backward pass: nothing, all but matrix products, or whole "
        "blocks",
    )
    compile: Literal["auto", "yes", "no"] = Field(
        "auto", description="compile every block; auto: on a GPU"
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="seed of initial weights, order of images, augmentation and masks",
    )
    log_every: int = Field(50, ge=1, le=MOST, description="steps between lines of metrics.jsonl")
    validate_every: int = Field(
        1000, ge=1, le=MOST, description="steps between validations; the best model is kept"
    )
    checkpoint_every: int = Field(1000, ge=1, le=MOST, description="steps between checkpoints")
    keep_checkpoints: int = Field(
        2, ge=1, le=MOST, description="newest checkpoints to keep, in addition to the best one"
    )
    snapshots: tuple[Annotated[int, Field(ge=0, le=MOST)], ...] = Field(
        (),
        description="steps after which the model is validated and kept in RUN/snapshots; "
        "0: initial weights, without validation",
    )
    stop_seconds: float = Field(
        25,
        gt=0,
        le=_WEEK,
        description="seconds to save a checkpoint after Ctrl-C or SIGTERM, before the process is "
        "ended",
    )
    patience: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="stop after this many validations without improvement",
    )

    track: TrackerName | None = Field(
        None,
        description="also send the lines of metrics.jsonl, and samples and completions at "
        "validations, to an experiment tracker",
    )

    @model_validator(mode="after")
    def _snapshots_are_reached(self) -> Self:
        if beyond := [step for step in self.snapshots if step > self.steps]:
            raise ValueError(
                f"a snapshot after {beyond[0]} steps is asked for, and there are {self.steps}"
            )
        return self

    def warmup(self, images: int) -> int:
        """Return the steps of warm-up for a training split of `images` images."""
        return -(-images // self.batch_size) if self.warmup_steps == "epoch" else self.warmup_steps
