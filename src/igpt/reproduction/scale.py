"""The scales of a reproduction: an hour or a night on two CPU cores, or one GPU."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from igpt.errors import InputError, suggest

Shape = tuple[int, int, int]  # blocks, width, heads
Flags = Mapping[str, object]  # flags of a command, without the dashes


@dataclass(frozen=True)
class Second:
    """A second recipe, which is compared with the first one and does not decide an answer.

    Attributes:
        name: of the recipe, as results name it.
        recipe, finetuning, with_all, with_few: as those of the scale.
    """

    name: str
    recipe: Flags
    finetuning: Flags
    with_all: Flags
    with_few: Flags


@dataclass(frozen=True)
class Speed:
    """Measured durations on one of two busy cores, for estimates.

    Attributes:
        images: images per second in training with the first recipe, by size and resolution.
        second: duration of a training step with the second recipe, relative to the first one.
        masked: the same for BERT's objective.
        forward: duration of computing an image's features, relative to training on it.
        fit: seconds per image, feature and layer to fit the classifiers of a layer.
        start: seconds to start a command.
        prepare: seconds to prepare an image.
        without_bf16: duration on a processor without instructions for bf16, relative to all these.
    """

    images: Mapping[tuple[str, int], float]
    second: float
    masked: float
    forward: float
    fit: float
    start: float
    prepare: float
    without_bf16: float


@dataclass(frozen=True)
class Scale:
    """All choices of a reproduction.

    Attributes:
        rehearsal: True for runs of toy length, whose numbers mean nothing.
        resolutions: the compared resolutions; all other questions use the first one.
        corpus_images, labelled_images: maximum number of images per split.
        sizes: shapes of the compared models, the smallest first.
        main: the size that is also trained with BERT's objective, and fine-tuned.
        recipe: flags of all pretraining.
        steps: length of pretraining; `snapshots`: steps whose models are probed too.
        resolution_size, resolution_steps: size and length of training of the compared resolutions.
        probing: flags of all probes.
        probe_images: images per split for the probes of the main size and of BERT;
            snapshot_images: for all other probes.
        test_images: test images of all probes.
        finetuning: flags of all fine-tuning; `with_all` and `with_few` are added with all and with
            few labels.
        few: labels per class; `subsets`: number of label subsets.
        masks: masks per image in the probe of a BERT model (modal prediction); 0: complete images.
        pictures: images per row of samples.
        jobs: number of steps side by side.
        seeds: number of models with different seeds, per recipe and images, whose layers are
            compared; with several, they are also pretrained on the labelled images, without their
            labels, and the compared models are these instead of the sizes.
        second: a second recipe.
        masked_size: the size that is trained with BERT's objective; None: `main`.
        masked_ratio: images of BERT's pretraining relative to the autoregressive one's.
        doublings: steps of one longer training after which its model is probed.
        long: flags of that training, in addition to the second recipe's.
        equal_compute: whether resolutions are compared at equal compute too.
        from_scratch: flags of fine-tuning from initial weights, in addition to the others.
        own_labels: whether the labels of the pretraining images are probed too.
        speed: for estimates of time; None: there are none.
    """

    name: str
    rehearsal: bool
    colors: int
    resolutions: tuple[int, ...]
    corpus_images: int
    labelled_images: int
    sizes: dict[str, Shape]
    main: str
    recipe: Flags
    steps: int
    snapshots: tuple[int, ...]
    resolution_size: str
    resolution_steps: int
    probe_images: int
    snapshot_images: int
    test_images: int
    finetuning: Flags
    with_all: Flags
    with_few: Flags
    few: tuple[int, ...]
    subsets: int
    masks: int
    pictures: int
    jobs: int
    seeds: int = 1
    second: Second | None = None
    masked_size: str | None = None
    masked_ratio: float = 1.0
    doublings: tuple[int, ...] = ()
    long: Flags = field(default_factory=dict)
    equal_compute: bool = False
    from_scratch: Flags = field(default_factory=dict)
    own_labels: bool = True
    probing: Flags = field(default_factory=dict)
    speed: Speed | None = None

    @property
    def of_both_objectives(self) -> str:
        """The size that is trained with both objectives."""
        return self.masked_size or self.main


_CPU = Scale(
    name="cpu",
    rehearsal=False,
    colors=128,
    resolutions=(16, 24, 32),
    corpus_images=20_000,
    labelled_images=10_000,
    sizes={"small": (4, 32, 1), "medium": (6, 64, 2), "large": (8, 96, 3)},
    main="medium",
    recipe={
        "batch-size": 8,
        "warmup-steps": 100,
        "optimizer": "muon",
        "learning-rate": 7e-3,
        "positions": "rotary",
        "start-from-palette": True,
        "flip": True,
        "log-every": 50,
        "validate-every": 500,
        "validation-images": 512,
        "checkpoint-every": 250,
    },
    steps=1000,
    snapshots=(100, 250, 500, 1000),
    resolution_size="small",
    resolution_steps=600,
    probe_images=2000,
    snapshot_images=1500,
    test_images=3000,
    finetuning={
        "batch-size": 4,
        "optimizer": "muon",
        "schedule": "cosine",
        "learning-rate": 3e-3,
        "warmup-steps": 50,
        "flip": True,
        "log-every": 50,
    },
    with_all={
        "steps": 2000,
        "validate-every": 400,
        "checkpoint-every": 400,
        "validation-images": 500,
        "test-images": 3000,
    },
    with_few={
        "steps": 300,
        "validate-every": 75,
        "checkpoint-every": 300,
        "validation-images": 100,
        "test-images": 500,
    },
    few=(4, 25),
    subsets=4,
    masks=0,  # five masks would take five times as long
    pictures=6,
    jobs=2,
)

# Estimated at half an hour on an H100, not measured. These images at three resolutions take 55 MB.
_GPU = replace(
    _CPU,
    name="gpu",
    colors=512,
    resolutions=(32, 16, 24),
    corpus_images=25_000,
    labelled_images=5_000,
    sizes={"small": (8, 256, 4), "medium": (12, 384, 6), "large": (24, 512, 8)},
    main="large",
    recipe={
        "batch-size": 128,
        "micro-batch-size": 64,
        "warmup-steps": 200,
        "learning-rate": 3e-3,
        "flip": True,
        "shift": 2,
        "log-every": 50,
        "validate-every": 500,
        "validation-images": 2000,
        "checkpoint-every": 500,
    },
    steps=1500,
    snapshots=(100, 250, 500, 1000, 1500),
    masks=5,
    resolution_size="small",
    resolution_steps=800,
    probe_images=5_000,
    snapshot_images=4000,
    test_images=5_000,
    finetuning={"batch-size": 128, "micro-batch-size": 64, "flip": True, "log-every": 25},
    with_all={
        "steps": 200,
        "learning-rates": (1e-4, 3e-4),
        "shift": 4,
        "validate-every": 50,
        "checkpoint-every": 100,
        "validation-images": 2000,
    },
    with_few={
        "compile": "no",
        "steps": 60,
        "learning-rate": 3e-4,
        "shift": 4,
        "validate-every": 15,
        "checkpoint-every": 60,
        "validation-images": 1000,
    },
)

# Measured on two cores of an AMD EPYC with bf16, two processes of one thread each; the last one on
# an AMD EPYC with AVX2 only: 1.6 to 2.6, by model.
_EPYC = Speed(
    images={
        ("small", 16): 296.0,
        ("medium", 16): 130.0,
        ("large", 16): 46.0,
        ("medium", 8): 470.0,
        ("medium", 12): 240.0,
        ("medium", 24): 29.0,
    },
    second=1.27,
    masked=1.03,
    forward=0.3,
    fit=4e-6,
    start=5.0,
    prepare=2e-4,
    without_bf16=2.0,
)

# The paper's recipe is judged: learned positions, Adam without weight decay, no augmentation in
# pretraining. Chen et al. tune learning rates downwards from 0.01; 0.003 is the usual assumption.
_OFTEN: Flags = {
    "log-every": 100,
    "validate-every": 1200,
    "validation-images": 1000,
    "checkpoint-every": 300,
    "keep-checkpoints": 1,
}
_FINETUNING: Flags = {"batch-size": 16, "flip": True, "shift": 2, "log-every": 100}
_WITH_ALL: Flags = {
    "steps": 2800,  # one pass over 45,000 images
    "learning-rates": (1e-3, 3e-4),
    "validate-every": 400,
    "checkpoint-every": 250,
    "keep-checkpoints": 1,
    "validation-images": 1000,
}
_WITH_FEW: Flags = {
    "steps": 400,
    "learning-rate": 1e-3,
    "validate-every": 100,
    "checkpoint-every": 250,
    "keep-checkpoints": 1,
    "validation-images": 500,
    "test-images": 5000,
}
_NIGHT = Scale(
    name="night",
    rehearsal=False,
    colors=128,
    resolutions=(16, 8, 12, 24),
    corpus_images=100_000,
    labelled_images=50_000,
    sizes={"small": (6, 32, 1), "medium": (8, 48, 1), "large": (10, 96, 2)},
    main="large",
    recipe={
        "batch-size": 16,
        "warmup-steps": 400,
        "optimizer": "adamw",
        "learning-rate": 3e-3,
        "positions": "learned",
        **_OFTEN,
    },
    steps=9600,
    snapshots=(600, 1200, 2400, 4800, 9600),
    resolution_size="medium",
    resolution_steps=3200,
    probe_images=20_000,
    snapshot_images=10_000,
    test_images=10_000,
    finetuning=_FINETUNING,
    with_all=_WITH_ALL,
    with_few=_WITH_FEW,
    from_scratch={"learning-rates": (3e-3, 1e-3)},
    few=(25, 250),
    subsets=3,
    masks=0,
    pictures=6,
    jobs=2,
    seeds=2,
    second=Second(
        name="modern",
        # The settings of the preset are repeated, so that a later change of it is not taken for the
        # same step.
        recipe={
            "model": "modern",
            "optimizer": "muon",
            "learning-rate": 3e-3,
            "positions": "rotary",
            "start-from-palette": True,
            "value-residual": True,
            "share-color-updates": True,
            "batch-size": 16,
            "warmup-steps": 200,
            "flip": True,
            **_OFTEN,
        },
        finetuning={**_FINETUNING, "optimizer": "muon", "schedule": "cosine", "warmup-steps": 100},
        with_all={**_WITH_ALL, "learning-rates": (3e-3, 1e-3)},
        with_few={**_WITH_FEW, "learning-rate": 3e-3},
    ),
    masked_size="medium",
    masked_ratio=6.67,  # 1 / 0.15: as many predicted positions
    doublings=(200, 400, 800, 1600, 3200, 6400, 12_800),
    long={"schedule": "constant", "learning-rate": 5e-3},
    equal_compute=True,
    probing={"precision": "auto"},  # as in training
    own_labels=False,  # 200 classes, and no question needs them
    speed=_EPYC,
)

_SCALES = {one.name: one for one in (_CPU, _GPU, _NIGHT)}

# What `longer` makes longer, and the questions that this serves.
PARTS = ("pretraining", "bert", "finetuning", "resolution", "compute")


def scale(name: str, *, rehearsal: bool = False) -> Scale:
    """Return the scale of a name; for a rehearsal, with runs of toy length.

    Raises:
        InputError: unknown name.
    """
    if name not in _SCALES:
        raise InputError(f"no scale {name!r}; {suggest(name, _SCALES)}")
    full = _SCALES[name]
    if not rehearsal:
        return full
    short = {"log-every": 1, "validate-every": 2, "checkpoint-every": 2, "validation-images": 20}
    recipe = {"batch-size": 8, "warmup-steps": 2, **short}
    with_few = {"steps": 2, "test-images": 20, **short}
    second = full.second and replace(
        full.second,
        recipe={**full.second.recipe, **recipe},
        finetuning={**full.second.finetuning, "batch-size": 8, "warmup-steps": 1},
        with_all={**full.second.with_all, "steps": 2, **short},
        with_few={**full.second.with_few, **with_few},
    )
    return replace(
        full,
        rehearsal=True,
        colors=16,
        resolutions=tuple(side // 4 for side in full.resolutions),
        corpus_images=4000,
        labelled_images=200,
        sizes={size: (2, 16 * number, 2) for number, size in enumerate(full.sizes, 1)},
        recipe={**full.recipe, **recipe},
        steps=4,
        snapshots=(1, 2, 4),
        resolution_steps=2,
        probe_images=4000,
        snapshot_images=60,
        test_images=60,
        finetuning={**full.finetuning, "batch-size": 8, "test-images": 20},
        with_all={**full.with_all, "steps": 2, **short},
        with_few={**full.with_few, **with_few},
        few=(1, 2),
        subsets=2,
        pictures=2,
        second=second,
        doublings=(1, 2, 4)[: len(full.doublings)],
        speed=None,
    )


def longer(scale: Scale, parts: Sequence[str]) -> Scale:
    """Return a scale with some parts twice as long; a part that is named twice, four times.

    The steps of other parts stay the same, so that their results are kept.

    Raises:
        InputError: the scale has no such part.
    """
    for part in parts:
        scale = _longer(scale, part)
    return scale


def _longer(scale: Scale, part: str) -> Scale:
    if part == "pretraining":
        return replace(
            scale, steps=2 * scale.steps, snapshots=tuple(2 * step for step in scale.snapshots)
        )
    if part == "bert":
        return replace(scale, masked_ratio=2 * scale.masked_ratio)
    if part == "finetuning":
        return replace(
            scale,
            with_all=_twice(scale.with_all),
            with_few=_twice(scale.with_few),
            second=scale.second
            and replace(
                scale.second,
                with_all=_twice(scale.second.with_all),
                with_few=_twice(scale.second.with_few),
            ),
        )
    if part == "resolution":
        return replace(scale, resolution_steps=2 * scale.resolution_steps)
    if part == "compute" and scale.doublings:
        return replace(scale, doublings=(*scale.doublings, 2 * scale.doublings[-1]))
    parts = [one for one in PARTS if one != "compute" or scale.doublings]
    raise InputError(
        f"the scale {scale.name} has no part {reprlib.repr(part)}; {suggest(part, parts)}"
    )


def _twice(flags: Flags) -> Flags:
    return {**flags, "steps": 2 * int(str(flags["steps"]))}
