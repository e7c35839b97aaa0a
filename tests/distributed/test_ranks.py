"""Several ranks train like one process, and other numbers of ranks resume their checkpoints.

Tolerances are some ten times the largest differences measured over 8 steps: 1.3e-7 in the loss and
of the gradient's norm in fp32; 4e-6 with Muon, which orthogonalizes in bf16; 6e-4 (and 2e-3 of the
norm) in bf16.
"""

import json
import shutil
from pathlib import Path

import pytest

from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError
from igpt.training.distributed import World
from igpt.training.metrics import read_metrics
from igpt.training.pretrain import PretrainConfig, pretrain

# 11 images on 4 ranks are 3, 3, 3 and 2, in micro-batches of 2 and 1; BERT's masks are uneven in
# all of them.
CHANGES = {
    "batch_size": 11,
    "micro_batch_size": 2,
    "steps": 8,
    "validate_every": 4,
    "checkpoint_every": 4,
}


def lines(run: Path, kind: str) -> list[dict[str, float]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == kind]


def flags_of(settings: dict[str, object]) -> list[str]:
    return [
        word
        for key, value in settings.items()
        for word in (f"--{key.replace('_', '-')}", str(value))
    ]


def assert_same_losses(one: Path, other: Path, within: float = 1.5e-6) -> None:
    for kind in ("train", "validation"):
        alone, together = lines(one, kind), lines(other, kind)
        assert len(alone) == len(together) > 0
        for first, second in zip(alone, together, strict=True):
            assert second["step"] == first["step"]
            assert second["loss"] == pytest.approx(first["loss"], abs=within)
            if "grad_norm" in first:
                assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=4 * within)


@pytest.fixture(scope="session")
def settings(short: dict[str, object]) -> dict[str, object]:
    return {**short, **CHANGES}


@pytest.fixture(scope="session")
def alone(
    digits: TokenDataset, settings: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Return the runs of one process, by objective."""
    runs = {}
    for objective in ("autoregressive", "bert"):
        runs[objective] = tmp_path_factory.mktemp("alone") / objective
        pretrain(
            PretrainConfig.layered({**settings, "objective": objective, "tokens": digits.path}),
            runs[objective],
        )
    return runs


@pytest.mark.parametrize(
    ("size", "shard", "objective"),
    [
        *(
            (size, shard, "autoregressive")
            for size, shard in ((2, 1), (2, 2), (4, 1), (4, 2), (4, 4))
        ),
        *((size, shard, "bert") for size, shard in ((2, 1), (4, 4))),
    ],
)
def test_all_numbers_of_ranks_and_ways_to_shard_give_the_losses_of_one_process(
    ranks,
    alone: dict[str, Path],
    digits: TokenDataset,
    settings: dict[str, object],
    tmp_path: Path,
    size: int,
    shard: int,
    objective: str,
) -> None:
    flags = flags_of({**settings, "objective": objective, "shard": shard})
    ranks(size, "pretrain", digits.path, "-o", tmp_path / "run", "--model", "tiny", *flags)
    assert_same_losses(alone[objective], tmp_path / "run")
    (machine,) = lines(tmp_path / "run", "machine")
    assert (machine["ranks"], machine["shard"]) == (size, shard)


def test_ranks_drop_the_same_labels(
    ranks, digits: TokenDataset, settings: dict[str, object], tmp_path: Path
) -> None:
    given = {**settings, "condition": "labels", "label_dropout": 0.5}
    pretrain(PretrainConfig.layered({**given, "tokens": digits.path}), tmp_path / "alone")
    flags = flags_of({**given, "shard": 2})
    ranks(4, "pretrain", digits.path, "-o", tmp_path / "run", "--model", "tiny", *flags)
    assert_same_losses(tmp_path / "alone", tmp_path / "run")


@pytest.mark.parametrize(("size", "shard"), [(2, 2), (2, 1), (1, 1)])
def test_a_checkpoint_of_four_ranks_is_resumed_by_fewer(
    ranks,
    alone: dict[str, Path],
    saved_by_four: Path,
    digits: TokenDataset,
    tmp_path: Path,
    size: int,
    shard: int,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved_by_four, run)
    ranks(size, "pretrain", digits.path, "-o", run, "--resume", "--shard", shard)
    assert [line["step"] for line in lines(run, "resume")] == [4]
    assert_same_losses(alone["autoregressive"], run)


@pytest.fixture(scope="session")
def saved_by_four(
    ranks,
    digits: TokenDataset,
    settings: dict[str, object],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return a run of four sharded ranks, in the state that a kill after step 4 leaves."""
    run = tmp_path_factory.mktemp("four") / "run"
    ranks(
        4,
        "pretrain",
        digits.path,
        "-o",
        run,
        "--model",
        "tiny",
        *flags_of({**settings, "shard": 4}),
    )
    assert len(list((run / "checkpoints" / "step-00000004").glob("*.distcp"))) == 4, (
        "every rank writes its part"
    )
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    return run


def test_the_same_number_of_ranks_resumes_bit_for_bit(
    ranks, saved_by_four: Path, digits: TokenDataset, settings: dict[str, object], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved_by_four, run)
    before = json.dumps([line["loss"] for line in lines(run, "train")])
    weights = (run / "model" / "model.safetensors").read_bytes()
    again = ["pretrain", digits.path, "-o", run, "--resume", "--shard", "4"]
    ranks(4, *again, "--minutes", "1e-6")  # over at once: all ranks stop after the next step
    assert (run / "checkpoints" / "step-00000005").is_dir()
    ranks(4, *again)
    assert json.dumps([line["loss"] for line in lines(run, "train")]) == before
    assert (run / "model" / "model.safetensors").read_bytes() == weights


def test_muon_and_activation_checkpointing_can_be_sharded(
    ranks, digits: TokenDataset, settings: dict[str, object], tmp_path: Path
) -> None:
    changes = {**settings, "optimizer": "muon"}
    pretrain(PretrainConfig.layered({**changes, "tokens": digits.path}), tmp_path / "one")
    flags = flags_of({**changes, "shard": 2, "activation_checkpointing": "selective"})
    ranks(2, "pretrain", digits.path, "-o", tmp_path / "two", "--model", "tiny", *flags)
    assert_same_losses(tmp_path / "one", tmp_path / "two", within=5e-5)


@pytest.mark.parametrize("shard", [1, 2])
def test_bf16_differs_by_rounding_only(
    ranks,
    alone: dict[str, Path],
    digits: TokenDataset,
    settings: dict[str, object],
    tmp_path: Path,
    shard: int,
) -> None:
    flags = flags_of({**settings, "precision": "bf16", "shard": shard})
    ranks(2, "pretrain", digits.path, "-o", tmp_path / "run", "--model", "tiny", *flags)
    assert_same_losses(alone["autoregressive"], tmp_path / "run", within=5e-3)


@pytest.mark.parametrize(("objective", "shard"), [("autoregressive", 2), ("bert", 1)])
def test_fine_tuning_gives_the_classifiers_of_one_process(
    ranks, alone: dict[str, Path], digits: TokenDataset, tmp_path: Path, objective: str, shard: int
) -> None:
    """A search over learning rates, and the final training on all images."""
    settings = {
        "batch_size": 10,
        "steps": 4,
        "validate_every": 4,
        "log_every": 1,
        "precision": "fp32",
    }
    words = ["finetune", alone[objective], digits.path, *flags_of(settings), "--fold-back"]
    words += ["--learning-rates", 1e-3, 3e-3]
    ranks(1, *words, "-o", tmp_path / "one")
    ranks(2, *words, "-o", tmp_path / "two", "--shard", shard)
    results = [json.loads((tmp_path / name / "test.json").read_text()) for name in ("one", "two")]
    for result in results:
        del result["environment"]
    assert results[0] == results[1]
    assert ("modal" in results[0]) == (objective == "bert")
    for part in ("rates/0.001", "rates/0.003", "fold-back"):
        losses = [
            [line["loss"] for line in lines(tmp_path / name / part, "train")]
            for name in ("one", "two")
        ]
        assert len(losses[0]) >= 4
        assert losses[1] == pytest.approx(losses[0], abs=1.5e-6)


@pytest.mark.parametrize(("size", "shard", "objective"), [(2, 1, "bert"), (4, 4, "autoregressive")])
def test_features_are_measured_as_by_one_process(
    ranks,
    alone: dict[str, Path],
    digits: TokenDataset,
    settings: dict[str, object],
    tmp_path: Path,
    size: int,
    shard: int,
    objective: str,
) -> None:
    """The losses stay those of the runs without measurements."""
    runs = [tmp_path / name for name in ("one", "several")]
    changes = {**settings, "objective": objective, "probe_every": 4}
    pretrain(PretrainConfig.layered({**changes, "tokens": digits.path}), runs[0])
    flags = flags_of({**changes, "shard": shard})
    ranks(size, "pretrain", digits.path, "-o", runs[1], "--model", "tiny", *flags)
    first, second = (lines(run, "probe") for run in runs)
    assert [line["step"] for line in first] == [line["step"] for line in second] == [0, 4, 8]
    for one, other in zip(first, second, strict=True):
        assert other["layer"] == one["layer"] == 1
        assert other["effective_rank"] == pytest.approx(one["effective_rank"], rel=1e-4)
        for key in ("linear_accuracy", "knn_accuracy"):  # rounding changes at most an image or two
            assert other[key] == pytest.approx(one[key], abs=0.012)
    for run in runs:
        assert_same_losses(alone[objective], run)


def test_numbers_of_ranks_that_do_not_divide_are_refused() -> None:
    import torch

    with pytest.raises(InputError, match="--shard 3 does not divide 4 processes"):
        World(0, 4, torch.device("cpu")).device_mesh(3)
