"""Training state on disk: weights, optimiser and step, whole or absent, resumed bit for bit on as many ranks.

checkpoints/step-00001200/    what torch.distributed.checkpoint writes, a file or more a rank, and
    state.json                format, step, best validation so far, and the size of every file

On several machines the folder must be one that all of them see.
"""

import shutil
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from igpt.errors import InputError
from igpt.files import read_json, sync, write_json
from igpt.training.distributed import Team

VERSION = 2


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: updates done.
        validated: updates after which it was last validated.
        best: lowest validation value so far, and best_step: after how many updates.
        seconds: time spent in updates.
        validations_without_better: since the best one.
        skipped: updates that changed nothing, for a loss or gradient that was not finite.
        bad_since: the first of the last unbroken row of them (None when the last update was a good one).
        untold_loss, untold_updates: summed losses since the last line of metrics.jsonl, and how many.
    """

    step: int = 0
    validated: int = 0
    best: float | None = None
    best_step: int = 0
    seconds: float = 0.0
    validations_without_better: int = 0
    skipped: int = 0
    bad_since: int | None = None
    untold_loss: float = 0.0
    untold_updates: int = 0


class Checkpoints:
    """A run's checkpoints. They are written by a thread from a copy of the state, while training goes on.

    Args:
        folder: where they stand; one folder for all ranks.
        keep: so many of the newest are kept, and the one of the best validation; while updates are skipped, the newest
            from before that too.
    """

    def __init__(self, folder: Path, team: Team, keep: int) -> None:
        self.folder, self._team, self._keep = folder, team, keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._coming: Future[None] | None = None
        # Not by a context manager: the writer warns in a thread of its own.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")

    def save(self, model: nn.Module, optimizers: Sequence[Optimizer], progress: Progress) -> None:
        """Begins to write a checkpoint, when the one before is written; every rank must call it.

        Raises:
            OSError: the one before could not be written.
        """
        self.finish()
        path = self.folder / f"step-{progress.step:08d}"
        temporary = path.with_name(f".{path.name}.tmp")
        if self._team.leads:
            for left in self.folder.glob(".step-*.tmp"):  # by a kill
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir(parents=True)
        self._team.wait()
        weights, moments = get_state_dict(model, optimizers)
        held = {"model": weights, "optimizer": moments}
        written = state_dict_saver.async_save(
            held, checkpoint_id=temporary, process_group=self._team.disk, no_dist=self._team.size == 1
        )
        assert isinstance(written, Future)
        self._coming = self._thread.submit(self._complete, written, temporary, path, asdict(progress))

    def _complete(self, written: "Future[Any]", temporary: Path, path: Path, progress: dict[str, Any]) -> None:
        """Gives a checkpoint its name when all ranks have written, and removes those that are no longer wanted."""
        try:
            written.result()  # on the leading rank, when all have written
            if self._team.leads:
                sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
                write_json(temporary / "state.json", {"version": VERSION, **progress, "files": sizes})
                sync(temporary)
                shutil.rmtree(path, ignore_errors=True)  # a damaged one that was passed over
                temporary.rename(path)
                sync(path.parent)
                self._prune(progress["step"], progress["best_step"], progress["bad_since"])
        except CheckpointException as error:
            raise OSError(f"cannot write the checkpoint {path}: {_reason(error)}") from None
        finally:
            if self._team.leads:
                shutil.rmtree(temporary, ignore_errors=True)

    def _prune(self, step: int, best_step: int, bad_since: int | None) -> None:
        """Removes all but the newest, the best, and the newest from before what is wrong now.

        What lies beyond the present step was damaged, and passed over. A checkpoint of the update before the first bad
        one holds the very weights that gave it.
        """
        reached = [path for path in checkpoints(self.folder) if step_of(path) <= step]
        good = [path for path in reached if bad_since is None or step_of(path) < bad_since - 1]
        wanted = {*reached[: self._keep], *good[:1], *(path for path in reached if step_of(path) == best_step)}
        for old in set(checkpoints(self.folder)) - wanted:
            shutil.rmtree(old)

    def finish(self) -> None:
        """Returns when all that was begun is on the disk.

        Raises:
            OSError: it could not be written.
        """
        coming, self._coming = self._coming, None
        if coming is not None:
            coming.result()

    def load(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> tuple[Progress, list[str]]:
        """Fills model and optimisers from the newest whole checkpoint, whatever number of ranks wrote it.

        Returns:
            how far it had come, and sentences on which was taken and which newer ones were passed over.

        Raises:
            InputError: there is no whole one.
        """
        path, passed = self._team.tell(newest_whole(self.folder) if self._team.leads else (Path(), []))
        state = _check(path)
        weights, moments = get_state_dict(model, optimizers)
        held: dict[str, Any] = {"model": weights, "optimizer": moments}
        state_dict_loader.load(held, checkpoint_id=path, process_group=self._team.disk, no_dist=self._team.size == 1)
        set_state_dict(model, optimizers, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
        notes = [*(f"passed over: {reason}" for reason in passed), f"resumed from {path}"]
        return Progress(**{item.name: state[item.name] for item in fields(Progress)}), notes


def _reason(error: CheckpointException) -> str:
    """What went wrong below the checkpoint writer, which wraps a full disk in exceptions of its own."""
    inner: BaseException | None = next(iter(error.failures.values()))[0]
    first = inner
    while inner is not None:
        if isinstance(inner, OSError):
            return inner.strerror or str(inner)
        inner = inner.__cause__ or inner.__context__
    # From another rank an exception comes without its cause, and this is the archive writer's own.
    return "a file is cut off; is the disk full?" if "inline_container" in str(first) else str(first)


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
        if not file.exists():
            raise InputError(f"{file} is missing")
        found = file.stat().st_size
        if found != size:
            raise InputError(f"{file} is damaged: {found} bytes, {size} were written")
    return state
