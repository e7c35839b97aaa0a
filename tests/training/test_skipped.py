"""Steps whose loss or gradient is not finite are skipped; too many of them end the run."""

import re
from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from igpt.data.tokens.batches import Batch
from igpt.errors import InputError
from igpt.model.config import ModelConfig
from igpt.model.objectives import Autoregressive, Summed
from igpt.model.transformer import ImageGPT
from igpt.training.checkpoints import TrainingState, checkpoints, newest_whole, step_of
from igpt.training.distributed import World
from igpt.training.engine import Engine
from igpt.training.metrics import read_metrics
from igpt.training.settings import TrainConfig
from igpt.training.trainer import Trainer, Validation

from ..helpers.runs import assert_same_tensors, losses

FINE, NO_LOSS, NO_GRADIENT = range(3)


def troubled(model: ImageGPT, tokens: Tensor, trouble: Tensor) -> Summed:
    """The autoregressive objective, with errors that the batches select."""
    summed, count = Autoregressive().loss(model, tokens)
    if (trouble == NO_LOSS).any():
        summed = summed * torch.nan
    if (trouble == NO_GRADIENT).any():
        summed = (
            summed + (0 * model.lm_head.weight.sum()).sqrt()
        )  # 0, and its derivative is infinity times 0
    return summed, count


def batch(number: int, trouble: int = FINE) -> Batch:
    tokens = torch.randint(0, 16, (4, 16), generator=torch.Generator().manual_seed(number))
    return tokens, torch.tensor([FINE, FINE, trouble, FINE])


def make_engine(settings: dict[str, Any]) -> Engine:
    torch.manual_seed(0)
    model = ImageGPT(ModelConfig(resolution=4, n_colors=16, n_layer=2, n_embd=16, n_head=2))
    torch.nn.init.normal_(
        model.lm_head.weight, std=0.1
    )  # otherwise nothing below it would have a gradient
    common = {"batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "weight_decay": 0.1}
    return Engine(
        model,
        TrainConfig.layered({**common, **settings}),
        World(0, 1, torch.device("cpu")),
        troubled,
    )


def state(engine: Engine) -> list[Any]:
    """Return copies of the weights and of the optimizers' state."""
    kept = [
        engine.model.state_dict(),
        *(optimizer.state_dict()["state"] for optimizer in engine.optimizers),
    ]
    return [
        {
            key: value.clone()
            if isinstance(value, Tensor)
            else {k: v.clone() for k, v in value.items()}
        }
        for part in kept
        for key, value in part.items()
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("trouble", [NO_LOSS, NO_GRADIENT], ids=["loss", "gradient"])
def test_a_skipped_step_changes_no_bit(optimizer: str, trouble: int) -> None:
    engine, other = make_engine({"optimizer": optimizer}), make_engine({"optimizer": optimizer})
    assert len(engine.optimizers) == (2 if optimizer == "muon" else 1)
    for number in range(4):
        if number in (0, 2):  # after the first step, the optimizers have no state yet
            before = state(engine)
            loss, norm, skipped = engine.update(batch(9, trouble), 1e-2).tolist()
            assert skipped == 1
            assert (loss == loss) == (trouble == NO_GRADIENT)
            assert norm != norm
            if number:
                assert_same_tensors(before, state(engine))
        results = [some.update(batch(number), 1e-2) for some in (engine, other)]
        assert results[0].tolist() == results[1].tolist()
        assert results[0][2] == 0
        assert_same_tensors(state(engine), state(other))


def train(
    run: Path,
    troubles: Set[int],
    *,
    resume: bool = False,
    objective: int = NO_LOSS,
    **settings: object,
) -> TrainingState:
    """Run 12 steps, of which those with some numbers (from 1) have errors."""
    common = {"steps": 12, "learning_rate": 1e-2, "log_every": 1, "checkpoint_every": 1}
    engine = make_engine({**common, **settings})

    def batches(step: int) -> Batch:
        return batch(step, objective if step + 1 in troubles else FINE)

    checked = Validation("loss", str, troubled, 4, lambda first, last: batch(100))
    run.mkdir(exist_ok=True)
    return Trainer(engine, batches, checked, run, warmup=0).train(resume=resume)


def counts(run: Path) -> dict[int, int]:
    """Return the number of skipped steps, by the steps of metrics.jsonl."""
    return {
        line["step"]: line["skipped"]
        for line in read_metrics(run / "metrics.jsonl")
        if line["kind"] == "train"
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_continues_after_few_skipped_steps(optimizer: str, tmp_path: Path) -> None:
    progress = train(tmp_path, {3, 6, 7}, max_skipped=3, optimizer=optimizer)
    assert (progress.step, progress.skipped) == (12, 3)
    assert counts(tmp_path) == {1: 0, 2: 0, 4: 1, 5: 1, 8: 3, 9: 3, 10: 3, 11: 3, 12: 3}
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["skipped"] == 3
    assert all(loss == loss for loss in losses(tmp_path).values())


def test_metrics_have_the_mean_of_the_other_steps(tmp_path: Path) -> None:
    (tmp_path / "every").mkdir()
    train(tmp_path / "every", {3, 4, 6})
    train(tmp_path / "second", {3, 4, 6}, log_every=2)
    every, second = losses(tmp_path / "every"), losses(tmp_path / "second")
    assert list(second) == [2, 6, 8, 10, 12]
    assert second[2] == pytest.approx((every[1] + every[2]) / 2)
    assert second[6] == every[5]


@pytest.mark.parametrize("objective", [NO_LOSS, NO_GRADIENT], ids=["loss", "gradient"])
def test_too_many_skipped_steps_stop_the_run_and_name_an_earlier_checkpoint(
    objective: int, tmp_path: Path
) -> None:
    """The two newest ones contain the weights that caused the errors."""
    troubles = {3, 6, 7, 8}
    with pytest.raises(InputError, match="at step 8, and 4 steps were skipped so far") as caught:
        train(tmp_path, troubles, max_skipped=3, objective=objective)
    good = Path(re.search(r"the last good checkpoint is (\S+);", str(caught.value))[1])
    assert step_of(good) == 4
    assert newest_whole(good.parent)[0] == good.with_name("step-00000007")
    assert step_of(good) in map(step_of, checkpoints(tmp_path / "checkpoints"))


def test_the_count_is_kept_when_resuming(tmp_path: Path) -> None:
    troubles = {3, 6, 9}
    train(tmp_path / "whole", troubles, max_skipped=3)
    for allowed, at in ((0, 3), (1, 6), (2, 9)):
        with pytest.raises(InputError, match=f"at step {at}"):
            train(tmp_path / "run", troubles, max_skipped=allowed, resume=allowed > 0)
    progress = train(tmp_path / "run", troubles, max_skipped=3, resume=True)
    assert progress.skipped == 3
    assert counts(tmp_path / "run") == counts(tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_no_earlier_checkpoint_exists(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at step 1; there is no earlier checkpoint"):
        train(tmp_path, {1}, max_skipped=0)
