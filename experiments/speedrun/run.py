"""The speedrun: minimize the training time to a fixed validation loss on CIFAR-10.

    python experiments/speedrun/run.py --data CIFAR10 --out DIR

Every training is `igpt pretrain` in its own process, with one thread; two run at a time, one per
core. Finished trainings (DIR/results) are not repeated. Interrupted ones start again from the
beginning, because their time must include all training.
The last step writes records.json and the table in README.md, in the folder of this file. Only
training time counts.
"""

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import tyro
import yaml

from igpt.data.images.palette import Palette
from igpt.data.tokens.dataset import TokenDataset, TokenSplit
from igpt.data.tokens.manifest import MANIFEST
from igpt.environment import describe
from igpt.errors import InputError, Interrupted, suggest
from igpt.evaluation.likelihood import score
from igpt.files import atomic_file, read_json, write_json
from igpt.model.transformer import ImageGPT
from igpt.reproduction.processes import Process, ProcessPool
from igpt.training.metrics import read_metrics
from igpt.training.pretrain import PretrainConfig
from igpt.training.signals import StopRequest

HERE = Path(__file__).parent
AT_A_TIME = 2  # trainings, with one thread each
MARKS = ("<!-- records -->", "<!-- end of records -->")

# Settings of all entries: a model that one core trains in minutes, and its validation.
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
        over: the entry whose settings `change` alters; None for the first.
        what: the change, for the table.
        average: number of snapshots, the last ones before each validation, whose mean weights are
            validated.
    """

    name: str
    over: str | None
    what: str
    change: Mapping[str, Any]
    average: int = 1


# One change each, with its own length of training; all are validated after every 80 images.
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
        "4 images per step instead of 8",
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
        "half as many steps",
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
        "rate", "start_from_palette", "learning rate 1e-2 instead of 5e-3", {"learning_rate": 1e-2}
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
        "mean weights of the last 3 snapshots, one every 5 steps",
        {"snapshots": [*range(5, 165, 5)]},
        3,
    ),
)
NAMES = {entry.name: entry for entry in ENTRIES}


def settings_of(name: str, steps: int | None = None) -> dict[str, Any]:
    """Return the settings of an entry, including those of the entries below it.

    Args:
        steps: number of steps, for a quick test.

    Raises:
        InputError: unknown entry.
    """
    if name not in NAMES:
        raise InputError(f"no entry {name!r}; {suggest(name, NAMES)}")
    entry = NAMES[name]
    settings = {**(settings_of(entry.over) if entry.over else COMMON), **entry.change}
    if steps is not None:
        settings |= {"steps": steps, "warmup_steps": 1, "validate_every": 1, "validation_images": 2}
        settings |= {"snapshots": [*range(1, steps + 1)]} if "snapshots" in settings else {}
    # Log with every validation, to know its time. No checkpoint is needed before the end.
    return {
        **settings,
        "log_every": settings["validate_every"],
        "checkpoint_every": settings["steps"],
    }


def _recorded_settings(name: str, seed: int, steps: int | None) -> dict[str, Any]:
    """Return everything that a result depends on."""
    average = NAMES[name].average
    return {**settings_of(name, steps), "seed": seed} | (
        {"average": average} if average > 1 else {}
    )


def prepare(data: str, palette: Path, out: Path) -> None:
    """Prepare the token data set `out/tokens` if it does not exist.

    Raises:
        InputError: the source cannot be prepared, or the existing tokens have another palette.
    """
    tokens = out / "tokens"
    if not (tokens / MANIFEST).exists():
        words = ("prepare", data, "-o", str(tokens), "--size", "32", "--palette", str(palette))
        for process in run_commands([("prepare", words)], out):
            require_success(process)
    if TokenDataset(tokens).palette.fingerprint != Palette.load(palette).fingerprint:
        raise InputError(
            f"the tokens in {tokens} have another palette than {palette}; choose another --out"
        )


def result_of(name: str, seed: int, out: Path, steps: int | None = None) -> dict[str, Any] | None:
    """Return the recorded result of a training, or None.

    Raises:
        InputError: it was made with other settings.
    """
    path = out / "results" / f"{name}-{seed}.json"
    if not path.exists():
        return None
    result = read_json(path, "result")
    if result["settings"] != _recorded_settings(name, seed, steps):
        raise InputError(f"{path} was made with other settings; delete it, or choose another --out")
    return result


def pretrain_command(name: str, seed: int, out: Path, steps: int | None) -> tuple[str, ...]:
    """Write the settings of a training, remove an interrupted one, and return the command."""
    run = out / "runs" / f"{name}-{seed}"
    shutil.rmtree(run, ignore_errors=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    recipe = run.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump({**settings_of(name, steps), "seed": seed}, sort_keys=False))
    return ("pretrain", str(out / "tokens"), "-o", str(run), "--config", str(recipe))


def write_result(name: str, seed: int, out: Path, steps: int | None = None) -> dict[str, Any]:
    """Write and return the result of a finished training."""
    run, settings = out / "runs" / f"{name}-{seed}", _recorded_settings(name, seed, steps)
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
        validation = TokenDataset(out / "tokens")["validation"]
        result["curve"] = averaged(run, validation, result["curve"], count)
    path = out / "results" / f"{name}-{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    return result


def run_commands(
    commands: Iterable[tuple[str, Sequence[str]]], out: Path, deadline: float = math.inf
) -> Iterator[Process]:
    """Run `igpt` commands, `AT_A_TIME` at a time with one thread each; yield each one when it ends.

    Args:
        commands: the name of each command's log, `out/NAME.txt`, and its words after `igpt`; taken
            one by one when a process is free.
        deadline: time (`time.monotonic`) after which no command starts.

    Raises:
        Interrupted: on Ctrl-C or SIGTERM, after the running commands have been stopped.
    """
    waiting = iter(commands)
    pool = ProcessPool(Path(), AT_A_TIME, threads=1)
    with StopRequest() as stop:
        try:
            while not stop.number:
                while not pool.is_full and time.monotonic() < deadline:
                    command = next(waiting, None)
                    if command is None:
                        break
                    name, words = command
                    pool.start(name, words, out / f"{name}.txt")
                if not pool.running:
                    return
                yield from pool.wait(0.5)
        finally:
            pool.stop()
    raise Interrupted(stop.number, "run the same command again to resume")


def require_success(process: Process) -> None:
    """Raise an InputError with the last line of the log if a command failed."""
    if process.exit_code:
        raise InputError(
            f"{process.name} ended with {process.exit_code}: {process.last_line} ({process.log})"
        )


def averaged(
    run: Path, validation: TokenSplit, curve: Sequence[Mapping[str, Any]], count: int
) -> list[dict[str, Any]]:
    """Return the validations of a run, with mean weights of the last `count` snapshots.

    Computing and validating the mean does not count as training time.
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
    """Return all recorded results, except those of entries whose settings have changed since."""
    found = []
    for name, seed in product(NAMES, seeds):
        path = out / "results" / f"{name}-{seed}.json"
        result = read_json(path, "result") if path.exists() else None
        if result and result["settings"] == _recorded_settings(name, seed, steps):
            found.append(result)
    return found


def measured(lines: Sequence[Mapping[str, Any]], batch_size: int) -> dict[str, Any]:
    """Return the validations of a training, with the training time before each, and the speed."""
    seconds = {line["step"]: line["seconds"] for line in lines if line["kind"] == "train"}
    curve = [
        {"step": line["step"], "seconds": seconds[line["step"]], "loss": line["loss"]}
        for line in lines
        if line["kind"] == "validation"
        and line["step"] in seconds  # not those of snapshots between them
    ]
    last = curve[-1]
    return {"curve": curve, "images_per_second": batch_size * last["step"] / last["seconds"]}


def target_of(results: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> float | None:
    """Return the mean of the first entry's final losses; None until all its seeds are done."""
    final = {
        result["seed"]: result["curve"][-1]["loss"]
        for result in results
        if result["entry"] == ENTRIES[0].name
    }
    return mean(final[seed] for seed in seeds) if final.keys() >= set(seeds) else None


def crossing(curve: Sequence[Mapping[str, Any]], target: float | None) -> tuple[float, int] | None:
    """Return seconds and steps until a validation curve reaches the target, interpolated."""
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
    """Return the record of a training: when it reached the target, if it did.

    Args:
        sets_target: its final loss defines the target; its time is that of the complete training.
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
    """Return True if an entry is an improvement: it reaches the target sooner, with no more images.

    Both are medians over the seeds. Images are compared too because the speed of the machine varies
    by 10 %. A seed that does not reach the target counts as infinitely slow. Return None for the
    first entry, and if the two entries were trained with different seeds.
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
    """Return the records as a Markdown table with one row per entry."""
    rows = [
        "| entry | over | what changed | seconds (range) | steps | final loss | images/s | kept | "
        "date | commit |",
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
    """Return all records with their target; by default, the first entry defines it."""
    processors = sorted({one["environment"]["processor"] for one in results})
    if len(processors) > 1:
        raise InputError(
            f"results of several processors cannot be compared: {', '.join(processors)}; choose "
            "another --out"
        )
    given = target is not None
    aim = target if given else target_of(results, seeds)
    first = ENTRIES[0].name
    return {
        "target": aim,
        "target_from": "given"
        if given
        else f"mean of the final losses of {first}, seeds {list(seeds)}",
        "how": (
            f"at most {AT_A_TIME} trainings at a time, of one thread each; seconds of training "
            "alone"
        ),
        "records": [
            record(one, aim, one["entry"] == first and not given and aim is not None)
            for one in results
        ],
        "machine": describe(),
    }


def write_table(text: str, readme: Path) -> None:
    """Write the table between the marks in a file."""
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
    """Run the trainings that are not done yet, and write the records.

    Args:
        data: CIFAR-10, as `igpt prepare` takes it.
        out: folder for tokens, runs and results.
        palette: palette of all entries.
        seeds: random seeds of the weights and of the order of images.
        only: entries to train; by default all. The summary contains all recorded results.
        target: validation loss to reach; by default the mean final loss of the first entry.
        minutes: start no training after this time; 0 only writes the summary.
        steps: test run with this number of steps; the table is printed, and nothing is recorded.
    """
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    for name in only:
        settings_of(name)
    if steps is not None:
        out = out / "try"
    if minutes != 0:
        prepare(data, palette, out)
    wanted = {
        f"runs/{entry.name}-{seed}": (entry.name, seed)
        for entry, seed in product(ENTRIES, seeds)
        if not only or entry.name in only
    }
    todo = {log: one for log, one in wanted.items() if result_of(*one, out, steps) is None}
    commands = ((log, pretrain_command(*one, out, steps)) for log, one in list(todo.items()))
    failures: list[str] = []
    for process in run_commands(commands, out, deadline):
        name, seed = todo.pop(process.name)
        try:
            require_success(process)
            last = write_result(name, seed, out, steps)["curve"][-1]
        except InputError as error:
            failures.append(str(error))
            print(error, flush=True)
            continue
        print(
            f"{name}, seed {seed}: loss {last['loss']:.4f} after {last['step']} steps, "
            f"{last['seconds']:.0f} s",
            flush=True,
        )
    if todo:
        print(f"not trained, for lack of time: {', '.join(todo)}")
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
    except Interrupted as error:
        print(error, file=sys.stderr)
        raise SystemExit(128 + error.number) from None
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
