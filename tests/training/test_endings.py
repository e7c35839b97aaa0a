"""Files and messages when training ends by an error or by a late Ctrl-C."""

import signal
import time
from pathlib import Path

import pytest

from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import Interrupted
from igpt.training import checkpoints as state
from igpt.training.checkpoints import Checkpoints, newest_whole
from igpt.training.engine import Engine
from igpt.training.pretrain import PretrainConfig, pretrain
from igpt.training.run_directory import device_and_stop_seconds
from igpt.training.trainer import Trainer


def settings(digits: TokenDataset, short: dict[str, object], **changes: object) -> PretrainConfig:
    return PretrainConfig.layered(short, {"tokens": digits.path, "steps": 12, **changes})


def test_a_checkpoint_is_complete_before_an_error_releases_the_lock(
    digits: TokenDataset, short: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, update = state.sha256_of, Engine.update

    def slow(path: Path) -> str:
        time.sleep(0.2)
        return whole(path)

    def failing(self: Engine, batch: object, rate: float) -> object:
        if (tmp_path / "run" / "checkpoints").exists():
            raise OSError(28, "No space left on device")
        return update(self, batch, rate)

    monkeypatch.setattr(state, "sha256_of", slow)
    monkeypatch.setattr(Engine, "update", failing)
    with pytest.raises(OSError, match="No space left"):
        pretrain(settings(digits, short), tmp_path / "run")
    assert newest_whole(tmp_path / "run" / "checkpoints")[0].name == "step-00000006"
    assert not list((tmp_path / "run" / "checkpoints").glob(".step-*"))


def test_a_second_request_to_stop_leaves_no_incomplete_checkpoint(
    digits: TokenDataset, short: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers: list[Checkpoints] = []
    save = Checkpoints.save

    def interrupted(self: Checkpoints, *arguments: object) -> None:
        save(self, *arguments)
        writers.append(self)
        raise KeyboardInterrupt

    whole = state.sha256_of
    monkeypatch.setattr(state, "sha256_of", lambda path: (time.sleep(0.2), whole(path))[1])
    monkeypatch.setattr(Checkpoints, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(settings(digits, short), tmp_path / "run")
    writers[0].finish()
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_ctrl_c_during_the_last_save_is_not_lost(
    digits: TokenDataset, short: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Trainer._loop

    def late(self: Trainer, *arguments: object) -> None:
        loop(self, *arguments)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_loop", late)
    with pytest.raises(Interrupted, match="at the end of training, after 12 steps"):
        pretrain(settings(digits, short), tmp_path / "run")
    assert newest_whole(tmp_path / "run" / "checkpoints")[0].name == "step-00000012"


def test_device_and_seconds_for_saving_are_the_recorded_ones_unless_given_again(
    digits: TokenDataset, short: dict[str, object], tmp_path: Path
) -> None:
    settings(digits, short, device="cpu", stop_seconds=99).save(tmp_path / "config.yaml")
    plain = settings(digits, short)
    assert device_and_stop_seconds(tmp_path, plain, None, resume=True) == ("cpu", 99)
    assert device_and_stop_seconds(tmp_path, plain, {"stop_seconds": 25}, resume=True) == (
        "cpu",
        25,
    )
    assert device_and_stop_seconds(tmp_path, plain, None, resume=False) == ("auto", 25)
