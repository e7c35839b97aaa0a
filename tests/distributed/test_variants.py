"""Several ranks train variants of the model like one process."""

from pathlib import Path

import pytest

from igpt.data.tokens.dataset import TokenDataset
from igpt.training.metrics import read_metrics
from igpt.training.pretrain import PretrainConfig, pretrain

TOGETHER = {
    "positions": "rotary",
    "value_residual": True,
    "share_color_updates": True,
}


def losses(run: Path) -> list[float]:
    return [
        line["loss"]
        for line in read_metrics(run / "metrics.jsonl")
        if line["kind"] in ("train", "validation")
    ]


@pytest.fixture(scope="module")
def settings(digits: TokenDataset, short: dict[str, object]) -> PretrainConfig:
    changes = {
        "batch_size": 11,
        "micro_batch_size": 2,
        "steps": 6,
        "validate_every": 3,
        "start_from_palette": True,
    }
    return PretrainConfig.layered(short, TOGETHER, changes, {"tokens": digits.path})


@pytest.fixture(scope="module")
def alone(settings: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run = tmp_path_factory.mktemp("variants") / "alone"
    pretrain(settings, run)
    return losses(run)


@pytest.mark.parametrize(
    ("size", "shard", "recomputation"), [(2, 1, "none"), (4, 4, "selective"), (4, 2, "full")]
)
def test_ranks_give_the_losses_of_one_process(
    ranks,
    settings: PretrainConfig,
    alone: list[float],
    tmp_path: Path,
    size: int,
    shard: int,
    recomputation: str,
) -> None:
    shared = settings.model_copy(update={"shard": shard, "activation_checkpointing": recomputation})
    shared.save(tmp_path / "settings.yaml")
    ranks(
        size,
        "pretrain",
        settings.tokens,
        "-o",
        tmp_path / "run",
        "--config",
        tmp_path / "settings.yaml",
    )
    assert losses(tmp_path / "run") == pytest.approx(alone, abs=1.5e-6)


def test_a_checkpoint_of_two_shards_is_resumed_by_one_process(
    ranks, igpt, settings: PretrainConfig, alone: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings.model_copy(update={"shard": 2}).save(tmp_path / "settings.yaml")
    words = ["pretrain", settings.tokens, "-o", run, "--config", tmp_path / "settings.yaml"]
    ranks(2, *words, "--minutes", "1e-6")  # over at once: all ranks stop after the next step
    done = igpt("pretrain", settings.tokens, "-o", run, "--resume", "--shard", 1)
    assert done.returncode == 0, done.stderr
    (resumed,) = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "resume"]
    assert resumed["step"] == 1
    assert losses(run) == pytest.approx(alone, abs=1.5e-6)
