import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from multiprocessing import active_children, current_process
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from igpt.data import prepare as preparation
from igpt.data.images.decode import load, open_image
from igpt.data.images.palette import Palette
from igpt.data.images.transform import Transform
from igpt.data.merge import merge
from igpt.data.pool import _deferred_signals
from igpt.data.prepare import PrepareConfig, prepare, prepare_part
from igpt.data.sources.catalogue import SourceConfig, open_source
from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError

from ..helpers.reading import contents
from ..helpers.reported_cases import script_without_guard

Write = Callable[..., Path]
SMALL = PrepareConfig(size=4, colors=8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, picture: Callable[..., bytes]) -> str:
    """Return 48 random images with labels: 38 + 5 + 5."""
    file = tmp_path_factory.mktemp("pictures") / "pictures.parquet"
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    rows = {
        "image": [{"bytes": picture(number), "path": None} for number in range(48)],
        "label": [number % 3 for number in range(48)],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    return str(file)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide the images above into five jobs, and use workers even for so few."""
    monkeypatch.setattr(preparation, "SHARD_IMAGES", (10, 10))
    monkeypatch.setattr(preparation, "MIN_IMAGES_FOR_WORKERS", 0)


@pytest.fixture(scope="module")
def whole(pictures: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files that one uninterrupted process writes for the images, in shards of 10."""
    out = tmp_path_factory.mktemp("whole") / "tokens"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "SHARD_IMAGES", (10, 10))
        prepare(pictures, out, SMALL)
    return contents(out)


def test_digits(tmp_path: Path):
    done: list[tuple[int, ...]] = []
    config = PrepareConfig(size=8)
    dataset = prepare(
        "digits", tmp_path / "digits", config, progress=lambda *counts: done.append(counts)
    )
    assert done == [(1024, 1797), (1797, 1797)]
    assert [len(dataset[split]) for split in dataset] == [1437, 180, 180]
    assert len(dataset.palette) == 17
    assert dataset.class_names == list("0123456789")
    made = dataset.manifest["made"]
    assert (made["palette_error"]["mse"], made["palette_error"]["psnr_db"]) == (0.0, None)
    assert made["images"] == {"train": 1437, "validation": 180, "test": 180}
    assert made["skipped"] == []
    assert PrepareConfig.layered(made["config"]) == PrepareConfig(size=8)
    dataset.verify()
    bunch = load_digits()
    for name, split in open_source("digits", SourceConfig())[0].items():
        tokens = dataset[name].rows(np.arange(len(split)))
        shown = dataset.palette.inverse_transform(tokens).reshape(-1, 8, 8, 3)
        levels = np.round(bunch.images[split.indices] * (255 / 16))
        np.testing.assert_array_equal(shown, np.repeat(levels[..., None], 3, axis=-1))
        np.testing.assert_array_equal(dataset[name].labels, bunch.target[split.indices])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits"]


def test_every_token_is_the_nearest_colour(three_splits: Path, tmp_path: Path):
    """Compared with the area-averaged image."""
    dataset = prepare(str(three_splits), tmp_path / "tokens", PrepareConfig(size=16, colors=64))
    assert [len(dataset[split]) for split in dataset] == [600, 100, 300]
    assert len(dataset.palette) == 64
    points = (dataset.palette.centers_.astype(np.float64) + 1) * 127.5
    source = open_source(str(three_splits))[0]["test"]
    for row in (0, 123, 299):
        image, label = next(source.read(np.array([row])))
        pixels = np.asarray(load(open_image(image)).convert("RGB"), np.float64)
        square = np.floor(pixels.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3)) + 0.5)
        distance = ((square.reshape(-1, 1, 3) - points) ** 2).sum(-1)
        np.testing.assert_array_equal(dataset["test"].rows([row])[0], distance.argmin(axis=1))
        assert dataset["test"].labels[row] == label
    assert 20 < dataset.manifest["made"]["palette_error"]["psnr_db"] < 40


def test_two_workers_write_the_same_bytes(
    pictures: str, whole: dict[str, bytes], tmp_path: Path, small_shards: None
):
    workers: set[int | None] = set()
    prepare(
        pictures,
        tmp_path / "tokens",
        SMALL,
        workers=2,
        progress=lambda *_: workers.update(child.pid for child in active_children()),
    )
    assert len(workers) == 2
    assert contents(tmp_path / "tokens") == whole
    # The manifest, the picture of the palette, and two files of each shard: five of training, and
    # the held-out ones
    shards = [name for name in whole if name.endswith(".tokens.npy")]
    assert sum(name.startswith("train-") for name in shards) == 5
    assert len(whole) == 2 + 2 * len(shards)


@pytest.fixture
def stacks(tmp_path: Path) -> Path:
    """Write 20 TIFFs of 5 frames."""
    folder = tmp_path / "stacks"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(20):
        frames = [
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(5)
        ]
        frames[0].save(folder / f"{number:02}.tif", save_all=True, append_images=frames[1:])
    return folder


def test_frames_after_the_first_are_counted_and_named(
    stacks: Path, tmp_path: Path, small_shards: None
):
    strict = PrepareConfig(size=4, colors=8, max_bad=0)
    alone = prepare(str(stacks), tmp_path / "alone", strict)
    made = alone.manifest["made"]
    assert sum(len(alone[split]) for split in alone) == 20
    (kind,) = made["left_out"]
    found = made["left_out"][kind]
    assert (kind, found["count"], found["possible_images"]) == (
        "further frames of images",
        80,
        False,
    )
    assert found["first"].endswith(f" {stacks / '00.tif'}")
    prepare(str(stacks), tmp_path / "several", strict, workers=2)
    assert contents(tmp_path / "several") == contents(tmp_path / "alone")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(str(stacks), tmp_path / "continued", strict, progress=interrupt)
    record = json.loads((tmp_path / "continued.partial" / "0-00000.done.json").read_text())
    assert record["further_frames"] == {"count": 40, "first": found["first"]}
    prepare(str(stacks), tmp_path / "continued", strict)
    assert contents(tmp_path / "continued") == contents(tmp_path / "alone")
    for number in (1, 2):
        prepare_part(str(stacks), tmp_path / "merged", strict, (number, 2))
    assert merge(tmp_path / "merged").manifest["made"] == made


def test_interrupted_work_is_resumed(
    pictures: str, whole: dict[str, bytes], tmp_path: Path, small_shards: None
):
    def interrupt(done: int, total: int) -> None:
        if done >= 20:
            raise KeyboardInterrupt

    out, partial = tmp_path / "tokens", tmp_path / "tokens.partial"
    with pytest.raises(KeyboardInterrupt):
        prepare(pictures, out, SMALL, progress=interrupt)
    assert not out.exists()
    first = (partial / "train-00000.tokens.npy").stat()
    steps: list[tuple[int, ...]] = []
    prepare(pictures, out, SMALL, workers=2, progress=lambda *counts: steps.append(counts))
    assert contents(out) == whole
    assert not partial.exists()
    assert steps == [(30, 48), (40, 48), (48, 48)]  # finished work is not repeated
    assert (out / "train-00000.tokens.npy").stat().st_mtime_ns == first.st_mtime_ns


# Forks once per argument: the child prepares the images and is killed by the operating system just
# before the given one of its operations that name or remove files; a second child then makes the
# same call.
KILLED = """
import json, os, signal, sys
from pathlib import Path
import datasets, sklearn.cluster, scipy.spatial
from igpt.data import prepare as preparation

preparation.SHARD_IMAGES = (10, 10)
pictures, folder = sys.argv[1], Path(sys.argv[2])

def run(out, kill_at):
    # Return the child's status; without a moment to kill it, it writes the number of moments.
    child = os.fork()
    if child == 0:
        seen = 0
        def watch(event, arguments):
            nonlocal seen
            removed = event in ("os.remove", "os.rmdir") and os.path.lexists(arguments[0])
            named = event == "os.rename" or removed
            if named and str(out) in str(arguments[-2 if event == "os.remove" else 0]) or \\
                    event == "os.rename" and str(folder) in str(arguments[0]):
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1
        sys.addaudithook(watch)
        preparation.prepare(pictures, out, preparation.PrepareConfig(size=4, colors=8))
        if kill_at is None:
            (folder / "moments").write_text(str(seen))
        os._exit(0)
    return os.waitpid(child, 0)[1]

run(folder / "uninterrupted", None)
count = int((folder / "moments").read_text())
for kill_at in map(int, sys.argv[3:]):
    out = folder / f"killed-{kill_at}"
    first = run(out, kill_at % count)
    whole = out.exists()
    second = None if whole else run(out, None)
    found = {"kill_at": kill_at, "first": first, "whole": whole, "second": second}
    print(json.dumps(found), flush=True)
"""


def test_killed_work_is_resumed_after_a_kill_at_any_moment(
    pictures: str, whole: dict[str, bytes], tmp_path: Path
):
    # 0 plan, 1 its folder, from 2 on tokens, labels and records; from the end: -1 removing the
    # plan, -2 naming the folder, -3 to -7 removing the five records, -8 manifest
    moments = [1, 3, 15, -8, -5, -2, -1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, pictures, tmp_path, *map(str, moments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [report["kill_at"] for report in reports] == moments, done.stderr
    for report in reports:
        moment = report["kill_at"]
        made = contents(tmp_path / f"killed-{moment}")
        if moment != -1:
            assert report["first"] == signal.SIGKILL
            assert not report["whole"]
            assert report["second"] == 0, done.stderr
        else:  # the data set already has its name; at worst the plan is still in it
            assert report["whole"]
            assert report["first"] == signal.SIGKILL
            assert made.pop("plan.json")
        assert made == whole
        TokenDataset(tmp_path / f"killed-{moment}").verify()
    names = {path.name for path in tmp_path.iterdir()}
    # After a kill that follows the renaming there is no second call, so the lock file remains; the
    # next call would take it over.
    assert names == {f"killed-{moment}" for moment in moments} | {
        "uninterrupted",
        "moments",
        ".killed--1.lock",
    }


ABANDONED = """
import os, signal, sys
from multiprocessing import active_children
from pathlib import Path
from igpt.data import prepare as preparation

def kill(*_):
    print(*(child.pid for child in active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    preparation.SHARD_IMAGES, preparation.MIN_IMAGES_FOR_WORKERS = (10, 10), 0
    config = preparation.PrepareConfig(size=4, colors=8)
    preparation.prepare(sys.argv[1], Path(sys.argv[2]), config, workers=2, progress=kill)
"""


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the processes from /proc")
def test_the_workers_of_a_killed_process_end(
    pictures: str, whole: dict[str, bytes], tmp_path: Path, small_shards: None
):
    (tmp_path / "abandoned.py").write_text(ABANDONED)
    command = [sys.executable, tmp_path / "abandoned.py", pictures, tmp_path / "tokens"]
    with (tmp_path / "log").open("wb") as log:  # a pipe would stay open as long as the workers live
        assert (
            subprocess.run(command, stdout=log, stderr=log, timeout=120, check=False).returncode
            == -signal.SIGKILL
        )
    workers = [int(word) for word in (tmp_path / "log").read_text().splitlines()[0].split()]
    assert len(workers) == 2
    until = time.monotonic() + 60
    while any(map(running, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(running, workers))
    prepare(pictures, tmp_path / "tokens", SMALL)
    assert contents(tmp_path / "tokens") == whole


HOLDING = """
import os, sys
from pathlib import Path
from igpt.data import merge as merging, prepare as preparation

preparation.SHARD_IMAGES = (10, 10)
verb, source, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])

def hold(*_):
    print("working", flush=True)
    sys.stdin.readline()

config = preparation.PrepareConfig(size=4, colors=8)
if verb == "prepare":
    preparation.prepare(source, out, config, progress=hold)
elif verb == "part":
    preparation.prepare_part(source, out, config, (1, 2), progress=hold)
else:
    take = merging._link
    merging._link = lambda *words: (hold(), take(*words))
    merging.merge(out)
"""


@pytest.mark.parametrize("verb", ["prepare", "part", "merge"])
def test_a_second_process_is_refused_while_the_first_one_works(
    verb: str, pictures: str, whole: dict[str, bytes], tmp_path: Path, small_shards: None
):
    """The error names the host and the id of the first process, which continues unharmed."""
    out = tmp_path / "tokens"
    calls: dict[str, Callable[[], object]] = {
        "prepare": lambda: prepare(pictures, out, SMALL),
        "part": lambda: prepare_part(pictures, out, SMALL, (1, 2)),
        "merge": lambda: merge(out),
    }
    if verb == "merge":
        for number in (1, 2):
            prepare_part(pictures, out, SMALL, (number, 2))
    command = [sys.executable, "-W", "ignore", "-c", HOLDING, verb, pictures, out]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdin
        assert first.stdout
        try:
            assert first.stdout.readline() == "working\n"
            before = contents(tmp_path)
            with pytest.raises(
                InputError, match=rf"written by process {first.pid} on {socket.gethostname()} "
            ):
                calls[verb]()
            assert contents(tmp_path) == before
            first.stdin.close()
            assert first.wait(120) == 0
        finally:
            first.kill()
    with pytest.raises(InputError, match="exists already"):
        calls[verb]()
    if verb == "part":
        prepare_part(pictures, out, SMALL, (2, 2))
        merge(out)
    assert contents(out) == whole
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("delay", [0, 0.3, 1])
def test_of_two_processes_started_together_one_finishes_and_one_is_refused(
    delay: float, pictures: str, whole: dict[str, bytes], tmp_path: Path
):
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        HOLDING,
        "prepare",
        pictures,
        tmp_path / "tokens",
    ]
    started = []
    for _ in range(2):
        started.append(
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )
        time.sleep(delay)
    errors = [process.communicate(timeout=120)[1] for process in started]
    codes = [process.returncode for process in started]
    assert sorted(codes) == [0, 1], errors
    refusal = errors[codes.index(1)]
    other = started[codes.index(0)].pid
    # The first process writes its number after it has taken the lock.
    owners = (f"process {other} on", "another process")
    written = any(f"is being written by {owner}" in refusal for owner in owners)
    assert written or "exists already" in refusal, refusal
    assert contents(tmp_path / "tokens") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_the_lock_of_a_killed_process_is_taken_over_and_its_work_is_resumed(
    pictures: str, whole: dict[str, bytes], tmp_path: Path, small_shards: None
):
    out = tmp_path / "tokens"
    command = [sys.executable, "-W", "ignore", "-c", HOLDING, "prepare", pictures, out]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout
        assert first.stdout.readline() == "working\n"
        first.kill()
    assert (tmp_path / ".tokens.lock").exists()
    steps: list[tuple[int, int]] = []
    prepare(pictures, out, SMALL, progress=lambda *counts: steps.append(counts))
    assert steps[0] == (20, 48)  # the first ten existed
    assert contents(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_a_refused_source_leaves_no_folder(tmp_path: Path):
    with pytest.raises(InputError, match="no folder or file"):
        prepare(str(tmp_path / "nowhere"), tmp_path / "new" / "deep" / "tokens", SMALL)
    assert list(tmp_path.iterdir()) == []


def test_records_that_were_removed_are_named(pictures: str, tmp_path: Path, small_shards: None):
    partial = tmp_path / "tokens.partial"

    def remove(done: int, total: int) -> None:
        if done == 30:
            (partial / "0-00000.done.json").unlink()
            (partial / "0-00002.done.json").unlink()

    with pytest.raises(
        InputError,
        match=r"2 shard records of .*partial have been removed \(0-00000\.done\.json, "
        r"0-00002\.done\.json\)",
    ):
        prepare(pictures, tmp_path / "tokens", SMALL, progress=remove)
    assert not (tmp_path / "tokens").exists()
    prepare(pictures, tmp_path / "tokens", SMALL).verify()


def test_shards_that_were_removed_are_named(pictures: str, tmp_path: Path, small_shards: None):
    def remove(done: int, total: int) -> None:
        if done == 30:
            (tmp_path / "tokens.partial" / "train-00001.tokens.npy").unlink()

    with pytest.raises(InputError, match=r"train-00001\.tokens\.npy is missing"):
        prepare(pictures, tmp_path / "tokens", SMALL, progress=remove)
    assert not (tmp_path / "tokens").exists()


def test_damaged_shards_of_unfinished_work_are_written_again(
    pictures: str, whole: dict[str, bytes], unfinished: Path
):
    partial = unfinished.with_name("tokens.partial")
    (partial / "train-00000.tokens.npy").unlink()
    damaged = bytearray((partial / "train-00001.tokens.npy").read_bytes())
    damaged[-1] ^= 1
    (partial / "train-00001.tokens.npy").write_bytes(damaged)
    prepare(pictures, unfinished, SMALL)
    assert contents(unfinished) == whole


def test_a_record_with_fewer_images_than_planned_is_named(pictures: str, unfinished: Path):
    file = unfinished.with_name("tokens.partial") / "0-00001.done.json"
    record = json.loads(file.read_text())
    count = record["shards"]["train"]["count"]
    record["shards"]["train"]["count"] -= 1
    file.write_text(json.dumps(record))
    with pytest.raises(
        InputError,
        match=rf"0-00001\.done\.json has {count - 1} images of 'train', and there should be "
        rf"{count} "
        rf"\({count} planned, 0 skipped\)",
    ):
        prepare(pictures, unfinished, SMALL)
    assert not unfinished.exists()


SHARD = {"tokens": "train-0.tokens.npy", "labels": "train-0.labels.npy", "count": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, r"images = None: Input should be a valid integer"),
        ({"images": -1}, r"images = -1: Input should be greater than or equal to 0"),
        ({"skipped": "none"}, r"skipped = 'none': Input should be a valid list"),
        ({"shards": []}, r"shards = \[\]: Input should be a valid dictionary"),
        ({"shards": {"train": {}}}, r"the key 'shards\.train\.tokens' is missing"),
        (
            {"shards": {"train": SHARD | {"count": -3}}},
            r"shards\.train\.count = -3: Input should be greater",
        ),
        (
            {"shards": {"train": SHARD | {"count": "3"}}},
            r"shards\.train\.count = '3': Input should be a valid integer",
        ),
        (
            {"shards": {"train": SHARD | {"tokens": "../a.npy"}}},
            r"shards\.train\.tokens = '\.\./a\.npy': the plain name",
        ),
        (
            {"shards": {"train": SHARD | {"labels": "/etc/passwd"}}},
            r"shards\.train\.labels = '/etc/passwd': the plain",
        ),
    ],
)
def test_a_malformed_record_of_unfinished_work_is_named_with_its_key(
    change: dict[str, object], message: str, pictures: str, unfinished: Path
):
    file = unfinished.with_name("tokens.partial") / "0-00001.done.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=rf"0-00001\.done\.json: {message}") as caught:
        prepare(pictures, unfinished, SMALL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": 5}, "source = 5: Input should be a valid string"),
        ({"config": []}, r"config = \[\]: Input should be a valid dictionary"),
        ({"config": {}}, r"the key 'config\.size' is missing"),
        ({"images": {"test": 3}}, r"images = \{'test': 3\}: 'train' is missing"),
        ({"images": {"train": -1}}, r"images\.train = -1: Input should be greater"),
        ({"part": [1]}, r"part = \[1\]: List should have at least 2"),
        ({"part": [3, 2]}, r"part = \[3, 2\]: \[i, n\] is needed"),
        ({"class_names": ["a", "a", "c"]}, r"class_names = .*: 'a' is there more than once"),
        (
            {"palette": {"centers": "red"}},
            r"palette\.centers = 'red': Input should be a valid list",
        ),
    ],
)
def test_a_malformed_plan_of_unfinished_work_is_named_with_its_key(
    change: dict[str, object], message: str, pictures: str, unfinished: Path
):
    file = unfinished.with_name("tokens.partial") / "plan.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=rf"plan\.json: {message}") as caught:
        prepare(pictures, unfinished, SMALL)
    assert "\n" not in str(caught.value)


def test_unknown_keys_of_a_later_version_are_accepted(
    pictures: str, whole: dict[str, bytes], unfinished: Path
):
    for name in ("plan.json", "0-00001.done.json"):
        file = unfinished.with_name("tokens.partial") / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"left_out": {"files": 3}}))
    prepare(pictures, unfinished, SMALL)
    assert contents(unfinished) == whole


def test_unfinished_work_of_version_0_1_0_is_resumed(
    pictures: str, whole: dict[str, bytes], unfinished: Path
):
    """Its plan does not contain the number of records."""
    file = unfinished.with_name("tokens.partial") / "plan.json"
    plan = json.loads(file.read_text())
    assert plan.pop("jobs") == [5]
    file.write_text(json.dumps(plan))
    prepare(pictures, unfinished, SMALL)
    assert contents(unfinished) == whole


SCRIPT = """
import sys
from pathlib import Path
from igpt.data import prepare as preparation

print("started", flush=True)
preparation.SHARD_IMAGES, preparation.MIN_IMAGES_FOR_WORKERS = (10, 10), 0
config = preparation.PrepareConfig(size=4, colors=8)
preparation.prepare(sys.argv[1], Path(sys.argv[2]), config, workers=2)
print("finished", __name__, "__file__" in globals(), __spec__ and __spec__.name)
"""

# The main module of a notebook has no file.
NOTEBOOK = f"""
import sys, types
sys.modules["__main__"] = types.ModuleType("__main__")
exec({SCRIPT!r}, vars(sys.modules["__main__"]))
"""


@pytest.mark.parametrize("how", ["file", "module", "stdin", "notebook"])
def test_a_script_needs_no_guard_for_workers(
    how: str, pictures: str, whole: dict[str, bytes], tmp_path: Path
):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "script.py").write_text(SCRIPT)
    words = {
        "file": ["package/script.py"],
        "module": ["-m", "package.script"],
        "stdin": ["-"],
        "notebook": ["-c", NOTEBOOK],
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words[how], pictures, "tokens"],
        cwd=tmp_path,
        input=SCRIPT if how == "stdin" else "",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    name = "package.script" if how == "module" else None
    assert done.stdout.splitlines() == ["started", f"finished __main__ {how != 'notebook'} {name}"]
    assert contents(tmp_path / "tokens") == whole


def test_the_reported_script_without_a_guard(tmp_path: Path):
    """5,000 images, enough for workers, each of which used to run the script again without end."""
    script_without_guard(tmp_path)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    data = TokenDataset(tmp_path / "tokens")
    assert [len(data[split]) for split in data] == [4000, 500, 500]


def test_a_daemonic_process_gets_an_error_because_it_cannot_start_workers(
    pictures: str, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(vars(current_process())["_config"], "daemon", True)
    with pytest.raises(
        InputError, match="a daemonic process cannot start workers; use workers=1 in it"
    ):
        prepare(pictures, tmp_path / "tokens", SMALL, workers=2)


def test_ctrl_c_while_workers_start_is_handled_afterwards_and_does_not_reach_them():
    """Regression: it was ignored during the start, which can take seconds, and lost."""
    show = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    reached = []

    def start() -> None:
        with _deferred_signals():
            signal.raise_signal(signal.SIGINT)
            started = subprocess.run(
                [sys.executable, "-c", show], capture_output=True, text=True, check=True
            )
            reached.append(started.stdout)

    with pytest.raises(KeyboardInterrupt):
        start()
    assert reached == ["True\n"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize(
    ("settings", "workers", "message"),
    [
        ({}, 100_000, r"100000 workers are too many for this computer; give at most \d+"),
        (
            {"size": 1024, "views": 1000},
            1,
            "1000 views of 1024 px need too much memory; give at most --views 128",
        ),
    ],
)
def test_absurd_settings_are_refused_before_any_work(
    settings: dict[str, int], workers: int, message: str, tmp_path: Path
):
    with pytest.raises(InputError, match=message):
        prepare(
            str(tmp_path / "nowhere"),
            tmp_path / "tokens",
            PrepareConfig.layered(settings),
            workers=workers,
        )
    assert list(tmp_path.iterdir()) == []


def test_extreme_but_harmless_settings_are_accepted(pictures: str, tmp_path: Path):
    config = PrepareConfig(size=4, colors=65535, limit=10**30, seed=2**63 - 1)
    dataset = prepare(pictures, tmp_path / "tokens", config)
    assert sum(len(dataset[split]) for split in dataset) == 48


def test_shards_of_large_images_contain_fewer_images():
    """Their tokens are in memory together: 256 MiB at most."""
    limits = {
        size: preparation._shard_images(PrepareConfig(size=size))
        for size in (32, 64, 128, 256, 1024)
    }
    assert limits == {
        32: (1024, 8192),
        64: (1024, 8192),
        128: (1024, 8192),
        256: (1024, 2048),
        1024: (128, 128),
    }


def test_a_killed_worker_is_reported(
    pictures: str, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        preparation, "SHARD_IMAGES", (1, 1)
    )  # so many that the other worker cannot finish them meanwhile

    def kill(*_: int) -> None:
        os.kill(active_children()[0].pid or 0, signal.SIGKILL)

    with pytest.raises(
        InputError, match="a worker was killed, most often for lack of memory; the same command"
    ):
        prepare(pictures, tmp_path / "tokens", SMALL, workers=2, progress=kill)
    dataset = prepare(pictures, tmp_path / "tokens", SMALL)
    dataset.verify()
    assert sum(len(dataset[split]) for split in dataset) == 48


def test_an_existing_folder_is_not_changed(pictures: str, tmp_path: Path):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "mine").write_text("mine")
    with pytest.raises(InputError, match="tokens exists already; remove it or choose another -o"):
        prepare(pictures, tmp_path / "tokens", SMALL)
    assert contents(tmp_path) == {"tokens/mine": b"mine"}


def test_another_folder_with_the_partial_name_is_not_changed(pictures: str, tmp_path: Path):
    (tmp_path / "tokens.partial").mkdir()
    (tmp_path / "tokens.partial" / "mine").write_text("mine")
    with pytest.raises(InputError, match=r"tokens\.partial exists and holds no unfinished work"):
        prepare(pictures, tmp_path / "tokens", SMALL)
    assert contents(tmp_path) == {"tokens.partial/mine": b"mine"}


@pytest.fixture
def unfinished(pictures: str, tmp_path: Path, small_shards: None) -> Path:
    """Interrupt the preparation of OUT after 20 images."""

    def interrupt(done: int, total: int) -> None:
        if done >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(pictures, tmp_path / "tokens", SMALL, progress=interrupt)
    return tmp_path / "tokens"


def test_unfinished_work_is_not_resumed_with_other_settings(pictures: str, unfinished: Path):
    before = contents(unfinished.parent)
    for other in (
        {"size": 5},
        {"colors": 9},
        {"seed": 1},
        {"held_out": 0.2},
        {"label_column": "none"},
        {},
    ):
        source = pictures if other else "digits"
        with pytest.raises(
            InputError,
            match="holds unfinished work with other settings or images; remove it or choose "
            "another",
        ):
            prepare(source, unfinished, PrepareConfig.layered(SMALL.model_dump(), other))
        assert contents(unfinished.parent) == before


@pytest.fixture
def some_bad(write_folder: Write) -> Path:
    """Write thirty images in two classes, of which two do not decode."""
    folder = write_folder(
        "some-bad", *(f"{kind}/{number:02}.png" for kind in "ab" for number in range(15))
    )
    (folder / "a" / "07.png").write_bytes(b"")
    (folder / "b" / "03.png").write_bytes((folder / "b" / "03.png").read_bytes()[:60])
    return folder


def test_unfinished_work_is_not_resumed_with_a_changed_source(
    write_folder: Write, tmp_path: Path, small_shards: None, picture: Callable[..., bytes]
):
    """As many images as before, but one is different."""
    folder = write_folder("images", *(f"{number:02}.png" for number in range(30)))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(str(folder), tmp_path / "tokens", SMALL, progress=interrupt)
    (folder / "20.png").rename(folder / "20a.png")
    with pytest.raises(InputError, match="holds unfinished work with other settings or images"):
        prepare(str(folder), tmp_path / "tokens", SMALL)
    (folder / "20a.png").rename(folder / "20.png")
    prepare(str(folder), tmp_path / "tokens", SMALL).verify()


def test_unfinished_work_is_not_resumed_with_a_changed_palette(
    pictures: str, tmp_path: Path, small_shards: None
):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    given = SMALL.model_copy(update={"palette": str(tmp_path / "palette.npy")})
    Palette.from_centers([[-1, -1, -1], [1, 1, 1]]).save(tmp_path / "palette.npy")
    with pytest.raises(KeyboardInterrupt):
        prepare(pictures, tmp_path / "tokens", given, progress=interrupt)
    Palette.from_centers([[-1, -1, -1], [0, 0, 0], [1, 1, 1]]).save(tmp_path / "palette.npy")
    with pytest.raises(InputError, match="with other settings or images"):
        prepare(pictures, tmp_path / "tokens", given)


def test_class_numbers_beyond_the_classes_are_refused(
    write_parquet: Write, tmp_path: Path, picture: Callable[..., bytes]
):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = {
        "image": [{"bytes": picture(number), "path": None} for number in range(12)],
        "label": [0, 1] * 6,
    }
    file = write_parquet("a.parquet", rows, features)
    table = pq.read_table(file)
    wrong = pa.array([0, 1] * 5 + [0, 7], table["label"].type)
    pq.write_table(table.set_column(1, table.schema.field("label"), wrong), file)
    with pytest.raises(InputError, match=r"row 11 has the class 7, and there are 2 \(from 0\)"):
        prepare(str(file), tmp_path / "tokens", SMALL)


def test_small_images_have_one_view(pictures: str, tmp_path: Path):
    dataset = prepare(pictures, tmp_path / "tokens", PrepareConfig(size=6, colors=8, views=3))
    assert [len(dataset[split]) for split in dataset] == [38, 5, 5]


def lenient(**settings: object) -> PrepareConfig:
    return PrepareConfig.layered({"size": 4, "colors": 8, "max_bad": 0.1, **settings})


def test_too_many_bad_images_stop_the_work(some_bad: Path, tmp_path: Path):
    """Two of thirty are more than one in a hundred."""
    with pytest.raises(
        InputError, match=r"do not decode: 1, where --max-bad 0.01 allows 0; the first: \w+ "
    ) as caught:
        prepare(str(some_bad), tmp_path / "tokens", SMALL)
    assert "\n" not in str(caught.value)
    assert any(f"{name}.png: " in str(caught.value) for name in ("a/07", "b/03"))
    assert not (tmp_path / "tokens").exists()
    with pytest.raises(InputError, match=r"do not decode: 2, where --max-bad 0\.05 allows 1"):
        prepare(str(some_bad), tmp_path / "tokens", lenient(max_bad=0.05))


def check_all_but_two(dataset: TokenDataset, folder: Path) -> None:
    """Check that all images that decode are present, in order, with their own labels."""
    skipped = dataset.manifest["made"]["skipped"]
    assert len(skipped) == 2
    reasons = {"a/07.png": "empty (zero bytes)", "b/03.png": "does not decode"}
    for name, reason in reasons.items():
        assert sum(name in line and reason in line for line in skipped) == 1
    assert sum(dataset.manifest["made"]["images"].values()) == 30
    for name, split in open_source(str(folder))[0].items():
        files = [Path(image) for image, _ in split.read(np.arange(len(split)))]
        good = [file for file in files if f"{file.parent.name}/{file.name}" not in reasons]
        squares = np.concatenate([Transform(4)(file) for file in good])
        rows = dataset[name].rows(np.arange(len(dataset[name])))
        np.testing.assert_array_equal(rows, dataset.palette.transform(squares).reshape(-1, 16))
        assert dataset.class_names is not None
        assert [dataset.class_names[label] for label in dataset[name].labels] == [
            file.parent.name for file in good
        ]
        assert sum(line.startswith(f"{name} ") for line in skipped) == len(files) - len(good)


def test_few_bad_images_are_skipped_and_listed(some_bad: Path, tmp_path: Path):
    check_all_but_two(prepare(str(some_bad), tmp_path / "tokens", lenient()), some_bad)


def test_work_stopped_by_bad_images_can_be_resumed_without_them(
    some_bad: Path, tmp_path: Path, small_shards: None
):
    """The advice in the message works: the second call writes the same as an uninterrupted one."""
    with pytest.raises(InputError, match="with a larger --max-bad"):
        prepare(str(some_bad), tmp_path / "tokens", lenient(max_bad=0))
    assert (tmp_path / "tokens.partial" / "plan.json").exists()
    check_all_but_two(prepare(str(some_bad), tmp_path / "tokens", lenient()), some_bad)
    prepare(str(some_bad), tmp_path / "alone", lenient())
    assert contents(tmp_path / "tokens") == contents(tmp_path / "alone")


def test_skipped_images_are_counted_after_resuming(
    some_bad: Path, tmp_path: Path, small_shards: None
):
    def interrupt(done: int, total: int) -> None:
        if done == 20:  # both bad images are among these
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(str(some_bad), tmp_path / "tokens", lenient(), progress=interrupt)
    with pytest.raises(InputError, match=r"do not decode: 2, where --max-bad 0\.05 allows 1"):
        prepare(str(some_bad), tmp_path / "tokens", lenient(max_bad=0.05))


def test_bad_images_are_counted_over_all_workers(
    some_bad: Path, tmp_path: Path, small_shards: None
):
    """Each job has one bad image, which is allowed; together they are too many."""
    with pytest.raises(InputError, match=r"do not decode: 2, where --max-bad 0\.05 allows 1"):
        prepare(str(some_bad), tmp_path / "tokens", lenient(max_bad=0.05), workers=2)


@pytest.mark.parametrize("max_bad", [0, 1])
def test_a_source_in_which_no_image_decodes_is_refused(
    write_folder: Write, tmp_path: Path, max_bad: float
):
    folder = write_folder("all-bad", *(f"{number}.png" for number in range(10)))
    for file in folder.iterdir():
        file.write_text("no image")
    with pytest.raises(
        InputError,
        match=r"no training image of .* decodes; the first: .*/\d.png: not an image in a",
    ):
        prepare(str(folder), tmp_path / "tokens", lenient(max_bad=max_bad))
    assert [path.name for path in tmp_path.iterdir()] == ["all-bad"]


def test_a_split_in_which_no_image_decodes_is_empty(write_folder: Write, tmp_path: Path):
    names = [f"{split}/{number}.png" for split in ("train", "val", "test") for number in range(4)]
    folder = write_folder("sets", *names)
    for file in (folder / "val").iterdir():
        file.write_text("no image")
    dataset = prepare(str(folder), tmp_path / "tokens", lenient(max_bad=0.5))
    assert [len(dataset[split]) for split in dataset] == [4, 0, 4]
    assert dataset["validation"].rows([]).shape == (0, 16)


BAD = {
    "truncated.jpg": "truncated",
    "empty.png": "the file is empty (zero bytes)",
    "text.jpg": "not an image in a known format",
    "bomb.png": "exceeds limit",
    "link.png": "no such file",
}


def test_every_kind_of_bad_file(tmp_path: Path, picture: Callable[..., bytes]):
    """A folder with every kind of bad file: all good images, of every size, are prepared."""
    folder = tmp_path / "mixture"
    folder.mkdir()
    for number in range(40):
        (folder / f"good-{number:02}.png").write_bytes(picture(number))
    Image.new("L", (1, 1), 7).save(folder / "one-pixel.png")
    Image.new("RGB", (20000, 3), "red").save(folder / "ribbon.png")
    (folder / "truncated.jpg").write_bytes(picture(0, "JPEG", 64)[:900])
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("this is no picture")
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = b""
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        chunks += (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    (folder / "link.png").symlink_to(tmp_path / "gone.png")
    dataset = prepare(str(folder), tmp_path / "tokens", lenient(max_bad=0.2))
    skipped = dataset.manifest["made"]["skipped"]
    assert len(skipped) == len(BAD)
    for name, reason in BAD.items():
        assert sum(f"/{name}: " in line and reason in line for line in skipped) == 1, (
            name,
            skipped,
        )
    assert sum(len(dataset[split]) for split in dataset) == 42


@pytest.fixture(scope="module")
def large_pictures(tmp_path_factory: pytest.TempPathFactory, picture: Callable[..., bytes]) -> str:
    """Return thirty images of 24 px: large enough for crops of 4 px."""
    folder = tmp_path_factory.mktemp("large")
    for number in range(30):
        (folder / f"{number:02}.png").write_bytes(picture(number, side=24))
    return str(folder)


def test_random_views_of_training_images(large_pictures: str, tmp_path: Path, small_shards: None):
    """Three crops of each training image, consecutively; centre squares of the others."""
    config = PrepareConfig(size=4, colors=8, views=3)
    dataset = prepare(large_pictures, tmp_path / "tokens", config)
    plain = prepare(large_pictures, tmp_path / "plain", PrepareConfig(size=4, colors=8))
    assert [len(dataset[split]) for split in dataset] == [72, 3, 3]
    assert dataset.palette.fingerprint == plain.palette.fingerprint
    split = open_source(large_pictures)[0]["train"]
    expected = [
        Transform(4, views=3)(image, (0, row))
        for row, (image, _) in zip(split.indices, split.read(np.arange(24)), strict=True)
    ]
    rows = dataset["train"].rows(np.arange(72))
    np.testing.assert_array_equal(
        rows, dataset.palette.transform(np.concatenate(expected)).reshape(72, 16)
    )
    assert len(np.unique(rows, axis=0)) > 60
    for name in ("validation", "test"):
        np.testing.assert_array_equal(
            dataset[name].rows(np.arange(3)), plain[name].rows(np.arange(3))
        )
    prepare(large_pictures, tmp_path / "by-two", config, workers=2)
    assert contents(tmp_path / "by-two") == contents(tmp_path / "tokens")


def test_the_picture_shows_originals_above_quantized_images(large_pictures: str, tmp_path: Path):
    dataset = prepare(large_pictures, tmp_path / "tokens", PrepareConfig(size=4, colors=8))
    picture = np.asarray(Image.open(tmp_path / "tokens" / "palette.png"))
    images = picture[22 : 22 + 2 * 66 + 2]
    grid = images[2:, 2 : 2 + 12 * 66].reshape(2, 66, 12, 66, 3)
    cells = grid[:, :64:16, :, :64:16].transpose(0, 2, 1, 3, 4)
    np.testing.assert_array_equal(
        cells[1], dataset.palette.inverse_transform(dataset.palette.transform(cells[0]))
    )
    assert (cells[0] != cells[1]).any()


def test_the_share_of_each_colour_is_recorded(large_pictures: str, tmp_path: Path):
    dataset = prepare(large_pictures, tmp_path / "tokens", PrepareConfig(size=4, colors=8))
    share = dataset.manifest["made"]["palette_error"]["share"]
    counts = np.bincount(dataset["train"].rows(np.arange(24)).ravel(), minlength=8)
    np.testing.assert_allclose(share, counts / counts.sum(), atol=1e-6)


def test_a_given_palette_is_used(pictures: str, tmp_path: Path):
    given = Palette.from_centers(np.random.default_rng(0).uniform(-1, 1, (5, 3)))
    given.save(tmp_path / "palette.npy")
    config = PrepareConfig(size=4, colors=8, palette=str(tmp_path / "palette.npy"))
    dataset = prepare(pictures, tmp_path / "tokens", config)
    assert dataset.palette.fingerprint == given.fingerprint
    assert len(np.unique(dataset["train"].rows(np.arange(38)))) == 5
    assert dataset.manifest["made"]["palette_error"]["mse"] > 100
    other = prepare(
        "digits", tmp_path / "digits", PrepareConfig(size=4, palette=str(tmp_path / "tokens"))
    )
    assert other.palette.fingerprint == given.fingerprint


def test_a_missing_palette(pictures: str, tmp_path: Path):
    with pytest.raises(InputError, match="no palette at"):
        prepare(
            pictures,
            tmp_path / "tokens",
            PrepareConfig(size=4, palette=str(tmp_path / "nowhere.npy")),
        )
    assert list(tmp_path.iterdir()) == []


def test_the_seed_decides_splits_and_palette(
    pictures: str, whole: dict[str, bytes], tmp_path: Path, small_shards: None
):
    prepare(pictures, tmp_path / "other", PrepareConfig(size=4, colors=8, seed=1))
    first, other = json.loads(whole["dataset.json"]), TokenDataset(tmp_path / "other")
    assert other.palette.fingerprint != first["palette"]["fingerprint"]
    name = next(name for name in whole if name.startswith("test-") and name.endswith(".labels.npy"))
    assert contents(tmp_path / "other").get(name) != whole[name]


def test_labels_can_be_left_out(pictures: str, tmp_path: Path):
    dataset = prepare(
        pictures, tmp_path / "tokens", PrepareConfig(size=4, colors=8, label_column="none")
    )
    assert dataset.class_names is None
    with pytest.raises(InputError, match="38 of 38 images"):
        dataset["train"].require_labels("a probe")


def test_images_of_all_kinds_together(tmp_path: Path):
    """Grey, transparent, 16-bit, CMYK and palette images, of many sizes."""
    folder = tmp_path / "kinds"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number, mode in enumerate(
        ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16", "RGB", "YCbCr", "RGB"]
    ):
        side = 3 + 5 * number
        if mode == "I;16":
            image = Image.fromarray(generator.integers(0, 65536, (side, side + 3), dtype=np.uint16))
        else:
            image = Image.fromarray(
                generator.integers(0, 256, (side, side + 3, 3), dtype=np.uint8)
            ).convert(mode)
        image.save(folder / f"{number}.{'jpg' if mode in ('CMYK', 'YCbCr') else 'png'}")
    dataset = prepare(str(folder), tmp_path / "tokens", PrepareConfig(size=8, colors=16))
    assert [len(dataset[split]) for split in dataset] == [8, 1, 1]
    assert dataset.manifest["made"]["skipped"] == []


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Limit files to 50 kB: writing more fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk(tmp_path: Path, request: pytest.FixtureRequest):
    request.getfixturevalue("small_disk")
    with pytest.raises(OSError, match=r"File too large|requested and"):
        prepare("digits", tmp_path / "tokens", PrepareConfig(size=8))
    assert sorted(contents(tmp_path)) == ["tokens.partial/palette.png", "tokens.partial/plan.json"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    prepare("digits", tmp_path / "tokens", PrepareConfig(size=8)).verify()
    prepare("digits", tmp_path / "whole", PrepareConfig(size=8))
    assert contents(tmp_path / "tokens") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 1}, "size = 1"),
        ({"colors": 1}, "colors = 1"),
        ({"colors": 65536}, "colors = 65536"),
        ({"held_out": 0.5}, "held_out = 0.5"),
        ({"held_out": 0}, "held_out = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"max_bad": 1.5}, "max_bad = 1.5"),
        ({"views": -1}, "views = -1"),
        ({"filter": "sinc"}, "'area', 'nearest', 'bilinear', 'bicubic' or 'lanczos'"),
        ({"enlarge": "area"}, "'pad', 'nearest', 'bilinear', 'bicubic' or 'lanczos'"),
        ({"colours": 16}, "unknown key 'colours' in settings; did you mean 'colors'"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str):
    with pytest.raises(InputError) as caught:
        PrepareConfig.layered(settings)
    assert message in str(caught.value)


def test_zero_workers_are_refused(pictures: str, tmp_path: Path):
    with pytest.raises(InputError, match="at least one worker is needed, not 0"):
        prepare(pictures, tmp_path / "tokens", SMALL, workers=0)


def test_the_limit_of_images_of_each_split(pictures: str, tmp_path: Path):
    """The subset depends on the seed, and has the order of the images without a limit."""
    given = {"size": 8, "colors": 4}
    whole = prepare(pictures, tmp_path / "whole", PrepareConfig(**given))
    few = prepare(pictures, tmp_path / "few", PrepareConfig(**given, limit=5))
    assert {name: len(few[name]) for name in few} == {
        name: min(5, len(whole[name])) for name in whole
    }
    assert few.manifest["made"]["config"]["limit"] == 5
    subset = np.sort(np.random.default_rng(0).permutation(len(whole["train"]))[:5])
    assert few["train"].labels.tolist() == whole["train"].labels[subset].tolist()
    again = prepare(
        pictures, tmp_path / "again", PrepareConfig(**given, limit=5, palette=str(whole.path))
    )
    assert (again["train"].rows(range(5)) == whole["train"].rows(subset)).all()
