"""Which steps are made again, and estimates of time."""

from pathlib import Path
from typing import Any

import pytest

from igpt.files import write_json
from igpt.report.findings import duration
from igpt.reproduction.reproduce import describe_plan
from igpt.reproduction.runner import this_machine
from igpt.reproduction.scale import scale
from igpt.reproduction.schedule import pace, seconds_left, to_make_again, wall_seconds
from igpt.reproduction.steps import Step, steps


def chain(*names: str, seconds: float = 10.0) -> list[Step]:
    """Return steps that each read the result of the one before."""
    return [
        Step(name, (), after=names[at - 1 : at] if at else (), seconds=seconds)
        for at, name in enumerate(names)
    ]


def test_only_what_unfinished_steps_read_is_made_again(tmp_path: Path) -> None:
    tokens, run, first, second = chain("tokens", "run", "first", "second")
    second = Step("second", (), after=("run",))
    plan = [tokens, run, first, second]
    assert to_make_again(plan, {"tokens", "run", "first", "second"}, tmp_path) == set()
    assert to_make_again(plan, {"tokens", "run", "first"}, tmp_path) == {"tokens", "run"}
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").touch()
    assert to_make_again(plan, {"tokens", "run", "first"}, tmp_path) == set()


def test_wall_time_of_steps_side_by_side() -> None:
    steps = [*chain("a", "b"), *chain("c", "d", "e")]
    seconds = {"a": 10.0, "b": 10.0, "c": 5.0, "d": 5.0, "e": 30.0}
    assert wall_seconds(steps, seconds, 1) == 60
    assert wall_seconds(steps, seconds, 2) == 40, "c, d and e one after the other"
    assert wall_seconds(steps[1:], seconds, 2) == 40, "what is not in the list is finished"
    both = [*chain("a"), *chain("c")]
    assert wall_seconds([*both, *chain("e")], seconds, 2) == 35, "e starts after c"
    assert wall_seconds([*both, *chain("e")], seconds, 2, running=["e"]) == 30, "e runs already"


FAST = {"processor": "EPYC", "cpu_precision": "bf16"}


def record(seconds: float, ended: str = "done") -> dict[str, Any]:
    return {"ended": ended, "seconds": seconds, "machine": FAST}


def test_the_pace_is_that_of_finished_steps_on_the_same_kind_of_machine() -> None:
    steps = chain("a", "b", "c", seconds=400.0)
    records = {"a": record(500.0), "b": record(300.0), "c": record(9.0, "stopped")}
    assert pace(steps, records, FAST) == 1.0
    assert pace(steps, {**records, "b": record(700.0)}, FAST) == 1.5
    for other in (
        {**FAST, "processor": "another"},
        {**FAST, "cpu_precision": "fp32"},
        {"processor": "EPYC"},
    ):
        assert pace(steps, records, other, expected=2.0) == 2.0
    assert pace(steps, {"a": record(900.0)}, FAST) == 1.0, "400 s are too few"


@pytest.mark.parametrize(("begun", "left"), [(False, 200.0), (True, 140.0)])
def test_a_stopped_training_needs_the_rest_of_its_time(
    begun: bool, left: float, tmp_path: Path
) -> None:
    step = Step("run", (), run=True, seconds=100.0)
    if begun:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").touch()
    assert seconds_left(step, {"run": record(60.0, "stopped")}, tmp_path, 2.0) == left
    assert seconds_left(Step("run", ()), {}, tmp_path, 2.0) == 0


def test_a_night_takes_about_ten_hours_and_each_group_fits_into_a_sitting(tmp_path: Path) -> None:
    plan = steps(scale("night"), "corpus", "labelled")
    seconds = {step.name: step.seconds or 0.0 for step in plan}
    assert min(seconds.values()) > 0
    assert 9 < wall_seconds(plan, seconds, 2) / 3600 < 11
    for group in {step.group for step in plan}:
        one = [step for step in plan if step.group == group]
        assert wall_seconds(one, seconds, 2) / 60 < 155, group
    text = describe_plan(tmp_path / "none", scale("night"), "corpus", "labelled")
    assert text.splitlines()[-1].startswith(f"all steps: {len(plan)} of {len(plan)} steps to do")
    assert all(f"igpt {' '.join(step.words)}" in text for step in plan)
    assert not (tmp_path / "none").exists()


def test_a_plan_takes_longer_without_bf16_and_corrects_itself_by_finished_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def total() -> str:
        plan = describe_plan(tmp_path, scale("night"), "corpus", "labelled", jobs=1)
        return plan.splitlines()[-1].split(", ")[1]

    def with_bf16(found: bool) -> None:
        multiplies = "igpt.reproduction.reproduce.multiplies_bf16"
        monkeypatch.setattr(multiplies, lambda device_type: found)

    plan = steps(scale("night"), "corpus", "labelled")
    expected = sum(step.seconds or 0.0 for step in plan)
    with_bf16(found=True)
    assert total() == f"about {duration(expected)}"
    with_bf16(found=False)
    assert total() == f"about {duration(2 * expected)}"
    made = [step for step in plan if step.name in ("runs/small", "runs/at-16")]
    records = {
        step.name: {
            "command": list(step.words),
            "ended": "done",
            "seconds": 3 * (step.seconds or 0.0),
            "side_by_side": 2,
            "machine": this_machine(),
        }
        for step in made
    }
    head = {"format": "igpt-reproduction-steps", "version": 1}
    write_json(tmp_path / "steps.json", {**head, "steps": records})
    for step in plan:  # readable tokens, so that nothing is made again
        if step.words[0] == "prepare" or step in made:
            (tmp_path / step.name / "model").mkdir(parents=True)
            (tmp_path / step.name / "model" / "config.json").touch()
    rest = expected - sum(step.seconds or 0.0 for step in made)
    assert total() == f"about {duration(3 * rest)}"
