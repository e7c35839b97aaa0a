"""Checkpoints that are kept, loaded, and damaged."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError
from igpt.training.checkpoints import Checkpoints, TrainingState, newest_whole
from igpt.training.distributed import World
from igpt.training.metrics import read_metrics
from igpt.training.optimizer import make_optimizers
from igpt.training.pretrain import PretrainConfig, pretrain

from ..helpers.runs import assert_same_tensors

DATA = "__0_0.distcp"


class Saved:
    """A small model whose weights after n steps are n, and its checkpoints."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.model = nn.Linear(3, 2)
        self.optimizers = make_optimizers(self.model, "adamw", betas=(0.9, 0.95), weight_decay=0.0)
        self.checkpoints = Checkpoints(folder, World(0, 1, torch.device("cpu")), keep)

    def save(self, *steps: int, best: int = 0) -> None:
        for step in steps:
            nn.init.constant_(self.model.weight, step)
            self.checkpoints.save(self.model, self.optimizers, TrainingState(step, best_step=best))
            nn.init.constant_(self.model.weight, -1)  # a copy is written
        self.checkpoints.finish()

    def load(self) -> tuple[int, list[str]]:
        progress, notes = self.checkpoints.load(self.model, self.optimizers)
        assert (self.model.weight == progress.step).all()
        return progress.step, notes

    @property
    def steps(self) -> list[int]:
        return sorted(
            int(path.name.removeprefix("step-")) for path in self.checkpoints.folder.iterdir()
        )


def test_a_damaged_checkpoint_is_replaced_by_the_next_save_and_valid_ones_stay_until_then(
    tmp_path: Path,
) -> None:
    some = Saved(tmp_path, keep=2)
    some.save(2, 4, 6, 8, best=2)
    assert some.steps == [2, 6, 8]
    os.truncate(tmp_path / "step-00000008" / DATA, 10)
    (tmp_path / "step-00000006" / DATA).unlink()
    step, notes = some.load()
    assert step == 2
    assert [note.partition(" were written")[0].partition(", ")[0] for note in notes] == [
        f"skipped: {tmp_path}/step-00000008/{DATA} is damaged: 10 bytes",
        f"skipped: {tmp_path}/step-00000006/{DATA} is missing",
        f"resumed from {tmp_path}/step-00000002",
    ]
    assert some.steps == [2, 6, 8]
    some.save(6, best=2)
    assert some.steps == [2, 6], (
        "the later damaged one is removed, the one with the same name is replaced"
    )
    assert newest_whole(tmp_path) == (tmp_path / "step-00000006", [])
    assert some.load() == (6, [f"resumed from {tmp_path}/step-00000006"])


def test_valid_checkpoints_survive_a_save_that_fails(tmp_path: Path) -> None:
    some = Saved(tmp_path, keep=1)
    some.save(2, 4)
    (tmp_path / "step-00000006").write_text("in the way of the next one")
    with pytest.raises(OSError, match="step-00000006"):
        some.save(6)
    (tmp_path / "step-00000006").unlink()
    assert some.steps == [4], "no incomplete one either"
    assert some.load()[0] == 4


@pytest.mark.parametrize("name", [DATA, ".metadata", "state.json"])
def test_every_missing_file_is_detected(name: str, tmp_path: Path) -> None:
    some = Saved(tmp_path, keep=2)
    some.save(2, 4)
    (tmp_path / "step-00000004" / name).unlink()
    step, notes = some.load()
    assert step == 2
    assert f"{name} is missing" in notes[0]
    (tmp_path / "step-00000002" / name).unlink()
    with pytest.raises(
        InputError, match=r"no whole checkpoint in .* there is nothing to resume; start another run"
    ):
        some.load()


def test_the_state_of_the_optimizers_is_restored(tmp_path: Path) -> None:
    some, other = Saved(tmp_path, keep=1), Saved(tmp_path, keep=1)
    some.model(torch.ones(1, 3)).sum().backward()
    for optimizer in some.optimizers:
        optimizer.step()
    some.save(1)
    other.load()
    states = [[optimizer.state_dict() for optimizer in saved.optimizers] for saved in (some, other)]
    assert states[0][0]["state"]
    assert_same_tensors(*states)


def test_the_newest_and_the_best_are_kept(
    digits: TokenDataset, short: dict[str, object], tmp_path: Path
) -> None:
    """With a too high learning rate the first validation is the best; two more end training."""
    high = {
        "learning_rate": 0.1,
        "schedule": "constant",
        "validate_every": 2,
        "checkpoint_every": 2,
    }
    config = PretrainConfig.layered(
        {**short, **high, "patience": 2, "keep_checkpoints": 1, "tokens": digits.path}
    )
    pretrain(config, tmp_path)
    end = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert (end["best_step"], end["step"]) == (2, 6)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000006",
    ]
