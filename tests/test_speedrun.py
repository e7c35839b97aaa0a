"""The speedrun's entries are valid settings of pretraining, and its table shows its records."""

import json
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from igpt.data.images.palette import Palette
from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError
from igpt.evaluation.likelihood import score
from igpt.model.transformer import ImageGPT
from igpt.training.metrics import read_metrics
from igpt.training.pretrain import PretrainConfig

FOLDER = Path(__file__).parents[1] / "experiments" / "speedrun"


@pytest.fixture(scope="module")
def speedrun() -> ModuleType:
    spec = spec_from_file_location("speedrun", FOLDER / "run.py")
    module = sys.modules["speedrun"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(entry: str, seed: int, losses: list[float], rate: float = 2.0) -> dict[str, Any]:
    """Return a result with a validation every 10 steps of 4 images, each of which takes `rate`
    seconds."""
    lines: list[dict[str, Any]] = [{"kind": "start", "step": 0}]
    for number, loss in enumerate(losses, 1):
        step = 10 * number
        lines.append({"kind": "train", "step": step, "loss": 9.0, "seconds": rate * step})
        lines.append({"kind": "validation", "step": step, "loss": loss})
    environment = {
        "processor": "one",
        "commit": "abc1234",
        "started": f"2026-01-0{seed + 1}T00:00:00+00:00",
    }
    return {
        "entry": entry,
        "seed": seed,
        "settings": {"batch_size": 4},
        "lines": lines,
        "environment": environment,
    }


@pytest.fixture
def results(speedrun: ModuleType) -> list[dict[str, Any]]:
    made = [
        result("faithful", 0, [5.0, 4.5, 4.1]),
        result("faithful", 1, [5.0, 4.5, 3.9]),
        result("batch", 0, [4.4, 4.0, 3.7]),
        result("batch", 1, [4.4, 3.9, 3.8], rate=2.5),
        result("muon", 0, [3.9, 3.8, 3.7]),
        result("muon", 1, [4.9, 4.8, 4.7]),
        result("rotary", 0, [4.9, 4.8, 4.7]),
    ]
    return [{**one, **speedrun.measured(one["lines"], 4)} for one in made]


def test_all_entries_are_settings_of_pretraining(speedrun: ModuleType, tmp_path: Path) -> None:
    seen = []
    for entry in speedrun.ENTRIES:
        settings = speedrun.settings_of(entry.name)
        config = PretrainConfig.layered(settings, {"tokens": tmp_path, "seed": 1})
        assert config.steps % config.validate_every == 0
        assert config.log_every == config.validate_every
        assert config.validate_every * config.batch_size == 80
        assert config.warmup(45_000) < config.steps
        assert settings not in seen
        seen.append(settings)
        assert entry.over in [None, *speedrun.NAMES][: len(seen)], (
            "the entry that it changes comes before it"
        )
        PretrainConfig.layered(speedrun.settings_of(entry.name, 2), {"tokens": tmp_path})
    assert len(speedrun.NAMES) == len(speedrun.ENTRIES)
    assert PretrainConfig.layered(seen[0], {"tokens": tmp_path}).faithful
    with pytest.raises(InputError, match="no entry 'mun'"):
        speedrun.settings_of("mun")


def test_the_palette_can_be_read() -> None:
    assert len(Palette.load(FOLDER / "palette.npy")) == 512


def test_records_and_their_table(speedrun: ModuleType, results: list[dict[str, Any]]) -> None:
    summary = speedrun.summarise(results, (0, 1), None)
    assert summary["target"] == pytest.approx(4.0)
    reported = {
        (one["entry"], one["seed"]): (one["reached"], one["seconds"], one["updates"])
        for one in summary["records"]
    }
    assert reported == {
        ("faithful", 0): (True, 60.0, 30),
        ("faithful", 1): (True, 60.0, 30),
        ("batch", 0): (True, 40.0, 20),
        ("batch", 1): (True, 45.0, 18),  # four fifths of the way between two validations
        ("muon", 0): (True, 20.0, 10),
        ("muon", 1): (False, None, None),
        ("rotary", 0): (False, None, None),
    }
    lines = speedrun.table(summary["records"], summary["target"]).splitlines()
    assert lines[0] == "Target: a validation loss of 4.0000 nats/pixel."
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    found = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert list(found) == ["faithful", "batch", "muon", "rotary"]
    time = "seconds (range)"
    assert [row[time] for row in found.values()] == [
        "60 (60 to 60)",
        "42 (40 to 45)",
        "20 (20 to 20), 1 of 2 not reached",
        "not reached",
    ]
    assert [row["kept"] for row in found.values()] == [
        "",
        "yes",
        "no",
        "",
    ]  # `rotary` changes an entry without a result
    assert found["batch"]["final loss"] == "3.7500 (3.7000 to 3.8000)"
    assert found["batch"]["images/s"] == "1.8"
    assert found["batch"]["steps"] == "19"
    assert (found["batch"]["date"], found["batch"]["commit"]) == ("2026-01-02", "`abc1234`")


def test_a_given_target_and_a_missing_one(
    speedrun: ModuleType, results: list[dict[str, Any]]
) -> None:
    given = speedrun.summarise(results, (0, 1), 4.5)
    assert [one["updates"] for one in given["records"]] == [20, 20, 10, 10, 10, None, None]
    unset = speedrun.summarise(results[1:], (0, 1), None)
    assert unset["target"] is None
    assert not any(one["reached"] for one in unset["records"])
    assert "not set yet" in speedrun.table(unset["records"], None)


def test_the_table_is_written_between_its_markers(speedrun: ModuleType, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    text = (FOLDER / "README.md").read_text()
    readme.write_text(text)
    for table in ("| one |", "| two |"):
        speedrun.write_table(table, readme)
    before, after = text.split(speedrun.MARKS[0])[0], text.split(speedrun.MARKS[1])[1]
    assert readme.read_text() == f"{before}{speedrun.MARKS[0]}\n| two |\n{speedrun.MARKS[1]}{after}"


def test_a_result_of_other_settings_is_not_used(speedrun: ModuleType, tmp_path: Path) -> None:
    assert speedrun.result_of("muon", 0, tmp_path) is None
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "muon-0.json").write_text('{"settings": {"steps": 3}}')
    with pytest.raises(InputError, match=r"muon-0\.json was made with other settings"):
        speedrun.result_of("muon", 0, tmp_path)
    assert speedrun.done_before(tmp_path, (0, 1)) == []
    settings = {**speedrun.settings_of("muon"), "seed": 0}
    (tmp_path / "results" / "muon-0.json").write_text(json.dumps({"settings": settings}))
    assert speedrun.result_of("muon", 0, tmp_path) == {"settings": settings}
    assert speedrun.done_before(tmp_path, (0, 1)) == [{"settings": settings}]


def test_commands_run_in_processes(speedrun: ModuleType, tmp_path: Path) -> None:
    commands = [
        ("logs/help", ("inspect", "--help")),
        ("logs/none", ("inspect", str(tmp_path / "x"))),
    ]
    ended = {one.name: one for one in speedrun.run_commands(commands, tmp_path)}
    speedrun.require_success(ended["logs/help"])
    with pytest.raises(InputError, match=r"logs/none ended with 2: .*x.*logs/none\.txt"):
        speedrun.require_success(ended["logs/none"])
    assert list(speedrun.run_commands(commands, tmp_path, deadline=0.0)) == []


def test_one_seed_of_two_is_not_a_record(
    speedrun: ModuleType, results: list[dict[str, Any]]
) -> None:
    records = speedrun.summarise(
        [one for one in results if (one["entry"], one["seed"]) != ("batch", 1)], (0, 1), 4.0
    )
    assert speedrun.kept("batch", records["records"]) is None


def test_a_temporarily_faster_machine_is_not_a_record(
    speedrun: ModuleType, results: list[dict[str, Any]]
) -> None:
    quick = [
        result("muon", seed, [9.0, 9.0, 9.0, 3.9], rate=0.5) for seed in (0, 1)
    ]  # 40 steps in 20 seconds
    some = [*results[:4], *({**one, **speedrun.measured(one["lines"], 4)} for one in quick)]
    records = speedrun.summarise(some, (0, 1), 4.0)["records"]
    assert speedrun.kept("batch", records)
    assert speedrun.kept("muon", records) is False


def test_results_of_several_processors_are_not_compared(
    speedrun: ModuleType, results: list[dict[str, Any]]
) -> None:
    results[-1]["environment"] = {**results[-1]["environment"], "processor": "two"}
    with pytest.raises(InputError, match="several processors cannot be compared: one, two"):
        speedrun.summarise(results, (0, 1), None)


def test_averages_of_snapshots(
    speedrun: ModuleType, igpt: Callable[..., Any], digits: TokenDataset, tmp_path: Path
) -> None:
    flags = [
        "--model",
        "tiny",
        "--n-layer",
        1,
        "--n-embd",
        8,
        "--steps",
        4,
        "--validate-every",
        2,
        "--log-every",
        2,
    ]
    flags += [
        "--validation-images",
        5,
        "--precision",
        "fp32",
        "--learning-rate",
        0.1,
        "--warmup-steps",
        0,
    ]
    done = igpt("pretrain", digits.path, "-o", tmp_path / "run", *flags, "--snapshots", 1, 2, 3, 4)
    assert done.returncode == 0, done.stderr
    curve = speedrun.measured(read_metrics(tmp_path / "run" / "metrics.jsonl"), 32)["curve"]
    assert [point["step"] for point in curve] == [2, 4], (
        "validations that only belong to a snapshot are excluded"
    )
    alone, of_two = (
        speedrun.averaged(tmp_path / "run", digits["validation"], curve, count) for count in (1, 2)
    )
    assert [point["loss"] for point in alone] == pytest.approx(
        [point["loss"] for point in curve], abs=1e-5
    )
    assert [(point["step"], point["seconds"]) for point in of_two] == [
        (one["step"], one["seconds"]) for one in curve
    ]
    model, other = (
        ImageGPT.from_pretrained(tmp_path / f"run/snapshots/step-0000000{step}") for step in (3, 4)
    )
    with torch.no_grad():
        for mine, its in zip(model.parameters(), other.parameters(), strict=True):
            mine.lerp_(its, 0.5)
    assert of_two[1]["loss"] == pytest.approx(
        score(model, digits["validation"].spread(5)).mean(), abs=1e-5
    )
    assert abs(of_two[1]["loss"] - alone[1]["loss"]) > 1e-3
