"""The steps of a reproduction: `igpt` commands that run in its folder, and their dependencies.

tokens/corpus-R, tokens/labelled-R    token data sets at resolution R
runs/SIZE, runs/bert, runs/at-R       pretraining
probes/NAME.json                      linear probes: SIZE-STEP of a snapshot, main, bert, at-R; own:
                                      the labels of the pretraining images
finetuned/START-LABELS[-SUBSET]       fine-tuning from "ar", "bert" or "scratch"
pictures/NAME.png                     samples and completions
"""

from collections.abc import Iterator
from dataclasses import dataclass

from igpt.reproduction.scale import Flags, Scale

CORPUS, LABELLED = "tokens/corpus-{}", "tokens/labelled-{}"


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
    """

    name: str
    words: tuple[str, ...]
    after: tuple[str, ...] = ()
    run: bool = False
    optional: bool = False


def steps(scale: Scale, corpus: str, labelled: str) -> list[Step]:
    """Return all steps, in the order in which they should start.

    Args:
        corpus: source of the pretraining images; their labels are probed if there are any.
        labelled: source of the labelled images.
    """
    first, *others = scale.resolutions
    return [
        *_tokens(scale, first, corpus, labelled),
        *_pretraining(scale),
        *(step for side in others for step in _tokens(scale, side, corpus, labelled)),
        *(_at_resolution(scale, side) for side in scale.resolutions),
        *_probes(scale),
        *_finetuning(scale),
        *_pictures(scale),
    ]


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
        yield Step(name, ("prepare", source, "-o", name, *flags), () if name == first else (first,))


def _pretraining(scale: Scale) -> Iterator[Step]:
    corpus = CORPUS.format(scale.resolutions[0])
    for size in reversed(scale.sizes):
        kept: Flags = {"snapshots": (*((0,) if size == scale.main else ()), *scale.snapshots)}
        yield _pretrain(scale, f"runs/{size}", size, corpus, scale.steps, kept)
    yield _pretrain(scale, "runs/bert", scale.main, corpus, scale.steps, {"objective": "bert"})


def _at_resolution(scale: Scale, side: int) -> Step:
    tokens = CORPUS.format(side)
    return _pretrain(
        scale, f"runs/at-{side}", scale.resolution_size, tokens, scale.resolution_steps, {}
    )


def _pretrain(scale: Scale, run: str, size: str, tokens: str, length: int, more: Flags) -> Step:
    layers, width, heads = scale.sizes[size]
    shape = {"n-layer": layers, "n-embd": width, "n-head": heads, "steps": length, "seed": 0}
    words = ("pretrain", tokens, "-o", run, "--model", "tiny", *_flags(scale.recipe, shape, more))
    return Step(run, words, (tokens,), run=True)


def _probes(scale: Scale) -> Iterator[Step]:
    side = scale.resolutions[0]
    labelled = LABELLED.format(side)
    many: Flags = {"limit": scale.probe_images, "test-images": scale.test_images}
    layers: Flags = {**many, "no-baselines": True}
    fewer: Flags = {**layers, "limit": scale.snapshot_images}
    for size in reversed(scale.sizes):
        for step in scale.snapshots:
            run = f"runs/{size}"
            yield _probe(f"probes/{size}-{step}", run, labelled, fewer, model=snapshot(run, step))
    main = f"runs/{scale.main}"
    yield _probe("probes/main", main, labelled, {**many, "labels-per-class": scale.few})
    yield _probe("probes/bert", "runs/bert", labelled, {**layers, "masks": scale.masks or None})
    yield _probe("probes/own", main, CORPUS.format(side), layers, optional=True)
    for side in scale.resolutions:
        yield _probe(f"probes/at-{side}", f"runs/at-{side}", LABELLED.format(side), fewer)


def _probe(
    name: str, run: str, tokens: str, flags: Flags, model: str = "", optional: bool = False
) -> Step:
    words = ("probe", model or run, tokens, "-o", f"{name}.json", *_flags(flags))
    return Step(name, words, (run, tokens), optional=optional)


def _finetuning(scale: Scale) -> Iterator[Step]:
    main = f"runs/{scale.main}"
    starts = {
        "ar": (main, main),
        "scratch": (snapshot(main, 0), main),
        "bert": ("runs/bert", "runs/bert"),
    }
    tokens = LABELLED.format(scale.resolutions[0])
    for start, (model, run) in starts.items():
        kind: Flags = {"generation-weight": 0.0} if start == "scratch" else {}
        name = f"finetuned/{start}-all"
        flags = _flags(scale.finetuning, scale.with_all, kind, {"seed": 0})
        yield Step(name, ("finetune", model, tokens, "-o", name, *flags), (run, tokens), run=True)
        if start == "bert":
            continue
        for count in scale.few:
            for subset in range(scale.subsets):
                name = f"finetuned/{start}-{count}-{subset}"
                flags = _flags(
                    scale.finetuning,
                    scale.with_few,
                    kind,
                    {"labels-per-class": count, "seed": subset},
                )
                yield Step(
                    name, ("finetune", model, tokens, "-o", name, *flags), (run, tokens), run=True
                )


def _pictures(scale: Scale) -> Iterator[Step]:
    size = next(reversed(scale.sizes))
    run, tokens = f"runs/{size}", CORPUS.format(scale.resolutions[0])
    for step in scale.snapshots:
        model = snapshot(run, step)
        name = f"pictures/samples-{step}"
        flags = _flags({"count": scale.pictures, "seed": 0})
        yield Step(name, ("sample", model, "-o", f"{name}.png", *flags), (run,))
        name = f"pictures/completions-{step}"
        flags = _flags(
            {"tokens": tokens, "count": scale.pictures // 2, "completions": 2, "seed": 0}
        )
        yield Step(name, ("complete", model, "-o", f"{name}.png", *flags), (run, tokens))
