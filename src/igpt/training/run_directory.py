"""The run directory: which settings a run has, what it was made with, and who works in it.

config.yaml        all settings, resolved; with the tokens they repeat the run
environment.json   versions, machine, command, commit, and the checksums of what was given: the
tokens' manifest, and
                   the weights of a model to be fine-tuned
.lock              while a process works in it: see `igpt.locks`
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from igpt.config import read_settings
from igpt.data.tokens.dataset import MANIFEST
from igpt.environment import describe, read_environment
from igpt.errors import InputError
from igpt.files import sha256_of, write_json
from igpt.locks import exclusive_folder
from igpt.training.checkpoints import checkpoints
from igpt.training.distributed import World
from igpt.training.metrics import read_metrics
from igpt.training.settings import TrainConfig

_SETTINGS, _ENVIRONMENT, _METRICS = "config.yaml", "environment.json", "metrics.jsonl"
_OF_A_RUN = (_SETTINGS, _METRICS, "checkpoints", "model", "rates", "fold-back", "test.json")
_AS_DRAWN = "step-00000000"  # a snapshot of the weights before the first step
Settings = TypeVar("Settings", bound=TrainConfig)


@contextmanager
def sole_writer(run: Path, world: World) -> Iterator[None]:
    """Keep other processes from working in a run directory; of a world, the leading rank holds the lock for all.

    Raises:
        InputError: another process works in it; all ranks are told its host and process id.
    """
    with ExitStack() as held:
        refusal = None
        if world.is_main:
            try:
                held.enter_context(exclusive_folder(run))
            except InputError as error:
                refusal = str(error)
        refusal = world.broadcast(refusal)
        if refusal is not None:
            raise InputError(refusal)
        yield


def has_begun(run: Path) -> bool:
    """Return whether a run directory holds something that training made, which a new start would lose.

    Settings, and metrics without a line of training or validation, are left by a run whose first
    step never happened.
    """
    if any((run / name).exists() for name in ("model", "test.json")) or checkpoints(
        run / "checkpoints"
    ):
        return True
    if any(path.name != _AS_DRAWN for path in (run / "snapshots").glob("step-*")):
        return True
    if (run / _METRICS).exists() and _has_trained(run / _METRICS):
        return True
    return any(has_begun(part) for part in _parts(run))


def _parts(run: Path) -> list[Path]:
    """Return the folders in which fine-tuning trains more than once."""
    return [part for part in [*(run / "rates").glob("*"), run / "fold-back"] if part.is_dir()]


def _has_trained(metrics: Path) -> bool:
    try:
        return any(line["kind"] in ("train", "validation", "end") for line in read_metrics(metrics))
    except InputError:  # it is unknown what it says: nothing is overwritten
        return True


def _is_ours(run: Path) -> bool:
    """Return whether `record_run` has written to a directory; otherwise the files in it are somebody else's."""
    try:
        return "tokens_sha256" in read_environment(run / _ENVIRONMENT)
    except InputError:
        return False


def _clear(run: Path) -> None:
    """Remove what a start has left that did not come to its first step, and nothing else."""
    for name in (_SETTINGS, _METRICS):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "snapshots" / _AS_DRAWN, ignore_errors=True)
    for unfinished in (run / "checkpoints").glob(".step-*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)
    parts = _parts(run)
    for part in parts:
        _clear(part)
    for folder in (*parts, run / "rates", run / "snapshots", run / "checkpoints"):
        with suppress(OSError):  # not there, or not empty
            folder.rmdir()


def device_and_stop_seconds(
    run: Path, config: TrainConfig, given: Mapping[str, Any] | None, resume: bool
) -> tuple[str, float]:
    """Return the device of a run and the seconds to save in, which are needed before its settings are settled.

    Args:
        run, config, given, resume: see `settle_config`, which checks the recorded values.
    """
    device, seconds = config.device, config.stop_seconds
    recorded = run / _SETTINGS
    if resume and recorded.exists():
        values = read_settings(recorded)
        known = given or {}
        if "device" not in known and values.get("device") in ("cpu", "cuda"):
            device = values["device"]
        if "stop_seconds" not in known and isinstance(values.get("stop_seconds"), int | float):
            seconds = values["stop_seconds"]
    return device, seconds


def settle_config(run: Path, config: Settings, given: Mapping[str, Any], resume: bool) -> Settings:
    """Return the settings of a run: new ones for a fresh directory, the recorded ones to resume.

    Args:
        config: the settings of a fresh run.
        given: those of them that the user gave on purpose; to resume, they must be the recorded
            ones (paths, "auto" and what only concerns the machine may change).

    Raises:
        InputError: the run has begun and `resume` is False, or a given setting is not the recorded
            one.
    """
    recorded = run / _SETTINGS
    if not resume:
        exists = any((run / name).exists() for name in _OF_A_RUN)
        if exists and (has_begun(run) or not _is_ours(run)):
            raise InputError(f"{run} exists already; --resume continues it, or choose another -o")
        return config
    if not recorded.exists():
        raise InputError(
            f"there is no run to resume at {run}: config.yaml is missing; start it without --resume"
        )
    if ("generation_weight" in read_settings(recorded)) != (
        "generation_weight" in type(config).model_fields
    ):
        other = "pretrain" if "generation_weight" in type(config).model_fields else "finetune"
        raise InputError(
            f"{run} was begun by igpt {other}, which continues it with --resume; choose another -o"
        )
    before = type(config).load(recorded)
    moved: dict[str, Any] = {}
    for key, value in given.items():
        # Where things lie may change; that the tokens are the same is checked by checksum.
        if isinstance(value, Path) or key in config.of_the_machine:
            moved[key] = value
        elif value not in (getattr(before, key), "auto"):
            raise InputError(
                f"{run} was started with {key} = {getattr(before, key)}, not {value}; leave that out to resume, or "
                "start another run"
            )
    return before.model_copy(update=moved)


def record_run(
    run: Path,
    config: TrainConfig,
    tokens: Path,
    *,
    resume: bool,
    is_main: bool,
    model_sha256: str | None = None,
) -> None:
    """Write what the run is; to resume, tokens and model must be the ones it began with.

    A new start removes what an earlier one has left that did not come to its first step.

    Args:
        model_sha256: of the weights it begins with, if they are not drawn.

    Raises:
        InputError: the tokens or the model have changed.
    """
    checksums = {"tokens_sha256": sha256_of(tokens / MANIFEST)}
    if model_sha256:
        checksums["model_sha256"] = model_sha256
    if resume:
        recorded = read_environment(run / _ENVIRONMENT)
        if "tokens_sha256" not in recorded:
            raise InputError(f"{run / _ENVIRONMENT}: the key 'tokens_sha256' is missing")
        if recorded["tokens_sha256"] != checksums["tokens_sha256"]:
            raise InputError(
                f"{tokens} is not the data set that {run} was started with, or it has changed since"
            )
        if recorded.get("model_sha256", model_sha256) != model_sha256:
            raise InputError(
                f"the model is not the one that {run} was started with, or it has changed since"
            )
    elif is_main:
        run.mkdir(parents=True, exist_ok=True)
        if _is_ours(run):
            _clear(run)
        write_json(run / _ENVIRONMENT, {**describe(), **checksums})
        config.save(run / _SETTINGS)
