"""The steps of a reproduction: `igpt` commands that run in its folder, and their dependencies.

tokens/corpus-R, tokens/labelled-R    token data sets at resolution R
runs/SIZE, runs/bert, runs/at-R       pretraining
probes/NAME.json                      linear probes: SIZE-STEP of a snapshot, main, bert, at-R; own:
                                      the labels of the pretraining images
finetuned/START-LABELS[-SUBSET]       fine-tuning from "ar", "bert" or "scratch"
pictures/NAME.png                     samples and completions

Scales with several seeds, a second recipe or a comparison of compute have more:

runs/[RECIPE-]IMAGES-SEED             pretraining on IMAGES, corpus or labelled
runs/as-R                             at resolution R, with the FLOPs of the first resolution
runs/long                             one longer training
probes/NAME.json                      of these runs; long-STEP of a snapshot; ar-SIZE, to compare
                                      with bert
finetuned/START-LABELS[-SUBSET]       START: also ar-SIZE, RECIPE-ar, RECIPE-scratch
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from igpt.model.config import ModelConfig
from igpt.model.cost import training_flops
from igpt.reproduction.scale import Flags, Scale, Speed

CORPUS, LABELLED = "tokens/corpus-{}", "tokens/labelled-{}"
LONG = "long"


@dataclass(frozen=True)
class Step:
    """A command.

    Attributes:
        name: path of its result in the reproduction's folder.
        words: of the command line, after `igpt`.
        after: names of the steps whose results it reads.
        run: True if the result is a run directory, which an interrupted command continues with
            --resume.
        optional: True if the step is skipped when the command rejects its input.
        group: steps that read the same models: whoever starts one should finish all in the same
            folder. "" if the scale has no groups.
        seconds: estimated; None if unknown.
    """

    name: str
    words: tuple[str, ...]
    after: tuple[str, ...] = ()
    run: bool = False
    optional: bool = False
    group: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class Run:
    """A pretraining run.

    Attributes:
        name: of its folder in runs/.
        size: its shape's name.
        side: resolution.
        flags: of `igpt pretrain`, but for the shape.
        on_labelled: whether it is trained on the labelled images, without their labels.
        group: see `Step`.
    """

    name: str
    size: str
    side: int
    flags: Flags
    on_labelled: bool = False
    group: str = ""

    @property
    def steps(self) -> int:
        """Its length."""
        return self.number("steps")

    @property
    def images(self) -> int:
        """Number of images in training, counted with repetition."""
        return self.steps * self.number("batch-size")

    def number(self, flag: str) -> int:
        """Return the value of a flag that is an integer."""
        return int(str(self.flags[flag]))


@dataclass(frozen=True)
class Compared:
    """A model whose layers are compared.

    Attributes:
        label: in figures; `run`, `probe`: their names.
        seed: of its training.
        on_labelled: whether it is pretrained on the labelled images, without their labels.
    """

    label: str
    run: str
    probe: str
    seed: int = 0
    on_labelled: bool = False


def compared(scale: Scale, *, second: bool = False) -> list[Compared]:
    """Return the models whose layers are compared, of the first or of the second recipe."""
    if scale.seeds == 1:
        return [
            Compared(size, size, "main" if size == scale.main else f"{size}-{scale.steps}")
            for size in scale.sizes
        ]
    found = []
    for on_labelled, images in enumerate(("corpus", "labelled")):
        for seed in range(scale.seeds):
            run = probe = f"{images}-{seed}"
            if second:
                assert scale.second
                run = probe = f"{scale.second.name}-{images}-{seed}"
            elif not on_labelled and seed == 0:
                run, probe = scale.main, "main"
            found.append(Compared(f"{images}, seed {seed}", run, probe, seed, bool(on_labelled)))
    return found


def runs(scale: Scale) -> list[Run]:
    """Return all pretraining runs.

    Their order is that of their groups: long trainings come before short ones, which fill the time
    until the end.
    """
    first = scale.resolutions[0]
    grouped = scale.seeds > 1

    found = []
    for size in reversed(scale.sizes):
        kept = (*((0,) if size == scale.main else ()), *scale.snapshots)
        group = "objectives" if size == scale.of_both_objectives != scale.main else size
        found.append(
            Run(
                size, size, first, _of_steps(scale.recipe, scale.steps, snapshots=kept), group=group
            )
        )
    steps = round(scale.masked_ratio * scale.steps)
    flags = _of_steps(scale.recipe, steps, objective="bert")
    found.append(Run("bert", scale.of_both_objectives, first, flags, group="objectives"))
    if grouped:
        found += _of_recipe(scale, scale.recipe, compared(scale)[1:])
    seconds = compared(scale, second=True) if grouped and scale.second else []
    if scale.second:
        found += _of_recipe(scale, scale.second.recipe, seconds[:1])
    if scale.doublings:
        assert scale.second
        flags = _of_steps(
            {**scale.second.recipe, **scale.long}, scale.doublings[-1], snapshots=scale.doublings
        )
        found.append(Run(LONG, scale.main, first, flags, group="compute"))
    if scale.second:
        found += _of_recipe(scale, scale.second.recipe, seconds[1:])
    for side in scale.resolutions:
        flags = _of_steps(scale.recipe, scale.resolution_steps)
        found.append(Run(f"at-{side}", scale.resolution_size, side, flags, group="resolution"))
    for side in scale.resolutions[1:] if scale.equal_compute else ():
        steps = equal_compute_steps(scale, side)
        share = steps / scale.resolution_steps  # the warm-up is the same share of training
        warmup = max(1, round(share * int(str(scale.recipe["warmup-steps"]))))
        flags = _of_steps({**scale.recipe, "warmup-steps": warmup}, steps)
        found.append(Run(f"as-{side}", scale.resolution_size, side, flags, group="resolution"))
    return found if grouped else [replace(run, group="") for run in found]


def _of_steps(flags: Flags, steps: int, **more: object) -> Flags:
    return {"model": "tiny", **flags, "steps": steps, "seed": 0, **more}


def _of_recipe(scale: Scale, recipe: Flags, models: Sequence[Compared]) -> Iterator[Run]:
    """Yield the runs of compared models; the first one's initial weights are fine-tuned too."""
    for model in models:
        is_first = model.seed == 0 and not model.on_labelled
        initial = {"snapshots": (0,)} if is_first else {}
        flags = _of_steps(recipe, scale.steps, **initial, seed=model.seed)
        side = scale.resolutions[0]
        yield Run(model.run, scale.main, side, flags, model.on_labelled, group=model.run)


def equal_compute_steps(scale: Scale, side: int) -> int:
    """Return the steps at a resolution that need the FLOPs of those at the first resolution."""
    layers, width, heads = scale.sizes[scale.resolution_size]
    first, other = (
        training_flops(
            ModelConfig(
                resolution=each, n_colors=scale.colors, n_layer=layers, n_embd=width, n_head=heads
            )
        )
        for each in (scale.resolutions[0], side)
    )
    return max(1, round(scale.resolution_steps * first / other))


def steps(scale: Scale, corpus: str, labelled: str) -> list[Step]:
    """Return all steps, in the order in which they should start.

    Args:
        corpus: source of the pretraining images; their labels are probed if there are any.
        labelled: source of the labelled images.
    """
    first, *others = scale.resolutions
    pretraining = {run.name: run for run in runs(scale)}
    at_first = [run for run in pretraining.values() if run.side == first]
    at_others = [run for run in pretraining.values() if run.side != first]
    found = [
        *_tokens(scale, first, corpus, labelled),
        *(_pretrain(scale, run) for run in at_first),
        *(step for side in others for step in _tokens(scale, side, corpus, labelled)),
        *(_pretrain(scale, run) for run in at_others),
        *_finetuning(scale, pretraining, long=True),
        *_probes(scale, pretraining),
        *_finetuning(scale, pretraining, long=False),
        *_pictures(scale, pretraining),
    ]
    order = list(dict.fromkeys(["", *(run.group for run in pretraining.values())]))
    return sorted(found, key=lambda step: order.index(step.group))


def snapshot(run: str, step: int) -> str:
    """Return the path of the model of `run` after `step` steps."""
    return f"{run}/snapshots/step-{step:08d}"


def _flags(*several: Flags) -> tuple[str, ...]:
    """Return the words of flags; later ones override earlier ones."""
    words: list[str] = []
    for name, value in {name: value for flags in several for name, value in flags.items()}.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value != ():
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return tuple(words)


def _tokens(scale: Scale, side: int, corpus: str, labelled: str) -> Iterator[Step]:
    """Yield the data sets at a resolution, all with the palette of the corpus at the first one."""
    first = CORPUS.format(scale.resolutions[0])
    for folder, source, limit in (
        (CORPUS, corpus, scale.corpus_images),
        (LABELLED, labelled, scale.labelled_images),
    ):
        name = folder.format(side)
        colors: Flags = {"colors": scale.colors} if name == first else {"palette": first}
        held: Flags = {"held-out": 0.02} if folder == CORPUS else {}
        flags = _flags({"size": side, "limit": limit, "seed": 0, "workers": 1}, colors, held)
        seconds = scale.speed.start + limit * scale.speed.prepare if scale.speed else None
        after = () if name == first else (first,)
        words = ("prepare", source, "-o", name, *flags)
        yield Step(name, words, after, seconds=seconds)


def _pretrain(scale: Scale, run: Run) -> Step:
    tokens = (LABELLED if run.on_labelled else CORPUS).format(run.side)
    name = f"runs/{run.name}"
    layers, width, heads = scale.sizes[run.size]
    shape = {"n-layer": layers, "n-embd": width, "n-head": heads}
    words = ("pretrain", tokens, "-o", name, *_flags(run.flags, shape))
    seconds = None
    if scale.speed:
        validations = run.steps / run.number("validate-every") + len(scale.snapshots)
        images = run.images + validations * run.number("validation-images") / 3
        seconds = scale.speed.start + images * _seconds_per_image(scale, scale.speed, run)
    return Step(name, words, (tokens,), run=True, group=run.group, seconds=seconds)


def _seconds_per_image(scale: Scale, speed: Speed, run: Run) -> float:
    """Return the estimated seconds of training on an image with the model of a run."""
    seconds = 1 / speed.images[run.size, run.side]
    if run.flags.get("objective") == "bert":
        seconds *= speed.masked
    if scale.second and run.flags.get("model") == scale.second.recipe["model"]:
        seconds *= speed.second
    return seconds


def _probes(scale: Scale, pretraining: Mapping[str, Run]) -> Iterator[Step]:
    side = scale.resolutions[0]
    many: Flags = {
        **scale.probing,
        "limit": scale.probe_images,
        "test-images": scale.test_images,
    }
    layers: Flags = {**many, "no-baselines": True}
    fewer: Flags = {**layers, "limit": scale.snapshot_images}
    few: Flags = {"labels-per-class": scale.few}
    main = pretraining[scale.main]
    for size in reversed(scale.sizes):
        for step in scale.snapshots:
            yield _probe(scale, f"{size}-{step}", pretraining[size], fewer, step=step)
    yield _probe(scale, "main", main, {**many, **few})
    masked = scale.of_both_objectives
    if masked != scale.main:
        yield _probe(scale, f"ar-{masked}", pretraining[masked], layers)
    yield _probe(scale, "bert", pretraining["bert"], {**layers, "masks": scale.masks or None})
    if scale.own_labels:
        yield _probe(scale, "own", main, layers, tokens=CORPUS.format(side), optional=True)
    for name, run in pretraining.items():
        if name.startswith(("at-", "as-")):
            yield _probe(scale, name, run, fewer)
    if scale.seeds > 1:
        for second in (False, True) if scale.second else (False,):
            for at, model in enumerate(compared(scale, second=second)):
                more = few if second and at == 0 else {}
                if model.probe != "main":
                    yield _probe(scale, model.probe, pretraining[model.run], {**layers, **more})
    for step in scale.doublings:
        yield _probe(scale, f"{LONG}-{step}", pretraining[LONG], fewer, step=step)
    if scale.doublings:
        yield _probe(scale, LONG, pretraining[LONG], layers, step=scale.doublings[-1])


def _probe(
    scale: Scale,
    name: str,
    run: Run,
    flags: Flags,
    *,
    step: int | None = None,
    tokens: str | None = None,
    optional: bool = False,
) -> Step:
    tokens = tokens or LABELLED.format(run.side)
    path = f"runs/{run.name}"
    model = path if step is None else snapshot(path, step)
    words = ("probe", model, tokens, "-o", f"probes/{name}.json", *_flags(flags))
    seconds = None
    if scale.speed:
        shape = scale.sizes[run.size]
        limit = int(str(flags["limit"]))
        fitted = limit + min(limit, scale.labelled_images // 10)
        rate = _seconds_per_image(scale, scale.speed, run) * scale.speed.forward
        features = (fitted + scale.test_images) * rate
        fits = (shape[0] + 1) * shape[1] * fitted * scale.speed.fit
        pixels = 0.0
        if "no-baselines" not in flags:  # raw pixels, and an untrained network
            features, fits = 2 * features, 2 * fits
            pixels = 3 * run.side**2 * fitted * scale.speed.fit
        seconds = scale.speed.start + features + fits + pixels
    return Step(
        f"probes/{name}",
        words,
        (path, tokens),
        optional=optional,
        group=run.group,
        seconds=seconds,
    )


@dataclass(frozen=True)
class _Start:
    """What fine-tuning starts from: a model of a run, and whether few labels are tried too."""

    name: str
    run: Run
    flags: tuple[Flags, Flags, Flags]  # all fine-tuning, with all labels, with few
    initial: bool = False
    few: bool = True


def _starts(scale: Scale, pretraining: Mapping[str, Run]) -> Iterator[_Start]:
    flags = scale.finetuning, scale.with_all, scale.with_few
    main, masked = pretraining[scale.main], scale.of_both_objectives
    yield _Start("ar", main, flags)
    yield _Start("scratch", main, flags, initial=True)
    if masked != scale.main:
        yield _Start(f"ar-{masked}", pretraining[masked], flags, few=False)
    yield _Start("bert", pretraining["bert"], flags, few=False)
    if second := scale.second:
        run = pretraining[compared(scale, second=True)[0].run]
        flags = second.finetuning, second.with_all, second.with_few
        yield _Start(f"{second.name}-ar", run, flags)
        yield _Start(f"{second.name}-scratch", run, flags, initial=True)


def _finetuning(scale: Scale, pretraining: Mapping[str, Run], *, long: bool) -> Iterator[Step]:
    """Yield the trainings on all labels (`long`) or those on few."""
    for start in _starts(scale, pretraining):
        every, with_all, with_few = start.flags
        kind: Flags = {"generation-weight": 0.0} if start.initial else {}
        if long:
            rates = scale.from_scratch if start.name == "scratch" else {}
            flags = {**every, **with_all, **rates, **kind, "seed": 0}
            yield _finetune(scale, f"{start.name}-all", start, flags)
            continue
        for count in scale.few if start.few else ():
            for subset in range(scale.subsets):
                flags = {**every, **with_few, **kind, "labels-per-class": count, "seed": subset}
                yield _finetune(scale, f"{start.name}-{count}-{subset}", start, flags)


def _finetune(scale: Scale, name: str, start: _Start, flags: Flags) -> Step:
    run = f"runs/{start.run.name}"
    tokens = LABELLED.format(scale.resolutions[0])
    model = snapshot(run, 0) if start.initial else run
    words = ("finetune", model, tokens, "-o", f"finetuned/{name}", *_flags(flags))
    seconds = None
    if scale.speed:
        known: Mapping[str, object] = flags
        number = {key: int(str(known[key])) for key in ("steps", "batch-size", "validate-every")}
        rates = known.get("learning-rates")
        trainings = len(rates) if isinstance(rates, tuple) else 1
        validated = (
            number["steps"] / number["validate-every"] * int(str(known["validation-images"]))
        )
        tested = int(str(known.get("test-images", scale.test_images)))
        images = trainings * (number["steps"] * number["batch-size"] + validated / 3) + tested / 3
        seconds = scale.speed.start + images * _seconds_per_image(scale, scale.speed, start.run)
    return Step(
        f"finetuned/{name}",
        words,
        (run, tokens),
        run=True,
        group=start.run.group,
        seconds=seconds,
    )


def _pictures(scale: Scale, pretraining: Mapping[str, Run]) -> Iterator[Step]:
    made = pretraining[next(reversed(scale.sizes))]
    run, tokens = f"runs/{made.name}", CORPUS.format(scale.resolutions[0])
    seconds = 2 * scale.speed.start if scale.speed else None
    for step in scale.snapshots:
        model = snapshot(run, step)
        for kind, flags, after in (
            ("sample", {"count": scale.pictures}, (run,)),
            (
                "complete",
                {"tokens": tokens, "count": scale.pictures // 2, "completions": 2},
                (run, tokens),
            ),
        ):
            name = f"pictures/{'samples' if kind == 'sample' else 'completions'}-{step}"
            words = (kind, model, "-o", f"{name}.png", *_flags(flags, {"seed": 0}))
            yield Step(name, words, after, group=made.group, seconds=seconds)
