"""Two processes train as one does: the same batches, the same losses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from igpt.data.tokens import TokenDataset
from igpt.training.metrics import read_metrics
from igpt.training.pretrain import PretrainConfig, pretrain


def lines(run: Path, kind: str) -> list[dict[str, float]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == kind]


def two_ranks(*words: object) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "igpt"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)


@pytest.mark.parametrize("objective", ["autoregressive", "bert"])
def test_two_ranks_give_the_losses_of_one(
    objective: str, digits: TokenDataset, short: dict[str, object], short_flags: list[str], tmp_path: Path
) -> None:
    changes = {"objective": objective, "batch_size": 9, "micro_batch_size": 3, "steps": 8}  # 5 and 4 images a rank
    pretrain(PretrainConfig.layered({**short, **changes, "tokens": digits.path}), tmp_path / "one")
    flags = [*short_flags, *(word for key, value in changes.items() for word in (f"--{key.replace('_', '-')}", value))]
    done = two_ranks("pretrain", digits.path, "-o", tmp_path / "two", "--model", "tiny", *flags)
    assert done.returncode == 0, done.stderr
    for kind, expected_count in (("train", 8), ("validation", 1)):
        alone, together = lines(tmp_path / "one", kind), lines(tmp_path / "two", kind)
        assert len(alone) == len(together) == expected_count
        for one, two in zip(alone, together, strict=True):
            assert two["loss"] == pytest.approx(one["loss"], abs=2e-5)
    assert [line["grad_norm"] for line in lines(tmp_path / "two", "train")] == pytest.approx(
        [line["grad_norm"] for line in lines(tmp_path / "one", "train")], rel=1e-3
    )
