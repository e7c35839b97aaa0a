"""Memory estimates agree with the tensors that real steps keep alive, to a few per cent."""

from typing import Any

import pytest

from igpt.model.config import ModelConfig
from igpt.training.memory import kept_by_block, peak_memory
from igpt.training.settings import TrainConfig

from ..helpers.live_tensors import as_on_a_gpu, measure_update

# 289 positions: with 256 or fewer, bf16 takes another attention on a CPU.
SMALL = ModelConfig(resolution=17, n_layer=4, n_embd=128, n_head=4)
WIDE = ModelConfig(resolution=24, n_layer=3, n_embd=512, n_head=8)

DEEP = ModelConfig(
    resolution=8, n_layer=8, n_embd=256, n_head=4
)  # gradients grow faster than activations shrink


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig.layered(
        {"batch_size": 2, "device": "cpu", "compile": "no", "precision": "bf16", **changes}
    )


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("recomputation", ["none", "selective", "full"])
def test_a_real_step(precision: str, recomputation: str) -> None:
    one = settings(precision=precision, activation_checkpointing=recomputation)
    with as_on_a_gpu():
        measured = measure_update(SMALL, one).peak
    assert peak_memory(SMALL, one, 1).total == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_real_step_with_the_operations_of_a_cpu(precision: str) -> None:
    """On a CPU, fp32 also keeps scaled copies of the MLPs' weights."""
    one = settings(precision=precision)
    scaled = 4 * 8 * SMALL.n_embd**2 * SMALL.n_layer * (precision == "fp32")
    assert peak_memory(SMALL, one, 1).total + scaled == pytest.approx(
        measure_update(SMALL, one).peak, rel=0.01
    )


def test_fake_steps_are_as_large_as_real_ones() -> None:
    one = settings(precision="fp32", activation_checkpointing="selective")
    assert measure_update(SMALL, one, pretend=True).peak == measure_update(SMALL, one).peak


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "muon", "precision": "fp32"},
        {"optimizer": "muon", "activation_checkpointing": "full", "micro_batch_size": 1},
    ],
)
def test_muon_keeps_one_moment(changes: dict[str, Any]) -> None:
    one = settings(**changes)
    with as_on_a_gpu():
        assert peak_memory(SMALL, one, 1).total == pytest.approx(
            measure_update(SMALL, one).peak, rel=0.01
        )


@pytest.mark.parametrize(
    ("model", "changes", "ranks"),
    [
        (WIDE, {"micro_batch_size": 1}, 1),
        (WIDE, {"activation_checkpointing": "full", "batch_size": 4, "micro_batch_size": 2}, 1),
        (WIDE, {"batch_size": 16, "shard": 8}, 8),
        (WIDE, {"batch_size": 32, "shard": 4, "micro_batch_size": 2}, 8),
        (
            WIDE,
            {
                "batch_size": 16,
                "shard": 8,
                "activation_checkpointing": "selective",
                "micro_batch_size": 1,
            },
            8,
        ),
        (WIDE, {"batch_size": 16, "shard": 8, "activation_checkpointing": "full"}, 8),
        (DEEP, {"shard": 2, "activation_checkpointing": "full"}, 2),
        (WIDE.model_copy(update={"objective": "bert"}), {}, 1),
        (ModelConfig(n_layer=24, n_embd=512, n_head=8), {"batch_size": 2}, 1),  # igpt-s
    ],
)
def test_fake_steps(model: ModelConfig, changes: dict[str, Any], ranks: int) -> None:
    one = settings(**changes)
    with as_on_a_gpu():
        measured = measure_update(model, one, ranks=ranks, pretend=True).peak
    assert peak_memory(model, one, ranks).total == pytest.approx(measured, rel=0.02)


def test_what_a_block_keeps() -> None:
    """Bytes per element of the residual: 36, 24, 4 in bf16 and 64, 44, 4 in fp32, plus sums."""
    for precision, expected in (("bf16", (36, 24, 4)), ("fp32", (64, 44, 4))):
        for name, number in zip(("none", "selective", "full"), expected, strict=True):
            one = settings(precision=precision, activation_checkpointing=name)
            assert kept_by_block(SMALL, one, 100) / (100 * SMALL.n_embd) == pytest.approx(
                number, abs=0.2
            )


def test_sharding_divides_the_state_and_ddp_doubles_accumulated_gradients() -> None:
    whole, accumulated = (
        peak_memory(WIDE, settings(batch_size=16, micro_batch_size=size), 8) for size in (2, 1)
    )
    shared = peak_memory(WIDE, settings(batch_size=16, micro_batch_size=2, shard=8), 8)
    for part in ("weights", "optimizer"):
        assert whole.parts[part] == 8 * shared.parts[part]
    assert accumulated.gradients == 2 * whole.gradients == 2 * whole.weights
    assert whole.optimizer == 2 * whole.weights
    assert whole.total == sum(whole.parts.values())
