"""A complete reproduction with few steps: all real commands, in two runs, and its page."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from igpt.errors import InputError
from igpt.files import write_json
from igpt.report.reproduction import write_page
from igpt.reproduction.evidence import Results
from igpt.reproduction.questions import questions
from igpt.reproduction.reproduce import describe_plan, gather, reproduce
from igpt.reproduction.runner import FORMAT, RECORD, VERSION, read_records, run_steps
from igpt.reproduction.scale import PARTS, Scale, longer, scale
from igpt.reproduction.steps import steps

from ..helpers import malformed, preloaded

SMALL = replace(
    scale("night", rehearsal=True),
    resolutions=(4, 6),
    sizes={"small": (2, 8, 1), "large": (3, 16, 2)},
    main="large",
    masked_size="small",
    masked_ratio=2,
    resolution_size="small",
    steps=2,
    snapshots=(1, 2),
    doublings=(1, 2),
    few=(1,),
    own_labels=True,
)
QUESTIONS = questions(SMALL)
NAMES = [asked.name for asked in QUESTIONS]
NOTES = "layers: twice as many steps, without a difference\n"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Yield the words before those of a command; see preloaded.py."""
    address = tmp_path_factory.mktemp("igpt") / "socket"
    server = subprocess.Popen([sys.executable, preloaded.__file__, "serve", str(address)])
    while not address.exists():
        assert server.poll() is None
        time.sleep(0.01)
    yield [sys.executable, preloaded.__file__, "run", str(address)]
    server.terminate()
    server.wait()


@pytest.fixture(scope="module")
def folder(
    photographs: Path, program: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Prepare the tokens, delete the images, and run the other steps."""
    folder = tmp_path_factory.mktemp("reproduction")
    patch = pytest.MonkeyPatch()
    run = partial(run_steps, program=program)
    patch.setattr("igpt.reproduction.reproduce.run_steps", run)
    images, out = folder / "images", folder / "out"
    shutil.copytree(photographs, images)
    assert reproduce(out, SMALL, str(images), str(images), tokens_only=True)
    shutil.rmtree(images)
    (out / "notes.yaml").write_text(NOTES)
    assert reproduce(out, SMALL, str(images), str(images), jobs=2)
    yield out
    patch.undo()


def test_every_step_is_done_once(folder: Path) -> None:
    source = str(folder.parent / "images")
    planned = steps(SMALL, source, source)
    known = read_records(folder)
    assert {step.name for step in planned} == set(known)
    assert {record["ended"] for record in known.values()} == {"done"}
    for step in planned:
        assert tuple(known[step.name]["command"]) == step.words
        made = folder / step.name
        assert (
            made.is_dir() or made.with_suffix(".json").exists() or made.with_suffix(".png").exists()
        ), step.name
    assert reproduce(folder, SMALL, source, source)
    assert read_records(folder) == known, "a second call has nothing to do"


def test_the_evidence_is_complete(folder: Path) -> None:
    evidence = json.loads((folder / "evidence.json").read_text())
    assert (evidence["format"], evidence["version"], evidence["complete"]) == (
        "igpt-reproduction",
        1,
        True,
    )
    assert [asked["name"] for asked in evidence["questions"]] == NAMES
    for asked in evidence["questions"]:
        assert asked["held"] in ("yes", "in part", "no", "undecided", "shown")
        assert asked["table"]["rows"]
        assert asked["how"]
        assert all(len(row) == len(asked["table"]["head"]) for row in asked["table"]["rows"])
    images = {model["name"]: model["images_seen"] for model in evidence["models"]}
    assert list(images)[:3] == ["small", "large", "bert"]
    assert images["large"] == 16
    assert images["bert"] == 32, "twice as many, as the scale says"
    assert images["as-6"] < images["at-6"] == images["at-4"], "equal compute has fewer images"
    assert [machine["torch"] for machine in evidence["machines"]] == [torch.__version__]
    assert evidence["questions"][0]["tried"] == "twice as many steps, without a difference"
    own = next(
        row for row in evidence["questions"][0]["table"]["rows"] if "the 2 classes" in row[0]
    )
    assert own[1].endswith(")")


def test_the_figures_show_the_numbers_of_the_files(folder: Path) -> None:
    """The numbers of an answer are those of the steps' files."""
    results = Results(folder, SMALL, read_records(folder))
    probe = json.loads((folder / "probes" / "main.json").read_text())
    best = next(row for row in probe["layers"] if row["layer"] == probe["best_layer"])
    assert results.best(results.probe("main")).value == best["test_accuracy"]
    lines = [
        json.loads(line)
        for line in (folder / "runs" / "large" / "metrics.jsonl").read_text().splitlines()
    ]
    assert results.losses("large")[2] == next(
        line["loss"] for line in lines if line["kind"] == "validation" and line["step"] == 2
    )
    tests = [
        json.loads((folder / f"finetuned/ar-1-{subset}/test.json").read_text())
        for subset in range(SMALL.subsets)
    ]
    assert {test["train_images"] for test in tests} == {2}, "one label of each of two classes"
    mean = sum(test["test_accuracy"] for test in tests) / SMALL.subsets
    assert results.finetuned("ar", 1).value == pytest.approx(mean)


def test_the_page_is_complete_and_self_contained(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    assert "This is a rehearsal with runs of toy length: its numbers mean nothing." in text
    for name in NAMES:
        assert f'<section id="{name}">' in text
    assert "Tried: twice as many steps" in text
    assert not re.search(r'(src|href|srcset)="(?!data:)', text), "nothing is loaded"
    assert text.count("<h2>") == len(QUESTIONS) + 2  # completions, and how they were made


def test_the_markdown_refers_to_its_figures(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    found = re.findall(r"!\[[^\]]+\]\((figures/[\w.-]+)\)", text)
    assert len(found) == len(QUESTIONS) + 1  # samples and completions
    for name in found:
        assert (folder / name).stat().st_size > 100
    tables = [table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)]
    assert len(tables) > len(QUESTIONS)
    for table in tables:
        assert table[1].startswith("|---")
        assert {row.count("|") for row in table} == {table[0].count("|")}


def test_stacked_pictures_keep_their_pixels(folder: Path) -> None:
    for kind in ("samples", "completions"):
        with Image.open(folder / "figures" / f"{kind}.png") as opened:
            assert opened.mode == "P"
            sheet = np.asarray(opened.convert("RGBA"))
        parts = [
            np.asarray(Image.open(folder / "pictures" / f"{kind}-{step}.png").convert("RGB"))
            for step in (1, 2)
        ]
        height, width = parts[0].shape[:2]
        second = sheet[height:] if kind == "samples" else sheet[:, width + 12 :]
        for part, shown in zip(parts, (sheet[:height, :width], second), strict=True):
            np.testing.assert_array_equal(shown[..., :3], part)
            assert (shown[..., 3] == 255).all()
        if kind == "completions":
            assert not sheet[:, width : width + 12, 3].any(), (
                "the background of the page is visible between them"
            )


def test_the_same_evidence_gives_the_same_page(folder: Path, tmp_path: Path) -> None:
    before = {
        name: (folder / name).read_bytes()
        for name in ("report.html", "report.md", "figures/layers.svg")
    }
    write_page(folder, json.loads((folder / "evidence.json").read_text()))
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_the_first_paragraphs_conclude_and_name_both_machines(folder: Path, tmp_path: Path) -> None:
    evidence = json.loads((folder / "evidence.json").read_text())
    evidence["machines"].append({**evidence["machines"][0], "gpu": "H200"})
    (tmp_path / "pictures").symlink_to(folder / "pictures")
    first, second, *others = evidence["questions"]
    for asked in others:
        asked["held"] = "undecided" if asked["finding"] else "shown"
    first["held"], second["held"] = "yes", "no"
    write_page(tmp_path, {**evidence, "rehearsal": False})
    text = (tmp_path / "report.md").read_text()
    assert "\n| gpu |  | H200 |\n" in text, "a column for each machine"
    _, paragraph, cost, *_ = text.split("\n\n")
    assert ", and on H200 (igpt " in cost
    assert f"Reproduced: {first['finding']}. Not reproduced: {second['finding']}." in paragraph
    assert f"within the intervals: {others[0]['finding']}; " in paragraph


def test_a_clone_without_models_continues(folder: Path, photographs: Path, tmp_path: Path) -> None:
    """Git keeps the results of finished steps; only what unfinished ones read is made again."""
    images, clone = folder.parent / "images", tmp_path / "out"
    shutil.copytree(folder, clone)
    git = ["git", "-C", str(clone)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "clean", "-fdxq"], check=True)
    kept = [path for path in clone.rglob("*") if path.is_file() and ".git" not in path.parts]
    assert max(path.stat().st_size for path in kept if path.suffix == ".json") < 100_000
    assert not list(clone.rglob("*.safetensors"))
    before = read_records(clone)
    unfinished = ("probes/long-2", "finetuned/modern-ar-1-1")
    records = {name: record for name, record in before.items() if name not in unfinished}
    write_json(clone / RECORD, {"format": FORMAT, "version": VERSION, "steps": records})
    (clone / "probes" / "long-2.json").unlink()
    plan = describe_plan(clone, SMALL, str(images), str(images))
    longer_plan = describe_plan(clone, longer(SMALL, ["resolution"]), str(images), str(images))
    planned = {
        name: state
        for state, name in re.findall(
            r"^  (to do|done|again) +(\S+):", longer_plan, flags=re.MULTILINE
        )
    }
    assert [planned[name] for name in ("runs/at-6", "probes/at-6", "runs/small")] == [
        "to do",
        "to do",
        "done",
    ]
    again = re.findall(r"^  again +(\S+):", plan, flags=re.MULTILINE)
    assert set(again) == {
        "tokens/corpus-4",
        "tokens/labelled-4",
        "runs/modern-corpus-0",
        "runs/long",
    }
    shutil.copytree(photographs, images)
    try:
        assert reproduce(clone, SMALL, str(images), str(images))
    finally:
        shutil.rmtree(images)
    after = read_records(clone)
    assert {name for name in after if after[name] != records.get(name)} <= {*again, *unfinished}
    assert not (clone / "runs" / "large" / "model").exists(), "nothing needs it"
    first, second = (json.loads((one / "evidence.json").read_text()) for one in (folder, clone))
    assert second["questions"] == first["questions"], "the same numbers"


def test_longer_parts_replace_their_results_only(folder: Path, tmp_path: Path) -> None:
    source = str(folder.parent / "images")
    chosen = longer(SMALL, ["compute"])
    plan = {step.name: step.words for step in steps(chosen, source, source)}
    differ = {
        name
        for name, record in read_records(folder).items()
        if plan[name] != tuple(record["command"])
    }
    assert differ == {"runs/long", "probes/long"}
    assert plan.keys() - read_records(folder).keys() == {"probes/long-4"}, "one more doubling"
    with pytest.raises(InputError, match="holds runs/long made by another command"):
        reproduce(folder, chosen, source, source)
    for part in PARTS:
        assert longer(scale("night"), [part]) != scale("night")
    with pytest.raises(InputError, match="no part 'berd'; did you mean 'bert'"):
        longer(SMALL, ["berd"])


def test_labels_are_checked_before_any_training(folder: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "out", str(folder.parent / "images")
    shutil.copytree(folder / "tokens", out / "tokens")
    tokens = {
        name: record for name, record in read_records(folder).items() if name.startswith("tokens/")
    }
    write_json(out / RECORD, {"format": FORMAT, "version": VERSION, "steps": tokens})
    with pytest.raises(InputError, match="100 labels a class are asked for, and one class has"):
        reproduce(out, replace(SMALL, few=(100,)), source, source)
    for place in out.glob("tokens/labelled-*/dataset.json"):
        place.write_text(json.dumps({**json.loads(place.read_text()), "class_names": None}))
    with pytest.raises(
        InputError,
        match="images has no labels, and probes and fine-tuning need them",
    ):
        reproduce(out, SMALL, source, source)
    assert not (out / "runs").exists()


def test_mistakes_in_notes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.yaml").write_text("layer: more\n")
    with pytest.raises(
        InputError, match=r"notes\.yaml: there is no question 'layer'; did you mean 'layers'"
    ):
        reproduce(tmp_path, SMALL, "photographs", "photographs")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("layers: 3", "layers = 3: a note is text"),
        ("layers: [a, b]", "layers = .*: a note is text"),
        ("layers:", "layers = None: a note is text"),
        ("1: a", "there is no question 1"),
        ("- a", "name: value"),
        ("layers: " + "[" * 2000, "neither YAML nor JSON|nested too deeply"),
        ("layers: {", "neither YAML nor JSON"),
    ],
)
def test_notes_that_are_not_text(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "notes.yaml").write_text(content)
    with pytest.raises(InputError, match=rf"notes\.yaml.*({said})") as refusal:
        reproduce(tmp_path, SMALL, "photographs", "photographs")
    assert "\n" not in str(refusal.value)
    for what in malformed.others(tmp_path / "notes.yaml"):
        with pytest.raises(InputError, match=r"notes\.yaml"):
            reproduce(tmp_path, SMALL, "photographs", "photographs")
        assert [path.name for path in tmp_path.iterdir()] == ["notes.yaml"], what


def test_a_second_reproduction_in_one_folder_is_refused(igpt, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from igpt.locks import exclusive_folder\n"
        "with exclusive_folder(Path(sys.argv[1])): print(flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        first.stdout.readline()
        done = igpt("reproduce", "-o", tmp_path / "out", "--rehearsal")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"out is being written by process {first.pid} on " in done.stderr
        first.communicate(b"\n")
    assert not (tmp_path / "out").exists()


def test_missing_steps_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    evidence = gather(Results(tmp_path, SMALL, {}), "photographs", "photographs")
    assert not evidence["complete"]
    text = write_page(tmp_path, evidence).read_text()
    assert "The step probes/main is not done yet." in text
    assert "Nothing has been trained yet." in text


@pytest.mark.parametrize("name", ["cpu", "night", "gpu"])
@pytest.mark.parametrize("rehearsal", [False, True])
def test_the_graph_contains_the_inputs_of_every_step(name: str, rehearsal: bool) -> None:
    chosen: Scale = scale(name, rehearsal=rehearsal)
    done: set[str] = set()
    for step in steps(chosen, "corpus", "labelled"):
        assert done.issuperset(step.after), step
        assert step.name not in done
        done.add(step.name)
    assert chosen.main in chosen.sizes
    assert chosen.resolution_size in chosen.sizes
    assert max(chosen.snapshots) == chosen.steps, "the last snapshot is the end of training"
    assert len(chosen.sizes) >= 3


def test_mistakes(igpt, tmp_path: Path) -> None:
    for words, line in (
        (["--scale", "tpu"], "invalid choice"),
        (
            ["--minutes", "0"],
            "igpt reproduce: --minutes is more than 0 and at most 1,000,000, not 0",
        ),
        (["--minutes", "nan"], "--minutes is more than 0 and at most 1,000,000, not nan"),
        (["--minutes", "inf"], "--minutes is more than 0 and at most 1,000,000, not inf"),
        (["--jobs", "0"], "igpt reproduce: --jobs is 1 to 1024, not 0"),
        (["--jobs", "1000000000"], "igpt reproduce: --jobs is 1 to 1024, not 1000000000"),
        (
            ["--rehearsal", "--corpus", str(tmp_path / "none")],
            r"the step tokens/corpus-4 failed \(exit code 2\): .*none",
        ),
    ):
        done = igpt("reproduce", "-o", tmp_path / "out", *words)
        assert done.returncode == 2
        assert re.search(line, done.stderr), done.stderr
        assert done.stderr.count("\n") == 1
