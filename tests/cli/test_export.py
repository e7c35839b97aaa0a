"""`igpt export`: what it writes, and mistakes in one line."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from igpt.data.tokens.dataset import TokenDataset
from igpt.evaluation.features import pooled
from igpt.model.config import ModelConfig
from igpt.model.transformer import ImageGPT

Run = Callable[..., subprocess.CompletedProcess[str]]


def assert_refused(done: subprocess.CompletedProcess[str], said: str) -> None:
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert said in done.stderr


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    shape = {"resolution": 4, "n_colors": 5, "n_layer": 1, "n_embd": 8, "n_head": 2}
    config = ModelConfig.model_validate({**shape, "objective": "bert"})
    ImageGPT(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_a_run_is_exported(
    igpt: Run, short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "onnx"
    done = igpt("export", short_run, "--onnx", out)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    names = ["export.json", "features.onnx", "palette.npy", "step.onnx", "weights.bin"]
    assert sorted(file.name for file in out.iterdir()) == names
    assert [Path(line.partition(":")[0]).name for line in done.stdout.splitlines()] == names
    assert json.loads((out / "export.json").read_text())["start_token"] == len(digits.palette)
    assert [file.name for file in out.parent.iterdir()] == ["onnx"]
    test = digits["test"]
    pixels = digits.palette.inverse_transform(test.rows(np.arange(5))).reshape(5, 8, 8, 3)
    opened = ort.InferenceSession(out / "features.onnx", providers=["CPUExecutionProvider"])
    features = opened.run(["features"], {"pixels": pixels})[0]
    expected = next(pooled(ImageGPT.from_pretrained(short_run / "model"), test))[:, :5]
    np.testing.assert_allclose(features.transpose(1, 0, 2), expected, rtol=0, atol=1e-4)


def test_an_int8_step_is_written_without_warnings(
    igpt: Run, short_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = igpt("export", short_run, "--onnx", tmp_path / "onnx", "--int8")
    assert done.returncode == 0, done.stderr
    assert "step-int8.onnx:" in done.stdout
    files = list((tmp_path / "onnx").iterdir())
    assert len({file.stat().st_mode for file in files}) == 1, "all are readable to the same users"
    assert not done.stderr
    assert not caplog.records


def test_mistakes(igpt: Run, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "file").write_text("old")
    before = sorted(tmp_path.rglob("*"))
    new = tmp_path / "new"
    assert_refused(igpt("export", bert), "name one folder to create: --onnx DIR or --bf16 DIR")
    assert_refused(igpt("export", bert, "--onnx", new, "--bf16", new), "name one folder to create")
    assert_refused(igpt("export", bert, "--bf16", new, "--int8"), "--int8 belongs to --onnx")
    assert_refused(igpt("export", bert, "--bf16", tmp_path / "old"), "exists already")
    assert_refused(igpt("export", bert, "--onnx", tmp_path / "old"), "exists already")
    assert_refused(igpt("export", bert, "--onnx", tmp_path / "file"), "is a file")
    assert_refused(igpt("export", bert, "--onnx", tmp_path / "file" / "x"), "cannot be written")
    assert_refused(igpt("export", tmp_path / "none", "--onnx", new), "no model directory")
    assert_refused(
        igpt("export", bert, "--onnx", new, "--int8"),
        "a step in int8 needs a model trained as 'autoregressive'; this one is 'bert'",
    )
    for package in ("onnx", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)  # not installed
            assert_refused(igpt("export", bert, "--onnx", new), "pip install 'igpt[onnx]'")
    assert sorted(tmp_path.rglob("*")) == before
    assert igpt("export", bert, "--onnx", new).returncode == 0
