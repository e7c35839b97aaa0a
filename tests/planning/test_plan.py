"""Plans select the best layout that fits; their advice works, and their command lines run."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from igpt.environment import memory_limit
from igpt.errors import InputError
from igpt.model.cost import training_flops
from igpt.model.precision import matmul_rate, resolve_precision
from igpt.planning.plan import KINDS, PlanConfig, layouts, plan
from igpt.training.memory import peak_memory
from igpt.training.presets import preset

GIB = 2**30


def asked(name: str, **changes: Any) -> PlanConfig:
    recipe = {key: value for key, value in preset(name).items() if key in PlanConfig.model_fields}
    return PlanConfig.layered(recipe, changes)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("igpt-s", {}),
        ("igpt-s", {"gpu": "L4", "precision": "fp32"}),
        ("igpt-m", {"gpus": 4, "gpu": "RTX-4090"}),
        ("igpt-l-48", {"gpus": 8, "gpu": "A100-40"}),
        ("igpt-xl", {"gpus": 16}),
        ("igpt-xl", {"gpus": 32, "shard": 16, "activation_checkpointing": "full"}),
    ],
)
def test_the_first_layout_that_fits(name: str, changes: dict[str, Any]) -> None:
    settings = asked(name, **changes)
    found = plan(settings)
    tried = list(layouts(settings))
    totals = [peak_memory(settings.model, one, settings.gpus).total / GIB for one in tried]
    number = tried.index(found.training)
    assert found.remedy is None
    assert totals[number] <= settings.kind.usable < min([*totals[:number], float("inf")])
    assert found.memory[found.training.activation_checkpointing].total / GIB == totals[number]
    for key in ("shard", "activation_checkpointing"):
        assert getattr(found.training, key) == changes.get(key, getattr(found.training, key))


def test_order_of_layouts() -> None:
    """At 32 px four images keep a GPU busy; full recomputation has the lowest priority."""
    order = [
        (one.shard, one.activation_checkpointing, one.micro_batch_size or 12)
        for one in layouts(asked("igpt-s", gpus=2, batch_size=24))
    ]
    assert order[:5] == [
        (1, "none", 12),
        (1, "none", 4),
        (1, "selective", 12),
        (1, "selective", 4),
        (2, "none", 12),
    ]
    assert order[8:13] == [
        (1, "full", 12),
        (1, "full", 4),
        (2, "full", 12),
        (2, "full", 4),
        (1, "none", 2),
    ]
    assert len(order) == len(set(order)) == 2 * 3 * 4
    assert [
        one.micro_batch_size
        for one in layouts(asked("igpt-s", batch_size=15, activation_checkpointing="none"))
    ] == [
        None,
        5,
        3,
        1,
    ]


def test_the_formula_of_the_time() -> None:
    settings = asked("igpt-s", gpus=8, efficiency=0.5, gpu_tflops=1000.0)
    flops = training_flops(settings.model) * 128 * 1e6
    assert plan(settings).gpu_hours == pytest.approx(flops / 0.5e15 / 3600)
    assert plan(settings).days == pytest.approx(flops / 0.5e15 / 8 / 86400)
    again = settings.model_copy(update={"activation_checkpointing": "full"})
    assert 1.3 < plan(again).gpu_hours / plan(settings).gpu_hours < 4 / 3, (
        "blocks run forward once more"
    )


def test_a_plan_for_a_cpu_has_its_measured_rate() -> None:
    measured = asked("photos", gpu="cpu", resolution=16)
    device = torch.device("cpu")
    precision = resolve_precision("auto", device)
    assert measured.peak == matmul_rate(precision, device)
    assert measured.kind.memory == memory_limit() / GIB
    given = measured.model_copy(update={"gpu_tflops": 0.1, "gpu_memory": 8.0})
    flops = training_flops(given.model) * 16 * 700
    assert plan(given).gpu_hours == pytest.approx(flops / (0.3 * 0.1e12) / 3600)
    lines = list(plan(given).lines("photos", {"resolution": 16}))
    assert f"this CPU, 100 GFLOP/s in {precision} (given); batches of 16: 16 at a time" in lines
    assert lines[-1] == (
        "igpt pretrain TOKENS --model photos -o RUN --resolution 16 "
        f"--precision {precision} --device cpu"
    )
    with pytest.raises(InputError, match="--gpu cpu is this machine without a GPU"):
        plan(given.model_copy(update={"gpus": 2}))
    large = asked("igpt-xl", gpu="cpu", gpu_tflops=0.1, gpu_memory=8.0)
    assert plan(large).remedy.startswith("it would with --gpu H200: ")


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("igpt-s", {}, "about 2 d 1 h, 49 GPU-hours"),
        ("gpu-hour", {}, "about 59 min, without"),
        ("tiny", {"resolution": 8}, "about 1 s, without"),
        ("igpt-xl", {"gpus": 4, "shard": 4}, "about 174 days, 16,"),
    ],
)
def test_units_fit_the_numbers(name: str, changes: dict[str, Any], said: str) -> None:
    lines = list(plan(asked(name, **changes)).lines(name, changes))
    assert said in lines[-2], lines[-2]
    rows = dict(line.split(maxsplit=1) for line in lines if line.startswith(("weights", "sum")))
    assert all(float(words.split()[0]) >= 0.01 for words in rows.values()), rows


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, r"it would on 2 GPUs: --micro-batch-size 1 --shard 2"),
        (
            {"gpus": 8, "shard": 1},
            r"it would with other settings: --micro-batch-size \d --shard \d",
        ),
        ({"gpu": "RTX-4090", "batch_size": 1}, r"it would with --gpu H200: the default ones"),
        ({"gpu": "RTX-4090", "batch_size": 1, "resolution": 512}, r"more and larger GPUs"),
    ],
)
def test_what_would_fit(changes: dict[str, Any], said: str) -> None:
    found = plan(asked("igpt-xl", **changes))
    assert found.remedy is not None
    assert re.search(said, found.remedy), found.remedy
    assert min(memory.total for memory in found.memory.values()) / GIB > found.settings.kind.usable


def test_mistakes() -> None:
    for changes, said in [
        ({"gpu": "H1000"}, "no GPU 'H1000' is known; did you mean 'H100'?"),
        ({"gpus": 3, "shard": 2}, "--shard 2 does not divide 3 GPUs"),
        ({"gpus": 129}, "at most one GPU per image"),
        (
            {"gpus": 64, "micro_batch_size": 4},
            "--micro-batch-size 4 is more than the 2 images of a GPU",
        ),
        ({"n_head": 7}, "7 heads do not divide a width of 512"),
    ]:
        with pytest.raises(InputError, match=re.escape(said)):
            plan(asked("igpt-s", **changes))
    assert asked("igpt-s", gpu="rtx_4090").kind == KINDS["RTX-4090"]
    assert asked("igpt-s", gpu_memory=1000.0, gpu_tflops=2.0).kind.bf16 == 2.0
    assert plan(asked("igpt-s", gpu_memory=1000.0)).training.micro_batch_size is None


@pytest.mark.parametrize(
    "words",
    [
        "igpt-s",
        "igpt-s --gpu L40S --batch-size 64 --n-layer 12 --steps 7",
        "igpt-xl --gpus 64 --gpu A100-80",
        "igpt-l --gpus 12 --activation-checkpointing full",
    ],
)
def test_printed_command_line_parses(
    igpt, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = igpt("plan", *words.split(), "-o", "plan.json")
    assert done.returncode == 0, done.stderr
    planned = json.loads((tmp_path / "plan.json").read_text())
    command = shlex.split(done.stdout.splitlines()[-1])
    launch, words_of_igpt = command[: command.index("igpt")], command[command.index("igpt") + 1 :]
    ranks = {
        word: int(launch[launch.index(word) + 1])
        for word in launch
        if word in ("--nnodes", "--nproc-per-node")
    }
    assert (
        ranks.get("--nnodes", 1) * ranks.get("--nproc-per-node", 1) == planned["settings"]["gpus"]
    )
    ran = igpt(*words_of_igpt)
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
    assert "no token data set at TOKENS" in ran.stderr
    assert planned["fits"]
    for name in ("none", "selective", "full"):
        parts = planned["memory"][name]
        total = sum(value for key, value in parts.items() if key not in ("moment", "total"))
        assert parts["total"] == pytest.approx(total)


def test_mistakes_on_the_command_line(igpt) -> None:
    for words, said in [
        (["igpt-x"], "no preset 'igpt-x'; did you mean"),
        (["igpt-s", "--gpu", "T1000"], "no GPU"),
    ]:
        done = igpt("plan", *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert said in done.stderr
    done = igpt("plan", "igpt-xl")
    assert done.returncode == 0
    assert "this does not fit: it would on 2 GPUs: --" in done.stdout
