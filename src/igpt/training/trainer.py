"""The training loop, independent of the objective, the data set and the validation metric.

Before every step: validate, probe the features, write a snapshot, and save a checkpoint if they
are due; stop if training has ended or a stop was requested. Then: one optimizer step, and a line of
metrics if due.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from igpt.data.tokens.batches import Batch, Prefetch
from igpt.errors import InputError, Interrupted
from igpt.evaluation.feature_quality import FeatureQuality
from igpt.model.cost import training_flops
from igpt.model.precision import matmul_rate, resolve_precision
from igpt.progress import ProgressBar, progress_bar
from igpt.training.checkpoints import Checkpoints, TrainingState, checkpoints, step_of
from igpt.training.engine import Engine
from igpt.training.metrics import Metrics, read_metrics
from igpt.training.optimizer import learning_rate
from igpt.training.parallelize import LossFunction
from igpt.training.signals import StopRequest, exit_if_stuck
from igpt.training.trackers import Tracker, numbers_of, open_tracker, pictures

# In place of the number of a signal; it is lower than those of Ctrl-C and SIGTERM.
_TIME_IS_OVER = 1


class Diverged(InputError):  # noqa: N818  like the other classes of errors.py
    """Too many losses or gradients were not finite; the message names the last good checkpoint."""


@dataclass(frozen=True)
class Validation:
    """Selection of the best model: by the lowest mean of a loss over some images.

    Attributes:
        name: of the loss in metrics.jsonl.
        text: describes a mean loss to the user, such as "loss 1.5054".
        images: number of images.
        batch: `batch(first, last)` returns the tensors of images `first` to `last - 1`.
    """

    name: str
    text: Callable[[float], str]
    loss: LossFunction
    images: int
    batch: Callable[[int, int], Batch]


@dataclass(frozen=True)
class Probing:
    """Measurement of the features of a layer during training.

    Attributes:
        every: steps between measurements; the first is before the first step, the last at the end.
        layer: 0 .. L - 1.
        images: number of images.
        batch: `batch(first, last)` returns the tokens of images `first` to `last - 1`.
        measure: returns the quality of the features of all images, [N, D]; called on the main rank.
    """

    every: int
    layer: int
    images: int
    batch: Callable[[int, int], Tensor]
    measure: Callable[[NDArray[np.float32]], FeatureQuality]


class Trainer:
    """Train a model and write RUN/model, RUN/checkpoints, RUN/snapshots and RUN/metrics.jsonl.

    Args:
        batches: returns the whole batch of a step, as tensors whose rows are images; a pure
            function of the step. It is called in a thread, one step ahead.
        run: run directory, which must exist.
        warmup: steps over which the learning rate rises.
        title: of the progress bar.
        probing: measurement of the features, if any.
        examples: images whose completions a tracker shows, tokens [B, n].
        end: time of `time.monotonic` after which training stops, if any.
    """

    def __init__(
        self,
        engine: Engine,
        batches: Callable[[int], Batch],
        validation: Validation,
        run: Path,
        warmup: int,
        title: str = "pretraining",
        probing: Probing | None = None,
        examples: NDArray[np.uint16] | None = None,
        end: float | None = None,
    ) -> None:
        self.engine, self.config, self.world = engine, engine.config, engine.world
        self.batches, self.validation, self.probing = batches, validation, probing
        self.run, self.warmup, self.title = run, warmup, title
        self.examples, self.end = examples, math.inf if end is None else end
        self.state = TrainingState()
        self._tracker: Tracker | None = None  # on the main rank, if one is asked for
        self.metrics = Metrics(run / "metrics.jsonl", self.world.is_main)
        self.checkpoints = Checkpoints(
            run / "checkpoints", self.world, self.config.keep_checkpoints
        )
        self._stop = StopRequest()
        self._throughput = _Throughput()
        self._unread: list[Tensor] = []  # results of steps that are still on the device
        self._grad_norm = 0.0  # of the last step that was not skipped
        self._saved_step = 0  # step of the newest checkpoint
        self._first_step = 0  # at which this call of `train` began
        # Last step of each kind of line that the tracker has from before the run was resumed.
        self._tracked: dict[str, int] = {}
        precision = resolve_precision(self.config.precision, self.world.device)
        self._flops = training_flops(engine.model.config)  # per image
        self._peak_flops = matmul_rate(precision, self.world.device) * self.world.size

    def train(
        self, *, resume: bool = False, on_start: Callable[[Metrics], None] | None = None
    ) -> TrainingState:
        """Train until the last step, or until validation no longer improves (`patience`).

        Args:
            resume: continue from the newest undamaged checkpoint, if there is any.
            on_start: writes the first lines of metrics.jsonl when training starts at step 0.

        Raises:
            Interrupted: on Ctrl-C or SIGTERM, or after `end`; a checkpoint was saved.
            Diverged: too many losses or gradients were not finite.
        """
        notes = self._begin(resume, on_start)
        with (
            self._tracking(),
            exit_if_stuck(self.config.stop_seconds, self._describe_unsaved),
            self._stop,
            progress_bar(on_stdout=True, quiet=not self.world.is_main) as bar,
            Prefetch(self.batches, self.world.device) as batches,
            self.checkpoints,
        ):
            bar(self.title, self.state.step, self.config.steps)
            for note in notes:
                bar.say(note)
            self._loop(batches, bar)
        state = self.state
        self.metrics.write(
            "end",
            state.step,
            best=state.best,
            best_step=state.best_step,
            seconds=state.seconds,
            skipped=state.skipped,
        )
        # A stop requested after the last step must also stop the caller, which may train once
        # more with the next learning rate.
        if number := self.world.all_reduce_max(self._stop.number):
            raise Interrupted(number, f"stopped at the end of training, after {state.step} steps")
        return state

    def _loop(self, batches: Prefetch, bar: ProgressBar) -> None:
        self._throughput.restart()
        while True:
            with self._throughput.paused():
                ended = self._work_between_steps(bar)
            if ended:
                break
            self._step(batches(self.state.step), bar)

    def _begin(self, resume: bool, on_start: Callable[[Metrics], None] | None) -> list[str]:
        """Load the newest checkpoint or start new metrics; return notes on what was loaded."""
        notes: list[str] = []
        if self.world.broadcast(resume and bool(checkpoints(self.checkpoints.folder))):
            self.state, notes = self.checkpoints.load(self.engine.model, self.engine.optimizers)
            self._saved_step = self._first_step = self.state.step
            if self.config.track:
                self._tracked = self.metrics.last_steps()
            self.metrics.cut_after(self.state.step, self.state.validated, self.state.probed)
            self.metrics.write("resume", self.state.step, steps=self.config.steps)
        if self.state.step == 0:
            self.metrics.cut_after(-1, -1)
            if on_start:
                on_start(self.metrics)
        # FLOPs per image and the peak rate, from which MFU is computed.
        self.metrics.write(
            "machine",
            self.state.step,
            ranks=self.world.size,
            shard=self.config.shard,
            device=self.world.device.type,
            flops_per_image=self._flops,
            matmul_flops_per_second=self._peak_flops,
        )
        return notes

    @contextmanager
    def _tracking(self) -> Iterator[None]:
        """Send what is written to metrics.jsonl to the tracker that the settings name.

        A tracker that has the run already, from before the run was resumed, gets only later steps:
        repeated ones have the same numbers. One that is new to the run gets the earlier lines too.
        """
        if self.config.track is None or not self.world.is_main:
            yield
            return
        settings = self.config.model_dump(mode="json")
        tracker, continued = open_tracker(self.config.track, self.run, settings)

        def send(line: Mapping[str, Any]) -> None:
            values = numbers_of(line)
            if values and line["step"] > self._tracked.get(line["kind"], -1):
                tracker.numbers(values, line["step"])

        if not continued:
            self._tracked = {}
            for line in read_metrics(self.metrics.path):
                send(line)
        self._tracker, self.metrics.listener = tracker, send
        try:
            yield
        finally:
            self._tracker = self.metrics.listener = None
            tracker.close()

    def _show_pictures(self) -> None:
        """Send samples and completions to the tracker; all ranks must call it."""
        if self.config.track is None or self.examples is None:
            return
        weights = self.engine.weights()
        if self._tracker and self.state.step > self._tracked.get("validation", -1):
            for name, pixels in pictures(self.engine.model, weights, self.examples):
                self._tracker.image(name, pixels, self.state.step)

    def _work_between_steps(self, bar: ProgressBar) -> bool:
        """Validate, probe, write a snapshot and save if due; return whether training has ended.

        Raises:
            Interrupted: any rank was asked to stop, or its time is over; a checkpoint is saved.
        """
        state, config = self.state, self.config
        is_last = state.step == config.steps
        is_snapshot = state.step in config.snapshots
        validates = is_last or is_snapshot or state.step % config.validate_every == 0
        if validates and state.step > state.validated:
            self._validate(bar)
        if self._must_probe():
            self._probe(bar)
        if is_snapshot:
            self._write_model(self.run / "snapshots" / f"step-{state.step:08d}")
        # At least one step is done, so that repeated calls come to an end.
        is_late = time.monotonic() >= self.end and state.step > self._first_step
        stop = self.world.all_reduce_max(self._stop.number or _TIME_IS_OVER * is_late)
        is_exhausted = (
            config.patience is not None and state.validations_without_better >= config.patience
        )
        # A stop request may have cut the last validation or probe short.
        ended = is_exhausted or (is_last and state.validated == state.step)
        ended = ended and not self._must_probe()
        saves = state.step % config.checkpoint_every == 0 or ended or stop > 0
        if saves and state.step != self._saved_step:
            self._read_results()
            self.checkpoints.save(self.engine.model, self.engine.optimizers, state)
            self._saved_step = state.step
        if stop and not ended:
            self.checkpoints.finish()
            raise Interrupted(
                0 if stop == _TIME_IS_OVER else stop,
                f"stopped and saved after {state.step} of {config.steps} steps",
            )
        if ended and not is_last:
            bar.say(
                f"stopped early: {config.patience} validations without improvement; to continue, "
                "--resume with a higher --patience"
            )
        return ended

    def _step(self, batch: Batch, bar: ProgressBar) -> None:
        state, config = self.state, self.config
        rate = learning_rate(
            state.step,
            peak=config.learning_rate,
            warmup=self.warmup,
            total=config.steps,
            schedule=config.schedule,
        )
        self._unread.append(self.engine.update(batch, rate))
        state.step += 1
        self._throughput.images += config.batch_size
        is_logged = state.step % config.log_every == 0 or state.step == config.steps
        # A GPU runs asynchronously: synchronize only for a line of metrics.
        if is_logged or self.world.device.type == "cpu":
            loss = self._read_results()
            news = f"loss {loss:.3f}, {self._throughput.images_per_second:.0f} images/s"
            bar(self.title, state.step, config.steps, news)
        if is_logged:
            self._log(rate)

    def _read_results(self) -> float:
        """Wait for all steps so far, add up their losses, and return the loss of the last one.

        Raises:
            Diverged: more than `max_skipped` steps were skipped.
        """
        state, loss = self.state, math.nan
        results = torch.stack(self._unread).tolist() if self._unread else []
        self._unread.clear()
        for step, (loss, norm, skipped) in enumerate(results, state.step - len(results) + 1):
            if not skipped:
                state.unlogged_loss += loss
                state.unlogged_steps += 1
                state.first_skipped, self._grad_norm = None, norm
                continue
            state.skipped += 1
            state.first_skipped = state.first_skipped or step
            if state.skipped > self.config.max_skipped:
                several = (
                    f", and {state.skipped} steps were skipped so far" if state.skipped > 1 else ""
                )
                self._diverge(
                    f"the loss is {loss} and the gradient norm {norm} at step {step}{several}"
                )
        return loss

    def _log(self, rate: float) -> None:
        """Write the mean loss since the last line of metrics, unless all steps were skipped."""
        state = self.state
        state.seconds += self._throughput.seconds
        images_per_second = self._throughput.images_per_second
        if state.unlogged_steps:
            self.metrics.write(
                "train",
                state.step,
                loss=state.unlogged_loss / state.unlogged_steps,
                learning_rate=rate,
                grad_norm=self._grad_norm,
                skipped=state.skipped,
                images_per_second=images_per_second,
                utilisation=images_per_second * self._flops / self._peak_flops,
                seconds=state.seconds,
            )
        state.unlogged_loss, state.unlogged_steps = 0.0, 0
        self._throughput.restart()

    def _validate(self, bar: ProgressBar) -> None:
        """Validate, and keep the model if it is the best so far; return early on a stop request."""
        self._read_results()
        validation, state, world = self.validation, self.state, self.world
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        size = self.engine.evaluation_batch_size()
        bar.part("validating", 0, validation.images)
        for first in range(0, validation.images, size):
            if world.all_reduce_max(self._stop.number):
                return
            batch = validation.batch(first, min(first + size, validation.images))
            total += self.engine.evaluate(validation.loss, batch)
            bar.part("validating", min(first + size, validation.images), validation.images)
        value = float(total) / validation.images
        if not math.isfinite(value):
            text = validation.text(value).replace(" ", " is ")
            self._diverge(f"the validation {text} after {state.step} steps")
        is_best = state.best is None or value < state.best
        state.validated = state.step
        state.validations_without_better += 1
        if is_best:
            state.best, state.best_step = value, state.step
            state.validations_without_better = 0
            self._write_model(self.run / "model")
        self.metrics.write("validation", state.step, **{validation.name: value, "best": is_best})
        self._show_pictures()
        best = " (best so far)" if is_best else ""
        bar.say(f"step {state.step}: validation {validation.text(value)}{best}")

    def _must_probe(self) -> bool:
        """Return whether the features are to be measured at this step, and have not been."""
        state, probing = self.state, self.probing
        if probing is None or state.probed == state.step:
            return False
        return state.step == self.config.steps or state.step % probing.every == 0

    def _probe(self, bar: ProgressBar) -> None:
        """Measure the quality of the features; return early on a stop request."""
        self._read_results()
        probing, state, world = self.probing, self.state, self.world
        assert probing is not None
        bar.part("probing", 0, probing.images)
        size = self.engine.evaluation_batch_size()
        parts = []
        for first in range(0, probing.images, size):
            if world.all_reduce_max(self._stop.number):
                return
            last = min(first + size, probing.images)
            parts.append(self.engine.features(probing.batch(first, last), probing.layer))
            bar.part("probing", last, probing.images)
        features = torch.cat(parts)
        if not bool(features.isfinite().all()):
            self._diverge(
                f"features of layer {probing.layer} are not finite after {state.step} steps"
            )
        if world.is_main:
            found = probing.measure(features.cpu().numpy())
            self.metrics.write("probe", state.step, layer=probing.layer, **asdict(found))
            bar.say(f"step {state.step}: features of layer {probing.layer}: {found.text()}")
        world.barrier()  # over gloo, because NCCL would let the other ranks' GPUs spin
        state.probed = state.step

    def _write_model(self, path: Path) -> None:
        weights = self.engine.weights()
        if self.world.is_main:
            self.engine.model.save_pretrained(path, weights)

    def _diverge(self, reason: str) -> None:
        """Raise `Diverged`, naming the newest checkpoint before the first skipped step."""
        # A checkpoint at step `first_bad - 1` has weights whose loss or gradient is not finite.
        first_bad = self.state.first_skipped or self.state.step + 1
        self.checkpoints.finish()
        good = [
            path for path in checkpoints(self.checkpoints.folder) if step_of(path) < first_bad - 1
        ]
        advice = (
            f"the last good checkpoint is {good[0]}" if good else "there is no earlier checkpoint"
        )
        raise Diverged(
            f"{reason}; {advice}; start another run with a lower --learning-rate or a longer "
            "--warmup-steps"
        )

    def _describe_unsaved(self) -> str:
        newest = next(iter(checkpoints(self.checkpoints.folder)), None)
        if newest is None:
            kept = "no checkpoint has been written yet"
        else:
            kept = f"the newest checkpoint: {newest}"
        return f"not saved within {self.config.stop_seconds:g} seconds; {kept}"


class _Throughput:
    """Images and seconds of the steps since the last line of metrics, without work in between."""

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
