"""Data sets on the Hub, streamed or downloaded: from a small local Hub, in other processes."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from igpt.data.prepare import PrepareConfig, prepare

from ...helpers.small_hub import FOREIGN, Hub, serving

Picture = Callable[..., bytes]


@pytest.fixture(scope="module")
def served() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


SPLITS = {"train": range(300), "validation": range(300, 340), "unlabeled": range(340, 400)}
NAMES = ["cat", "dog", "eel"]
CARD = """---
configs:
- config_name: all
  data_files: data/*
- config_name: few
  data_files:
  - split: train
    path: plain/*
dataset_info:
- config_name: few
  features:
  - {name: image, dtype: image}
  - {name: label, dtype: {class_label: {names: {'0': one, '1': two, '2': three}}}}
  - {name: caption, dtype: string}
---
Pictures.
"""
END = 1 << 16  # bytes at the end of a Parquet file that Arrow reads first


@pytest.fixture
def hub(served: Hub, picture: Picture) -> Hub:
    """Parquet in row groups of 20 with a long column that is not needed, and two data sets that are
    not Parquet."""

    def parquet(rows: range) -> bytes:
        columns = {
            "image": [{"bytes": picture(row, side=64), "path": f"{row}.png"} for row in rows],
            "label": [-1 if row >= 340 else row % 3 for row in rows],
            "caption": [hashlib.sha256(str(row).encode()).hexdigest() * 100 for row in rows],
        }
        buffer = io.BytesIO()
        kinds = {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=NAMES),
            "caption": datasets.Value("string"),
        }
        datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).to_parquet(
            buffer, batch_size=20
        )
        return buffer.getvalue()

    if not served.sets:
        datasets.disable_progress_bars()
        train, validation, unlabeled = SPLITS.values()
        pictures = {
            "data/train-00000-of-00002.parquet": parquet(train[:100]),
            "data/train-00001-of-00002.parquet": parquet(train[100:]),
            "data/validation-00000-of-00001.parquet": parquet(validation),
            "data/unlabeled-00000-of-00001.parquet": parquet(unlabeled),
        }
        plain = io.BytesIO()
        pq.write_table(
            pq.read_table(io.BytesIO(parquet(validation))).replace_schema_metadata(None), plain
        )
        served.sets |= {
            "someone/pictures": pictures,
            "someone/configured": {
                **pictures,
                "plain/0.parquet": plain.getvalue(),
                "README.md": CARD.encode(),
            },
            "someone/words": {"words.csv": b"image,label\na.png,1\n"},
            "someone/folders": {
                f"{kind}/{number}.png": picture(number) for kind in "ab" for number in range(5)
            },
        }
    served.log.clear()
    served.closed = False
    return served


# For each source: print the class names, and the digest of the image and the label of all rows of
# each reader, or of some rows for training; or the error.
PROGRAM = """
import hashlib, json, sys
import numpy as np
from igpt.data.sources.catalogue import SourceConfig, open_source

def read(reader, rows):
    return [[row, hashlib.sha1(image["bytes"]).hexdigest(), label]
            for row, (image, label) in zip(rows, reader.read(np.array(rows)), strict=True)]

rows = json.loads(sys.argv[1])
for source, settings in json.loads(sys.argv[2]):
    try:
        splits, names, *_ = open_source(source, SourceConfig(**settings))
        found = {"names": names, "counts": [len(split) for split in splits.values()]}
        train = splits["train"].reader
        if rows:
            print("opened", flush=True)
            input()
            found |= {"train": read(train, rows), "last": train.name_of(rows[-1])}
        else:
            named = reversed(splits.items())
            readers = {id(split.reader): (name, split.reader) for name, split in named}
            found |= {name: read(reader, range(len(reader))) for name, reader in readers.values()}
        print(json.dumps(found))
    except ValueError as error:
        print(json.dumps(f"refused: {error}"))
"""


@pytest.fixture
def started(hub: Hub, tmp_path: Path) -> Callable[..., "subprocess.Popen[str]"]:
    """Start the program with this Hub and an empty cache."""

    def start(
        *sources: tuple[str, dict[str, object]], rows: list[int] | None = None
    ) -> "subprocess.Popen[str]":
        environment = {key: value for key, value in os.environ.items() if key not in FOREIGN}
        environment |= hub.environment(tmp_path / "home")
        command = [sys.executable, "-c", PROGRAM, json.dumps(rows), json.dumps(sources)]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, env=environment, text=True, stdin=pipe, stdout=pipe, stderr=pipe
        )

    return start


def ended(process: "subprocess.Popen[str]") -> list[Any]:
    """Return what it prints, by source."""
    out, err = process.communicate("\n", timeout=120)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]


def expected(picture: Picture, rows: range) -> list[list[Any]]:
    """Return the expected output for the images with these numbers."""
    digests = [hashlib.sha1(picture(number, side=64)).hexdigest() for number in rows]
    return [
        [row, digest, -1 if number >= 340 else number % 3]
        for row, (number, digest) in enumerate(zip(rows, digests, strict=True))
    ]


def stored(folder: Path) -> tuple[int, set[str]]:
    """Return how many bytes are stored in a cache, and the suffixes of its files."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files), {path.suffix for path in files}


@pytest.mark.parametrize("stream", [True, False])
def test_all_rows(
    hub: Hub, started: Callable[..., Any], picture: Picture, tmp_path: Path, stream: bool
):
    (found,) = ended(started(("someone/pictures", {"stream": stream})))
    assert found["names"] == NAMES
    assert found["counts"] == [270, 40, 30]
    assert found["train"] == expected(picture, SPLITS["train"])
    assert found["validation"] == expected(picture, SPLITS["validation"])
    held, endings = stored(tmp_path / "home")
    if stream:
        assert held < 20_000
        assert not endings & {".parquet", ".arrow"}
        images = sum(len(picture(row, side=64)) for row in range(340))
        assert (
            images < hub.sent(".parquet") < images + 7.5 * END
        )  # four files to count the rows, three to read them
    else:
        assert held > sum(map(len, hub.sets["someone/pictures"].values())) / 2
        assert ".arrow" in endings


def test_files_of_the_hub_behind_a_url(hub: Hub, started: Callable[..., Any], picture: Picture):
    url = "hf://datasets/someone"
    table, folder, missing = ended(
        started(
            (f"{url}/pictures/data", {"train_split": "train"}),
            (f"{url}/folders", {}),
            (f"{url}/nothing", {}),
        )
    )
    assert table["names"] == NAMES
    assert table["train"] == expected(picture, SPLITS["train"])
    assert folder["names"] == ["a", "b"]
    assert [label for _, _, label in folder["train"]] == [0] * 5 + [1] * 5
    assert missing.startswith("refused: hf://datasets/someone/nothing is not there")


def test_a_token_data_set_of_the_hub(hub: Hub, tmp_path: Path):
    made = prepare("digits", tmp_path / "tokens", PrepareConfig(size=4, colors=8, limit=100))
    hub.sets["someone/tokens"] = {path.name: path.read_bytes() for path in made.path.iterdir()}
    program = (
        "from igpt import TokenDataset\n"
        "data = TokenDataset('hf://datasets/someone/tokens')\n"
        "data.verify()\n"
        "print(data['train'].rows([0, 1]).tolist())\n"
    )
    environment = {key: value for key, value in os.environ.items() if key not in FOREIGN}
    environment |= hub.environment(tmp_path / "home") | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == made["train"].rows([0, 1]).tolist()


def test_some_rows_of_a_stream(hub: Hub, started: Callable[..., Any], picture: Picture):
    process = started(("someone/pictures", {"stream": True}), rows=[3, 4, 120, 299])
    assert process.stdout.readline() == "opened\n", process.stderr.read()
    assert sorted(path for path, _, _ in hub.log) == sorted(hub.sets["someone/pictures"])
    assert hub.sent(".parquet") <= 4 * END
    hub.log.clear()
    (found,) = ended(process)
    every = expected(picture, SPLITS["train"])
    assert found["train"] == [every[row] for row in (3, 4, 120, 299)]
    assert found["last"] == "train-00001-of-00002.parquet row 199 (299.png)"
    assert {path for path, _, _ in hub.log} == {
        f"data/train-0000{part}-of-00002.parquet" for part in (0, 1)
    }
    group = sum(len(picture(row, side=64)) for row in range(20))
    assert (
        hub.sent(".parquet") < 4.1 * group + 3 * END
    )  # three, and the last one again for its name


def test_a_hub_that_fails_during_the_download(hub: Hub, started: Callable[..., Any]):
    process = started(("someone/pictures", {"stream": True}), rows=[3, 120])
    assert process.stdout.readline() == "opened\n", process.stderr.read()
    hub.closed = True
    (message,) = ended(process)
    assert re.fullmatch(
        r"refused: hf://.*/train-00000-of-00002.parquet is not readable as Parquet: .*403.*",
        message,
    )


def test_splits_and_configurations_by_name(started: Callable[..., Any], picture: Picture):
    unlabeled, few = ended(
        started(
            (
                "someone/pictures",
                {"stream": True, "train_split": "unlabeled", "test_split": "validation"},
            ),
            ("someone/configured:few", {"stream": True}),
        )
    )
    assert unlabeled["counts"] == [54, 6, 40]
    assert unlabeled["train"] == expected(picture, SPLITS["unlabeled"])
    assert unlabeled["test"] == expected(picture, SPLITS["validation"])
    assert few["names"] == ["one", "two", "three"]  # from the data set card; the file has no names
    assert few["counts"] == [32, 4, 4]
    assert few["train"] == expected(picture, SPLITS["validation"])


def test_data_sets_that_cannot_be_streamed(hub: Hub, started: Callable[..., Any]):
    words, folders, nothing, config, split = ended(
        started(
            ("someone/words", {"stream": True}),
            ("someone/folders", {"stream": True}),
            ("someone/nothing", {"stream": True}),
            ("someone/configured:many", {"stream": True}),
            ("someone/pictures", {"stream": True, "test_split": "unlabelled"}),
        )
    )
    for name, message in (("words", words), ("folders", folders)):
        assert (
            message == f"refused: someone/{name} is not in Parquet, and only Parquet is streamed; "
            f"omit --stream"
        )
    assert hub.sent(".csv") == hub.sent(".png") == 0
    assert nothing.startswith(
        "refused: 'someone/nothing' is neither a folder nor a data set that could be loaded from "
        "the Hub ("
    )
    assert re.match("refused: 'someone/configured:many' is neither .*'many' not found", config)
    assert split == "refused: someone/pictures has no split 'unlabelled'; did you mean 'unlabeled'?"
    assert not any("\n" in message for message in (words, folders, nothing, config, split))
