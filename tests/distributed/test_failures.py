"""One of two ranks is killed, fails, or is asked to stop: no rank hangs, and the run can be
resumed."""

import re
import signal
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from igpt.data.tokens.dataset import TokenDataset
from igpt.training.checkpoints import checkpoints

from ..helpers.runs import Command, Pair, assert_same_run, end_well, has_logged


@pytest.fixture(scope="module")
def whole(
    digits: TokenDataset, short_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """Return uninterrupted runs, by the number of ranks that share a copy of the weights."""
    runs = {shard: tmp_path_factory.mktemp("whole") / f"shard-{shard}" for shard in (1, 2)}
    for shard, run in runs.items():
        words = [
            "pretrain",
            digits.path,
            "-o",
            run,
            "--model",
            "tiny",
            *short_flags,
            "--shard",
            shard,
        ]
        end_well(Pair(run.parent, *words).start())
    return runs


@pytest.fixture
def start(digits: TokenDataset, short_flags: list[str], tmp_path: Path):
    """Start two ranks of the run in `tmp_path`/run."""

    def ranks(shard: int, *more: object, **options) -> list[Command]:
        words = [
            "pretrain",
            digits.path,
            "-o",
            tmp_path / "run",
            "--model",
            "tiny",
            *short_flags,
            "--shard",
            shard,
        ]
        return Pair(tmp_path, *words, store=options.pop("store", None)).start(*more, **options)

    return ranks


@pytest.mark.parametrize(("shard", "victim"), [(1, 1), (2, 0)])
def test_the_other_rank_ends_when_one_is_killed(
    start, whole: dict[int, Path], tmp_path: Path, shard: int, victim: int
) -> None:
    ranks = start(shard)
    ranks[0].wait_until(
        lambda: (
            has_logged(tmp_path / "run", 7) and bool(checkpoints(tmp_path / "run" / "checkpoints"))
        )
    )
    ranks[victim].send(signal.SIGKILL)
    other = ranks[1 - victim]
    assert other.code() == 1
    assert other.complaint.startswith(
        "igpt pretrain: another rank is gone: killed, or its machine was lost"
    )
    assert ranks[victim].code() == -signal.SIGKILL
    again = start(shard, "--resume")
    end_well(again)
    assert "resumed from" in again[0].out
    assert_same_run(whole[shard], tmp_path / "run", tmp_path)


@pytest.mark.parametrize(("shard", "asked"), [(1, 1), (2, 0)])
def test_all_ranks_stop_when_one_is_asked_to(
    start, whole: dict[int, Path], tmp_path: Path, shard: int, asked: int
) -> None:
    ranks = start(shard)
    ranks[0].wait_until(lambda: has_logged(tmp_path / "run", 7))
    ranks[asked].send(signal.SIGTERM)
    for rank in ranks:
        assert rank.code() == 128 + signal.SIGTERM, rank.err
        assert re.search(
            r"stopped and saved after \d+ of 24 steps; "
            r"continue with the same command and --resume$",
            rank.complaint,
        )
    end_well(start(shard, "--resume"))
    assert_same_run(whole[shard], tmp_path / "run", tmp_path)


@pytest.mark.parametrize("shard", [1, 2])
def test_a_checkpoint_that_one_rank_cannot_write_ends_all_ranks(
    start, whole: dict[int, Path], tmp_path: Path, shard: int
) -> None:
    ranks = start(shard, largest_files=(None, 40_000))
    codes = [rank.code() for rank in ranks]
    assert 2 in codes
    assert set(codes) <= {1, 2}, "1 if a rank got the error from another"
    for rank in ranks:
        assert "cannot write the checkpoint" in rank.complaint
        assert re.search("File too large|is the disk full", rank.complaint)
    assert not list((tmp_path / "run" / "checkpoints").iterdir()), "an incomplete file was left"
    end_well(start(shard, "--resume"))
    assert_same_run(whole[shard], tmp_path / "run", tmp_path)


def test_the_error_of_a_rank_is_reported_by_the_other(start, tmp_path: Path) -> None:
    """Only rank 0 writes the model."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    failing, other = start(1, store=store, largest_files=(40_000, None))
    assert failing.code() == 2
    assert failing.complaint.startswith("igpt pretrain: cannot write")
    assert other.code() == 1
    assert other.complaint.startswith(
        f"igpt pretrain: rank 0: OSError: cannot write {tmp_path}/run/model"
    )


def test_a_user_error_of_a_rank_is_reported_by_the_other(
    digits: TokenDataset, short_flags: list[str], tmp_path: Path
) -> None:
    """The tokens are missing on its machine."""
    pair = Pair(tmp_path, "pretrain")
    more = ["-o", tmp_path / "run", "--model", "tiny", *short_flags]
    ranks = [
        pair.start_rank(rank, tokens, *more)
        for rank, tokens in enumerate([digits.path, tmp_path / "none"])
    ]
    assert [rank.code() for rank in ranks] == [1, 2]
    assert ranks[0].complaint == ranks[1].complaint
    assert "none" in ranks[1].complaint
