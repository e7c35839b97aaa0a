"""Jobs on a local Ray cluster of two nodes: one is killed halfway, and the results are the same."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from igpt.cli import main
from igpt.data import prepare as preparation
from igpt.data.prepare import PrepareConfig, prepare
from igpt.data.ray_pool import RayCluster
from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError

from ..helpers.reading import contents

SRC = Path(preparation.__file__).parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Start the head node of a cluster, on one core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SRC))  # of the workers
        patch.setenv("RAY_worker_niceness", "0")  # 15 by default: busy machines starve them
        found = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "object_store_memory": 100 * 2**20},
        )
        yield found
        found.shutdown()


@pytest.fixture
def second_node(cluster: Cluster) -> Iterator[Any]:
    """Add a node of one core."""
    node = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    cluster.wait_for_nodes()
    yield node
    if node in cluster.list_all_nodes():
        cluster.remove_node(node)


def test_jobs_of_a_killed_node_and_of_a_killed_worker_are_repeated(
    cluster: Cluster, second_node: Any, tmp_path: Path
) -> None:
    def work(job: int) -> int:
        """Record the node of each job; job 3 kills its process the first time."""
        node = ray.get_runtime_context().get_node_id()
        (tmp_path / f"{job}.{node}.{os.getpid()}").touch()
        if job == 3 and len(list(tmp_path.glob("3.*"))) == 1:
            os._exit(1)
        time.sleep(0.3)
        return job**2

    killed = second_node.node_id  # in hexadecimal
    found = []
    with RayCluster(cluster.address).running(work) as run:
        for result in run(range(16)):
            found.append(result)
            if len(found) >= 6 and cluster.list_all_nodes()[1:]:
                assert list(tmp_path.glob(f"*.{killed}.*")), "the other node has done something"
                cluster.remove_node(second_node, allow_graceful=False)
    assert found == [job**2 for job in range(16)]
    assert len(list(tmp_path.glob("3.*"))) >= 2
    assert not ray.is_initialized()


def test_prepare_with_a_killed_node_makes_the_same_bytes(
    cluster: Cluster, second_node: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "SHARD_IMAGES", (100, 100))
    config = PrepareConfig(size=8)
    prepare("digits", tmp_path / "whole", config)

    def kill(done: int, total: int) -> None:
        if done > total / 2 and cluster.list_all_nodes()[1:]:
            cluster.remove_node(second_node, allow_graceful=False)

    there = RayCluster(cluster.address)
    prepare("digits", tmp_path / "tokens", config, cluster=there, progress=kill)
    assert contents(tmp_path / "tokens") == contents(tmp_path / "whole")
    assert len(cluster.list_all_nodes()) == 1


def test_prepare_on_a_cluster_writes_to_a_store(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delattr(preparation, "running")  # the processes of this machine have no part in it
    config, there = PrepareConfig(size=4, limit=100), RayCluster(cluster.address)
    made = prepare("digits", Path("memory://tokens"), config, cluster=there)
    assert {split: len(made[split]) for split in made} == dict.fromkeys(made, 100)


def test_scores_and_features_are_the_same(
    cluster: Cluster,
    short_run: Path,
    digits: TokenDataset,
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # the workers read relative paths there
    (tmp_path / "photographs").symlink_to(photographs)
    (tmp_path / "digits").symlink_to(digits.path)
    there = ["--engine", "ray", "--address", cluster.address]
    for words, name in (
        (["score", str(short_run), "digits", "--split", "train"], "scores.csv"),  # two batches
        (["features", str(short_run), "photographs", "--layer", "1"], "features.npz"),
    ):
        for out, engine in ((f"whole-{name}", []), (name, there)):
            assert main([*words, "-o", out, *engine]) == 0
    assert Path("scores.csv").read_bytes() == Path("whole-scores.csv").read_bytes()
    found, expected = np.load("features.npz"), np.load("whole-features.npz")
    for name in {*found.files} - {"metadata"}:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "ray", "--address", "127.0.0.1:9"], "no Ray cluster can be reached at 127."),
        (["--engine", "ray", "--address", "nowhere"], "--address is HOST:PORT of a Ray cluster"),
        (["--address", "127.0.0.1:9"], "--address is of a Ray cluster; add --engine ray"),
        (["--engine", "ray", "--shard", "1/2"], "leave --shard and --merge out"),
        (["--engine", "ray", "--workers", "2"], "leave it out with --engine ray"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "digits", "--size", "8", "-o", str(tmp_path / "t"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if "partial" not in path.name]


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with (
        pytest.raises(InputError, match=r"--engine ray needs the extra: pip install 'igpt\[ray\]'"),
        RayCluster().running(str),
    ):
        pass
