"""The parts of a pretraining run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from igpt.data.tokens.dataset import TokenDataset
from igpt.model.cost import training_flops
from igpt.model.objectives import Autoregressive, Bert
from igpt.model.transformer import ImageGPT
from igpt.training.distributed import World
from igpt.training.metrics import read_metrics
from igpt.training.optimizer import learning_rate
from igpt.training.presets import MODELS
from igpt.training.pretrain import PretrainConfig, _validation_batch, _validation_tokens
from igpt.training.settings import TrainConfig


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == kind]


def test_berts_masks_of_validation_are_the_same_for_every_run(
    digits: TokenDataset, short: dict[str, object]
) -> None:
    world = World(0, 1, torch.device("cpu"))
    configs = [
        PretrainConfig.layered({**short, "tokens": digits.path, "objective": "bert", **change})
        for change in ({}, {"seed": 7, "mask_probability": 0.4})
    ]
    masks = []
    for config, size in zip(configs, (5, 32), strict=True):
        checked = _validation_tokens(digits["validation"], config)
        parts = [
            _validation_batch(Bert(), checked, world, first, min(first + size, 32))[1]
            for first in range(0, 32, size)
        ]
        masks.append(torch.cat(parts))
    assert torch.equal(*masks)
    assert masks[0].float().mean().item() == pytest.approx(0.15, abs=0.03)


def test_the_warm_up_of_the_published_recipe_is_an_epoch() -> None:
    assert {MODELS[name]["warmup_steps"] for name in MODELS if name.startswith("igpt-")} == {
        "epoch"
    }
    config = TrainConfig.layered({"batch_size": 128, "warmup_steps": "epoch"})
    assert config.warmup(1_229_920) == 9609  # 96 % of ImageNet
    assert TrainConfig(warmup_steps=7).warmup(1_229_920) == 7
    rates = [
        learning_rate(step, peak=1.0, warmup=10, total=100, schedule="cosine")
        for step in (0, 9, 10, 55, 99, 100)
    ]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.000305, 0.0], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "resolution", "batch_size", "steps"),
    [
        ("igpt-s", 32, 128, 1_000_000),
        ("igpt-m", 32, 128, 1_000_000),
        ("igpt-l", 32, 128, 1_000_000),
        ("igpt-l-48", 48, 128, 1_000_000),
        ("igpt-xl", 64, 64, 2_000_000),
    ],
)
def test_the_published_recipe(
    name: str, resolution: int, batch_size: int, steps: int, tmp_path: Path
) -> None:
    config = PretrainConfig.layered({"tokens": tmp_path, **MODELS[name]})
    assert (config.resolution, config.batch_size, config.steps) == (resolution, batch_size, steps)
    assert (config.betas, config.weight_decay, config.schedule) == ((0.9, 0.95), 0.0, "cosine")
    assert (config.optimizer, config.mask_probability, config.flip, config.shift) == (
        "adamw",
        0.15,
        False,
        0,
    )


def test_tokens_of_another_resolution_than_the_presets_are_refused(
    igpt, digits: TokenDataset, tmp_path: Path
) -> None:
    done = igpt("pretrain", digits.path, "-o", tmp_path / "run", "--model", "igpt-s")
    assert done.returncode == 2
    assert "has images of 8 px, and the model is for 32 px" in done.stderr
    assert "--resolution 8" in done.stderr
    assert not (tmp_path / "run").exists()


def test_images_and_mfu_are_recorded(short_run: Path) -> None:
    (machine,) = lines(short_run, "machine")
    assert machine["flops_per_image"] == training_flops(
        ImageGPT.from_pretrained(short_run / "model").config
    )
    for line in lines(short_run, "train"):
        achieved = line["images_per_second"] * machine["flops_per_image"]
        assert line["utilisation"] == pytest.approx(achieved / machine["matmul_flops_per_second"])
        assert 0 < line["utilisation"] < 1


def test_snapshots_are_the_model_at_their_step(
    igpt, digits: TokenDataset, short_flags: list[str], tmp_path: Path
) -> None:
    """Snapshots of the initial weights and of the best step, with their losses."""
    run = tmp_path / "run"
    done = igpt(
        "pretrain", digits.path, "-o", run, "--model", "tiny", *short_flags, "--snapshots", 0, 5, 24
    )
    assert done.returncode == 0, done.stderr
    kept = {path.name: ImageGPT.from_pretrained(path) for path in (run / "snapshots").iterdir()}
    assert sorted(kept) == ["step-00000000", "step-00000005", "step-00000024"]
    torch.manual_seed(0)
    initial = ImageGPT(kept["step-00000000"].config, digits.palette).state_dict()
    assert all(
        torch.equal(initial[name], tensor)
        for name, tensor in kept["step-00000000"].state_dict().items()
    )
    validated = {line["step"]: line["loss"] for line in lines(run, "validation")}
    assert sorted(validated) == [5, 8, 16, 24]
    best = ImageGPT.from_pretrained(run / "model").state_dict()
    assert min(validated, key=lambda step: validated[step]) == 24
    assert all(
        torch.equal(best[name], tensor)
        for name, tensor in kept["step-00000024"].state_dict().items()
    )
    checked = _validation_tokens(digits["validation"], PretrainConfig.load(run / "config.yaml"))
    with torch.no_grad():
        total, count = Autoregressive().loss(
            kept["step-00000005"], torch.from_numpy(checked.astype("int64"))
        )
    assert float(total / count) == pytest.approx(validated[5], abs=1e-6)


def test_a_snapshot_beyond_the_end_is_refused(igpt, digits: TokenDataset, tmp_path: Path) -> None:
    done = igpt(
        "pretrain", digits.path, "-o", tmp_path / "run", "--model", "tiny", "--snapshots", 300
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "a snapshot after 300 steps is asked for, and there are 200" in done.stderr
    assert not (tmp_path / "run").exists()
