"""The run directory: the settings of a run, what it was made with, and who may write to it.

config.yaml        all settings, resolved: with the same tokens they reproduce the run
environment.json   kind of the run, versions, machine, command, commit, and checksums of the inputs:
                   the manifests of the tokens and of the tokens to probe with, and the weights of
                   a model to fine-tune
.lock              while a process works in it, see `igpt.locks`
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from igpt.config import read_settings
from igpt.data.tokens.manifest import MANIFEST
from igpt.environment import describe, read_environment, run_kind
from igpt.errors import InputError
from igpt.files import sha256_of, write_json
from igpt.locks import exclusive_folder
from igpt.model.precision import resolve_precision
from igpt.training.checkpoints import checkpoints
from igpt.training.distributed import World, distributed_world
from igpt.training.metrics import read_metrics
from igpt.training.settings import TrainConfig
from igpt.training.trackers import require_tracker

_SETTINGS, _ENVIRONMENT, _METRICS = "config.yaml", "environment.json", "metrics.jsonl"
_RUN_FILES = (_SETTINGS, _METRICS, "checkpoints", "model", "rates", "fold-back", "test.json")
_INITIAL_SNAPSHOT = "step-00000000"
Settings = TypeVar("Settings", bound=TrainConfig)


@contextmanager
def sole_writer(run: Path, world: World) -> Iterator[None]:
    """Keep other processes from writing to a run directory; the main rank locks it for all ranks.

    Raises:
        InputError: another process works in it. Its host and process id are named on every rank.
    """
    with ExitStack() as stack:
        refusal = None
        if world.is_main:
            try:
                stack.enter_context(exclusive_folder(run))
            except InputError as error:
                refusal = str(error)
        refusal = world.broadcast(refusal)
        if refusal is not None:
            raise InputError(refusal)
        yield


@contextmanager
def open_run(
    run: Path, config: Settings, given: Mapping[str, Any] | None, resume: bool
) -> Iterator[tuple[Settings, World]]:
    """Join the ranks, lock the run directory, and yield the settings of the run and the world.

    Args:
        given: see `resolve_config`; the tokens alone by default.

    Raises:
        InputError, LostRank: see `distributed_world`, `sole_writer` and `resolve_config`.
    """
    with (
        distributed_world(*device_and_stop_seconds(run, config, given, resume)) as world,
        sole_writer(run, world),
    ):
        if given is None:
            given = config.model_dump(include={"tokens"})
        config = resolve_config(run, config, given, resume)
        require_tracker(config.track)
        world.barrier()  # no rank may mistake the folder that another one creates for an old run
        # The machines of the ranks may differ.
        precision = world.broadcast(resolve_precision(config.precision, world.device))
        yield config.model_copy(update={"precision": precision}), world


def has_begun(run: Path) -> bool:
    """Return whether a run directory holds results of training, which a new start would lose.

    A run that was stopped before its first step leaves settings, perhaps a snapshot of the initial
    weights, and metrics without a line of training or validation. These are no results.
    """
    if (run / "model").exists() or (run / "test.json").exists():
        return True
    if checkpoints(run / "checkpoints"):
        return True
    if any(path.name != _INITIAL_SNAPSHOT for path in (run / "snapshots").glob("step-*")):
        return True
    if (run / _METRICS).exists() and _has_trained(run / _METRICS):
        return True
    return any(has_begun(training) for training in _trainings(run))


def _trainings(run: Path) -> list[Path]:
    """Return the folders of a fine-tuning run that trains more than once."""
    return [path for path in [*(run / "rates").glob("*"), run / "fold-back"] if path.is_dir()]


def _has_trained(metrics: Path) -> bool:
    try:
        return any(line["kind"] in ("train", "validation", "end") for line in read_metrics(metrics))
    except InputError:  # unreadable, so perhaps
        return True


def _is_run(folder: Path) -> bool:
    """Return whether `record_run` has written to a folder; its files may be someone else's."""
    try:
        return "tokens_sha256" in read_environment(folder / _ENVIRONMENT)
    except InputError:
        return False


def _clear(run: Path) -> None:
    """Remove what a run that was stopped before its first step has left, and nothing else."""
    for name in (_SETTINGS, _METRICS):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "snapshots" / _INITIAL_SNAPSHOT, ignore_errors=True)
    for unfinished in (run / "checkpoints").glob(".step-*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)
    trainings = _trainings(run)
    for training in trainings:
        _clear(training)
    for folder in (*trainings, run / "rates", run / "snapshots", run / "checkpoints"):
        with suppress(OSError):  # it does not exist or is not empty
            folder.rmdir()


def device_and_stop_seconds(
    run: Path, config: TrainConfig, given: Mapping[str, Any] | None, resume: bool
) -> tuple[str, float]:
    """Return two settings that are needed to create the world, before `resolve_config`.

    Args:
        run, config, given, resume: see `resolve_config`, which validates the recorded values.
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


def resolve_config(run: Path, config: Settings, given: Mapping[str, Any], resume: bool) -> Settings:
    """Return the settings of a run: `config` for a new run, the recorded ones to resume.

    Args:
        config: settings of a new run.
        given: the settings that the user named. To resume, they must equal the recorded ones,
            except paths, "auto", and settings that may change (`TrainConfig.changeable` and
            `TrainConfig.ending`) or be increased (`TrainConfig.extendable`).

    Raises:
        InputError: the run has begun and `resume` is False; there is no run to resume, or one of
            another kind; or a given setting is not the recorded one.
    """
    recorded = run / _SETTINGS
    if not resume:
        exists = any((run / name).exists() for name in _RUN_FILES)
        if exists and (has_begun(run) or not _is_run(run)):
            raise InputError(f"{run} exists already; --resume continues it, or choose another -o")
        return config
    if not recorded.exists():
        raise InputError(
            f"there is no run to resume at {run}: config.yaml is missing; start it without --resume"
        )
    kind = run_kind(read_environment(run / _ENVIRONMENT), read_settings(recorded))
    if kind != config.kind:
        raise InputError(
            f"{run} was begun by igpt {kind}, which continues it with --resume; choose another -o"
        )
    before = type(config).load(recorded)
    changed: dict[str, Any] = {}
    for key, value in given.items():
        # Paths may change: checksums verify that the tokens and the model are the same.
        may_change = isinstance(value, Path) or key in config.changeable | config.ending
        if may_change or (key in config.extendable and value > getattr(before, key)):
            changed[key] = value
        elif value not in (getattr(before, key), "auto"):
            raise InputError(
                f"{run} was started with {key} = {getattr(before, key)}, not {value}; leave that "
                "out to resume, or start another run"
            )
    return before.model_copy(update=changed)


def record_run(
    run: Path,
    config: TrainConfig,
    tokens: Path,
    *,
    resume: bool,
    is_main: bool,
    model_sha256: str | None = None,
    probe_tokens: Path | None = None,
) -> None:
    """Write the settings and the environment of a new run, or check the inputs of a resumed one.

    Changes of `steps` and `patience` are recorded before training continues. A new run removes what
    an earlier one that was stopped before its first step has left.

    Args:
        model_sha256: checksum of the weights that training starts from, if they are not random.
        probe_tokens: data set by which features are measured during training, if any.

    Raises:
        InputError: the tokens or the model have changed.
    """
    checksums = {"tokens_sha256": sha256_of(tokens / MANIFEST)}
    if model_sha256:
        checksums["model_sha256"] = model_sha256
    if probe_tokens:
        checksums["probe_tokens_sha256"] = sha256_of(probe_tokens / MANIFEST)
    if resume:
        recorded = read_environment(run / _ENVIRONMENT)
        if "tokens_sha256" not in recorded:
            raise InputError(f"{run / _ENVIRONMENT}: the key 'tokens_sha256' is missing")
        if recorded["tokens_sha256"] != checksums["tokens_sha256"]:
            raise InputError(
                f"{tokens} is not the data set that {run} was started with, or it has changed since"
            )
        probed = checksums.get("probe_tokens_sha256")
        if recorded.get("probe_tokens_sha256", probed) != probed:
            raise InputError(
                f"{probe_tokens} is not the data set that {run} is probed with, or it has changed "
                "since"
            )
        if recorded.get("model_sha256", model_sha256) != model_sha256:
            raise InputError(
                f"the model is not the one that {run} was started with, or it has changed since"
            )
        before = read_settings(run / _SETTINGS)
        changes = {key: getattr(config, key) for key in config.extendable | config.ending}
        if is_main and any(value != before.get(key) for key, value in changes.items()):
            type(config).layered(before, changes, where=str(run)).save(run / _SETTINGS)
    elif is_main:
        run.mkdir(parents=True, exist_ok=True)
        if _is_run(run):
            _clear(run)
        write_json(run / _ENVIRONMENT, {"kind": config.kind, **describe(), **checksums})
        config.save(run / _SETTINGS)
