"""Models are downloaded from a small local Hub and uploaded to it with `huggingface_hub`, in other
processes."""

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from igpt.data.images.palette import Palette
from igpt.hub import require_name
from igpt.model.config import ModelConfig
from igpt.model.directory import weights_sha256
from igpt.model.transformer import ImageGPT

from .helpers.small_hub import FOREIGN, Hub, serving

# For each model: the checksum of its weights and its palette's fingerprint, or the error.
PROGRAM = """
import json, sys
from igpt.data.images.palette import Palette
from igpt.model.directory import weights_sha256
from igpt.model.transformer import ImageGPT
for word in sys.argv[1:]:
    name, _, what = word.partition(":")
    try:
        if what == "palette":
            print(json.dumps(Palette.load(name).fingerprint))
        else:
            model = ImageGPT.from_pretrained(name)
            print(json.dumps([weights_sha256(model.state_dict()), model.palette.fingerprint]))
    except ValueError as error:
        print(json.dumps(f"refused: {error}"))
"""
Read = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def model() -> ImageGPT:
    """Return a model with random weights and a palette."""
    torch.manual_seed(1)
    shape = ModelConfig(resolution=4, n_colors=11, n_layer=2, n_embd=24, n_head=3)
    model = ImageGPT(shape, Palette.from_centers(np.random.default_rng(1).uniform(-1, 1, (11, 3))))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module")
def files(model: ImageGPT, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of its directory by name, as the Hub stores them."""
    folder = tmp_path_factory.mktemp("model") / "model"
    model.save_pretrained(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def known(model: ImageGPT) -> list[str]:
    assert model.palette is not None
    return [weights_sha256(model.state_dict()), model.palette.fingerprint]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


def surroundings(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    known = {key: value for key, value in os.environ.items() if key not in FOREIGN}
    return {
        **known,
        **hub.environment(home),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_ETAG_TIMEOUT": "5",
        **more,
    }


@pytest.fixture
def read(hub: Hub, tmp_path: Path) -> Read:
    """Run the program with this Hub, or another address, and one cache for the test."""

    def run(*words: str, **more: str) -> list[Any]:
        command = [sys.executable, "-c", PROGRAM, *words]
        environment = surroundings(hub, tmp_path / "home", **more)
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def no_network() -> dict[str, str]:
    """Return an address at which no server listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return {"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}"}


def pickled(tensors: Mapping[str, object]) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def test_a_model_is_downloaded_once_and_then_read_without_the_network(
    hub: Hub, files: dict[str, bytes], known: list[str], read: Read
) -> None:
    others = {
        "pytorch_model.bin": bytes(9000),
        "flax_model.msgpack": bytes(9000),
        "onnx/model.safetensors": b"other",
    }
    hub.models["someone/model"] = {**files, **others, "README.md": b"# A model\n"}
    assert read("someone/model", "someone/model:palette") == [known, known[1]]
    assert sorted(path for path, _, _ in hub.log) == sorted(files), (
        "files that are not needed are not downloaded"
    )
    hub.log.clear()
    assert read("someone/model") == [known]
    assert hub.log == []
    assert read("someone/model", "someone/model:palette", HF_HUB_OFFLINE="1") == [known, known[1]]
    assert read("someone/model", "someone/model:palette", **no_network()) == [known, known[1]]


def test_pickled_weights_in_one_or_several_files_are_downloaded_and_execute_no_code(
    hub: Hub, files: dict[str, bytes], known: list[str], read: Read, tmp_path: Path
) -> None:
    (tmp_path / "weights").write_bytes(files["model.safetensors"])
    tensors = load_file(tmp_path / "weights")
    plain = {name: content for name, content in files.items() if name.endswith(".json")}
    halves = [{name: tensors[name] for name in sorted(tensors)[part::2]} for part in (0, 1)]
    parts = {
        f"pytorch_model-0000{part + 1}-of-00002.bin": pickled(half)
        for part, half in enumerate(halves)
    }
    hub.models |= {
        "someone/pickle": {**plain, "pytorch_model.bin": pickled(tensors)},
        "someone/parts": {**plain, **parts},
        "someone/evil": {**plain, "pytorch_model.bin": b"cos\nmkdir\n(S'made'\ntR."},
    }
    whole, joined, evil = read("someone/pickle", "someone/parts", "someone/evil")
    assert whole == joined == known
    assert "cannot be read safely" in evil
    assert not (tmp_path / "made").exists()


def index_of(weight_map: Mapping[str, str]) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


def test_the_index_decides_which_parts_are_downloaded(
    hub: Hub, files: dict[str, bytes], known: list[str], read: Read, tmp_path: Path
) -> None:
    """Parts with other names, next to those of an older save."""
    (tmp_path / "weights").write_bytes(files["model.safetensors"])
    tensors = load_file(tmp_path / "weights")
    plain = {name: content for name, content in files.items() if name.endswith(".json")}
    halves = {f"part {half}.safetensors": sorted(tensors)[half::2] for half in (0, 1)}
    parts = {name: save({key: tensors[key] for key in keys}) for name, keys in halves.items()}
    index = index_of({key: name for name, keys in halves.items() for key in keys})
    stale = {f"model-0000{part}-of-00002.safetensors": bytes(9000) for part in (1, 2)}
    pickles = {
        f"{name}.bin": pickled({key: tensors[key] for key in keys}) for name, keys in halves.items()
    }
    pickle_index = index_of({key: f"{name}.bin" for name, keys in halves.items() for key in keys})
    hub.models |= {
        "someone/model": {**plain, **parts, **stale, "model.safetensors.index.json": index},
        "someone/pickle": {**plain, **pickles, "pytorch_model.bin.index.json": pickle_index},
        "someone/lacking": {
            **plain,
            "part 0.safetensors": bytes(9000),
            "model.safetensors.index.json": index,
        },
        "someone/outside": {
            **plain,
            "model.safetensors.index.json": index_of({"a": "../x.safetensors"}),
        },
    }
    assert read("someone/model", "someone/pickle") == [known, known]
    needed = {
        *plain,
        *parts,
        "model.safetensors.index.json",
        *pickles,
        "pytorch_model.bin.index.json",
    }
    assert {path for path, _, _ in hub.log} == needed, "stale parts are not downloaded"
    assert read("someone/model", HF_HUB_OFFLINE="1") == [known]
    hub.log.clear()
    lacking, outside = read("someone/lacking", "someone/outside")
    assert lacking == (
        "refused: the Hub's someone/lacking: part 1.safetensors, which "
        "model.safetensors.index.json names, is missing"
    )
    assert "weight_map names '../x.safetensors'; the plain name of a .safetensors file" in outside
    assert not any(path.endswith(".safetensors") for path, _, _ in hub.log)


def test_errors_of_the_hub_are_one_sentence(hub: Hub, files: dict[str, bytes], read: Read) -> None:
    plain = {name: content for name, content in files.items() if name.endswith(".json")}
    hub.models |= {
        "someone/hidden": files,
        "someone/words": {
            "config.json": b'{"model_type": "gpt2"}',
            "model.safetensors": bytes(9000),
        },
        "someone/later": {**plain, "model-00001-of-00002.safetensors": bytes(9000)},
        "someone/bare": plain,
        "someone/space": {"README.md": b"# Nothing\n"},
    }
    hub.private.add("someone/hidden")
    names = ("nothing", "hidden", "words", "later", "bare", "space", "space:palette")
    said = read(*(f"someone/{name}" for name in names))
    advice = (
        f"; download its files elsewhere ({hub.address}/someone/nothing) and give the path of "
        f"their folder"
    )
    assert said[0] == (
        "refused: no model directory someone/nothing here, and the Hub cannot give it: it has no "
        "such model, or none "
        f"for this token (`hf auth login`, or HF_TOKEN in the environment){advice}"
    )
    assert said[1] == said[0].replace("nothing", "hidden")
    assert said[2].startswith("refused: the Hub's someone/words: ")
    assert said[2].endswith("config.json is of a model of type 'gpt2'; 'imagegpt' is needed")
    assert said[3].startswith(
        "refused: the Hub's someone/later: model-00002-of-00002.safetensors is missing"
    )
    assert (
        said[4]
        == "refused: the Hub's someone/bare: there are no weights: model.safetensors is missing"
    )
    assert said[5] == "refused: the Hub's someone/space: config.json is missing"
    assert said[6] == "refused: the Hub's someone/space: preprocessor_config.json is missing"
    assert hub.sent(".safetensors") == 0, "no large file is downloaded in vain"


def test_an_incomplete_model_in_the_cache_is_refused(
    hub: Hub, files: dict[str, bytes], read: Read
) -> None:
    hub.models["someone/model"] = dict(files)
    (palette,) = read("someone/model:palette")
    again, message, other = read(
        "someone/model:palette", "someone/model", "someone/other", **no_network()
    )
    assert again == palette
    for said, name in ((message, "model"), (other, "other")):
        assert said.startswith(
            f"refused: no model directory someone/{name} here, and the Hub cannot give it: there "
            "is no network, or it "
            "broke ("
        )
        assert "; download its files elsewhere (http://" in said
        assert said.endswith(f"/someone/{name}) and give the path of their folder")
    (offline,) = read("someone/other", HF_HUB_OFFLINE="1")
    assert (
        "the Hub cannot give it: HF_HUB_OFFLINE forbids to ask it; download its files elsewhere"
        in offline
    )


@pytest.mark.parametrize(
    "name",
    [
        "model",
        "a/b/c",
        "",
        "a/",
        "/b",
        "a b/c",
        "a/b--c",
        "a/..b",
        "a/b.git",
        "-a/b",
        "a/b-",
        "a./b",
        "a/" + "b" * 95,
    ],
)
def test_invalid_repository_names(name: str) -> None:
    with pytest.raises(
        ValueError, match="is not a valid name of a model on the Hub; USER/NAME is needed"
    ):
        require_name(name)


@pytest.mark.parametrize("name", ["a/b", "someone/igpt-s_2.0", "Some-One/x" + "y" * 86])
def test_valid_repository_names(name: str) -> None:
    require_name(name)
