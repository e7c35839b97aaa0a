"""Experiment trackers get the numbers of metrics.jsonl and pictures, once each, in one run."""

import importlib.util
import json
import signal
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import igpt
from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError, Interrupted
from igpt.files import read_json
from igpt.training import trackers, trainer
from tests.helpers.runs import losses

Tracked = tuple[list[tuple[int, float]], int]  # steps and losses, number of pictures


def of_tensorboard(run: Path, name: str) -> Tracked:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    pictures = [picture for tag in events.Tags()["images"] for picture in events.Images(tag)]
    assert all(picture.encoded_image_string.startswith(b"\x89PNG") for picture in pictures)
    return [(point.step, point.value) for point in events.Scalars("train/loss")], len(pictures)


def of_trackio(run: Path, name: str) -> Tracked:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    assert [one.name for one in trackio.Api().runs("igpt")] == [name]
    logs = SQLiteStorage.get_logs("igpt", name)
    pictures = [value for log in logs for value in log.values() if isinstance(value, dict)]
    return [(log["step"], log["train/loss"]) for log in logs if "train/loss" in log], len(pictures)


def of_mlflow(run: Path, name: str) -> Tracked:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(run / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("igpt")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == (name, "FINISHED")
    points = client.get_metric_history(found.info.run_id, "train/loss")
    pictures = client.list_artifacts(found.info.run_id, "images")
    return [(one.step, one.value) for one in points], sum(
        file.path.endswith(".png") for file in pictures
    )


def wandb_records(path: Path) -> Iterator[bytes]:
    """Yield the records of an offline run: 7 bytes, then 32-KiB blocks of LevelDB's log format."""
    content, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # padding at the end of a block
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            yield record
            record = b""


def of_wandb(run: Path, name: str) -> Tracked:
    from wandb.proto.wandb_internal_pb2 import Record

    parts = sorted((run / "wandb").glob(f"offline-run-*-{name}"))
    assert len(parts) == 2, "before and after the interruption, of the same run"
    points: list[tuple[int, float]] = []
    for part in parts:
        for data in wandb_records(part / f"run-{name}.wandb"):
            items = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json)
                for item in Record.FromString(data).history.item
            }
            if "train/loss" in items:
                points.append((items["_step"], items["train/loss"]))
    return points, len(list((run / "wandb").rglob("*.png")))


def test_errors_are_tracked_as_accuracies() -> None:
    line = {"kind": "validation", "step": 5, "error": 0.25, "best": True}
    assert trackers.numbers_of(line) == {"validation/accuracy": 0.75}


@pytest.mark.parametrize(
    ("track", "read"),
    [
        ("tensorboard", of_tensorboard),
        ("trackio", of_trackio),
        ("mlflow", of_mlflow),
        ("wandb", of_wandb),
    ],
)
def test_a_resumed_run_is_one_run_of_the_tracker(
    track: str,
    read: Callable[[Path, str], Tracked],
    digits: TokenDataset,
    short: dict[str, object],
    short_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip(track, reason=f"needs the extra {track}")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    for variable in ("WANDB_MODE", "MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(variable, raising=False)
    settings = {"model": "tiny", **short, "track": track}

    def interrupt(line: Mapping[str, Any]) -> dict[str, float]:
        if (line["kind"], line["step"]) == ("train", 13):
            signal.raise_signal(signal.SIGINT)
        return trackers.numbers_of(line)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "numbers_of", interrupt)
        with pytest.raises(Interrupted):
            igpt.pretrain(digits, run, **settings)
    igpt.pretrain(digits, run, resume=True)
    name = read_json(run / "track.json", "names")[track]
    points, pictures = read(run, name)
    known = losses(run)
    assert known == losses(short_run), "tracking changes nothing"
    assert [step for step, _ in points] == sorted(known)
    np.testing.assert_allclose([value for _, value in points], list(known.values()), rtol=1e-6)
    assert pictures == 2 * 3  # samples and completions at three validations


def test_a_tracker_asked_for_later_gets_the_earlier_lines(
    digits: TokenDataset, short: dict[str, object], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    settings = {**short, "model": "tiny", "steps": 4, "log_every": 2}
    run = igpt.pretrain(digits, tmp_path / "run", **settings)
    assert not (run.path / "track.json").exists()
    igpt.pretrain(digits, run, resume=True, track="tensorboard")
    assert [step for step, _ in of_tensorboard(run.path, "")[0]] == [2, 4]


def test_every_training_of_a_search_is_tracked(
    digits: TokenDataset, short_run: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    run = igpt.finetune(
        short_run,
        digits,
        tmp_path / "classes",
        steps=2,
        batch_size=8,
        precision="fp32",
        learning_rates=(1e-3, 1e-4),
        log_every=1,
        validation_images=20,
        test_images=20,
        track="tensorboard",
    )
    for folder in (run.path / "rates").iterdir():
        points, pictures = of_tensorboard(folder, "")
        assert ([step for step, _ in points], pictures) == ([1, 2], 2)


def test_a_missing_extra_is_named_before_any_work(
    digits: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--track wandb needs .*pip install 'igpt\[wandb\]'"):
        igpt.pretrain(digits, tmp_path / "run", model="tiny", track="wandb")
    assert not (tmp_path / "run").exists()
    # A folder with the name of a tracker is not the tracker.
    (tmp_path / "wandbfolder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trackers, "find_spec", lambda name: importlib.util.find_spec("wandbfolder"))
    with pytest.raises(InputError, match="--track wandb needs"):
        trackers.require_tracker("wandb")
