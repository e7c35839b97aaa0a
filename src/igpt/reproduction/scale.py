"""The two scales of a reproduction: for two CPU cores, and for one GPU."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from igpt.errors import InputError, suggest

Shape = tuple[int, int, int]  # blocks, width, heads
Flags = Mapping[str, object]  # flags of a command, without the dashes


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
        probe_images: images per split for the probes of the main size and of BERT;
            snapshot_images: for all other probes.
        test_images: test images of all probes.
        finetuning: flags of all fine-tuning; `with_all` and `with_few` are added with all and with
            few labels.
        few: labels per class; `subsets`: number of label subsets.
        masks: masks per image in the probe of a BERT model (modal prediction); 0: complete images.
        pictures: images per row of samples.
        jobs: number of steps side by side.
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

ScaleName = Literal["cpu", "gpu"]
_SCALES = {one.name: one for one in (_CPU, _GPU)}


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
    return replace(
        full,
        rehearsal=True,
        colors=16,
        resolutions=tuple(side // 4 for side in full.resolutions),
        corpus_images=4000,
        labelled_images=200,
        sizes={size: (2, 16 * number, 2) for number, size in enumerate(full.sizes, 1)},
        recipe={**full.recipe, "batch-size": 8, "warmup-steps": 2, **short},
        steps=4,
        snapshots=(1, 2, 4),
        resolution_steps=2,
        probe_images=4000,
        snapshot_images=60,
        test_images=60,
        finetuning={**full.finetuning, "batch-size": 8, "test-images": 20},
        with_all={**full.with_all, "steps": 2, **short},
        with_few={**full.with_few, "steps": 2, "test-images": 20, **short},
        few=(1, 2),
        subsets=2,
        pictures=2,
    )
