"""Training state on disk: weights, optimiser and step, whole or absent, resumed bit for bit.

checkpoints/step-00001200/    what torch.distributed.checkpoint writes, and
    state.json                format, step, best validation so far, and the size of every file
"""

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from igpt.errors import InputError
from igpt.files import atomic_folder, read_json, write_json

VERSION = 1


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: updates done.
        best: lowest validation value so far, and best_step: after how many updates.
        seconds: time spent in updates.
        validations_without_better: since the best one.
        untold_loss, untold_updates: summed losses since the last line of metrics.jsonl, and how many.
    """

    step: int = 0
    best: float | None = None
    best_step: int = 0
    seconds: float = 0.0
    validations_without_better: int = 0
    untold_loss: float = 0.0
    untold_updates: int = 0


def save_state(folder: Path, model: nn.Module, optimizers: Sequence[Optimizer], progress: Progress, keep: int) -> Path:
    """Writes a checkpoint into `folder`, and removes all but the `keep` newest."""
    path = folder / f"step-{progress.step:08d}"
    with atomic_folder(path) as temporary:
        weights, moments = get_state_dict(model, optimizers)
        held = {"model": weights, "optimizer": moments}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no process group
            try:
                state_dict_saver.save(held, checkpoint_id=temporary, no_dist=True)
            except CheckpointException as error:
                raise OSError(f"cannot write the checkpoint {path}: {_reason(error)}") from None
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        write_json(temporary / "state.json", {"version": VERSION, **vars(progress), "files": sizes})
    for old in checkpoints(folder)[keep:]:
        shutil.rmtree(old)
    return path


def _reason(error: CheckpointException) -> str:
    """What went wrong below the checkpoint writer, which wraps a full disk in exceptions of its own."""
    inner: BaseException | None = next(iter(error.failures.values()))[0]
    first = inner
    while inner is not None:
        if isinstance(inner, OSError):
            return inner.strerror or str(inner)
        inner = inner.__cause__ or inner.__context__
    return str(first)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def step_of(path: Path) -> int:
    """The updates that a checkpoint was written after, by its name."""
    return int(path.name.removeprefix("step-"))


def newest_whole(folder: Path) -> tuple[Path, list[str]]:
    """The newest undamaged checkpoint, and a sentence for each newer one that was passed over.

    Raises:
        InputError: there is none.
    """
    passed: list[str] = []
    for path in checkpoints(folder):
        try:
            _check(path)
        except InputError as error:
            passed.append(str(error))
        else:
            return path, passed
    raise InputError("; ".join([*passed, f"no whole checkpoint in {folder}: there is nothing to resume"]))


def _check(path: Path) -> dict[str, Any]:
    state = read_json(path / "state.json", "checkpoint")
    if state.get("version") != VERSION:
        raise InputError(f"{path} has checkpoint version {state.get('version')}; this igpt reads {VERSION}")
    for name, size in state["files"].items():
        file = path / name
        found = file.stat().st_size if file.exists() else 0
        if found != size:
            raise InputError(f"{file} is damaged: {found} bytes, {size} were written")
    return state


def load_state(path: Path, model: nn.Module, optimizers: Sequence[Optimizer]) -> Progress:
    """Fills model and optimisers from a checkpoint and says how far it had come.

    Raises:
        InputError: the checkpoint is damaged or of another version.
    """
    state = _check(path)
    weights, moments = get_state_dict(model, optimizers)
    held: dict[str, Any] = {"model": weights, "optimizer": moments}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state_dict_loader.load(held, checkpoint_id=path, no_dist=True)
    set_state_dict(model, optimizers, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    return Progress(**{item.name: state[item.name] for item in fields(Progress)})
