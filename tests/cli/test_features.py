"""`igpt features` on the command line: features of one layer of any images, in files that other
programs read."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from igpt.data.tokens.dataset import TokenDataset
from igpt.evaluation.features import pooled
from igpt.model.config import ModelConfig
from igpt.model.transformer import ImageGPT

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(short_run: Path, tmp_path: Path) -> Path:
    """Return a copy of the run to write into."""
    shutil.copytree(short_run / "model", tmp_path / "run" / "model")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def expected(short_run: Path, digits: TokenDataset) -> np.ndarray:
    """Return the features of all layers of the test images: [3, 180, 32]."""
    return np.concatenate(
        list(pooled(ImageGPT.from_pretrained(short_run / "model"), digits["test"])), axis=1
    )


def test_npz_and_parquet_contain_the_same(
    igpt: Run, run: Path, digits: TokenDataset, expected: np.ndarray, tmp_path: Path
) -> None:
    for layer, name in ((1, "a.npz"), (1, "b.parquet"), (2, "c.parquet"), (0, "d.npz")):
        done = igpt("features", run, digits.path, "--layer", layer, "-o", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{tmp_path}/{name}: 180 images, 32 features of layer {layer} of 2\n"
    arrays = np.load(tmp_path / "a.npz", allow_pickle=False)
    assert (arrays["features"].dtype, arrays["labels"].dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(arrays["features"], expected[1])
    np.testing.assert_array_equal(arrays["labels"], digits["test"].labels)
    assert arrays["names"].tolist() == [f"row {row}" for row in range(180)]
    assert arrays["class_names"].tolist() == digits.class_names
    assert arrays["layer"] == 1
    np.testing.assert_array_equal(np.load(tmp_path / "d.npz")["features"], expected[0])
    table = pq.read_table(tmp_path / "b.parquet")
    assert [str(field.type) for field in table.schema] == [
        "string",
        "int32",
        "string",
        "fixed_size_list<element: float>[32]",
    ]
    assert table.column_names == ["image", "label", "class", "features"]
    np.testing.assert_array_equal(np.array(table["features"].to_pylist(), np.float32), expected[1])
    np.testing.assert_array_equal(
        np.array(pq.read_table(tmp_path / "c.parquet")["features"].to_pylist()), expected[2]
    )
    assert table["label"].to_pylist() == digits["test"].labels.tolist()
    assert table["class"].to_pylist() == [
        digits.class_names[label] for label in digits["test"].labels
    ]
    assert table["image"].to_pylist() == arrays["names"].tolist()
    made = [json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json")]
    assert made[0] == json.loads(str(arrays["metadata"]))
    assert made[1] == json.loads(table.schema.metadata[b"igpt"])
    assert (made[0]["format"], made[0]["version"]) == ("igpt-exported-features", 1)
    assert (made[0]["layer"], made[0]["width"], made[0]["images"], made[0]["split"]) == (
        1,
        32,
        180,
        "test",
    )
    assert made[0]["palette"]["fingerprint"] == digits.palette.fingerprint
    assert made[0]["environment"].keys() >= {"command", "igpt", "torch"}


def test_images_without_classes(igpt: Run, run: Path, photographs: Path, tmp_path: Path) -> None:
    words = (run, photographs, "--layer", 2, "--label-column", "none", "--limit", 9)
    for name in ("a.npz", "a.parquet"):
        done = igpt("features", *words, "-o", tmp_path / name)
        assert done.returncode == 0, done.stderr
    arrays, table = np.load(tmp_path / "a.npz"), pq.read_table(tmp_path / "a.parquet")
    assert arrays["labels"].tolist() == [-1] * 9
    assert arrays["class_names"].size == 0
    assert table["label"].null_count == table["class"].null_count == 9
    assert all(Path(name).is_file() for name in arrays["names"])
    assert table["image"].to_pylist() == arrays["names"].tolist()
    np.testing.assert_array_equal(np.array(table["features"].to_pylist()), arrays["features"])
    assert json.loads((tmp_path / "a.json").read_text())["palette_error"]["mse"] > 100


def test_the_best_probing_layer_is_the_default(
    igpt: Run, run: Path, digits: TokenDataset, expected: np.ndarray, tmp_path: Path
) -> None:
    probe = {
        "format": "igpt-probe",
        "version": 2,
        "classes": 10,
        "images": {"train": 9, "validation": 9, "test": 9},
    }
    probe |= {
        "layers": [{"layer": 2, "validation_accuracy": 0.5, "test_accuracy": 0.5}],
        "best_layer": 2,
    }
    (run / "probe.json").write_text(json.dumps(probe))
    assert igpt("features", run, digits.path, "-o", tmp_path / "a.npz").returncode == 0
    np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["features"], expected[2])
    (run / "probe.json").write_text('{"best_layer": 2}')
    done = igpt("features", run, digits.path, "-o", tmp_path / "b.npz")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert (
        "probe.json is not igpt-probe of format version 2; `igpt probe` writes it again"
        in done.stderr
    )
    (run / "probe.json").write_text(
        '{"format": "igpt-probe", "version": 2, "skipped": "no labels"}'
    )
    done = igpt("features", run, digits.path, "-o", tmp_path / "b.npz")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "name a layer (--layer 0 to 2)" in done.stderr


def test_blocks_above_the_layer_are_not_computed(
    short_run: Path, digits: TokenDataset, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ImageGPT.from_pretrained(short_run / "model")
    monkeypatch.setattr(model.h[1], "forward", None)
    found = np.concatenate(list(pooled(model, digits["test"], last=1)), axis=1)
    np.testing.assert_array_equal(found, expected[:2])


def test_features_of_a_bert_model(igpt: Run, digits: TokenDataset, tmp_path: Path) -> None:
    shape = {
        "resolution": 8,
        "n_colors": 17,
        "n_layer": 1,
        "n_embd": 16,
        "n_head": 2,
        "objective": "bert",
    }
    model = ImageGPT(ModelConfig.layered(shape), digits.palette)
    model.save_pretrained(tmp_path / "bert")
    assert (
        igpt(
            "features", tmp_path / "bert", digits.path, "--layer", 1, "-o", tmp_path / "a.npz"
        ).returncode
        == 0
    )
    whole = np.concatenate(list(pooled(model, digits["test"])), axis=1)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["features"], whole[1])


def test_mistakes_are_one_line_and_leave_nothing(
    igpt: Run, run: Path, digits: TokenDataset, photographs: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.json").write_text('{"format": "igpt-features"}')
    (tmp_path / "file").write_text("")
    broken = ImageGPT.from_pretrained(run / "model")
    torch.nn.init.constant_(broken.wpe.weight, torch.nan)
    broken.save_pretrained(tmp_path / "broken")
    folder = tmp_path / "pictures"
    shutil.copytree(photographs / "train" / "down", folder)
    (folder / "04.png").write_text("no picture")
    wide = tmp_path / "wide"
    done = igpt("prepare", photographs, "-o", wide, "--size", 12, "--palette", run / "model")
    assert done.returncode == 0, done.stderr
    there = ("--layer", 1, "-o", tmp_path / "f.npz")
    for words, message in (
        (
            (run, digits.path, "-o", tmp_path / "f.npz"),
            "name a layer (--layer 0 to 2), or run igpt probe first",
        ),
        (
            (run, digits.path, "--layer", 3, "-o", tmp_path / "f.npz"),
            "the model has the layers 0 to 2, not 3",
        ),
        (
            (run, digits.path, "--layer", -1, "-o", tmp_path / "f.npz"),
            "the model has the layers 0 to 2, not -1",
        ),
        (
            (run, digits.path, "--layer", 1, "-o", tmp_path / "f.csv"),
            "features are written as .npz or .parquet",
        ),
        (
            (run, digits.path, "--layer", 1, "-o", tmp_path / "notes.npz"),
            "notes.json holds something else already",
        ),
        (
            (run, digits.path, "--layer", 1, "-o", tmp_path / "file" / "f.npz"),
            "f.npz cannot be written",
        ),
        ((run, tmp_path / "nowhere", *there), "no folder or file"),
        ((tmp_path / "none", digits.path, *there), "no model directory"),
        ((run, digits.path, "--split", "dev", *there), "has no split 'dev'"),
        ((run, wide, *there), "the model sees 8 px"),
        (
            (tmp_path / "broken", digits.path, *there),
            "features are not finite; the model's weights are broken",
        ),
        ((run, folder, *there), "04.png: not an image in a known format"),
    ):
        before = sorted(path for path in tmp_path.rglob("*"))
        done = igpt("features", *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), (words, done.stderr)
        assert message in done.stderr, words
        assert sorted(path for path in tmp_path.rglob("*")) == before, words


def test_an_interrupted_export_keeps_the_old_file(
    igpt: Run, run: Path, digits: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.npz", "a.parquet"):
        words = ("features", run, digits.path, "--layer", 1, "-o", tmp_path / name)
        assert igpt(*words).returncode == 0
        before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        with monkeypatch.context() as patch:
            patch.setattr("igpt.evaluation.export.pooled", interrupted)
            assert igpt(*words).returncode == 130
        assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def interrupted(*_: object, **__: object):
    yield np.zeros((2, 64, 32), np.float32)
    raise KeyboardInterrupt
