"""Models and batches that cannot fit into memory are refused; those that may fit are not."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from igpt.data.tokens.dataset import TokenDataset
from igpt.environment import memory_limit
from igpt.errors import InputError
from igpt.model.config import ModelConfig
from igpt.model.cost import count_parameters
from igpt.model.transformer import ImageGPT
from igpt.planning.plan import PlanConfig, plan
from igpt.training import memory
from igpt.training.distributed import World
from igpt.training.finetune import FinetuneConfig
from igpt.training.memory import peak_memory, require_memory, state_bytes
from igpt.training.pretrain import PretrainConfig, pretrain
from igpt.training.settings import TrainConfig

ALONE = World(0, 1, torch.device("cpu"))
SMALL = ModelConfig(resolution=8, n_layer=4, n_embd=64, n_head=2, n_colors=16)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"n_layer": 1_000_000},
            r"the model \(12,\d{3},\d{3},\d{3} parameters\) needs at least [\d.]+ GiB",
        ),
        (
            {"n_embd": 10_000_000},
            r"the model \(2,4\d\d,[\d,]+ parameters\) needs at least [\d.]+ PiB",
        ),
        ({"n_layer": 10**9, "n_embd": 10**9}, r"parameters\) needs at least [\d.,]+ EiB"),
        (
            {"batch_size": 10**9},
            r"a batch of 1,000,000,000 images needs at least [\d.]+ GiB .* lower --batch-size",
        ),
        (
            {"batch_size": 10**6},
            r"1,000,000 images at a time need at least [\d.]+ GiB, and this machine has "
            r"64\.0 GiB; lower --micro-batch",
        ),
    ],
)
def test_absurd_sizes_are_refused_within_a_second(
    changes: dict[str, int],
    said: str,
    digits: TokenDataset,
    short: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda: 64 << 30)
    config = PretrainConfig.layered({**short, "tokens": digits.path, **changes})
    started = time.process_time()
    with pytest.raises(InputError, match=said):
        pretrain(config, tmp_path / "run")
    assert time.process_time() - started < 1
    assert not (tmp_path / "run").exists()


def test_the_limit_is_the_memory_of_this_machine(
    digits: TokenDataset, short: dict[str, object], tmp_path: Path
) -> None:
    config = PretrainConfig.layered({**short, "tokens": digits.path, "n_layer": 10**9})
    with pytest.raises(InputError, match="and this machine has"):
        pretrain(config, tmp_path / "run")


def test_a_model_that_just_fits_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TrainConfig(batch_size=1, precision="fp32")
    exact = peak_memory(SMALL, settings, 1)
    assert state_bytes(SMALL, settings) == exact.weights + exact.optimizer + 4 * count_parameters(
        SMALL
    )
    monkeypatch.setattr(memory, "memory_limit", lambda: int(exact.total))
    require_memory(SMALL, settings, ALONE)
    monkeypatch.setattr(memory, "memory_limit", lambda: state_bytes(SMALL, settings) - 1)
    with pytest.raises(InputError, match="the model"):
        require_memory(SMALL, settings, ALONE)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_estimated_state_is_that_of_real_optimizers(optimizer: str) -> None:
    from igpt.training.optimizer import make_optimizers

    model = ImageGPT(SMALL)
    optimizers = make_optimizers(model, optimizer, betas=(0.9, 0.95), weight_decay=0.0)
    model(torch.zeros(1, 64, dtype=torch.long)).sum().backward()
    for one in optimizers:
        one.step()
    moments = [
        value for one in optimizers for state in one.state.values() for value in state.values()
    ]
    held = sum(tensor.nbytes for tensor in moments if tensor.ndim)
    held += sum(parameter.nbytes + parameter.grad.nbytes for parameter in model.parameters())
    assert state_bytes(SMALL, TrainConfig(optimizer=optimizer)) == held


@pytest.mark.parametrize(
    ("world", "settings", "fits"),
    [
        (World(0, 1, torch.device("cpu")), {}, True),
        (World(0, 4, torch.device("cpu"), local_size=4), {}, False),
        (World(0, 4, torch.device("cpu"), local_size=4), {"shard": 4}, True),
        (World(0, 4, torch.device("cpu"), local_size=2), {"shard": 2}, True),
        (World(0, 4, torch.device("cpu"), local_size=1), {}, True),
    ],
)
def test_ranks_share_the_memory_of_their_machine(
    world: World, settings: dict[str, int], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(
        batch_size=4, micro_batch_size=1, activation_checkpointing="full", **settings
    )
    monkeypatch.setattr(memory, "memory_limit", lambda: 2 * state_bytes(SMALL, config))
    if fits:
        require_memory(SMALL, config, world)
    else:
        with pytest.raises(InputError, match="for the 4 ranks on this machine"):
            require_memory(SMALL, config, world)


def test_a_single_image_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    large = SMALL.model_copy(update={"resolution": 2048})
    monkeypatch.setattr(memory, "memory_limit", lambda: 8 << 30)
    with pytest.raises(InputError, match=r"1 images at a time .* --activation-checkpointing full"):
        require_memory(large, TrainConfig(batch_size=1), ALONE)
    require_memory(large, TrainConfig(batch_size=1, activation_checkpointing="full"), ALONE)


def test_nothing_is_refused_if_the_memory_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda: None)
    require_memory(SMALL.model_copy(update={"n_layer": 10**9}), TrainConfig(), ALONE)


def test_the_memory_of_this_machine() -> None:
    limit = memory_limit()
    assert limit is not None
    assert 256 << 20 < limit < 1 << 50


@pytest.mark.parametrize("schema", [TrainConfig, PretrainConfig, FinetuneConfig])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 1e300),
        ("weight_decay", 1e300),
        ("grad_clip", 1e300),
        ("stop_seconds", 1e300),
        ("steps", 10**18),
        ("batch_size", 10**18),
        ("micro_batch_size", 10**18),
        ("warmup_steps", 10**18),
        ("snapshots", (10**18,)),
        ("log_every", 10**100),
        ("keep_checkpoints", 10**18),
        ("max_skipped", 10**18),
        ("patience", 10**18),
    ],
)
def test_settings_have_bounds(schema: type[TrainConfig], key: str, value: object) -> None:
    paths = {name: "x" for name in ("tokens", "model") if name in schema.model_fields}
    with pytest.raises(
        InputError, match=rf"{key}.*less than or equal to|{key}.*unable to parse|{key}.*too large"
    ):
        schema.layered(paths, {key: value})


def test_learning_rates_have_bounds() -> None:
    with pytest.raises(
        InputError, match=r"learning_rates\.1 = 1e\+300: .*less than or equal to 1000"
    ):
        FinetuneConfig.layered({"tokens": "x", "model": "x", "learning_rates": (1e-3, 1e300)})


@pytest.mark.parametrize(
    "changes",
    [
        {"n_layer": 10**9},
        {"batch_size": 10**9},
        {"batch_size": 735_134_400, "gpus": 26_460},
        {"batch_size": 735_134_400, "gpus": 735_134_400},
        {"batch_size": 10**9, "gpus": 10**9},
        {"n_layer": 10**9, "n_embd": 10**9, "resolution": 10**9, "n_colors": 10**9, "steps": 10**9},
    ],
)
def test_a_plan_of_absurd_sizes_does_not_hang(changes: dict[str, Any]) -> None:
    started = time.process_time()
    found = plan(PlanConfig.layered({"n_head": 8}, changes))
    assert list(found.lines("igpt-s", changes))
    assert time.process_time() - started < 10
