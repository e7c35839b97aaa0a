"""Variants in training: recomputed, compiled, saved, fine-tuned; and the schedules."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from igpt.data.tokens.dataset import TokenDataset
from igpt.model.config import ModelConfig
from igpt.model.objectives import Autoregressive
from igpt.model.transformer import ImageGPT
from igpt.report.card import write_card
from igpt.training.distributed import World
from igpt.training.engine import Engine
from igpt.training.finetune import FinetuneConfig, finetune
from igpt.training.optimizer import learning_rate
from igpt.training.pretrain import PretrainConfig, pretrain
from igpt.training.settings import TrainConfig

TOGETHER = {"positions": "rotary", "value_residual": True}


def train_steps(settings: dict[str, Any], variant: dict[str, Any]) -> list[list[float]]:
    """Return losses and norms of three steps."""
    shape = {"resolution": 4, "n_colors": 16, "n_layer": 3, "n_embd": 32, "n_head": 2}
    torch.manual_seed(0)
    model = ImageGPT(ModelConfig.layered({**shape, **variant}))
    torch.nn.init.normal_(
        model.lm_head.weight, std=0.1
    )  # otherwise nothing below it would have a gradient
    config = TrainConfig.layered({"batch_size": 4, "precision": "fp32", **settings})
    engine = Engine(model, config, World(0, 1, torch.device("cpu")), Autoregressive().loss)
    generator = torch.Generator().manual_seed(1)
    return [
        engine.update((torch.randint(0, 16, (4, 16), generator=generator),), 1e-2).tolist()
        for _ in range(3)
    ]


@pytest.mark.parametrize("recomputation", ["selective", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputing_activations_changes_nothing(recomputation: str, precision: str) -> None:
    kept = train_steps({"precision": precision}, TOGETHER)
    assert (
        train_steps({"precision": precision, "activation_checkpointing": recomputation}, TOGETHER)
        == kept
    )
    assert train_steps({"precision": precision}, {}) != kept


@pytest.mark.parametrize("recomputation", ["none", "selective"])
def test_compiled_blocks_are_one_graph_and_give_the_same(
    recomputation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their graphs run without generated code, which would take a minute to compile."""
    plain = train_steps({}, TOGETHER)
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True)
    )
    compiled = train_steps({"compile": "yes", "activation_checkpointing": recomputation}, TOGETHER)
    for one, other in zip(plain, compiled, strict=True):
        assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("objective", ["autoregressive", "bert"])
def test_a_run_writes_its_variant_and_is_fine_tuned(
    objective: str, digits: TokenDataset, short: dict[str, object], tmp_path: Path
) -> None:
    settings = {
        **short,
        **TOGETHER,
        "objective": objective,
        "optimizer": "muon",
        "schedule": "linear",
    }
    more = {"tokens": digits.path, "start_from_palette": True}
    found = pretrain(PretrainConfig.layered(settings, more), tmp_path / "run")
    model = ImageGPT.from_pretrained(found)
    assert {name: getattr(model.config, name) for name in TOGETHER} == TOGETHER
    assert json.loads((found / "config.json").read_text())["model_type"] == "igpt"
    tuning = {
        "model": found,
        "tokens": digits.path,
        "steps": 4,
        "batch_size": 8,
        "learning_rates": (),
        "validate_every": 2,
    }
    result = finetune(
        FinetuneConfig.layered(tuning, {"learning_rate": 1e-3, "precision": "fp32"}),
        tmp_path / "tuned",
    )
    assert 0 <= result["test_accuracy"] <= 1
    assert ImageGPT.from_pretrained(tmp_path / "tuned" / "model").config.value_residual
    for run in ("run", "tuned"):
        card = write_card(tmp_path / run, "someone/variant").read_text()
        assert "transformers does not support this variant" in card
        assert "from transformers import" not in card


def test_the_linear_schedule() -> None:
    steps = (0, 9, 10, 55, 99, 100)
    rates = [
        learning_rate(step, peak=1.0, warmup=10, total=100, schedule="linear") for step in steps
    ]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.5, 1 / 90, 0.0])
