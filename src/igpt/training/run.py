"""The run directory: which settings a run has, and what it was made with.

config.yaml        all settings, resolved; with the tokens they repeat the run
environment.json   versions, machine, command, commit, and the checksums of what was given: the tokens' manifest, and
                   the weights of a model to be fine-tuned
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from igpt.config import read_settings
from igpt.data.tokens import MANIFEST
from igpt.environment import describe
from igpt.errors import InputError
from igpt.files import read_json, sha256_of, write_json
from igpt.training.settings import TrainConfig

_OF_A_RUN = ("config.yaml", "metrics.jsonl", "checkpoints", "model", "rates", "fold-back", "test.json")
Settings = TypeVar("Settings", bound=TrainConfig)


def settle_config(run: Path, config: Settings, given: Mapping[str, Any], resume: bool) -> Settings:
    """Settles which settings a run has: new ones for a fresh directory, the recorded ones to resume.

    Args:
        config: the settings of a fresh run.
        given: those of them that the user gave on purpose; to resume, they must be the recorded ones (paths, "auto" and
            what only the machine is concerned with are settled anew).

    Raises:
        InputError: the directory exists and `resume` is False, or a given setting is not the recorded one.
    """
    recorded = run / "config.yaml"
    if not resume:
        if any((run / name).exists() for name in _OF_A_RUN):
            raise InputError(f"{run} exists already; --resume continues it, or choose another -o")
        return config
    if not recorded.exists():
        raise InputError(f"there is no run to resume at {run}: config.yaml is missing; start it without --resume")
    if ("generation_weight" in read_settings(recorded)) != ("generation_weight" in type(config).model_fields):
        other = "pretrain" if "generation_weight" in type(config).model_fields else "finetune"
        raise InputError(f"{run} was begun by igpt {other}, which continues it with --resume; choose another -o")
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
    run: Path, config: TrainConfig, tokens: Path, *, resume: bool, leads: bool, model_sha256: str | None = None
) -> None:
    """Writes what the run is; to resume, tokens and model must be the ones it began with.

    Args:
        model_sha256: of the weights it begins with, if they are not drawn.

    Raises:
        InputError: the tokens or the model have changed.
    """
    checksums = {"tokens_sha256": sha256_of(tokens / MANIFEST)}
    if model_sha256:
        checksums["model_sha256"] = model_sha256
    if resume:
        recorded = read_json(run / "environment.json", "run")
        if recorded["tokens_sha256"] != checksums["tokens_sha256"]:
            raise InputError(f"{tokens} is not the data set that {run} was started with, or it has changed since")
        if recorded.get("model_sha256", model_sha256) != model_sha256:
            raise InputError(f"the model is not the one that {run} was started with, or it has changed since")
    elif leads:
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "environment.json", {**describe(), **checksums})
        config.save(run / "config.yaml")
