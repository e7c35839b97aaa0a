"""The speedrun: the least training time to a fixed validation loss on CIFAR-10's tokens, one improvement at a time.

    python experiments/speedrun/run.py --data CIFAR10 --palette experiments/speedrun/palette.npy
    --out DIR

Every training is `igpt pretrain` in a process of its own, with one thread; two run at a time, one a
core. What is done (DIR/results) is not repeated; what was interrupted is begun anew, since its
clock would lack what was lost.
The summary comes last: records.json, and the table in README.md, both beside this file. Only
    training time counts.
"""

import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import tyro
import yaml

from igpt.data.images.palette import Palette
from igpt.data.tokens.dataset import MANIFEST, TokenDataset, TokenSplit
from igpt.environment import describe
from igpt.errors import InputError, suggest
from igpt.evaluation.likelihood import score
from igpt.files import atomic_file, read_json, write_json
from igpt.model.transformer import ImageGPT
from igpt.training.metrics import read_metrics
from igpt.training.pretrain import PretrainConfig

HERE = Path(__file__).parent
AT_A_TIME = 2  # trainings at most, of one thread each
MARKS = ("<!-- records -->", "<!-- end of records -->")

# What all entries have: a model that a core trains in minutes, and how it is looked at.
COMMON: Mapping[str, Any] = {
    "resolution": 32,
    "n_layer": 4,
    "n_embd": 64,
    "n_head": 2,
    "device": "cpu",
    "compile": "no",
    "precision": "fp32",
    "validation_images": 64,
    "keep_checkpoints": 1,
}


@dataclass(frozen=True)
class Entry:
    """One way to train.

    Attributes:
        over: the entry whose settings `change` alters; the first has none.
        what: the improvement, for the table.
        average: judged are means of the weights of so many snapshots, the last ones before each
            validation.
    """

    name: str
    over: str | None
    what: str
    change: Mapping[str, Any]
    average: int = 1


# One improvement each, with the length that it wants; all are validated after every 80 images.
ENTRIES = (
    Entry(
        "faithful",
        None,
        "the paper's recipe: AdamW (0.9, 0.95), cosine to 0 after a warm-up, learned positions",
        {
            "batch_size": 8,
            "steps": 160,
            "warmup_steps": 16,
            "learning_rate": 3e-3,
            "schedule": "cosine",
            "optimizer": "adamw",
            "validate_every": 10,
        },
    ),
    Entry(
        "batch",
        "faithful",
        "4 images an update in place of 8",
        {
            "batch_size": 4,
            "steps": 240,
            "warmup_steps": 24,
            "learning_rate": 3e-3,
            "validate_every": 20,
        },
    ),
    Entry(
        "muon",
        "batch",
        "Muon, learning rate 5e-3",
        {"optimizer": "muon", "learning_rate": 5e-3, "steps": 160, "warmup_steps": 16},
    ),
    Entry(
        "start_from_palette",
        "muon",
        "colour embeddings initialized from the palette's RGB values",
        {"start_from_palette": True},
    ),
    Entry(
        "rotary",
        "start_from_palette",
        "rotary positions of rows and columns",
        {"positions": "rotary"},
    ),
    Entry(
        "shorter",
        "start_from_palette",
        "half as many updates planned",
        {"steps": 80, "warmup_steps": 8},
    ),
    Entry("shorter_rotary", "shorter", "rotary positions once more", {"positions": "rotary"}),
    Entry(
        "value_residual",
        "start_from_palette",
        "values mixed with the first block's",
        {"value_residual": True},
    ),
    Entry(
        "rate", "start_from_palette", "learning rate 1e-2 in place of 5e-3", {"learning_rate": 1e-2}
    ),
    Entry(
        "rate_residual",
        "rate",
        "values mixed with the first block's, once more",
        {"value_residual": True},
    ),
    Entry(
        "rate_rotary", "rate_residual", "rotary positions, a third time", {"positions": "rotary"}
    ),
    Entry(
        "averaged",
        "rate_residual",
        "mean weights of the last 3 of 5 updates each",
        {"snapshots": [*range(5, 165, 5)]},
        3,
    ),
)
NAMES = {entry.name: entry for entry in ENTRIES}


def settings_of(name: str, steps: int | None = None) -> dict[str, Any]:
    """The settings of an entry, those that it is over included.

    Args:
        steps: to try it with so few updates.

    Raises:
        InputError: there is no such entry.
    """
    if name not in NAMES:
        raise InputError(f"no entry {name!r}; {suggest(name, NAMES)}")
    entry = NAMES[name]
    settings = {**(settings_of(entry.over) if entry.over else COMMON), **entry.change}
    if steps is not None:
        settings |= {"steps": steps, "warmup_steps": 1, "validate_every": 1, "validation_images": 2}
        settings |= {"snapshots": [*range(1, steps + 1)]} if "snapshots" in settings else {}
    # A line of metrics with every validation tells when it was; a checkpoint is not needed before
    # the end.
    return {
        **settings,
        "log_every": settings["validate_every"],
        "checkpoint_every": settings["steps"],
    }


def _asked(name: str, seed: int, steps: int | None) -> dict[str, Any]:
    """All that a result depends on."""
    average = NAMES[name].average
    return {**settings_of(name, steps), "seed": seed} | (
        {"average": average} if average > 1 else {}
    )


def prepare(data: str, palette: Path, tokens: Path) -> None:
    """Makes the token data set if it is not there.

    Raises:
        InputError: the source cannot be prepared, or the tokens that are there have another
            palette.
    """
    if not (tokens / MANIFEST).exists():
        _igpt(
            tokens.parent / "prepare.txt",
            "prepare",
            data,
            "-o",
            tokens,
            "--size",
            32,
            "--palette",
            palette,
        )
    if TokenDataset(tokens).palette.fingerprint != Palette.load(palette).fingerprint:
        raise InputError(
            f"the tokens in {tokens} have another palette than {palette}; choose another --out"
        )


def train(name: str, seed: int, out: Path, steps: int | None = None) -> dict[str, Any]:
    """Trains an entry, and writes and returns its result; one that is there already is returned as it is.

    Raises:
        InputError: the training failed, or the result that is there was made with other settings.
    """
    settings = _asked(name, seed, steps)
    path = out / "results" / f"{name}-{seed}.json"
    if path.exists():
        result = read_json(path, "result")
        if result["settings"] != settings:
            raise InputError(
                f"{path} was made with other settings; delete it, or choose another --out"
            )
        return result
    run = out / "runs" / f"{name}-{seed}"
    shutil.rmtree(run, ignore_errors=True)
    for folder in (path.parent, run.parent):
        folder.mkdir(parents=True, exist_ok=True)
    recipe = run.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump({**settings_of(name, steps), "seed": seed}, sort_keys=False))
    _igpt(run.with_suffix(".txt"), "pretrain", out / "tokens", "-o", run, "--config", recipe)
    result = {
        "entry": name,
        "seed": seed,
        "settings": settings,
        **measured(read_metrics(run / "metrics.jsonl"), settings["batch_size"]),
        "environment": {
            **read_json(run / "environment.json", "run"),
            "threads": 1,
            "trainings_at_a_time": AT_A_TIME,
        },
    }
    if (count := NAMES[name].average) > 1:
        result["curve"] = averaged(
            run, TokenDataset(out / "tokens")["validation"], result["curve"], count
        )
    write_json(path, result)
    return result


def averaged(
    run: Path, validation: TokenSplit, curve: Sequence[Mapping[str, Any]], count: int
) -> list[dict[str, Any]]:
    """The validations of a run, of the mean weights of the last `count` snapshots up to each of them.

    Making and judging a mean takes no training time.
    """
    config = PretrainConfig.load(run / "config.yaml")
    images, kept, found = (
        validation.spread(config.validation_images),
        sorted((run / "snapshots").iterdir()),
        [],
    )
    for point in curve:
        last = [path for path in kept if int(path.name.split("-")[1]) <= point["step"]][-count:]
        models = [ImageGPT.from_pretrained(path) for path in last]
        weights = [model.state_dict() for model in models]
        means = {
            name: torch.stack([one[name] for one in weights]).mean(dim=0) for name in weights[0]
        }
        models[0].load_state_dict(means)
        found.append({**point, "loss": float(score(models[0], images).mean())})
    return found


def done_before(out: Path, seeds: Sequence[int], steps: int | None = None) -> list[dict[str, Any]]:
    """All results that are there, but for those of entries that have other settings now."""
    found = []
    for name, seed in product(NAMES, seeds):
        path = out / "results" / f"{name}-{seed}.json"
        result = read_json(path, "result") if path.exists() else None
        if result and result["settings"] == _asked(name, seed, steps):
            found.append(result)
    return found


def measured(lines: Sequence[Mapping[str, Any]], batch_size: int) -> dict[str, Any]:
    """What metrics tell of a training: every validation with the seconds of training before it, and the speed."""
    seconds = {line["step"]: line["seconds"] for line in lines if line["kind"] == "train"}
    curve = [
        {"step": line["step"], "seconds": seconds[line["step"]], "loss": line["loss"]}
        for line in lines
        if line["kind"] == "validation"
        and line["step"] in seconds  # not those of snapshots between them
    ]
    last = curve[-1]
    return {"curve": curve, "images_per_second": batch_size * last["step"] / last["seconds"]}


def _igpt(log: Path, *words: object) -> None:
    """Runs a command of `igpt` with one thread; what it says goes to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "igpt", *map(str, words)]
    with log.open("w") as said:
        done = subprocess.run(
            command, stdout=said, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    if done.returncode:
        told = log.read_text().strip().splitlines()
        raise InputError(
            f"igpt {words[0]} ended with {done.returncode}: {told[-1] if told else ''} ({log})"
        )


def target_of(results: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> float | None:
    """The mean of the first entry's final losses; None until all its seeds are done."""
    final = {
        result["seed"]: result["curve"][-1]["loss"]
        for result in results
        if result["entry"] == ENTRIES[0].name
    }
    return mean(final[seed] for seed in seeds) if final.keys() >= set(seeds) else None


def crossing(curve: Sequence[Mapping[str, Any]], target: float | None) -> tuple[float, int] | None:
    """Seconds and updates until a validation curve came to the target, between two validations by straight lines."""
    before: Mapping[str, Any] | None = None
    for point in curve:
        if target is not None and point["loss"] <= target:
            if before is None:
                return point["seconds"], point["step"]
            part = (before["loss"] - target) / (before["loss"] - point["loss"])
            seconds, step = (
                before[key] + part * (point[key] - before[key]) for key in ("seconds", "step")
            )
            return seconds, round(step)
        before = point
    return None


def record(
    result: Mapping[str, Any], target: float | None, sets_target: bool = False
) -> dict[str, Any]:
    """One training's record: when it came to the target, if it did.

    Args:
        sets_target: its own final loss made the target: its time is that of all of it.
    """
    curve, environment = result["curve"], result["environment"]
    at = (curve[-1]["seconds"], curve[-1]["step"]) if sets_target else crossing(curve, target)
    return {
        "entry": result["entry"],
        "seed": result["seed"],
        "reached": at is not None,
        "seconds": at and at[0],
        "updates": at and at[1],
        "final_loss": curve[-1]["loss"],
        "images_per_second": result["images_per_second"],
        "settings": result["settings"],
        "commit": environment["commit"],
        "date": environment["started"][:10],
    }


def kept(name: str, records: Sequence[Mapping[str, Any]]) -> bool | None:
    """Whether an entry is an improvement: by medians over the seeds it is at the target sooner, with no more images.

    The machine's speed wanders by a tenth, which images do not. A seed that does not come to the
    target takes for ever. None of the first entry, and while the two have not been trained with the
    same seeds.
    """
    over = NAMES[name].over
    mine, others = ([one for one in records if one["entry"] == which] for which in (name, over))
    if not mine or {one["seed"] for one in mine} != {one["seed"] for one in others}:
        return None

    def taken(
        some: Sequence[Mapping[str, Any]], what: Callable[[Mapping[str, Any]], float]
    ) -> float:
        return median(what(one) if one["reached"] else math.inf for one in some)

    def images(one: Mapping[str, Any]) -> float:
        return float(one["updates"] * one["settings"]["batch_size"])

    sooner = taken(mine, lambda one: one["seconds"]) < taken(others, lambda one: one["seconds"])
    return sooner and taken(mine, images) <= taken(others, images)


def table(records: Sequence[Mapping[str, Any]], target: float | None) -> str:
    """The records in Markdown, an entry a row."""
    rows = [
        "| entry | over | what changed | seconds (range) | updates | final loss | images/s | kept | date | commit |",
        "|---|---|---|---:|---:|---:|---:|---|---|---|",
    ]
    for entry in ENTRIES:
        some = [one for one in records if one["entry"] == entry.name]
        if not some:
            continue
        times = sorted(one["seconds"] for one in some if one["reached"])
        updates = [one["updates"] for one in some if one["reached"]]
        took = (
            f"{median(times):.0f} ({times[0]:.0f} to {times[-1]:.0f})" if times else "not reached"
        )
        if times and len(times) < len(some):
            took += f", {len(some) - len(times)} of {len(some)} not reached"
        losses = sorted(one["final_loss"] for one in some)
        cells = [
            entry.name,
            entry.over or "",
            entry.what,
            took,
            f"{median(updates):.0f}" if updates else "",
            f"{mean(losses):.4f} ({losses[0]:.4f} to {losses[-1]:.4f})",
            f"{mean(one['images_per_second'] for one in some):.1f}",
            {True: "yes", False: "no", None: ""}[kept(entry.name, records)],
            max(one["date"] for one in some),
            ", ".join(sorted({f"`{one['commit']}`" for one in some})),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    aim = "not set yet" if target is None else f"a validation loss of {target:.4f} nats/pixel"
    return "\n".join([f"Target: {aim}.", "", *rows])


def summarise(
    results: Sequence[Mapping[str, Any]], seeds: Sequence[int], target: float | None
) -> dict[str, Any]:
    """All records, and what they are measured by; without a target, the first entry sets it."""
    processors = sorted({one["environment"]["processor"] for one in results})
    if len(processors) > 1:
        raise InputError(
            f"results of several processors cannot be compared: {', '.join(processors)}; choose another --out"
        )
    given = target is not None
    aim = target if given else target_of(results, seeds)
    first = ENTRIES[0].name
    return {
        "target": aim,
        "target_from": "given"
        if given
        else f"mean of the final losses of {first}, seeds {list(seeds)}",
        "how": f"at most {AT_A_TIME} trainings at a time, of one thread each; seconds of training alone",
        "records": [
            record(one, aim, one["entry"] == first and not given and aim is not None)
            for one in results
        ],
        "machine": describe(),
    }


def write_table(text: str, readme: Path) -> None:
    """Puts the table between the marks in a file."""
    before, rest = readme.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    with atomic_file(readme) as temporary:
        temporary.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")


def main(
    data: str,
    out: Path,
    palette: Path = HERE / "palette.npy",
    seeds: tuple[int, ...] = (0, 1, 2),
    only: tuple[str, ...] = (),
    target: float | None = None,
    minutes: float | None = None,
    steps: int | None = None,
) -> None:
    """Trains what is not done yet, and writes the records.

    Args:
        data: CIFAR-10, as `igpt prepare` takes it.
        out: folder for tokens, runs and results.
        palette: of all entries.
        seeds: of the weights and of the order of images.
        only: entries to train; all by default. The summary is of all that is there.
        target: validation loss to reach; by default what the first entry ends with, by the mean
            over its seeds.
        minutes: begin no training after so long; 0 only makes the summary.
        steps: only try the entries with so few updates; the table is printed and nothing recorded.
    """
    failures: list[str] = []
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    for name in only:
        settings_of(name)
    wanted = [entry.name for entry in ENTRIES if not only or entry.name in only]

    def job(name: str, seed: int) -> str:
        if time.monotonic() >= deadline and not (out / "results" / f"{name}-{seed}.json").exists():
            return f"{name}, seed {seed}: left for another time"
        try:
            last = train(name, seed, out, steps)["curve"][-1]
        except InputError as error:
            failures.append(f"{name}, seed {seed}: {error}")
            return failures[-1]
        return f"{name}, seed {seed}: loss {last['loss']:.4f} after {last['step']} updates, {last['seconds']:.0f} s"

    if steps is not None:
        out = out / "try"
    if minutes != 0:
        prepare(data, palette, out / "tokens")
    pool = ThreadPoolExecutor(AT_A_TIME)
    try:
        for done in as_completed(
            [pool.submit(job, name, seed) for name, seed in product(wanted, seeds)]
        ):
            print(done.result(), flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    summary = summarise(done_before(out, seeds, steps), seeds, target)
    text = table(summary["records"], summary["target"])
    print(f"\n{text}")
    if steps is None:
        write_json(HERE / "records.json", summary)
        write_table(text, HERE / "README.md")
    if failures:
        raise InputError(f"{len(failures)} trainings failed; the first was {failures[0]}")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
