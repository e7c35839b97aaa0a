"""Training state on disk: weights, optimiser and step, whole or absent, resumed bit for bit on as many ranks.

checkpoints/step-00001200/    what torch.distributed.checkpoint writes, a file or more a rank, and
    state.json                format, step, best validation so far, size and SHA-256 of every file,
    and its own SHA-256

On several machines the folder must be one that all of them see. Loading a checkpoint executes no
code from it: `.metadata` is a pickle, and is read by an unpickler that knows only the classes of
    such metadata; the other files are
read with `torch.load(weights_only=True)`.
"""

import hashlib
import io
import json
import pickle
import re
import shutil
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from igpt.errors import InputError
from igpt.files import (
    Stored,
    read_json,
    require_regular,
    require_schema,
    sha256_of,
    sync,
    write_json,
)
from igpt.training.distributed import World

VERSION = 3
_METADATA = ".metadata"
_HASHING = 8  # files whose checksums are computed at the same time
_NAME = re.compile(r"step-\d{8,}")

# All that a checkpoint's metadata consists of; anything else in a pickle is refused.
_DTYPES = {
    str(kind).removeprefix("torch.")
    for kind in vars(torch).values()
    if isinstance(kind, torch.dtype)
}
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", *_DTYPES},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {
        "PosixPath",
        "WindowsPath",
        "PurePosixPath",
        "PureWindowsPath",
    },  # Python 3.13
}


@dataclass
class TrainingState:
    """How far a run has come.

    Attributes:
        step: updates done.
        validated: updates after which it was last validated.
        best: lowest validation value so far, and best_step: after how many updates.
        seconds: time spent in updates.
        validations_without_better: since the best one.
        skipped: updates that changed nothing, for a loss or gradient that was not finite.
        first_skipped: the first of the last unbroken row of them (None when the last update was a
            good one).
        unlogged_loss, unlogged_steps: summed losses since the last line of metrics.jsonl, and how
            many.
    """

    step: int = 0
    validated: int = 0
    best: float | None = None
    best_step: int = 0
    seconds: float = 0.0
    validations_without_better: int = 0
    skipped: int = 0
    first_skipped: int | None = None
    unlogged_loss: float = 0.0
    unlogged_steps: int = 0


class _SavedFile(Stored):
    """A file of a checkpoint, as state.json has it."""

    bytes: int = Field(ge=0)
    sha256: str


class _State(Stored):
    """The schema of state.json; of `TrainingState`, it has every field."""

    version: int
    sha256: str
    step: int = Field(ge=0)
    validated: int = Field(ge=0)
    best: float | None
    best_step: int = Field(ge=0)
    seconds: float
    validations_without_better: int = Field(ge=0)
    skipped: int = Field(ge=0)
    first_skipped: int | None
    unlogged_loss: float
    unlogged_steps: int = Field(ge=0)
    files: dict[str, _SavedFile]


class Checkpoints:
    """A run's checkpoints. They are written by a thread from a copy of the state, while training goes on.

    Args:
        folder: where they stand; one folder for all ranks.
        keep: so many of the newest are kept, and the one of the best validation; while updates are
            skipped, the newest from before that too.
    """

    def __init__(self, folder: Path, world: World, keep: int) -> None:
        self.folder, self._world, self._keep = folder, world, keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._coming: Future[None] | None = None
        self._abandoned = False
        # Not by a context manager: the writer warns in a thread of its own.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")

    def save(
        self, model: nn.Module, optimizers: Sequence[Optimizer], progress: TrainingState
    ) -> None:
        """Begins to write a checkpoint, when the one before is written; every rank must call it.

        Raises:
            OSError: the one before could not be written.
        """
        self.finish()
        path = self.folder / f"step-{progress.step:08d}"
        temporary = path.with_name(f".{path.name}.tmp")
        if self._world.is_main:
            for left in self.folder.glob(".step-*.tmp"):  # by a kill
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir(parents=True)
        self._world.barrier()
        weights, moments = get_state_dict(model, optimizers)
        held = {"model": weights, "optimizer": moments}
        written = state_dict_saver.async_save(
            held,
            checkpoint_id=temporary,
            process_group=self._world.disk,
            no_dist=self._world.size == 1,
        )
        assert isinstance(written, Future)
        self._coming = self._thread.submit(
            self._complete, written, temporary, path, asdict(progress)
        )

    def _complete(
        self, written: "Future[Any]", temporary: Path, path: Path, progress: dict[str, Any]
    ) -> None:
        """Gives a checkpoint its name when all ranks have written, and removes those that are no longer wanted."""
        try:
            written.result()  # on the leading rank, when all have written
            if self._world.is_main:
                found = sorted(temporary.iterdir())
                with ThreadPoolExecutor(_HASHING) as threads:
                    sums = list(threads.map(sha256_of, found))
                files = {
                    file.name: {"bytes": file.stat().st_size, "sha256": checksum}
                    for file, checksum in zip(found, sums, strict=True)
                }
                if self._abandoned:
                    return
                state = {"version": VERSION, **progress, "files": files}
                write_json(temporary / "state.json", {**state, "sha256": _digest(state)})
                sync(temporary)
                shutil.rmtree(path, ignore_errors=True)  # a damaged one that was skipped
                temporary.rename(path)
                sync(path.parent)
                self._prune(progress["step"], progress["best_step"], progress["first_skipped"])
        except CheckpointException as error:
            raise OSError(f"cannot write the checkpoint {path}: {_reason(error)}") from None
        finally:
            if self._world.is_main and not self._abandoned:
                shutil.rmtree(temporary, ignore_errors=True)

    def _prune(self, step: int, best_step: int, first_skipped: int | None) -> None:
        """Removes all but the newest, the best, and the newest from before what is wrong now.

        Checkpoints beyond the present step were damaged, and skipped. A checkpoint of the update
        before the first bad one holds the very weights that gave it.
        """
        reached = [path for path in checkpoints(self.folder) if step_of(path) <= step]
        good = [
            path for path in reached if first_skipped is None or step_of(path) < first_skipped - 1
        ]
        wanted = {
            *reached[: self._keep],
            *good[:1],
            *(path for path in reached if step_of(path) == best_step),
        }
        for old in set(checkpoints(self.folder)) - wanted:
            shutil.rmtree(old)

    def abandon(self) -> None:
        """Leave a checkpoint that is being written without its name; the next one that is written removes its files."""
        self._abandoned = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the checkpoint that is being written.

        After an error it is waited for because the lock of the run directory is released next, but
        not with several ranks, of which one may be gone; a second stop request waits for nothing.
        """
        if kind is None:
            self.finish()
        elif not issubclass(kind, Exception):
            self.abandon()
        elif self._world.size == 1:
            with suppress(Exception):
                self.finish()

    def finish(self) -> None:
        """Returns when all that was begun is on the disk.

        Raises:
            OSError: it could not be written.
        """
        coming, self._coming = self._coming, None
        if coming is not None:
            coming.result()

    def load(
        self, model: nn.Module, optimizers: Sequence[Optimizer]
    ) -> tuple[TrainingState, list[str]]:
        """Fill model and optimisers from the newest whole checkpoint, whatever number of ranks wrote it.

        The leading rank verifies the checksums of all files, and tells the others which checkpoint
        to read.

        Returns:
            how far it had come, and sentences on which was taken and which newer ones were skipped.

        Raises:
            InputError: there is no whole one, or it is not one of this model.
        """
        path, skipped, progress = self._world.broadcast(
            _newest(self.folder) if self._world.is_main else _NOTHING
        )
        weights, moments = get_state_dict(model, optimizers)
        held: dict[str, Any] = {"model": weights, "optimizer": moments}
        try:
            state_dict_loader.load(
                held,
                storage_reader=_Reader(path),
                planner=_Planner(),
                process_group=self._world.disk,
                no_dist=self._world.size == 1,
            )
        except CheckpointException as error:
            raise InputError(f"{path} does not fit this run: {_reason(error)}") from None
        set_state_dict(
            model, optimizers, model_state_dict=held["model"], optim_state_dict=held["optimizer"]
        )
        return progress, [*(f"skipped: {reason}" for reason in skipped), f"resumed from {path}"]


class _Unpickler(pickle.Unpickler):
    """Reads the metadata of a checkpoint, and refuses every other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong there")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """Reads a checkpoint from a folder; its metadata without executing anything."""

    def read_metadata(self, *arguments: Any, **named: Any) -> Metadata:
        metadata = _read_metadata(Path(self.path) / _METADATA)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(DefaultLoadPlanner):
    """Loads what is no tensor (the optimisers' settings) without executing anything."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(
            torch.load(value, weights_only=True), plain
        )  # the base class loads with weights_only=False
        plain.seek(0)
        super().load_bytes(read_item, plain)


def _reason(error: CheckpointException) -> str:
    """What went wrong below the checkpoint writer, which wraps a full disk in exceptions of its own."""
    inner: BaseException | None = next(iter(error.failures.values()))[0]
    first = inner
    while inner is not None:
        if isinstance(inner, OSError):
            return inner.strerror or str(inner)
        inner = inner.__cause__ or inner.__context__
    # From another rank an exception comes without its cause, and this is the archive writer's own.
    return (
        "a file is cut off; is the disk full?" if "inline_container" in str(first) else str(first)
    )


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, newest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the updates that a checkpoint was written after, by its name."""
    return int(path.name.removeprefix("step-"))


def newest_whole(folder: Path) -> tuple[Path, list[str]]:
    """Return the newest undamaged checkpoint, and a sentence for each newer one that was skipped.

    Raises:
        InputError: there is none.
    """
    path, skipped, _ = _newest(folder)
    return path, skipped


_Found = tuple[Path, list[str], TrainingState]
_NOTHING: _Found = (Path(), [], TrainingState())


def _newest(folder: Path) -> _Found:
    skipped: list[str] = []
    for path in checkpoints(folder):
        try:
            return path, skipped, _verified(path)
        except InputError as error:
            skipped.append(str(error))
    raise InputError(
        "; ".join(
            [
                *skipped,
                f"no whole checkpoint in {folder}: there is nothing to resume; start another run with another -o",
            ]
        )
    )


def _verified(path: Path) -> TrainingState:
    """Return how far a checkpoint had come, once all of it is found to be as it was written.

    Raises:
        InputError: a file is missing or damaged, or holds something else than tensors and settings.
    """
    file = path / "state.json"
    found = read_json(file, "checkpoint")
    if found.get("version") != VERSION:
        raise InputError(
            f"{path} has checkpoint version {found.get('version')!r}; this igpt reads {VERSION}"
        )
    require_schema(found, _State, file)
    if _digest(found) != found["sha256"]:
        raise InputError(f"{file} is damaged: its SHA-256 is not the one that was written")
    if found["step"] != step_of(path):
        raise InputError(
            f"{path} holds the state after {found['step']} steps, not after {step_of(path)}"
        )
    with ThreadPoolExecutor(_HASHING) as threads:
        list(
            threads.map(lambda item: _verify_file(path / item[0], item[1]), found["files"].items())
        )
    if _METADATA not in found["files"]:
        raise InputError(f"{file} does not list {_METADATA}")
    _verify_content(path, found["files"])
    return TrainingState(**{item.name: found[item.name] for item in fields(TrainingState)})


def _digest(state: dict[str, Any]) -> str:
    """Return the SHA-256 of a state without its own checksum."""
    text = json.dumps(
        {key: value for key, value in state.items() if key != "sha256"}, sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _verify_file(file: Path, written: dict[str, Any]) -> None:
    require_regular(file)
    if not file.is_file():
        raise InputError(f"{file} is missing")
    size = file.stat().st_size
    if size != written["bytes"]:
        raise InputError(f"{file} is damaged: {size} bytes, {written['bytes']} were written")
    try:
        checksum = sha256_of(file)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    if checksum != written["sha256"]:
        raise InputError(f"{file} is damaged: its SHA-256 is not the one that was written")


def _read_metadata(file: Path) -> Metadata:
    try:
        with file.open("rb") as stream:
            metadata = _Unpickler(stream).load()
    except Exception as error:  # whatever a pickle can be made to raise
        raise InputError(f"{file} is no metadata of a checkpoint: {error}") from None
    if not isinstance(metadata, Metadata):
        raise InputError(f"{file} is no metadata of a checkpoint")
    return metadata


def _verify_content(path: Path, files: dict[str, Any]) -> None:
    """Check that the metadata speaks of the checkpoint's own files, and that what is no tensor is plain data."""
    file = path / _METADATA
    metadata = _read_metadata(file)
    entries, stored = metadata.state_dict_metadata, metadata.storage_data
    if not isinstance(entries, dict) or not isinstance(stored, dict):
        raise InputError(f"{file} is no metadata of a checkpoint")
    for index, where in stored.items():
        if (
            not isinstance(index, MetadataIndex)
            or getattr(where, "relative_path", None) not in files
        ):
            raise InputError(f"{file} names files that state.json does not list")
        if isinstance(entries.get(index.fqn), BytesStorageMetadata):
            _verify_plain(path / where.relative_path, index.fqn, where.offset, where.length)


def _verify_plain(file: Path, name: str, offset: int, length: int) -> None:
    try:
        with file.open("rb") as stream:
            stream.seek(offset)
            torch.load(io.BytesIO(stream.read(length)), weights_only=True)
    except Exception as error:  # whatever a pickle can be made to raise
        kind = type(error).__name__
        raise InputError(
            f"{file} is damaged: the entry {name!r} is not plain data ({kind})"
        ) from None
