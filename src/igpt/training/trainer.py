"""The training loop, and only the loop: it knows no objective, no data set and no evaluation by name."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import torch
from pydantic import Field

from igpt.config import Config
from igpt.data.batches import Batch, Prefetch
from igpt.errors import InputError, Interrupted
from igpt.model.objectives import Summed
from igpt.model.precision import autocast
from igpt.model.transformer import ImageGPT
from igpt.training.distributed import Team
from igpt.training.metrics import Bar, Metrics, bar
from igpt.training.optimizer import OptimizerName, Schedule, learning_rate, make_optimizers
from igpt.training.state import Progress, checkpoints, load_state, newest_whole, save_state, step_of

Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Config):
    """How to train; the defaults are the paper's where it states them (section 3.3)."""

    batch_size: int = Field(128, ge=1, description="images of an update, over all ranks")
    micro_batch_size: int | None = Field(None, ge=1, description="images at a time on a rank; the rest accumulates")
    steps: int = Field(1_000_000, ge=1, description="updates")
    optimizer: OptimizerName = Field("adamw", description="muon orthogonalises the updates of the blocks' matrices")
    learning_rate: float = Field(3e-3, gt=0, description="peak learning rate")
    warmup_steps: int = Field(0, ge=0, description="updates over which the learning rate rises")
    schedule: Schedule = Field("cosine", description="how the learning rate goes on from its peak")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="Adam's")
    weight_decay: float = Field(0.0, ge=0, description="of the matrices")
    grad_clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0 does not clip")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="of products; auto takes the faster")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU if there is one")
    seed: int = Field(0, ge=0, lt=2**63, description="of the weights, the order of the images and their variations")
    log_every: int = Field(50, ge=1, description="updates between lines of metrics.jsonl")
    validate_every: int = Field(1000, ge=1, description="updates between validations; the best model is kept")
    checkpoint_every: int = Field(1000, ge=1, description="updates between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints to keep")
    patience: int | None = Field(None, ge=1, description="stop after so many validations without a better one")


@dataclass
class _Stop:
    number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:  # asked a second time: do not wait for the checkpoint
            raise KeyboardInterrupt
        self.number = number


@contextmanager
def _stop_on_signals() -> Iterator[_Stop]:
    """Turns Ctrl-C and SIGTERM into a wish that the loop looks at between updates."""
    stop = _Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


@dataclass
class Trainer:
    """Everything the loop needs.

    Args:
        objective: called with the model and one micro-batch's tensors; gives a summed loss and a count.
        batches: the whole batch of update s, as tensors whose rows are images; a pure function of s. It runs in a
            thread of its own while the update before is computed.
        validate: the value to minimise, of the current model, and what it is called in metrics.jsonl.
        run: the run directory, with config.yaml already in it.
    """

    model: ImageGPT
    config: TrainConfig
    objective: Callable[..., Summed]
    batches: Callable[[int], Batch]
    validate: tuple[str, Callable[[ImageGPT], float]]
    run: Path
    team: Team
    title: str = "pretraining"

    def train(self, *, resume: bool = False, on_start: Callable[[Metrics], None] | None = None) -> Progress:
        """Trains to the last update; the best model by validation stands in RUN/model.

        Args:
            resume: continue from the newest whole checkpoint (from the start if none was written yet).
            on_start: writes what a fresh run's metrics begin with.

        Raises:
            Interrupted: on Ctrl-C or SIGTERM, after a checkpoint was written.
            InputError: a loss or gradient is not finite; the step and the last checkpoint are named.
        """
        config, team = self.config, self.team
        self.model.to(team.device).train()
        self.optimizers = make_optimizers(
            self.model, config.optimizer, betas=config.betas, weight_decay=config.weight_decay
        )
        self.metrics = Metrics(self.run / "metrics.jsonl", team.leads)
        self.progress = Progress()
        self.folder = self.run / "checkpoints"
        notes = self._resume() if resume and any(self.folder.glob("step-*")) else []
        if self.progress.step == 0:
            self.metrics.cut_after(-1)
            if on_start:
                on_start(self.metrics)
        with (
            _stop_on_signals() as stop,
            bar(self.title, self.progress.step, config.steps, team.leads) as shown,
            Prefetch(self.batches, team.device) as batches,
        ):
            for note in notes:
                shown.say(note)
            self._loop(batches, stop, shown)
        self.metrics.write(
            "end",
            self.progress.step,
            best=self.progress.best,
            best_step=self.progress.best_step,
            seconds=self.progress.seconds,
        )
        return self.progress

    def _resume(self) -> list[str]:
        path, passed = newest_whole(self.folder)
        self.progress = load_state(path, self.model, self.optimizers)
        self.metrics.cut_after(self.progress.step)
        self.metrics.write("resume", self.progress.step)
        return [*(f"passed over: {reason}" for reason in passed), f"resumed from {path}"]

    def _loop(self, batches: Prefetch, stop: _Stop, shown: Bar) -> None:
        config, progress = self.config, self.progress
        clock = _Clock()
        while progress.step < config.steps and not self._exhausted():
            rate = learning_rate(
                progress.step,
                peak=config.learning_rate,
                warmup=config.warmup_steps,
                total=config.steps,
                schedule=config.schedule,
            )
            loss, norm = self._update(batches(progress.step), rate)
            progress.step += 1
            progress.untold_loss += loss
            progress.untold_updates += 1
            clock.images += config.batch_size
            last = progress.step == config.steps
            shown.update(progress.step, f"loss {loss:.3f}, {clock.images_per_second:.0f} images/s")
            if progress.step % config.log_every == 0 or last:
                self._tell(clock, rate, norm)
            with clock.paused():
                if progress.step % config.validate_every == 0 or last:
                    self._validate(shown)
                interrupted = self._anyone_stops(stop)
                if progress.step % config.checkpoint_every == 0 or last or self._exhausted() or interrupted:
                    self._save()
            if interrupted and not last and not self._exhausted():
                reached = f"stopped and saved after {progress.step} of {config.steps} updates"
                raise Interrupted(interrupted, reached)
        if self._exhausted():
            shown.say(f"stopped early: {config.patience} validations without a better one")

    def _exhausted(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.progress.validations_without_better >= patience

    def _tell(self, clock: "_Clock", rate: float, norm: float) -> None:
        """Writes a line on the updates since the last one."""
        progress = self.progress
        progress.seconds += clock.seconds
        self.metrics.write(
            "train",
            progress.step,
            loss=progress.untold_loss / progress.untold_updates,
            learning_rate=rate,
            grad_norm=norm,
            images_per_second=clock.images_per_second,
            seconds=progress.seconds,
        )
        progress.untold_loss, progress.untold_updates = 0.0, 0
        clock.restart()

    def _update(self, whole: Batch, rate: float) -> tuple[float, float]:
        """One update; the loss (mean over the batch) and the gradient's norm before clipping."""
        config, team, step = self.config, self.team, self.progress.step
        count = len(whole[0])
        parts = [team.part(tensor) for tensor in whole]
        rows, size = len(parts[0]), config.micro_batch_size or len(whole[0])
        total = torch.zeros((), dtype=torch.float64, device=team.device)
        for first in range(0, rows, size):
            with autocast(config.precision, team.device):
                summed, counted = self.objective(self.model, *(part[first : first + size] for part in parts))
            assert counted == min(size, rows - first), "objectives count images"
            torch.autograd.backward(summed / count)
            total += summed.detach()
        loss = float(team.sum(total)) / count
        team.sum_gradients(self.model)
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._not_finite(f"the loss is {loss} and the gradient's norm {norm} at update {step + 1}")
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        return loss, norm

    def _not_finite(self, what: str) -> None:
        # A checkpoint of the present step holds the very weights that gave this loss.
        kept = [path for path in checkpoints(self.folder) if step_of(path) < self.progress.step]
        good = f"the last good checkpoint is {kept[0]}" if kept else "no checkpoint had been written yet"
        raise InputError(f"{what}; {good}; start another run with a lower --learning-rate or a longer --warmup-steps")

    def _validate(self, shown: Bar) -> None:
        """Validates on the leading rank, tells all, and keeps the best model."""
        name, function = self.validate
        value = torch.zeros((), dtype=torch.float64)
        if self.team.leads:
            self.model.eval()
            with torch.inference_mode(), autocast(self.config.precision, self.team.device):
                value += function(self.model)
            self.model.train()
        found, progress = float(self.team.sum(value.to(self.team.device))), self.progress
        if not math.isfinite(found):
            self._not_finite(f"the validation {name} is {found} after {progress.step} updates")
        better = progress.best is None or found < progress.best
        progress.validations_without_better = 0 if better else progress.validations_without_better + 1
        if better:
            progress.best, progress.best_step = found, progress.step
            if self.team.leads:
                self.model.save_pretrained(self.run / "model")
        self.metrics.write("validation", progress.step, **{name: found, "best": better})
        shown.say(f"update {progress.step}: validation {name} {found:.4f}{' (best so far)' if better else ''}")

    def _anyone_stops(self, stop: _Stop) -> int:
        """The signal that any rank has received, or 0."""
        if self.team.size == 1:
            return stop.number or 0
        numbers = torch.zeros(self.team.size, dtype=torch.long, device=self.team.device)
        numbers[self.team.rank] = stop.number or 0
        return int(self.team.sum(numbers).max())

    def _save(self) -> None:
        if self.team.leads:
            save_state(self.folder, self.model, self.optimizers, self.progress, self.config.keep_checkpoints)
        self.team.wait()
