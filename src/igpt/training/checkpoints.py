"""Checkpoints: weights, optimizer state and step. Complete or absent; resumed bit for bit.

checkpoints/step-00001200/    the files of torch.distributed.checkpoint, one or more per rank, and
    state.json                version, `TrainingState`, size and SHA-256 of every file, own SHA-256

Any number of ranks can resume. With several machines the folder must be on a shared disk. Loading a
checkpoint executes no code from it: `.metadata` is a pickle, and is read by an unpickler that
accepts only the classes of such metadata; the other files are read with
`torch.load(weights_only=True)`.
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
from dataclasses import asdict, dataclass, fields, replace
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
_HASHING_THREADS = 8
_NAME = re.compile(r"step-\d{8,}")

# The classes that the metadata of a checkpoint consists of. Others in a pickle are refused.
_DTYPES = {
    str(kind).removeprefix("torch.")
    for kind in vars(torch).values()
    if isinstance(kind, torch.dtype)
}
_PATHS = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"}
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
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,  # Python 3.13
}


@dataclass
class TrainingState:
    """Progress of a run.

    Attributes:
        step: steps done, including skipped ones.
        validated: step of the last validation.
        best, best_step: lowest validation value so far, and its step.
        seconds: spent in steps.
        validations_without_better: since the best one.
        skipped: steps that changed nothing because the loss or gradient was not finite.
        first_skipped: first of the consecutive skipped steps up to now; None if the last step was
            not skipped.
        unlogged_loss, unlogged_steps: sum and number of the losses since the last line of
            metrics.jsonl.
        probed: step of the last probe of the features; -1 before the first one.
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
    probed: int = -1


class _SavedFile(Stored):
    """A file of a checkpoint, in state.json."""

    bytes: int = Field(ge=0)
    sha256: str


class _State(Stored):
    """Schema of state.json, with every field of `TrainingState`.

    Earlier checkpoints of this version lack `probed`.
    """

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
    probed: int = Field(-1, ge=-1)
    files: dict[str, _SavedFile]


class Checkpoints:
    """The checkpoints of a run, written in a thread, from a copy, while training continues.

    Args:
        folder: one folder for all ranks.
        keep: how many of the newest to keep. The one of the best validation is kept too; and while
            steps are skipped, the newest one from before.
    """

    def __init__(self, folder: Path, world: World, keep: int) -> None:
        self.folder, self._world, self._keep = folder, world, keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._abandoned = False
        # Not `warnings.catch_warnings`: the writer warns in a thread of its own.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")

    def save(self, model: nn.Module, optimizers: Sequence[Optimizer], state: TrainingState) -> None:
        """Wait for the previous checkpoint, then start to write a new one. Every rank must call it.

        Raises:
            OSError: the previous one could not be written.
        """
        self.finish()
        path = self.folder / f"step-{state.step:08d}"
        temporary = path.with_name(f".{path.name}.tmp")
        if self._world.is_main:
            for left in self.folder.glob(".step-*.tmp"):  # by a killed process
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir(parents=True)
        self._world.barrier()
        weights, moments = get_state_dict(model, optimizers)
        written = state_dict_saver.async_save(
            {"model": weights, "optimizer": moments},
            checkpoint_id=temporary,
            process_group=self._world.disk,
            no_dist=self._world.size == 1,
        )
        assert isinstance(written, Future)
        self._pending = self._thread.submit(
            self._complete, written, temporary, path, replace(state)
        )

    def _complete(
        self, written: "Future[Any]", temporary: Path, path: Path, state: TrainingState
    ) -> None:
        """Rename a checkpoint when all ranks have written it, and remove old ones."""
        try:
            written.result()  # on the main rank, when all ranks have written
            if self._world.is_main:
                paths = sorted(temporary.iterdir())
                with ThreadPoolExecutor(_HASHING_THREADS) as threads:
                    checksums = list(threads.map(sha256_of, paths))
                files = {
                    file.name: {"bytes": file.stat().st_size, "sha256": checksum}
                    for file, checksum in zip(paths, checksums, strict=True)
                }
                if self._abandoned:
                    return
                content = {"version": VERSION, **asdict(state), "files": files}
                write_json(temporary / "state.json", {**content, "sha256": _digest(content)})
                sync(temporary)
                shutil.rmtree(path, ignore_errors=True)  # a damaged one that was skipped
                temporary.rename(path)
                sync(path.parent)
                self._prune(state)
        except CheckpointException as error:
            raise OSError(f"cannot write the checkpoint {path}: {_reason(error)}") from None
        finally:
            if self._world.is_main and not self._abandoned:
                shutil.rmtree(temporary, ignore_errors=True)

    def _prune(self, state: TrainingState) -> None:
        """Remove all but the newest, the best, and the newest from before the skipped steps.

        Checkpoints beyond the current step were damaged, and skipped. The checkpoint just before
        the first skipped step holds the very weights that caused it.
        """
        reached = [path for path in checkpoints(self.folder) if step_of(path) <= state.step]
        first_bad = state.first_skipped or state.step + 2
        good = [path for path in reached if step_of(path) < first_bad - 1]
        best = [path for path in reached if step_of(path) == state.best_step]
        for path in set(checkpoints(self.folder)) - {*reached[: self._keep], *good[:1], *best}:
            shutil.rmtree(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the checkpoint that is being written.

        After an error too, because the lock of the run directory is released next; but not with
        several ranks, of which one may be gone. A second stop request (`KeyboardInterrupt`) waits
        for nothing.
        """
        if kind is None:
            self.finish()
        elif not issubclass(kind, Exception):
            self.abandon()
        elif self._world.size == 1:
            with suppress(Exception):
                self.finish()

    def abandon(self) -> None:
        """Leave the checkpoint that is being written incomplete; the next save removes it."""
        self._abandoned = True

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            OSError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def load(
        self, model: nn.Module, optimizers: Sequence[Optimizer]
    ) -> tuple[TrainingState, list[str]]:
        """Fill model and optimizers from the newest undamaged checkpoint.

        The main rank verifies the checksums of all files. The number of ranks may have changed.

        Returns:
            the training state, and sentences on the checkpoint loaded and the newer ones skipped.

        Raises:
            InputError: there is no undamaged checkpoint, or it belongs to another model.
        """
        found = _newest(self.folder) if self._world.is_main else None
        found = self._world.broadcast(found)
        assert found is not None
        path, skipped, state = found
        weights, moments = get_state_dict(model, optimizers)
        tensors: dict[str, Any] = {"model": weights, "optimizer": moments}
        try:
            state_dict_loader.load(
                tensors,
                storage_reader=_Reader(path),
                planner=_Planner(),
                process_group=self._world.disk,
                no_dist=self._world.size == 1,
            )
        except CheckpointException as error:
            raise InputError(f"{path} does not fit this run: {_reason(error)}") from None
        set_state_dict(
            model,
            optimizers,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
        )
        return state, [*(f"skipped: {reason}" for reason in skipped), f"resumed from {path}"]


class _Unpickler(pickle.Unpickler):
    """Read the metadata of a checkpoint, and refuses all classes and functions but `_CLASSES`."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """Read a checkpoint from a folder, without executing code from its metadata."""

    def read_metadata(self, *arguments: Any, **named: Any) -> Metadata:
        metadata = _read_metadata(Path(self.path) / _METADATA)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(DefaultLoadPlanner):
    """Loads entries that are not tensors (settings of optimizers) without executing code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        # The base class loads with weights_only=False.
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def _reason(error: CheckpointException) -> str:
    """Return the reason, say a full disk, that the checkpoint writer wraps in its exceptions."""
    inner: BaseException | None = next(iter(error.failures.values()))[0]
    first = inner
    while inner is not None:
        if isinstance(inner, OSError):
            return inner.strerror or str(inner)
        inner = inner.__cause__ or inner.__context__
    # An exception from another rank has lost its cause; this one is of the archive writer.
    return (
        "a file is cut off; is the disk full?" if "inline_container" in str(first) else str(first)
    )


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, newest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def newest_whole(folder: Path) -> tuple[Path, list[str]]:
    """Return the newest undamaged checkpoint, and a sentence for each newer one that was skipped.

    Raises:
        InputError: there is none.
    """
    path, skipped, _ = _newest(folder)
    return path, skipped


def _newest(folder: Path) -> tuple[Path, list[str], TrainingState]:
    skipped: list[str] = []
    for path in checkpoints(folder):
        try:
            return path, skipped, _verified(path)
        except InputError as error:
            skipped.append(str(error))
    nothing = f"no whole checkpoint in {folder}: there is nothing to resume"
    raise InputError("; ".join([*skipped, nothing, "start another run with another -o"]))


def _verified(path: Path) -> TrainingState:
    """Verify a whole checkpoint and return its training state.

    Raises:
        InputError: a file is missing or damaged, or contains anything but tensors and plain data.
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
    with ThreadPoolExecutor(_HASHING_THREADS) as threads:
        for _ in threads.map(
            lambda item: _verify_file(path / item[0], item[1]), found["files"].items()
        ):
            pass  # raises the first error
    if _METADATA not in found["files"]:
        raise InputError(f"{file} does not list {_METADATA}")
    _verify_content(path, found["files"])
    known = [item.name for item in fields(TrainingState) if item.name in found]
    return TrainingState(**{name: found[name] for name in known})


def _digest(state: dict[str, Any]) -> str:
    """Return the SHA-256 of the content of state.json without its checksum."""
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
    except Exception as error:  # a pickle can raise anything
        raise InputError(f"{file} is not the metadata of a checkpoint: {error}") from None
    if not isinstance(metadata, Metadata):
        raise InputError(f"{file} is not the metadata of a checkpoint")
    return metadata


def _verify_content(path: Path, files: dict[str, Any]) -> None:
    """Check that the metadata names only listed files, and that non-tensors are plain data."""
    file = path / _METADATA
    metadata = _read_metadata(file)
    entries, stored = metadata.state_dict_metadata, metadata.storage_data
    if not isinstance(entries, dict) or not isinstance(stored, dict):
        raise InputError(f"{file} is not the metadata of a checkpoint")
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
    except Exception as error:  # a pickle can raise anything
        kind = type(error).__name__
        raise InputError(
            f"{file} is damaged: the entry {name!r} is not plain data ({kind})"
        ) from None
