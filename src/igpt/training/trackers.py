"""Experiment trackers: copies of the lines of metrics.jsonl, and pictures at validations.

A training is one run of its tracker, also after it was resumed. RUN/track.json has the name of that
run for each tracker: `{"wandb": "tiny-3f2a81c0"}`. Trackers are imported when they are asked for.
"""

import os
import re
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from igpt.errors import InputError
from igpt.files import read_json, write_json
from igpt.model.transformer import ImageGPT

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]
TRACK = "track.json"
PROJECT = "igpt"
_KINDS = ("train", "validation", "probe")  # of lines whose numbers are tracked
_ACCURACIES = {"error": "accuracy", "error_on_trained": "accuracy_on_trained"}
EXAMPLES = 4  # images that are completed
_SAMPLES, _COMPLETIONS = 8, 3


class Tracker(ABC):
    """A run of an experiment tracker."""

    @abstractmethod
    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Add numbers of a step."""

    @abstractmethod
    def image(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Add an RGB image of a step, [H, W, 3]."""

    @abstractmethod
    def close(self) -> None:
        """Write what is buffered; the run can be continued later."""


class _TensorBoard(Tracker):
    """Event files in RUN/tensorboard; a resumed run adds another file."""

    def __init__(self, run: Path, name: str, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run / "tensorboard"))

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def image(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases(Tracker):
    """A run in RUN/wandb for `wandb sync`; WANDB_MODE=online uploads while training."""

    def __init__(self, run: Path, name: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=name,
            name=name,
            dir=run,
            config=dict(settings),
            resume="allow",
            mode="online" if os.environ.get("WANDB_MODE") == "online" else "offline",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def image(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        self._run.log({name: self._image(pixels)}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio(Tracker):
    """A run in trackio's local data base, or where trackio's variables of the environment say."""

    def __init__(self, run: Path, name: str, settings: Mapping[str, Any]) -> None:
        import trackio

        self._image = trackio.Image
        self._run = trackio.init(
            project=PROJECT,
            name=name,
            config=dict(settings),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def image(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        self._run.log({name: self._image(pixels)}, step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow(Tracker):
    """A run in RUN/mlflow, or on the server that MLFLOW_TRACKING_URI names."""

    def __init__(self, run: Path, name: str, settings: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        place = os.environ.get("MLFLOW_TRACKING_URI") or (run.resolve() / "mlflow").as_uri()
        self._client = client = MlflowClient(tracking_uri=place)
        experiment = client.get_experiment_by_name(PROJECT)
        number = experiment.experiment_id if experiment else client.create_experiment(PROJECT)
        known = client.search_runs([number], f"attributes.run_name = '{name}'")
        if known:
            self._id = known[0].info.run_id
            client.update_run(self._id, status="RUNNING")
        else:
            self._id = client.create_run(number, run_name=name).info.run_id
            client.log_batch(
                self._id, params=[Param(key, str(value)) for key, value in settings.items()]
            )

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(
            self._id, metrics=[self._metric(key, value, now, step) for key, value in values.items()]
        )

    def image(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        self._client.log_image(self._id, pixels, key=name, step=step, synchronous=True)

    def close(self) -> None:
        self._client.set_terminated(self._id)


_Opener = Callable[[Path, str, Mapping[str, Any]], Tracker]
_TRACKERS: dict[str, tuple[str, _Opener]] = {  # the module that each needs
    "tensorboard": ("tensorboard", _TensorBoard),
    "wandb": ("wandb", _WeightsAndBiases),
    "trackio": ("trackio", _Trackio),
    "mlflow": ("mlflow", _MLflow),
}


def require_tracker(track: TrackerName | None) -> None:
    """Raise if the package of a tracker is not installed.

    Raises:
        InputError: the extra that installs it is named.
    """
    if track is None:
        return
    found = find_spec(_TRACKERS[track][0])
    if found is None or found.origin is None:  # a folder of that name without Python code
        raise InputError(f"--track {track} needs its extra: pip install 'igpt[{track}]'")


def open_tracker(
    track: TrackerName, run: Path, settings: Mapping[str, Any]
) -> tuple[Tracker, bool]:
    """Start or continue the tracker's run of a training.

    Args:
        run: directory of the training.
        settings: of the training, recorded by the tracker.

    Returns:
        the tracker's run, and whether it was continued.
    """
    path = run / TRACK
    names = read_json(path, "names of tracked runs") if path.exists() else {}
    continued = track in names
    if not continued:
        # MLflow searches for the name in a language of its own, in which quotes have a meaning.
        name = re.sub(r"[^\w.-]+", "-", run.resolve().name)
        names[track] = f"{name}-{uuid.uuid4().hex[:8]}"
        write_json(path, names)
    return _TRACKERS[track][1](run, str(names[track]), settings), continued


def numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of metrics.jsonl that are tracked, as "train/loss" and so on.

    The error of a classifier is tracked as its accuracy.
    """
    if line["kind"] not in _KINDS:
        return {}
    return {
        f"{line['kind']}/{_ACCURACIES.get(key, key)}": 1 - value
        if key in _ACCURACIES
        else float(value)
        for key, value in line.items()
        if key not in ("kind", "step")
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    }


def pictures(
    model: ImageGPT, weights: Mapping[str, torch.Tensor] | None, originals: NDArray[np.uint16]
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yield "samples" (if the model can generate whole images) and "completions", as RGB [H, W, 3].

    They do not use PyTorch's random numbers, so training is the same without them.

    Args:
        model: is not changed.
        weights: all of them, if the model is sharded.
        originals: images to complete, tokens [B, n]; each row has one and its completions.
    """
    from igpt.data.images.grid import image_grid
    from igpt.model.images import decode_images
    from igpt.sampling.images import complete_images, sample_images

    with torch.device("meta"):
        copy = ImageGPT(model.config, model.palette)
    tensors = model.state_dict() if weights is None else weights
    copy.load_state_dict({name: value.clone() for name, value in tensors.items()}, assign=True)
    copy.eval()
    if model.config.trained_as.has_likelihood:
        samples = [np.asarray(one) for one in sample_images(copy, _SAMPLES)]
        yield "samples", np.asarray(image_grid([samples]))
    tokens = torch.from_numpy(originals.astype(np.int64))
    completed = complete_images(copy, tokens, model.config.resolution // 2, _COMPLETIONS)
    rows = [
        [original, *map(np.asarray, filled)]
        for original, filled in zip(decode_images(copy, tokens), completed, strict=True)
    ]
    yield "completions", np.asarray(image_grid(rows, headings={0: "original", 1: "completions"}))
