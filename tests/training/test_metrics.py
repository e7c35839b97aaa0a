"""metrics.jsonl is read line by line against a schema, and paths are printed unchanged."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError
from igpt.progress import print_line, progress_bar
from igpt.training.metrics import Metrics, read_metrics, readable_metrics
from igpt.training.pretrain import PretrainConfig, pretrain

TRAIN = {"kind": "train", "step": 1, "loss": 2.5}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"\x00\xff\xfe\x01", "not readable as JSON"),
        (b"", "not readable as JSON"),
        (b"[1]", "a JSON object is needed"),
        (b"3", "a JSON object is needed"),
        (b'{"kind": "tra', "not readable as JSON"),
        (b'{"step": 1}', "the key 'kind' is missing"),
        (b'{"kind": "train", "loss": 1}', "the key 'step' is missing"),
        (b'{"kind": "train", "step": 1}', "a line of kind 'train' has the key 'loss'"),
        (b'{"kind": "end", "step": 1, "best": 1}', "has the key 'best_step'"),
        (b'{"kind": 3, "step": 1}', "kind = 3"),
        (b'{"kind": "train", "step": "1", "loss": 1}', "step = '1'"),
        (b'{"kind": "train", "step": -1, "loss": 1}', "step = -1"),
        (b'{"kind": "train", "step": 1.5, "loss": 1}', "step = 1.5"),
        (b'{"kind": "train", "step": true, "loss": 1}', "step = True"),
        (b'{"kind": "train", "step": 1, "loss": "2"}', "loss = '2'"),
        (b'{"kind": "train", "step": 1, "loss": NaN}', "NaN is no number"),
        (b'{"kind": "train", "step": 1, "loss": -Infinity}', "-Infinity is no number"),
        (b'{"kind": "train", "step": 1, "loss": 1e999}', "loss = inf"),
        (b'{"kind": "train", "step": 1, "loss": [2]}', "loss = [2]"),
        (b'{"kind": "validation", "step": 1, "error": "low"}', "error = 'low'"),
        (b'{"kind": "start", "step": 0, "parameters": "many"}', "parameters = 'many'"),
        (b'{"kind": "train", "step": 1, "loss": ' + b"9" * 5000 + b"}", "not readable as JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"kind": "' + b"x" * 2_000_000 + b'"}', "not readable as JSON"),
    ],
)
def test_an_invalid_line_is_named_with_its_key(line: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = json.dumps(TRAIN).encode() + b"\n"
    path.write_bytes(whole + line + b"\n" + whole)
    with pytest.raises(InputError) as caught:
        read_metrics(path)
    assert str(caught.value).startswith(f"{path}, line 2")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    records, unreadable = readable_metrics(path)
    assert records == [TRAIN, TRAIN]
    assert (unreadable > 0) == bool(line)


def test_keys_that_other_versions_may_add_are_accepted(tmp_path: Path) -> None:
    lines = [{"kind": "weather", "step": 3, "sun": True}, {**TRAIN, "more": [1, {"a": None}]}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_metrics(path) == lines
    assert readable_metrics(path) == (lines, 0)


@pytest.mark.parametrize(
    "tail", [b'{"kind": "train", "st', b"\x00" * 100, b"\xc3", b'{"kind": "train"}']
)
def test_a_truncated_last_line_is_not_damage(tail: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json.dumps(TRAIN).encode() + b"\n" + tail)
    assert read_metrics(path) == [TRAIN]
    assert readable_metrics(path) == ([TRAIN], 0)


def test_a_damaged_line_is_not_dropped_when_a_run_is_resumed(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        metrics.write("train", step, loss=1.0)
    damaged = metrics.path.read_bytes().replace(b'"step": 2', b'"step": x')
    metrics.path.write_bytes(damaged)
    with pytest.raises(InputError, match="line 2: not readable as JSON"):
        metrics.cut_after(3, 3)
    assert metrics.path.read_bytes() == damaged


def test_files_that_are_not_metrics(tmp_path: Path) -> None:
    for read in (read_metrics, readable_metrics):
        with pytest.raises(InputError, match=r"no metrics at .*: metrics\.jsonl is missing"):
            read(tmp_path / "metrics.jsonl")
        with pytest.raises(InputError, match="is a folder"):
            read(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InputError, match="is a FIFO"):
        read_metrics(tmp_path / "fifo")


def test_reading_metrics_needs_no_torch() -> None:
    code = "import sys, igpt.training.metrics; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


PATH = "runs/q[/old] [bold]x[/] :smile: [link=a]"


def test_paths_are_never_markup(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(on_stdout=True) as shown:
        shown.say(f"resumed from {PATH}")
        shown("title", 1, 3, PATH)
    assert capsys.readouterr().out == f"resumed from {PATH}\n"


@pytest.fixture
def lost_reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Return standard output as a pipe whose reader was closed, as by `head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        yield


@pytest.mark.usefixtures("lost_reader")
def test_training_continues_if_stdout_is_closed(
    digits: TokenDataset, short: dict[str, object], tmp_path: Path
) -> None:
    config = PretrainConfig.layered({**short, "tokens": digits.path, "steps": 16})
    pretrain(config, tmp_path / "run")
    pretrain(config, tmp_path / "run", resume=True)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 16
    print_line("and so does what comes after it")
    sys.stdout.flush()


def test_paths_are_never_markup_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stdout", Terminal())
    with progress_bar(on_stdout=True) as shown:
        shown.say(f"resumed from {PATH}")
        shown("fine-tuning [red]", 1, 3, "loss [1]")
    written = sys.stdout.getvalue()
    assert f"resumed from {PATH}" in written
    assert "fine-tuning [red]" in written
    assert "loss [1]" in written
