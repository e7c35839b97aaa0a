"""The race: its trainings are those of igpt, and its table shows its results."""

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from igpt.data.images.palette import Palette
from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError
from igpt.training.metrics import read_metrics

FOLDER = Path(__file__).parents[1] / "experiments" / "speedrun"


@pytest.fixture(scope="module")
def run() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        return import_module("run")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def recipe(run: ModuleType) -> ModuleType:
    return sys.modules[run.Recipe.__module__]


def write(race: Any, training: Any, losses: list[float], behind: bool = False) -> None:
    """Write a result with a validation every 1,000 images."""
    curve = [
        {"images": 1000 * number, "steps": number, "loss": loss, "seconds": 1.0}
        for number, loss in enumerate(losses, 1)
    ]
    recipe = training.recipe.model_dump(mode="json", exclude_defaults=True)
    result = {"recipe": recipe, "finished": True, "behind": behind, "curve": curve}
    (race.folder / f"{training.name}.json").write_text(json.dumps(result))


def finish(race: Any, entry: Any, losses: dict[int, list[float]]) -> None:
    """Write the results of an entry: those of its search by the first seed, then the others."""
    for number, training in enumerate(race.searched(entry)):
        write(race, training, [loss + number for loss in losses[0]])
    for training in race.repeated(entry):
        write(race, training, losses[training.recipe.seed])


def test_trainings_of_the_baseline_are_those_of_igpt(
    digits: TokenDataset, tmp_path: Path, igpt: Callable[..., Any], recipe: ModuleType
) -> None:
    shape = {"n_layer": 2, "n_embd": 16, "n_head": 2}
    settings = {**shape, "images": 160, "validate_every": 80, "validation_images": 20, "seed": 3}
    settings |= {"batch": 8, "rate": 1e-2, "precision": "fp32", "warmup": 0.2}
    sys.path.insert(0, str(FOLDER))
    train = import_module("train").train
    made = recipe.Recipe.layered(settings, where="the test")
    result = train(digits.path, made, tmp_path / "result.json", {})
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["finished"]
    flags = ["--model", "tiny", "--n-layer", 2, "--n-embd", 16, "--n-head", 2, "--batch-size", 8]
    flags += ["--steps", 20, "--warmup-steps", 4, "--learning-rate", 1e-2, "--precision", "fp32"]
    flags += ["--validate-every", 10, "--validation-images", 20, "--seed", 3, "--compile", "no"]
    other = igpt("pretrain", digits.path, "-o", tmp_path / "run", *flags)
    assert other.returncode == 0, other.stderr
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [line["loss"] for line in lines if line["kind"] == "validation"]
    assert [point["loss"] for point in result["curve"]] == pytest.approx(losses, rel=1e-5)


def test_every_recipe_trains_and_no_pixel_sees_itself_or_later_ones(
    run: ModuleType, recipe: ModuleType
) -> None:
    palette = Palette.load(FOLDER / "palette.npy")
    small = {"n_layer": 2, "n_embd": 16, "n_head": 2, "precision": "fp32"}
    seen, over = [], {}
    for entry in run.ENTRIES:
        change = {**over.get(entry.over, {}), **entry.change}
        over[entry.name] = change
        assert change not in seen or entry.search
        seen.append(change)
        made = recipe.Recipe.layered({**change, **small}, where=entry.name)
        torch.manual_seed(0)
        model = recipe.RaceModel(made, palette, 4)
        for name, parameter in model.named_parameters():  # the head starts at 0
            if parameter.ndim == 2 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
            assert parameter.any(), name
        tokens = torch.randint(0, 512, (2, 16))
        changed = tokens.clone()
        changed[:, 9] = (tokens[:, 9] + 1) % 512
        logits, others = model(tokens), model(changed)
        same = (logits == others).all(dim=2).all(dim=0).tolist()
        assert same == [place <= 9 for place in range(16)], entry.name
        before = [parameter.detach().clone() for parameter in model.parameters()]
        model.config.trained_as.loss(model, tokens)[0].backward()
        for optimizer in recipe.optimizers_of(model):
            for group in optimizer.param_groups:
                group["lr"] = 0.1
            optimizer.step()
        moved = [not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)]
        assert all(moved), entry.name


def test_three_rows_are_those_of_full_attention_on_three_rows(recipe: ModuleType) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 20, 8)
    found = recipe.attend_to_three_rows(q, k, v, 4)
    place = torch.arange(20)
    allowed = (place[:, None] >= place) & (place[:, None] // 4 - place // 4 <= 2)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    assert torch.allclose(found, expected, atol=1e-6)


def test_schedules(recipe: ModuleType) -> None:
    constant = recipe.Recipe(images=100, rate=2.0, warmup=0.2, schedule="constant", cooldown=0.5)
    assert [constant.rate_at(seen, 10) for seen in (0, 10, 20, 60, 80)] == [1, 2, 2, 2, 1]
    growing = recipe.Recipe(batch=4, batches=((10, 8), (20, 16)))
    assert [growing.batch_at(seen) for seen in (0, 9, 10, 19, 20, 99)] == [4, 4, 8, 8, 16, 16]


def test_a_search_comes_before_its_seeds_and_what_depends_on_it(
    run: ModuleType, tmp_path: Path
) -> None:
    race, (paper, muon, *_) = run.Race(tmp_path), run.ENTRIES
    assert len(race.searched(paper)) == 9
    assert race.searched(muon) == []
    started = set[str]()
    while (training := race.next(started)) is not None:
        started.add(training.name)
    assert started == {training.name for training in race.searched(paper)}
    finish(race, paper, {0: [3.5, 3.0], 1: [3.6, 3.1], 2: [3.6, 3.2]})
    assert race.best(paper).values == race.searched(paper)[0].values
    assert race.target() == pytest.approx(3.1)
    following = race.next(())
    assert following.entry == "muon"
    assert following.recipe.optimizer == "muon"
    write(race, following, [3.0])
    path = tmp_path / f"{following.name}.json"
    path.write_text(path.read_text().replace('"muon"', '"adamw"'))
    with pytest.raises(InputError, match="was made with other settings"):
        race.next(())


def test_trainings_of_a_search_stop_far_above_the_best(run: ModuleType, tmp_path: Path) -> None:
    race, paper = run.Race(tmp_path), run.ENTRIES[0]
    first, second, *_ = race.searched(paper)
    assert race.limits(first) == {}
    write(race, first, [4.0, 3.0] + [2.0] * 29)
    limits = race.limits(second)
    assert min(limits) == 16_000  # of 30,720
    assert limits[16_000] == pytest.approx(2.0 + run.BEHIND)
    write(race, second, [4.0, 3.0], behind=True)
    assert run.final(race.result(second)) == float("inf")


def test_the_table(run: ModuleType, tmp_path: Path) -> None:
    race, (paper, muon, palette, *_) = run.Race(tmp_path), run.ENTRIES
    finish(race, paper, {0: [3.5, 3.0], 1: [3.6, 3.1], 2: [3.6, 3.2]})
    finish(race, muon, {0: [3.5, 2.7], 1: [3.1, 2.6], 2: [3.5, 2.7]})
    finish(race, palette, {0: [3.5, 2.8]})
    lines = run.table(race, {"paper": 0.1, "muon": 0.125}).splitlines()
    assert lines[0] == "Target: 3.1000 nats/pixel."
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    found = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert list(found) == ["paper", "muon", "palette"]
    images = [row["images to the target"] for row in found.values()]
    assert images == ["2,000", "1,500", "1,571"]
    assert [row["seconds"] for row in found.values()] == ["200", "188", ""]
    assert [row["seeds"] for row in found.values()] == ["3", "3", "1"]
    assert [row["kept"] for row in found.values()] == ["", "yes", "no"]
    assert found["muon"]["final loss"] == "2.6667 (2.6000 to 2.7000)"
    slower = run.table(race, {"paper": 0.1, "muon": 0.2}).splitlines()
    assert next(line for line in slower if "| muon |" in line).endswith("| no |")
    searches = run.search_table(race).splitlines()
    assert len(searches) == 2 + 9 + 6


def test_the_tables_are_written_between_the_marks(run: ModuleType, tmp_path: Path) -> None:
    readme, text = tmp_path / "README.md", (FOLDER / "README.md").read_text()
    readme.write_text(text)
    for table in ("| one |", "| two |"):
        run.write_tables(table, readme)
    before, after = text.split(run.MARKS[0])[0], text.split(run.MARKS[1])[1]
    assert readme.read_text() == f"{before}{run.MARKS[0]}\n| two |\n{run.MARKS[1]}{after}"


def test_the_recorded_results_are_those_of_the_entries(run: ModuleType) -> None:
    race = run.Race(run.RESULTS)
    expected = {one.name for e in run.ENTRIES for one in [*race.searched(e), *race.repeated(e)]}
    recorded = {path.stem for path in run.RESULTS.glob("*.json")} - {"speeds"}
    assert recorded <= expected
    for path in recorded:
        assert json.loads((run.RESULTS / f"{path}.json").read_text())["finished"], path
    text = f"{run.table(race, _speeds(run))}\n\n### Searches\n\n{run.search_table(race)}"
    assert text in (FOLDER / "README.md").read_text()


def _speeds(run: ModuleType) -> dict[str, float]:
    path = run.RESULTS / "speeds.json"
    return json.loads(path.read_text()) if path.exists() else {}


def test_a_search_is_carried_out(
    run: ModuleType, digits: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = {"n_layer": 1, "n_embd": 8, "n_head": 1, "images": 32, "validate_every": 16}
    tiny |= {"validation_images": 8, "precision": "fp32"}
    entry = run.Entry(run.BASELINE, None, "tiny", tiny, {"rate": (1e-2,)})
    monkeypatch.setattr(run, "ENTRIES", (entry,))
    monkeypatch.setattr(run, "NAMES", {entry.name: entry})
    monkeypatch.setattr(run, "SEEDS", (0, 1))
    race = run.Race(tmp_path / "results")
    race.folder.mkdir()
    run.train_all(race, digits.path, tmp_path / "scratch", 1e12)
    found = sorted(path.stem for path in race.folder.iterdir())
    assert found == ["paper-rate0.01-seed0", "paper-rate0.01-seed1"]
    assert race.target() is not None
    speeds = run.measure(race, digits.path, tmp_path / "speeds", rounds=1, steps=1)
    assert speeds.keys() == {"paper"}
    assert speeds["paper"] > 0
