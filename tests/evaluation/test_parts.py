"""Scores and features that are computed in parts are those that one process computes, to the last
digit."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from igpt.data.tokens.dataset import TokenDataset

Run = Callable[..., subprocess.CompletedProcess[str]]
BATCH = 8


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("igpt.model.cost.inference_batch_size", lambda _: BATCH)
    monkeypatch.setattr("igpt.evaluation.likelihood.inference_batch_size", lambda _: BATCH)
    monkeypatch.setattr("igpt.evaluation.features.inference_batch_size", lambda _: BATCH)


@pytest.fixture(scope="module")
def pictures(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 48 images, of which two do not decode."""
    folder = tmp_path_factory.mktemp("parts") / "pictures"
    shutil.copytree(photographs, folder)
    for file in sorted(folder.rglob("*.png"))[5:20:10]:
        file.write_text("no picture")
    return folder


def words(run: Path, pictures: Path) -> tuple[object, ...]:
    return (run / "model", pictures, "--max-bad", 0.5, "--limit", 45, "--seed", 1)


def made(path: Path) -> dict[str, object]:
    found = json.loads(path.read_text())
    del found["environment"]
    return found


def check(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("count", [1, 3, 8])
def test_merged_scores_are_those_of_one_process(
    igpt: Run, short_run: Path, pictures: Path, tmp_path: Path, count: int
) -> None:
    """With more parts than batches, some parts are empty."""
    check(igpt("score", *words(short_run, pictures), "-o", tmp_path / "whole.csv"))
    for number in range(1, count + 1):
        shard = f"{number}/{count}"
        said = check(
            igpt("score", *words(short_run, pictures), "-o", tmp_path / "s.csv", "--shard", shard)
        )
        assert said == (
            f"{tmp_path}/s.csv.{number}-of-{count}: part {shard}; when all parts are there, merge "
            f"them: igpt score --merge -o {tmp_path}/s.csv\n"
        )
    assert not (tmp_path / "s.csv").exists()
    said = check(igpt("score", "--merge", "-o", tmp_path / "s.csv"))
    assert "images that do not decode: 2" in said
    assert (tmp_path / "s.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert made(tmp_path / "s.json") == made(tmp_path / "whole.json")


def test_a_token_data_set_in_parts(
    igpt: Run, short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    whole = (short_run / "model", digits.path, "--split", "validation")
    check(igpt("score", *whole, "-o", tmp_path / "whole.jsonl"))
    for shard in ("2/2", "1/2"):
        check(igpt("score", *whole, "-o", tmp_path / "s.jsonl", "--shard", shard))
    check(igpt("score", "--merge", "-o", tmp_path / "s.jsonl"))
    assert (tmp_path / "s.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert made(tmp_path / "s.json") == made(tmp_path / "whole.json")


def test_merged_features_are_those_of_one_process(
    igpt: Run, short_run: Path, pictures: Path, tmp_path: Path
) -> None:
    for ending in ("npz", "parquet"):
        run = ("features", *words(short_run, pictures), "--layer", 1)
        check(igpt(*run, "-o", tmp_path / f"whole.{ending}"))
        for shard in ("1/3", "2/3", "3/3"):
            check(igpt(*run, "-o", tmp_path / f"f.{ending}", "--shard", shard))
        said = check(igpt("features", "--merge", "-o", tmp_path / f"f.{ending}"))
        assert f"f.{ending}: 43 images, 32 features of layer 1 of 2" in said
        assert made(tmp_path / "f.json") == made(tmp_path / "whole.json")
    found, expected = np.load(tmp_path / "f.npz"), np.load(tmp_path / "whole.npz")
    assert found.files == expected.files
    for name in {*found.files} - {"metadata"}:
        np.testing.assert_array_equal(found[name], expected[name])
    assert pq.read_table(tmp_path / "f.parquet").equals(pq.read_table(tmp_path / "whole.parquet"))


@pytest.fixture
def parts(igpt: Run, short_run: Path, pictures: Path, tmp_path: Path) -> list[Path]:
    """Compute three parts of `s.csv`."""
    for number in (1, 2, 3):
        check(
            igpt(
                "score",
                *words(short_run, pictures),
                *("-o", tmp_path / "s.csv", "--shard", f"{number}/3"),
            )
        )
    return [tmp_path / f"s.csv.{number}-of-3" for number in (1, 2, 3)]


def test_missing_repeated_foreign_and_damaged_parts_are_named(
    igpt: Run, short_run: Path, pictures: Path, tmp_path: Path, parts: list[Path]
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    for part in parts:
        shutil.copytree(part, kept / part.name)
    out = tmp_path / "s.csv"

    def refused(message: str, *merge: object) -> None:
        before = sorted(tmp_path.rglob("*"))
        done = igpt(*(merge or ("score", "--merge", "-o", out)))
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert message in done.stderr
        assert sorted(tmp_path.rglob("*")) == before
        for part in parts:
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(kept / part.name, part)

    shutil.rmtree(parts[1])
    refused(f"parts of {out} are missing or unfinished: --shard 2/3")
    shutil.rmtree(parts[1])
    shutil.copytree(parts[0], parts[1])
    refused(f"{parts[1]} holds part 1 of 3; make it again")
    other = ("score", short_run / "model", pictures, "--max-bad", 0.5, "--limit", 45)
    shutil.rmtree(parts[2])
    check(igpt(*other, "--seed", 2, "-o", out, "--shard", "3/3"))
    refused(f"{parts[2]} and {parts[0]} differ in seed; make one of them again")
    shutil.rmtree(parts[2])
    content = json.loads((kept / parts[2].name / "part.json").read_text())
    for key, shown in (
        ("model_sha256", "the weights of the model"),
        ("fingerprints", "the images themselves (their names or sizes)"),
    ):
        changed = content | {"of": content["of"] | {key: "0"}}
        parts[2].mkdir(exist_ok=True)
        (parts[2] / "part.json").write_text(json.dumps(changed))
        refused(f"{parts[2]} and {parts[0]} differ in {shown}; make one of them again")
    np.save(parts[2] / "values.npy", np.zeros(3))
    refused("values.npy has changed since it was written; make that part again")
    (parts[0] / "rows.npy").unlink()
    refused("rows.npy is missing; make that part again")
    (parts[0] / "part.json").write_text('{"format": "igpt-part", "part": [1, 3]}')
    refused("the key 'of' is missing")
    (parts[0] / "part.json").write_text(json.dumps(content | {"skipped": [], "part": [1, 3]}))
    refused("labels.npy has changed since it was written")
    check(igpt("score", "--merge", "-o", out))


def test_a_killed_part_is_repeated(
    igpt: Run,
    short_run: Path,
    pictures: Path,
    tmp_path: Path,
    parts: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(igpt("score", "--merge", "-o", tmp_path / "s.csv"))
    whole = (tmp_path / "s.csv").read_bytes()
    again = ("score", *words(short_run, pictures), "-o", tmp_path / "s.csv", "--shard", "2/3")
    done = igpt(*again)
    assert (done.returncode, "exists already; remove it" in done.stderr) == (2, True)
    shutil.rmtree(parts[1])
    with monkeypatch.context() as patch:
        patch.setattr("igpt.evaluation.likelihood.losses_of", interrupt)
        assert igpt(*again).returncode == 130
    assert not parts[1].exists()
    check(igpt(*again))
    check(igpt("score", "--merge", "-o", tmp_path / "s.csv"))
    assert (tmp_path / "s.csv").read_bytes() == whole


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_flags_that_do_not_fit_are_refused(
    igpt: Run, short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    model, out = short_run / "model", ("-o", tmp_path / "s.csv")
    for given, message in (
        ((model, digits.path, *out, "--shard", "1/2", "--merge"), "give one of them"),
        ((model, digits.path, "--shard", "1/2"), "name the output that the parts belong to: -o"),
        (("--merge",), "name the output that the parts belong to: -o OUT"),
        ((model, *out, "--merge"), "--merge takes no MODEL or SOURCE"),
        ((*out, "--merge", "--limit", 3), "--limit is a setting of the parts; --merge takes only"),
        ((model, digits.path, *out, "--shard", "3/2"), "needs 1 <= i <= n <= 65536, not 3/2"),
        ((model, digits.path, *out, "--shard", "half"), "--shard takes i/n, such as 1/4"),
        (
            (model, digits.path, *out, "--shard", "1/2", "--maps", tmp_path / "m.png"),
            "--maps is not computed in parts",
        ),
        ((*out, "--merge"), f"no parts next to {tmp_path}/s.csv: igpt score MODEL SOURCE -o"),
    ):
        done = igpt("score", *given)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), (given, done.stderr)
        assert message in done.stderr, given
        assert not list(tmp_path.iterdir())
