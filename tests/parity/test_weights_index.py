"""Weights in several files: as in transformers, the index determines which files are read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

from igpt.errors import InputError
from igpt.model.transformer import ImageGPT

from ..helpers import reported_cases

N_COLORS, RESOLUTION = 16, 4
INDEX = "model.safetensors.index.json"


def save(path: Path, seed: int, **settings: Any) -> dict[str, torch.Tensor]:
    """Save a random model with transformers; return its tensors."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": N_COLORS + 1,
        "n_positions": RESOLUTION**2,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
    }
    model = ImageGPTForCausalImageModeling(ImageGPTConfig(**shape))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(path, **settings)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def write_index(path: Path, weight_map: object, name: str = INDEX) -> None:
    (path / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_same_logits(path: Path) -> ImageGPT:
    """Compare a directory as igpt and as transformers read it."""
    ours = ImageGPT.from_pretrained(path)
    theirs = ImageGPTForCausalImageModeling.from_pretrained(path).eval()
    tokens = torch.randint(
        0, N_COLORS, (2, RESOLUTION**2), generator=torch.Generator().manual_seed(0)
    )
    start = torch.full((2, 1), N_COLORS)
    with torch.no_grad():
        expected = theirs(torch.cat([start, tokens[:, :-1]], dim=1)).logits
        torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-4)
    return ours


def merge(source: Path, target: Path) -> None:
    for file in source.iterdir():
        shutil.copy(file, target / file.name)


@pytest.mark.parametrize("old", ["20KB", "1GB"])
@pytest.mark.parametrize("new", ["60KB", "1GB"])
def test_of_several_saves_in_one_folder_transformers_and_igpt_read_the_same(
    old: str, new: str, tmp_path: Path
) -> None:
    """In particular, model.safetensors has priority over an index."""
    first = save(tmp_path / "model", 1, max_shard_size=old)
    second = save(tmp_path / "new", 2, max_shard_size=new)
    merge(tmp_path / "new", tmp_path / "model")
    ours = assert_same_logits(tmp_path / "model")
    expected = first if (old, new) == ("1GB", "60KB") else second
    assert torch.equal(ours.wte.weight, expected["transformer.wte.weight"])


def split(path: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Store the weights of a directory in files of these names; return the file of every tensor."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {key: names[number % len(names)] for number, key in enumerate(sorted(tensors))}
    for name in names:
        some = {key: tensors[key] for key in tensors if weight_map[key] == name}
        if name.endswith(".bin"):
            torch.save(some, path / name)
        else:
            save_file(some, path / name, metadata={"format": "pt"})
    return weight_map


@pytest.mark.parametrize(
    ("names", "index"),
    [
        (("first.safetensors", "second.safetensors"), INDEX),
        (("model-00001-of-00009.safetensors",), INDEX),
        (("first.bin", "second.bin"), "pytorch_model.bin.index.json"),
    ],
)
def test_files_of_any_name_are_found(names: tuple[str, ...], index: str, tmp_path: Path) -> None:
    tensors = save(tmp_path, 3)
    write_index(tmp_path, split(tmp_path, names), index)
    ours = assert_same_logits(tmp_path)
    assert torch.equal(ours.wte.weight, tensors["transformer.wte.weight"])


def test_safetensors_have_priority_over_pickles(tmp_path: Path) -> None:
    tensors = save(tmp_path, 3)
    torch.save({"anything": 1}, tmp_path / "pytorch_model.bin")
    write_index(tmp_path, split(tmp_path, ("first.safetensors", "second.safetensors")))
    assert torch.equal(assert_same_logits(tmp_path).wte.weight, tensors["transformer.wte.weight"])


def test_the_file_named_in_config_json_is_read(tmp_path: Path) -> None:
    """As in transformers: before model.safetensors."""
    tensors = save(tmp_path, 3)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "other.safetensors")
    save(tmp_path / "new", 4)
    shutil.copy(tmp_path / "new" / "model.safetensors", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "transformers_weights": "other.safetensors"})
    )
    assert torch.equal(assert_same_logits(tmp_path).wte.weight, tensors["transformer.wte.weight"])
    for name, words in (
        ("none.safetensors", "none.safetensors, which config.json names, is missing"),
        (
            "../other.safetensors",
            "config.json names '../other.safetensors'; the plain name of a .safetensors file",
        ),
        (
            "pytorch_model.bin",
            "config.json names 'pytorch_model.bin'; the plain name of a .safetensors file",
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
        with pytest.raises(InputError, match=words):
            ImageGPT.from_pretrained(tmp_path)


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """Return a model in two files, and the index's map."""
    path = tmp_path / "model"
    save(path, 5)
    weight_map = split(path, ("first.safetensors", "second.safetensors"))
    write_index(path, weight_map)
    ImageGPT.from_pretrained(path)
    return path, weight_map


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        ImageGPT.from_pretrained(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_file_is_named(parts: tuple[Path, dict[str, str]]) -> None:
    path, _ = parts
    (path / "second.safetensors").unlink()
    assert refusal(path) == f"{path}: second.safetensors, which {INDEX} names, is missing"


def test_a_tensor_that_is_not_in_its_file_is_named(parts: tuple[Path, dict[str, str]]) -> None:
    path, weight_map = parts
    name = "transformer.wpe.weight"
    other = next(file for file in set(weight_map.values()) if file != weight_map[name])
    write_index(path, {**weight_map, name: other})
    assert f"{name} is not in {other}" in refusal(path)
    write_index(path, {**weight_map, "transformer.more": other})
    assert f"transformer.more is not in {other}" in refusal(path)


def test_a_tensor_in_two_files_is_named(parts: tuple[Path, dict[str, str]]) -> None:
    path, _ = parts
    first, second = (load_file(path / f"{name}.safetensors") for name in ("first", "second"))
    name = sorted(first)[0]
    save_file({**second, name: first[name]}, path / "second.safetensors", metadata={"format": "pt"})
    assert refusal(path) == f"{path}: {name} is both in first.safetensors and in second.safetensors"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not readable as JSON"),
        ("[]", "should hold a JSON object (index of weights)"),
        ("{}", "the key 'weight_map' is missing"),
        ('{"weight_map": []}', "weight_map = []"),
        ('{"weight_map": {}}', "weight_map is empty"),
        ('{"weight_map": {"a": 1}}', "weight_map.a = 1"),
        (
            '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
            "the key 'a' occurs twice",
        ),
        *(
            (
                json.dumps({"weight_map": {"a": name}}),
                f"weight_map names {name!r}; the plain name of a .safetensors",
            )
            for name in (
                "../first.safetensors",
                "/etc/first.safetensors",
                "parts/first.safetensors",
                "parts\\first.safetensors",
                "..",
                "",
                "*.safetensors",
                "first.safetensors\0",
                "first.bin",
            )
        ),
    ],
)
def test_a_malformed_index_is_one_line(
    text: str, words: str, parts: tuple[Path, dict[str, str]]
) -> None:
    path, _ = parts
    (path / INDEX).write_text(text)
    assert str(path / INDEX) in refusal(path)
    assert words in refusal(path)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cases") / "weights"
    reported_cases.weights_index(folder)
    return folder


@pytest.mark.parametrize("name", ["stale-and-new", "named", "new"])
def test_of_reported_folders_the_weights_of_the_index_are_read(reported: Path, name: str) -> None:
    path = reported / name
    ours = ImageGPT.from_pretrained(path)
    theirs = ImageGPTForCausalImageModeling.from_pretrained(path).eval()
    tokens = torch.randint(0, 16, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(torch.cat([torch.full((2, 1), 16), tokens[:, :-1]], dim=1)).logits
        torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-3)
    newest = ImageGPT.from_pretrained(reported / "new").state_dict()
    assert all(torch.equal(tensor, newest[key]) for key, tensor in ours.state_dict().items())


def test_a_missing_part_in_a_reported_index_is_refused(reported: Path, tmp_path: Path) -> None:
    for file in (reported / "named").iterdir():
        if file.name != "second.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(
        InputError,
        match=r"second\.safetensors, which model\.safetensors\.index\.json names, is missing",
    ):
        ImageGPT.from_pretrained(tmp_path)
