"""The training loop, and only the loop: it knows no objective, no data set and no evaluation by name."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from igpt.data.tokens.batches import Batch, Prefetch
from igpt.errors import InputError, Interrupted
from igpt.model.cost import training_flops
from igpt.model.precision import matmul_rate, resolve_precision
from igpt.progress import ProgressBar, progress_bar
from igpt.training.checkpoints import Checkpoints, TrainingState, checkpoints, step_of
from igpt.training.engine import Engine
from igpt.training.metrics import Metrics
from igpt.training.optimizer import learning_rate
from igpt.training.parallelize import LossFunction
from igpt.training.signals import StopRequest, exit_if_stuck, stop_on_signals


class Diverged(InputError):  # noqa: N818  as its siblings in errors.py
    """A run has come to losses or gradients that are not finite; the message says where, and what to resume from."""


class _Clock:
    """Time spent in updates since the last line of metrics, without what was spent between them."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.images = 0
        self._since = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._since

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began


@dataclass(frozen=True)
class Validation:
    """What the best model is chosen by: the mean over some images of what an objective gives; the least is the best.

    Attributes:
        name: what it is called in metrics.jsonl.
        images: how many.
        batch: the tensors of the images from a first one up to a last one.
    """

    name: str
    objective: LossFunction
    images: int
    batch: Callable[[int, int], Batch]


@dataclass
class Trainer:
    """Everything the loop needs.

    Args:
        batches: the whole batch of update s, as tensors whose rows are images; a pure function of
            s. It runs in a thread of its own while the update before is computed.
        run: the run directory, with config.yaml already in it.
        warmup: updates over which the learning rate rises.
    """

    engine: Engine
    batches: Callable[[int], Batch]
    validation: Validation
    run: Path
    warmup: int
    title: str = "pretraining"

    def train(
        self, *, resume: bool = False, on_start: Callable[[Metrics], None] | None = None
    ) -> TrainingState:
        """Trains to the last update; the best model by validation stands in RUN/model.

        Args:
            resume: continue from the newest whole checkpoint (from the start if none was written
                yet).
            on_start: writes what a fresh run's metrics begin with.

        Raises:
            Interrupted: on Ctrl-C or SIGTERM, after a checkpoint was written.
            Diverged: too many losses or gradients were not finite; the step and the last good
                checkpoint are named.
        """
        self.config, self.world = self.engine.config, self.engine.world
        self.metrics = Metrics(self.run / "metrics.jsonl", self.world.is_main)
        self.progress, self._saved = TrainingState(), 0
        self._untold: list[Tensor] = []  # of updates whose losses the host has not read
        self._norm = self._rate = 0.0
        self.checkpoints = Checkpoints(
            self.run / "checkpoints", self.world, self.config.keep_checkpoints
        )
        resumes = self.world.broadcast(resume and bool(checkpoints(self.checkpoints.folder)))
        notes = self._resume() if resumes else []
        if self.progress.step == 0:
            self.metrics.cut_after(-1, -1)
            if on_start:
                on_start(self.metrics)
        self._describe()
        with (
            exit_if_stuck(self.config.stop_seconds, self._unsaved),
            stop_on_signals() as stop,
            progress_bar(on_stdout=True, quiet=not self.world.is_main) as shown,
            Prefetch(self.batches, self.world.device) as batches,
        ):
            shown(self.title, self.progress.step, self.config.steps)
            for note in notes:
                shown.say(note)
            try:
                self._loop(batches, stop, shown)
                self.checkpoints.finish()
            except Exception:
                if (
                    self.world.size == 1
                ):  # the writer would go on after the lock is released; of several, one may be gone
                    with suppress(Exception):
                        self.checkpoints.finish()
                raise
            except BaseException:  # asked to stop a second time: nobody waits for the checkpoint
                self.checkpoints.abandon()
                raise
        self.metrics.write(
            "end",
            self.progress.step,
            best=self.progress.best,
            best_step=self.progress.best_step,
            seconds=self.progress.seconds,
            skipped=self.progress.skipped,
        )
        if number := self.world.all_reduce_max(
            stop.number
        ):  # it came too late for the loop, and more may follow
            raise Interrupted(
                number, f"stopped at the end of training, after {self.progress.step} updates"
            )
        return self.progress

    def _unsaved(self) -> str:
        newest = next(iter(checkpoints(self.checkpoints.folder)), "none was written yet")
        return f"not saved within {self.config.stop_seconds:g} seconds; the newest checkpoint: {newest}"

    def _resume(self) -> list[str]:
        self.progress, notes = self.checkpoints.load(self.engine.model, self.engine.optimizers)
        self._saved = self.progress.step
        self.metrics.cut_after(self.progress.step, self.progress.validated)
        self.metrics.write("resume", self.progress.step)
        return notes

    def _describe(self) -> None:
        """Writes by what the utilisation of the processors is reckoned."""
        self._flops = training_flops(self.engine.model.config)
        precision = resolve_precision(self.config.precision, self.world.device)
        self._ceiling = matmul_rate(precision, self.world.device) * self.world.size
        self.metrics.write(
            "machine",
            self.progress.step,
            ranks=self.world.size,
            shard=self.config.shard,
            device=self.world.device.type,
            flops_per_image=self._flops,
            matmul_flops_per_second=self._ceiling,
        )

    def _loop(self, batches: Prefetch, stop: StopRequest, shown: ProgressBar) -> None:
        config, progress, world = self.config, self.progress, self.world
        clock = _Clock()
        while True:
            with clock.paused():
                finished = progress.step == config.steps
                kept = progress.step in config.snapshots
                validates = finished or kept or progress.step % config.validate_every == 0
                if progress.step > progress.validated and validates:
                    self._validate(stop, shown)
                if kept:
                    self._keep_model(self.run / "snapshots" / f"step-{progress.step:08d}")
                wish = world.all_reduce_max(stop.number)
                ends = (finished and progress.validated == progress.step) or self._exhausted()
                due = progress.step % config.checkpoint_every == 0 or ends or wish
                if due and progress.step != self._saved:
                    self._save()
            if ends:
                break
            if wish:
                self.checkpoints.finish()
                raise Interrupted(
                    wish, f"stopped and saved after {progress.step} of {config.steps} updates"
                )
            rate = learning_rate(
                progress.step,
                peak=config.learning_rate,
                warmup=self.warmup,
                total=config.steps,
                schedule=config.schedule,
            )
            self._untold.append(self.engine.update(batches(progress.step), rate))
            progress.step += 1
            clock.images += config.batch_size
            tells = progress.step % config.log_every == 0 or progress.step == config.steps
            if tells or world.device.type == "cpu":  # of a GPU, the host reads nothing in between
                loss = self._read()
                shown(
                    self.title,
                    progress.step,
                    config.steps,
                    f"loss {loss:.3f}, {clock.images_per_second:.0f} images/s",
                )
            if tells:
                self._tell(clock, rate)
        if progress.step < config.steps:
            shown.say(f"stopped early: {config.patience} validations without a better one")

    def _exhausted(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.progress.validations_without_better >= patience

    def _read(self) -> float:
        """Waits for the updates begun so far and reads what they gave; the last one's loss."""
        progress, loss = self.progress, math.nan
        values = torch.stack(self._untold).tolist() if self._untold else []
        self._untold.clear()
        for number, (loss, norm, skipped) in enumerate(values, progress.step - len(values) + 1):
            if not skipped:
                progress.unlogged_loss += loss
                progress.unlogged_steps += 1
                progress.first_skipped, self._norm = None, norm
                continue
            progress.skipped += 1
            progress.first_skipped = progress.first_skipped or number
            if progress.skipped > self.config.max_skipped:
                several = (
                    f", and {progress.skipped} updates were skipped so far"
                    if progress.skipped > 1
                    else ""
                )
                self._not_finite(
                    f"the loss is {loss} and the gradient's norm {norm} at update {number}{several}"
                )
        return loss

    def _tell(self, clock: "_Clock", rate: float) -> None:
        """Writes a line on the updates since the last one, if one of them was not skipped."""
        progress = self.progress
        progress.seconds += clock.seconds
        images_per_second = clock.images_per_second
        if progress.unlogged_steps:
            self.metrics.write(
                "train",
                progress.step,
                loss=progress.unlogged_loss / progress.unlogged_steps,
                learning_rate=rate,
                grad_norm=self._norm,
                skipped=progress.skipped,
                images_per_second=images_per_second,
                utilisation=images_per_second * self._flops / self._ceiling,
                seconds=progress.seconds,
            )
        progress.unlogged_loss, progress.unlogged_steps = 0.0, 0
        clock.restart()

    def _not_finite(self, what: str) -> None:
        # A checkpoint of the update before the first bad one holds the very weights that gave it.
        bad = self.progress.first_skipped or self.progress.step + 1
        self.checkpoints.finish()
        kept = [path for path in checkpoints(self.checkpoints.folder) if step_of(path) < bad - 1]
        good = (
            f"the last good checkpoint is {kept[0]}"
            if kept
            else "there is no checkpoint from before"
        )
        raise Diverged(
            f"{what}; {good}; start another run with a lower --learning-rate or a longer --warmup-steps"
        )

    def _validate(self, stop: StopRequest, shown: ProgressBar) -> None:
        """Validates and keeps the best model; leaves it undone when the run is to stop."""
        self._read()
        validation, progress, world = self.validation, self.progress, self.world
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        size = self.engine.evaluation_batch_size()
        for first in range(0, validation.images, size):
            if world.all_reduce_max(stop.number):
                return
            batch = validation.batch(first, min(first + size, validation.images))
            total += self.engine.evaluate(validation.objective, batch)
        found = float(total) / validation.images
        if not math.isfinite(found):
            self._not_finite(
                f"the validation {validation.name} is {found} after {progress.step} updates"
            )
        better = progress.best is None or found < progress.best
        progress.validated = progress.step
        progress.validations_without_better = (
            0 if better else progress.validations_without_better + 1
        )
        if better:
            progress.best, progress.best_step = found, progress.step
            self._keep_model(self.run / "model")
        self.metrics.write("validation", progress.step, **{validation.name: found, "best": better})
        shown.say(
            f"update {progress.step}: validation {validation.name} {found:.4f}{' (best so far)' if better else ''}"
        )

    def _keep_model(self, path: Path) -> None:
        weights = self.engine.weights()
        if self.world.is_main:
            self.engine.model.save_pretrained(path, weights)

    def _save(self) -> None:
        self._read()
        self.checkpoints.save(self.engine.model, self.engine.optimizers, self.progress)
        self._saved = self.progress.step
