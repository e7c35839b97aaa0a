"""The race: which recipe trains a small model to a fixed loss with least time and fewest images?

    python experiments/speedrun/run.py --tokens TOKENS            trains, and writes the table
    python experiments/speedrun/run.py --tokens TOKENS --measure  measures seconds per image
    python experiments/speedrun/run.py                            writes the table in README.md

Every training is `train.py` in its own process, with one thread; two run at a time. Finished ones
(results/) are not repeated; interrupted ones start again.
"""

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import tyro

from igpt.data.images.palette import Palette
from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError, Interrupted
from igpt.files import atomic_file, read_json, write_json
from igpt.reproduction.processes import ProcessPool
from igpt.training.signals import StopRequest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from recipe import Recipe  # noqa: E402

RESULTS, PALETTE = HERE / "results", HERE / "palette.npy"
TRAIN = (sys.executable, str(HERE / "train.py"))
SEEDS = (0, 1, 2)
AT_A_TIME = 2  # trainings, of one thread each
BEHIND = 0.15  # nats/pixel above the best of a search at which its other trainings stop
MARKS = ("<!-- records -->", "<!-- end of records -->")
BASELINE = "paper"


@dataclass(frozen=True)
class Entry:
    """A recipe: one change to an earlier entry.

    Attributes:
        over: the entry that it changes; None for the first.
        what: the change, for the table.
        change: settings of `Recipe`.
        search: values that are tried with seed 0; the best by final loss gets the other seeds.
    """

    name: str
    over: str | None
    what: str
    change: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Sequence[Any]] = field(default_factory=dict)


ENTRIES = (
    Entry(
        BASELINE,
        None,
        "the paper's recipe: Adam (0.9, 0.95), cosine to 0 after a warm-up, learned positions",
        {"images": 30_720, "validate_every": 7_680},
        {"batch": (8, 16, 32), "rate": (1e-3, 3e-3, 3e-4)},
    ),
    Entry(
        "muon",
        BASELINE,
        "Muon for the matrices of the blocks, a quarter of the images",
        {"images": 7_680, "validate_every": 2_560, "optimizer": "muon"},
        {"batch": (16, 8), "rate": (5e-3, 3e-3, 1e-2)},
    ),
    Entry(
        "palette",
        "muon",
        "colour embeddings from the palette's RGB values",
        {"from_palette": True},
    ),
    Entry("rotary", "palette", "2-D RoPE instead of learned positions", {"positions": "rotary"}),
    Entry(
        "value_residual", "rotary", "values mixed with the first block's", {"value_residual": True}
    ),
    Entry(
        "again",
        "value_residual",
        "batch size and learning rate searched again",
        {},
        {"batch": (16, 8), "rate": (5e-3, 1e-2)},
    ),
    Entry(
        "random_embeddings",
        "value_residual",
        "random colour embeddings, as in the paper's recipe",
        {"from_palette": False},
    ),
    Entry(
        "shared_updates",
        "value_residual",
        "updates of embeddings and head shared by near colours",
        {"share_color_updates": True},
    ),
    Entry(
        "neighbors",
        "value_residual",
        "embeddings of the upper, upper left and upper right pixels",
        {"neighbors": ("up", "up-left", "up-right")},
    ),
    Entry(
        "head_from_palette",
        "value_residual",
        "output matrix from the palette",
        {"head_from_palette": 1.0},
    ),
    Entry(
        "value_embeddings",
        "value_residual",
        "embeddings in values of two blocks at each end",
        {"value_embeddings": 2},
    ),
    Entry("scalars", "value_residual", "learned scalars on the input embedding", {"scalars": True}),
    Entry(
        "local", "value_residual", "every second block attends to three rows", {"local": (0, 2, 4)}
    ),
    Entry("softcap", "value_residual", "logits bounded by 15", {"softcap": 15.0}),
    Entry("linear", "value_residual", "linear schedule", {"schedule": "linear"}),
    Entry(
        "constant",
        "value_residual",
        "constant rate, falling in the second half",
        {"schedule": "constant"},
    ),
    Entry(
        "growing",
        "value_residual",
        "batches of 8, from a third on 16, in the last third 32",
        {"batch": 8, "batches": ((2_560, 16), (5_120, 32))},
    ),
    Entry("flip", "value_residual", "mirrored images", {"flip": True}),
    Entry("momentum", "value_residual", "momentum rises over 100 steps", {"momentum_warmup": 100}),
    Entry(
        "decay",
        "value_residual",
        "cautious weight decay of 0.1",
        {"weight_decay": 0.1, "cautious": True},
    ),
)
NAMES = {entry.name: entry for entry in ENTRIES}
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Training:
    """One training of an entry.

    Attributes:
        values: of the settings that the entry searches.
    """

    entry: str
    recipe: Recipe
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of its files."""
        searched = [f"{key}{value:g}" for key, value in self.values.items()]
        return "-".join([self.entry, *searched, f"seed{self.recipe.seed}"])


class Race:
    """The recorded results, and what they decide.

    Raises:
        InputError: a result was made with other settings than its entry has.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def result(self, training: Training) -> Result | None:
        """Return the result of a training if it has finished."""
        path = self.folder / f"{training.name}.json"
        if not path.exists():
            return None
        result = read_json(path, "result")
        if result["recipe"] != training.recipe.model_dump(mode="json", exclude_defaults=True):
            raise InputError(f"{path} was made with other settings; delete it to train again")
        return result if result["finished"] else None

    def searched(self, entry: Entry) -> list[Training]:
        """Return the trainings of an entry's search; none while what it changes is not decided."""
        base: dict[str, Any] = {}
        if entry.over is not None:
            over = self.best(NAMES[entry.over])
            if over is None:
                return []
            base = over.recipe.model_dump(exclude_defaults=True)
        values = [
            dict(zip(entry.search, some, strict=True)) for some in product(*entry.search.values())
        ]
        recipes = [Recipe.layered(base, entry.change, some, where=entry.name) for some in values]
        return [Training(entry.name, *both) for both in zip(recipes, values, strict=True)]

    def best(self, entry: Entry) -> Training | None:
        """Return the best training of a finished search."""
        found = [(self.result(one), one) for one in self.searched(entry)]
        done = [(final(result), one) for result, one in found if result is not None]
        if not found or len(done) < len(found):
            return None
        return min(done, key=lambda both: both[0])[1]

    def repeated(self, entry: Entry) -> list[Training]:
        """Return the trainings of the best settings with all seeds.

        An entry whose first seed ends above that of the entry it changes has lost: it gets no
        others, unless it is the shorter one.
        """
        best = self.best(entry)
        if best is None:
            return []
        seeds: Sequence[int] = SEEDS
        if entry.over is not None and "images" not in entry.change:
            over = self.best(NAMES[entry.over])
            assert over is not None
            mine, other = self.result(best), self.result(over)
            assert mine is not None
            assert other is not None
            seeds = SEEDS if final(mine) < final(other) else SEEDS[:1]
        return [
            Training(entry.name, best.recipe.model_copy(update={"seed": seed}), best.values)
            for seed in seeds
        ]

    def next(self, running: Iterable[str]) -> Training | None:
        """Return a training to start now."""
        for entry in ENTRIES:
            for one in [*self.searched(entry), *self.repeated(entry)]:
                if one.name not in running and self.result(one) is None:
                    return one
        return None

    def limits(self, training: Training) -> dict[int, float]:
        """Return the losses above which a training of a search stops, by images seen.

        From half of the schedule on, they are `BEHIND` above the best of the search.
        """
        found = [self.result(one) for one in self.searched(NAMES[training.entry])]
        points = [point for result in found if result for point in result["curve"]]
        best: dict[int, float] = {}
        for point in points:
            if 2 * point["images"] >= training.recipe.images:
                best[point["images"]] = min(point["loss"], best.get(point["images"], math.inf))
        return {images: loss + BEHIND for images, loss in best.items()}

    def seeds(self, entry: Entry) -> list[Result]:
        """Return the results of an entry's best settings, one per finished seed."""
        found = [self.result(one) for one in self.repeated(entry)]
        return [result for result in found if result is not None]

    def needs_fewer(self, entry: Entry) -> bool:
        """Return whether every seed needs fewer images than the median of what it changes."""
        target = self.target()
        if target is None or len(self.seeds(entry)) < len(SEEDS):
            return False
        if entry.over is None:
            return True
        before = median(needed(self, NAMES[entry.over], target))
        return max(needed(self, entry, target)) < before

    def target(self) -> float | None:
        """Return the mean final loss of the baseline; None until all its seeds have finished."""
        losses = [final(result) for result in self.seeds(NAMES[BASELINE])]
        return mean(losses) if len(losses) == len(SEEDS) else None


def final(result: Result) -> float:
    """Return the last validation loss; infinity if the training stopped before its end."""
    return math.inf if result["behind"] else float(result["curve"][-1]["loss"])


def images_to(result: Result, target: float) -> float:
    """Return the images until the validation loss reaches a target, interpolated linearly."""
    before: Mapping[str, float] | None = None
    for point in result["curve"]:
        if point["loss"] <= target:
            if before is None:
                return float(point["images"])
            part = (before["loss"] - target) / (before["loss"] - point["loss"])
            return float(before["images"] + part * (point["images"] - before["images"]))
        before = point
    return math.inf


def needed(race: Race, entry: Entry, target: float) -> list[float]:
    """Return the images to the target for each seed; the baseline needs all of its own."""
    results = race.seeds(entry)
    if entry.name == BASELINE:
        return [float(result["curve"][-1]["images"]) for result in results]
    return [images_to(result, target) for result in results]


def table(race: Race, speeds: Mapping[str, float]) -> str:
    """Return the table of entries.

    Args:
        speeds: seconds per image, by entry.
    """
    target = race.target()
    rows = [
        "| entry | over | what changed | searched | final loss | images to the target | seconds | "
        "images/s | seeds | kept |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    medians: dict[str, tuple[float, float]] = {}
    for entry in ENTRIES:
        results = race.seeds(entry)
        if not results:
            continue
        losses = [final(result) for result in results]
        loss = f"{mean(losses):.4f}"
        if len(losses) > 1:
            loss += f" ({min(losses):.4f} to {max(losses):.4f})"
        images = "" if target is None else "not reached"
        seconds, kept, speed = "", "", speeds.get(entry.name)
        if target is not None:
            found = needed(race, entry, target)
            typical = median(found)
            time_needed = typical * (speed or math.nan)
            medians[entry.name] = (typical, time_needed)
            if typical < math.inf:
                images, seconds = f"{typical:,.0f}", f"{time_needed:.0f}" if speed else ""
            if entry.over in medians:
                before = medians[entry.over]
                kept = "yes" if race.needs_fewer(entry) and not time_needed >= before[1] else "no"
        best = race.best(entry)
        assert best is not None
        searched = ", ".join(f"{key} {value:g}" for key, value in best.values.items())
        rate = f"{1 / speed:.1f}" if speed else ""
        cells = [
            entry.name,
            entry.over or "",
            entry.what,
            searched,
            loss,
            images,
            seconds,
            rate,
            str(len(results)),
            kept,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    said = "not known yet" if target is None else f"{target:.4f} nats/pixel"
    return "\n".join([f"Target: {said}.", "", *rows])


def search_table(race: Race) -> str:
    """Return the table of all searches: the final loss with seed 0."""
    rows = ["| entry | settings | loss |", "|---|---|---:|"]
    for entry in ENTRIES:
        for training in race.searched(entry) if entry.search else []:
            result = race.result(training)
            if result is None:
                continue
            last = result["curve"][-1]
            loss = f"{last['loss']:.4f}"
            if result["behind"]:
                loss += f" after {last['images']:,} images, where it stopped"
            settings = ", ".join(f"{key} {value:g}" for key, value in training.values.items())
            rows.append(f"| {entry.name} | {settings} | {loss} |")
    return "\n".join(rows)


def write_tables(text: str, readme: Path) -> None:
    """Write tables between the marks in a file."""
    before, rest = readme.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    with atomic_file(readme) as temporary:
        temporary.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")


def train_all(race: Race, tokens: Path, scratch: Path, deadline: float) -> None:
    """Train what the results so far ask for, `AT_A_TIME` at a time.

    Raises:
        InputError: a training failed.
        Interrupted: on Ctrl-C or SIGTERM, after the running trainings have been stopped.
    """
    pool, running = ProcessPool(Path(), AT_A_TIME, threads=1, program=TRAIN), set[str]()
    with StopRequest() as stop:
        try:
            while not stop.number:
                while not pool.is_full and time.monotonic() < deadline:
                    training = race.next(running)
                    if training is None:
                        break
                    limits = race.limits(training)
                    start(race, training, tokens, scratch, pool, limits)
                    running.add(training.name)
                if not pool.running:
                    return
                for process in pool.wait(0.5):
                    running.discard(process.name)
                    if process.exit_code:
                        raise InputError(f"{process.name}: {process.last_line} ({process.log})")
                    last = read_json(race.folder / f"{process.name}.json", "result")["curve"][-1]
                    print(
                        f"{process.name}: {last['loss']:.4f} after {last['images']} images",
                        flush=True,
                    )
        finally:
            pool.stop()
    raise Interrupted(stop.number, "run the same command again to continue")


def start(
    race: Race,
    training: Training,
    tokens: Path,
    scratch: Path,
    pool: ProcessPool,
    limits: Mapping[int, float],
) -> None:
    """Start a training.

    Args:
        limits: see `Race.limits`.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    recipe = scratch / f"{training.name}.json"
    recipe.write_text(training.recipe.model_dump_json(exclude_defaults=True))
    out = race.folder / f"{training.name}.json"
    words = (str(tokens), str(recipe), str(out), json.dumps(limits))
    pool.start(training.name, words, scratch / f"{training.name}.txt")


def measure(
    race: Race, tokens: Path, scratch: Path, rounds: int = 3, steps: int = 16
) -> dict[str, float]:
    """Return seconds per image of the baseline and of all entries that need fewer images.

    They are medians of short trainings in turns.
    """
    found: dict[str, list[float]] = {}
    short = Race(scratch)
    for _ in range(rounds):
        for entry in ENTRIES:
            best = race.best(entry)
            if best is None or not race.needs_fewer(entry):
                continue
            size = best.recipe.batch
            change = {
                "images": 2 * steps * size,
                "validate_every": steps * size,
                "validation_images": 1,
            }
            training = Training(f"speed-{entry.name}", best.recipe.model_copy(update=change), {})
            pool = ProcessPool(Path(), 1, threads=1, program=TRAIN)
            start(short, training, tokens, scratch, pool, {})
            while pool.running:
                list(pool.wait(0.1))
            first, last = read_json(scratch / f"{training.name}.json", "result")["curve"]
            spent = last["seconds"] - first["seconds"]  # the first half warms up
            found.setdefault(entry.name, []).append(spent / (last["images"] - first["images"]))
    return {name: median(times) for name, times in found.items()}


def main(
    tokens: Path | None = None,
    scratch: Path = Path("/tmp/igpt-race"),
    minutes: float = math.inf,
    measure_speeds: bool = False,
) -> None:
    """Train what is missing, or measure speeds; then write the tables in README.md.

    Args:
        tokens: Tiny ImageNet at 16 px, prepared with palette.npy.
        scratch: folder for logs.
        minutes: start no training after this time.
        measure_speeds: instead, measure seconds per image; nothing else may run.
    """
    race, speeds = Race(RESULTS), RESULTS / "speeds.json"
    if tokens is not None:
        if TokenDataset(tokens).palette.fingerprint != Palette.load(PALETTE).fingerprint:
            raise InputError(f"{tokens} has another palette; prepare it with --palette {PALETTE}")
        if measure_speeds:
            write_json(speeds, measure(race, tokens, scratch))
        else:
            train_all(race, tokens, scratch, time.monotonic() + 60 * minutes)
    known = read_json(speeds, "speeds") if speeds.exists() else {}
    text = f"{table(race, known)}\n\n### Searches\n\n{search_table(race)}"
    print(text)
    write_tables(text, HERE / "README.md")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except Interrupted as error:
        print(error, file=sys.stderr)
        raise SystemExit(128 + error.number) from None
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
