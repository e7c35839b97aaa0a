"""`igpt push` to a small local Hub: the uploaded files can be downloaded again, and mistakes change
nothing."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from igpt.model.directory import weights_sha256
from igpt.model.transformer import ImageGPT

from ..helpers.small_hub import FOREIGN, Hub, serving

Push = Callable[..., subprocess.CompletedProcess[str]]
READ = """
import sys
from igpt.model.directory import weights_sha256
from igpt.model.transformer import ImageGPT
model = ImageGPT.from_pretrained(sys.argv[1])
print(weights_sha256(model.state_dict()), model.palette.fingerprint, model.config.objective)
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as hub:
        hub.users["hf_someone"] = "someone"
        yield hub


@pytest.fixture
def run(short_run: Path, tmp_path: Path) -> Path:
    """Return a copy of the run, with a picture."""
    shutil.copytree(short_run, tmp_path / "run")
    Image.new("RGB", (90, 30)).save(tmp_path / "run" / "samples.png")
    return tmp_path / "run"


@pytest.fixture
def push(hub: Hub, tmp_path: Path) -> Push:
    """Run a program with this Hub and a token: by default `igpt push` with the words."""

    def start(
        *words: object, program: tuple[str, ...] = ("-m", "igpt", "push"), **more: str
    ) -> object:
        surroundings = {key: value for key, value in os.environ.items() if key not in FOREIGN}
        surroundings |= (
            hub.environment(tmp_path / "home")
            | {"OMP_NUM_THREADS": "1", "HF_TOKEN": "hf_someone"}
            | more
        )
        surroundings = {key: value for key, value in surroundings.items() if value}
        command = [sys.executable, *program, *map(str, words)]
        return subprocess.run(
            command, env=surroundings, capture_output=True, text=True, timeout=300, cwd=tmp_path
        )

    return start  # type: ignore[return-value]


def test_uploaded_files_are_the_same_when_downloaded(hub: Hub, run: Path, push: Push) -> None:
    done = push(run, "someone/digits", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.address}/someone/digits\n"
    assert hub.private == {"someone/digits"}
    assert hub.commits == ["Model trained with igpt"], "one commit with all files"
    there = hub.models["someone/digits"]
    here = {file.name: file.read_bytes() for file in (run / "model").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} == here.keys()
    here |= {name: (run / name).read_bytes() for name in ("README.md", "samples.png")}
    assert there == {".gitattributes": b"", **here}
    assert sorted(hub.stored.values()) == sorted(
        there[name] for name in ("model.safetensors", "samples.png")
    )
    assert b'from_pretrained("someone/digits")' in there["README.md"]

    model = ImageGPT.from_pretrained(run / "model")
    assert model.palette is not None
    read = push("someone/digits", program=("-c", READ))
    assert read.stdout.split() == [
        weights_sha256(model.state_dict()),
        model.palette.fingerprint,
        "autoregressive",
    ]
    stranger = push("someone/digits", program=("-c", READ), HF_TOKEN="", HF_HOME=str(run / "other"))
    assert "it has no such model, or none for this token" in stranger.stderr


def test_an_edited_card_is_uploaded_unchanged(hub: Hub, run: Path, push: Push) -> None:
    wrote = push(run, "someone/digits", "--license", "mit", program=("-m", "igpt", "card"))
    assert wrote.stdout == f"{run / 'README.md'}\n"
    card = run / "README.md"
    card.write_text(card.read_text() + "\nDrawn by hand.\n")
    done = push(run, "someone/other")
    assert done.returncode == 0, done.stderr
    again = f"igpt card {run} someone/other writes a new one, to be pushed again"
    assert done.stdout.splitlines() == [
        f"{card} does not name someone/other; {again}",
        f"{hub.address}/someone/other",
    ]
    assert hub.models["someone/other"]["README.md"] == card.read_bytes()
    assert hub.models["someone/other"]["README.md"].endswith(b"Drawn by hand.\n")
    assert hub.private == set()
    (run / "samples.png").unlink()
    assert push(run, "someone/other").returncode == 0
    assert len(hub.commits) == 2
    assert "samples.png" in hub.models["someone/other"], "no file of the repository is deleted"


def test_mistakes_are_one_line_and_nothing_is_uploaded(
    hub: Hub, run: Path, push: Push, tmp_path: Path
) -> None:
    hub.models |= {"other/theirs": {"config.json": b"{}"}, "someone/public": {"config.json": b"{}"}}
    before = {name: dict(files) for name, files in hub.models.items()}
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = f"http://127.0.0.1:{server.getsockname()[1]}"
    by_hand = (
        "or upload the files by hand: config.json, model.safetensors, "
        "preprocessor_config.json, README.md"
    )
    for words, more, message in (
        (
            (run, "digits"),
            {},
            "'digits' is not a valid name of a model on the Hub; USER/NAME is needed",
        ),
        ((tmp_path, "someone/x"), {}, "is no run directory"),
        (
            (run, "someone/x"),
            {"HF_TOKEN": ""},
            "uploading needs a token with the right to write: `hf auth login`",
        ),
        ((run, "someone/x"), {"HF_TOKEN": "hf_nobody"}, "it does not know the token"),
        ((run, "other/x"), {}, "the token has no right to other/x"),
        ((run, "other/theirs"), {}, "the token has no right to other/theirs"),
        (
            (run, "someone/public", "--private"),
            {},
            "someone/public is public on the Hub already; choose another name",
        ),
        ((run, "someone/x"), {"HF_ENDPOINT": nobody}, "there is no network, or it broke"),
        ((run, "someone/x"), {"HF_ENDPOINT": nobody}, by_hand),
        ((run, "someone/x"), {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids to ask it"),
    ):
        done = push(*words, **more)
        assert done.returncode == 2, (words, done.stderr)
        assert message in done.stderr, (words, done.stderr)
        assert done.stderr.count("\n") == 1, (words, done.stderr)
        assert hub.models == before, words
    assert json.loads((run / "model" / "config.json").read_text())["model_type"] == "imagegpt"


def test_an_upload_that_fails_commits_nothing(hub: Hub, run: Path, push: Push) -> None:
    hub.broken = True
    done = push(run, "someone/digits")
    assert done.returncode == 2
    assert (
        "nothing was uploaded to someone/digits: it answers 400; repeat the command" in done.stderr
    )
    assert hub.models["someone/digits"] == {".gitattributes": b""}
    assert hub.commits == []
    hub.broken = False
    done = push(run, "someone/digits")
    assert done.returncode == 0, done.stderr
    assert len(hub.models["someone/digits"]) == 6
