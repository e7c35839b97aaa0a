"""Model directories: saved models are read, damaged ones are refused in one sentence."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from igpt.data.images.palette import Palette
from igpt.errors import InputError
from igpt.model.config import ModelConfig
from igpt.model.transformer import ImageGPT

N_COLORS = 11


def make_model(seed: int, **settings: object) -> ImageGPT:
    """Return a model in which every weight is random, and its palette."""
    shape = {"resolution": 4, "n_colors": N_COLORS, "n_layer": 2, "n_embd": 24, "n_head": 3}
    palette = Palette.from_centers(np.random.default_rng(seed).uniform(-1, 1, (N_COLORS, 3)))
    model = ImageGPT(ModelConfig.model_validate({**shape, **settings}), palette)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def assert_same(read: ImageGPT, written: ImageGPT) -> None:
    assert read.config == written.config
    assert read.palette is not None
    assert written.palette is not None
    assert read.palette.fingerprint == written.palette.fingerprint
    expected = written.state_dict()
    assert list(read.state_dict()) == list(expected)
    for name, tensor in read.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"objective": "bert"},
        {"bias": True},
        {"class_names": ("cat", "dog", "ship")},
        {"class_names": tuple(f"class {i}" for i in range(12))},  # "10" sorts before "2"
        {"n_layer": 12},
    ],
    ids=str,
)
def test_round_trip_is_bitwise(settings: dict[str, object], tmp_path: Path) -> None:
    model = make_model(1, **settings)
    model.save_pretrained(tmp_path / "model")
    read = ImageGPT.from_pretrained(tmp_path / "model")
    assert_same(read, model)
    assert not read.training
    assert all(parameter.requires_grad for parameter in read.parameters())
    assert {file.name for file in (tmp_path / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }


def test_a_model_without_palette_has_none_when_read(tmp_path: Path) -> None:
    ImageGPT(make_model(1).config).save_pretrained(tmp_path / "model")
    assert ImageGPT.from_pretrained(tmp_path / "model").palette is None


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_weights_of_other_types_become_float32_with_the_same_values(
    dtype: torch.dtype, ending: str, tmp_path: Path
) -> None:
    make_model(2).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    stored = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(stored, file) if ending == "safetensors" else torch.save(
        stored, file.with_name("pytorch_model.bin")
    )
    if ending == "bin":
        file.unlink()
    read = ImageGPT.from_pretrained(tmp_path / "model")
    assert {parameter.dtype for parameter in read.parameters()} == {torch.float32}
    assert torch.equal(read.wte.weight, stored["transformer.wte.weight"].float())
    assert torch.equal(
        read.h[1].mlp.c_fc.weight, stored["transformer.h.1.mlp.c_fc.weight"].float().t()
    )


def test_mixed_types_become_float32(tmp_path: Path) -> None:
    model = make_model(2)
    for index, parameter in enumerate(model.parameters()):
        parameter.data = parameter.data.bfloat16().to(
            (torch.float32, torch.bfloat16, torch.float64)[index % 3]
        )
    model.save_pretrained(tmp_path / "model")
    assert_same(ImageGPT.from_pretrained(tmp_path / "model"), model.float())


def test_float64_weights_beyond_float32_are_refused_unless_asked_for(tmp_path: Path) -> None:
    model = make_model(2).double()
    model.ln_f.weight.data[3] += 1e-12
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(
        InputError,
        match=r"transformer\.ln_f\.weight in .* is stored as float64 with values that float32",
    ):
        ImageGPT.from_pretrained(tmp_path / "model")
    assert_same(ImageGPT.from_pretrained(tmp_path / "model", dtype=torch.float64), model)
    with pytest.raises(InputError, match=r"read as torch[.]float32 or torch[.]float64, not as"):
        ImageGPT.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)


def test_weights_that_are_not_finite_can_be_inspected(tmp_path: Path) -> None:
    model = make_model(2).double()
    model.ln_f.weight.data[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    model.save_pretrained(tmp_path / "model")
    read = ImageGPT.from_pretrained(tmp_path / "model").ln_f.weight[:3]
    assert read[0].isnan()
    assert read[1:].tolist() == [torch.inf, -torch.inf]


def test_saving_over_the_directory_that_was_read(tmp_path: Path) -> None:
    make_model(3).save_pretrained(tmp_path / "model")
    model = ImageGPT.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "model")
    read = ImageGPT.from_pretrained(tmp_path / "model").state_dict()
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor)
        assert torch.equal(model.state_dict()[name], tensor)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_the_current_directory_and_links_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_model(4), make_model(5)
    (tmp_path / "model").mkdir()
    (tmp_path / "latest").symlink_to("model")
    monkeypatch.chdir(tmp_path / "model")
    first.save_pretrained(".")
    monkeypatch.chdir(tmp_path / "model")  # the folder was replaced
    assert_same(ImageGPT.from_pretrained("."), first)
    second.save_pretrained(tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert_same(ImageGPT.from_pretrained(tmp_path / "latest"), second)
    assert_same(ImageGPT.from_pretrained(tmp_path / "model"), second)


def test_other_directories_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("years of work")
    for taken, words in (
        (tmp_path, "holds something else than a model"),
        (tmp_path / "config.json", "is a file"),
    ):
        with pytest.raises(InputError, match=words):
            make_model(6).save_pretrained(taken)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "years of work"


def test_reading_does_not_disturb_a_save_in_progress(tmp_path: Path) -> None:
    model = make_model(7)
    model.save_pretrained(tmp_path / "model")
    unfinished = tmp_path / ".model.0a1b2c3d.tmp"
    unfinished.mkdir()
    assert_same(ImageGPT.from_pretrained(tmp_path / "model"), model)
    assert unfinished.is_dir()


# Frequent mistakes. Each function damages a valid directory; the message must contain the words
# next to it.


def edit_json(name: str, change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        values = json.loads((path / name).read_text())
        change(values)
        (path / name).write_text(json.dumps(values))

    return damage


def edit_config(**values: object) -> Callable[[Path], None]:
    return edit_json("config.json", lambda config: config.update(values))


def edit_clusters(clusters: object) -> Callable[[Path], None]:
    return edit_json(
        "preprocessor_config.json", lambda preprocessor: preprocessor.update(clusters=clusters)
    )


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = {
            name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()
        }
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return damage


def truncate(name: str, keep: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: int(len(content) * keep)])

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def pickle(value: object) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / "model.safetensors").unlink()
        torch.save(value, path / "pytorch_model.bin")

    return damage


def unpicklable(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"no pickle")


def pickle_fifo(path: Path) -> None:
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "pytorch_model.bin")


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes(content)


def write_twice(path: Path) -> None:
    """Write a class number twice, which a dictionary cannot represent."""
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text.replace('"0": "cat"', '"0": "bird", "0": "cat"'))


def header(content: bytes) -> Callable[[Path], None]:
    """Write weights with the given header and 12 bytes of values."""
    return write("model.safetensors", len(content).to_bytes(8, "little") + content + bytes(12))


def sparse(name: str) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / name, 5 * 10**9)


def fifo(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / name).unlink()
        os.mkfifo(path / name)

    return damage


def folder(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / name).unlink()
        (path / name).mkdir()

    return damage


def as_type(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], None]:
    """Change the type of one matrix."""
    return lambda tensors: tensors.update({QUERIES: tensors[QUERIES].to(dtype)})


def edit_size(size: object) -> Callable[[Path], None]:
    return edit_json(
        "preprocessor_config.json", lambda preprocessor: preprocessor.update(size=size)
    )


GAIN, QUERIES = "transformer.h.1.ln_1.weight", "transformer.h.0.attn.c_attn.weight"
DAMAGES = {
    "no folder": (shutil.rmtree, "no model directory"),
    "no config": (remove("config.json"), "config.json is missing"),
    "config cut off": (truncate("config.json", 0.5), "is it cut off"),
    "config is a list": (
        lambda path: (path / "config.json").write_text("[1]"),
        "should hold a JSON object",
    ),
    "another model": (edit_config(model_type="gpt2"), "of type 'gpt2'; 'imagegpt' is needed"),
    "no model type": (
        edit_json("config.json", lambda config: config.pop("model_type")),
        "'imagegpt' is needed",
    ),
    "later format": (edit_config(igpt={"version": 3}), "format version 3; this igpt reads 1 and 2"),
    "no format": (
        edit_config(igpt="new"),
        "config.json: igpt = 'new': Input should be a valid dictionary",
    ),
    "unknown objective": (
        edit_config(igpt={"version": 1, "objective": "diffusion"}),
        "igpt.objective = 'diffusion'",
    ),
    "other resolution": (
        edit_config(igpt={"resolution": 5}),
        "igpt.resolution = 5, but n_positions = 16 is 4^2",
    ),
    "variant of another type": (
        edit_config(igpt={"positions": "rotary"}),
        "a variant has model_type = 'igpt'",
    ),
    **{
        f"no {key}": (
            edit_json("config.json", lambda config, key=key: config.pop(key)),
            f"the key {key!r} is missing",
        )
        for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    },
    "width in words": (
        edit_config(n_embd="wide"),
        "config.json: n_embd = 'wide': Input should be a valid integer",
    ),
    "width as a bool": (
        edit_config(n_embd=True),
        "config.json: n_embd = True: Input should be a valid integer",
    ),
    "width in digits": (edit_config(n_embd=10**4000), "n_embd = 1000"),
    "width in too many digits": (
        write("config.json", b'{"n_embd": ' + b"9" * 5000 + b"}"),
        "not readable as JSON",
    ),
    "width that is no number": (
        edit_config(n_embd=math.nan),
        "n_embd = nan: Input should be a valid integer",
    ),
    "deep config": (write("config.json", b'{"a":' * 10**5), "is nested too deeply to be a model"),
    "config in another encoding": (
        write("config.json", '{"model_type": "\xe9"}'.encode("latin-1")),
        "readable as text",
    ),
    "config of gigabytes": (
        sparse("config.json"),
        "config.json has 5,000,000,000 bytes; that is no model",
    ),
    "config is a FIFO": (fifo("config.json"), "config.json is a FIFO; a regular file is needed"),
    "config is a folder": (folder("config.json"), "config.json is a folder"),
    "tied embeddings": (edit_config(tie_word_embeddings=True), "has tie_word_embeddings = True"),
    "scale in words": (edit_config(scale_attn_weights="no"), "scale_attn_weights = 'no'"),
    "cross-attention": (
        edit_config(add_cross_attention=True),
        "add_cross_attention = True, which iGPT does not have",
    ),
    "epsilon that is no number": (
        edit_config(layer_norm_epsilon=math.nan),
        "layer_norm_epsilon = nan",
    ),
    "no positions": (edit_config(n_positions=-16), "n_positions = -16"),
    "no colours": (edit_config(vocab_size=1), "vocab_size = 1"),
    "no square": (edit_config(n_positions=15), "n_positions = 15"),
    "heads": (edit_config(n_head=5), "5 heads do not divide a width of 24"),
    "other activation": (
        edit_config(activation_function="gelu_new"),
        "activation_function = 'gelu_new'",
    ),
    "narrow MLP": (edit_config(n_inner=48), "n_inner = 48"),
    "unscaled": (edit_config(scale_attn_weights=False), "scale_attn_weights = False"),
    "scaled by layer": (
        edit_config(scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx = True",
    ),
    "other epsilon": (edit_config(layer_norm_epsilon=1e-6), "layer_norm_epsilon = 1e-06"),
    "more layers": (edit_config(n_layer=3), "h.2.attn.c_attn.weight is missing"),
    "fewer layers": (edit_config(n_layer=1), "nothing is expected"),
    "more classes": (edit_config(id2label={"0": "a", "1": "b", "2": "c"}), "score.weight"),
    "no classes": (
        edit_json("config.json", lambda config: config.pop("id2label")),
        "id2label = None",
    ),
    "classes in words": (edit_config(id2label={"cat": "cat", "dog": "dog"}), "classes by number"),
    "classes in numbers": (edit_config(id2label={"0": 0, "1": 1}), "id2label.0 = 0"),
    "classes with a gap": (
        edit_config(id2label={"0": "cat", "2": "dog"}),
        "classes by number, from 0 on",
    ),
    "a class twice": (
        edit_config(id2label={"0": "cat", "00": "dog"}),
        "classes by number, from 0 on",
    ),
    "a class key twice": (write_twice, "the key '0' occurs twice"),
    "a class name twice": (
        edit_config(id2label={"0": "cat", "1": "cat"}),
        "two classes named 'cat'",
    ),
    "a list of classes": (edit_config(id2label=["cat", "dog"]), "id2label = ['cat', 'dog']"),
    "classes without a head": (
        edit_tensors(lambda tensors: tensors.pop("score.weight")),
        "score.weight is missing",
    ),
    "no weights": (remove("model.safetensors"), "model.safetensors is missing"),
    "weights cut off": (truncate("model.safetensors", 0.9), "is damaged"),
    "weights cut off early": (truncate("model.safetensors", 0.01), "is damaged"),
    "weights empty": (truncate("model.safetensors", 0), "is damaged"),
    "weights are a FIFO": (
        fifo("model.safetensors"),
        "model.safetensors is a FIFO; a regular file is needed",
    ),
    "long header": (header(b" " * (9 << 20)), "has a header of 9,437,184 bytes"),
    "header beyond the file": (write("model.safetensors", b"\xff" * 100), "is damaged"),
    "header that is no JSON": (header(b"{}{}{}{}"), "is damaged"),
    "deep header": (header(b'{"a":' * 10**5), "is damaged"),
    "shapes beyond the file": (
        header(b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'),
        "is damaged",
    ),
    "integers": (
        edit_tensors(as_type(torch.int8)),
        "is stored as i8; floating-point weights are needed",
    ),
    "flags": (
        edit_tensors(as_type(torch.bool)),
        "is stored as bool; floating-point weights are needed",
    ),
    "complex numbers": (
        edit_tensors(as_type(torch.complex64)),
        "is stored as c64; floating-point weights are needed",
    ),
    "one name twice": (
        edit_tensors(lambda tensors: tensors.update({"ln_f.weight": torch.ones(24)})),
        "ln_f.weight and transformer.ln_f.weight name the same tensor",
    ),
    "prefix twice": (
        edit_tensors(lambda tensors: tensors.update({f"transformer.{GAIN}": tensors.pop(GAIN)})),
        "h.1.ln_1.weight is missing, (24,)",
    ),
    "tensor of nothing": (
        edit_tensors(lambda tensors: tensors.update({GAIN: torch.ones(0)})),
        "is (0,), (24,)",
    ),
    "tensor missing": (
        edit_tensors(lambda tensors: tensors.pop(GAIN)),
        "h.1.ln_1.weight is missing, (24,)",
    ),
    "tensor too many": (
        edit_tensors(lambda tensors: tensors.update(more=torch.ones(2))),
        "more is (2,), nothing",
    ),
    "tensor misshapen": (
        edit_tensors(lambda tensors: tensors.update({GAIN: torch.ones(7)})),
        "is (7,), (24,)",
    ),
    "matrix misshapen": (
        edit_tensors(lambda tensors: tensors.update({QUERIES: torch.ones(3, 5)})),
        "is (5, 3)",
    ),
    "matrix of three axes": (
        edit_tensors(lambda tensors: tensors.update({QUERIES: torch.ones(3, 5, 7)})),
        "(3, 5, 7)",
    ),
    "pickle of a list": (pickle([1, 2]), "something else than named tensors"),
    "pickle of more": (
        pickle({"model": {"wte.weight": torch.ones(2)}, "step": 3}),
        "else than named tensors",
    ),
    "pickle that would run code": (pickle({"wte.weight": os.getcwd}), "cannot be read safely"),
    "no pickle": (unpicklable, "cannot be read safely"),
    "pickle is a FIFO": (pickle_fifo, "pytorch_model.bin is a FIFO; a regular file is needed"),
    "pickle of numbered tensors": (pickle({1: torch.ones(2)}), "something else than named tensors"),
    "pickle larger than stored": (
        pickle({"wte.weight": torch.ones(1).expand(10**9, 10**3)}),
        "than its stored values",
    ),
    "sparse pickle": (
        pickle({"wte.weight": torch.ones(2, 2).to_sparse()}),
        "a tensor without plain values",
    ),
    "pickle without values": (
        pickle({"wte.weight": torch.ones(2, device="meta")}),
        "a tensor without plain values",
    ),
    "palette cut off": (truncate("preprocessor_config.json", 0.5), "is it cut off"),
    "palette of another size": (
        edit_clusters([[0.0, 0.0, 0.0]]),
        "the palette has 1 colours, the model 11",
    ),
    "palette out of range": (edit_clusters([[0.0, 0.0, 255.0]] * 11), "lie in [-1, 1]"),
    "palette ragged": (edit_clusters([[0.0, 0.0], [1.0]]), "clusters.0 = [0.0, 0.0]"),
    "palette in words": (edit_clusters([["red", "green", "blue"]]), "clusters.0.0 = 'red'"),
    "palette of nothing": (edit_clusters([[None, None, None]]), "clusters.0.0 = None"),
    "palette of digits": (edit_clusters([["0", "0", "0"]] * 11), "clusters.0.0 = '0'"),
    "palette of flags": (edit_clusters([[True, True, True]] * 11), "clusters.0.0 = True"),
    "palette that is no number": (edit_clusters([[math.nan] * 3] * 11), "are no palette"),
    "palette is a FIFO": (fifo("preprocessor_config.json"), "preprocessor_config.json is a FIFO"),
    "size in words": (edit_size("small"), "preprocessor_config.json: size"),
    "size of one side": (edit_size({"height": 4}), "preprocessor_config.json: "),
    "another size": (
        edit_size({"height": 4, "width": 5}),
        "has a size of 4 x 5 pixels; the model has 4 x 4",
    ),
    "another size, in the old way": (
        edit_size(32),
        "has a size of 32 x 32 pixels; the model has 4 x 4",
    ),
}


@pytest.fixture(scope="module")
def good_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "model"
    make_model(8, class_names=("cat", "dog")).save_pretrained(path)
    return path


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_mistakes_are_described_in_one_sentence(
    good_directory: Path, damage: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    shutil.copytree(good_directory, path)
    ImageGPT.from_pretrained(path)
    damage(path)
    with pytest.raises(InputError) as caught:
        ImageGPT.from_pretrained(path)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert len(message) < 300 + len(str(path))


class Intruder:
    """Make a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_executes_no_code(good_directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(good_directory, path)
    tensors = load_file(path / "model.safetensors")
    torch.save({**tensors, "more": Intruder(tmp_path / "made")}, path / "pytorch_model.bin")
    ImageGPT.from_pretrained(path)  # it is not read if there is safetensors
    (path / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "pytorch_model-00001-of-00001.bin"):
        with pytest.raises(InputError, match="cannot be read safely; convert it to safetensors"):
            ImageGPT.from_pretrained(path)
        assert not (tmp_path / "made").exists()
        (path / "pytorch_model.bin").replace(path / name)
    index = {"weight_map": {"more": name}}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="cannot be read safely; convert it to safetensors"):
        ImageGPT.from_pretrained(path)
    assert not (tmp_path / "made").exists()
    torch.load(path / name, weights_only=False)
    assert (tmp_path / "made").exists(), "the attack works if the file is unpickled"


@pytest.mark.parametrize(("stem", "ending"), [("model", "safetensors"), ("pytorch_model", "bin")])
def test_weights_in_several_files(
    good_directory: Path, stem: str, ending: str, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    shutil.copytree(good_directory, path)
    whole, tensors = ImageGPT.from_pretrained(path), load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    for part in range(3):
        some = {name: tensors[name] for name in sorted(tensors)[part::3]}
        file = path / f"{stem}-{part + 1:05d}-of-00003.{ending}"
        save_file(some, file) if ending == "safetensors" else torch.save(some, file)
    assert_same(ImageGPT.from_pretrained(path), whole)
    (path / f"{stem}-00002-of-00003.{ending}").unlink()
    with pytest.raises(
        InputError, match=rf"{stem}-00002-of-00003.{ending} is missing \(1 of 3 files\)"
    ):
        ImageGPT.from_pretrained(path)


def test_parts_of_two_saves_without_an_index_are_refused(
    good_directory: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    shutil.copytree(good_directory, path)
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    ImageGPT.from_pretrained(path)
    shutil.copy(
        path / "model-00001-of-00001.safetensors", path / "model-00002-of-00002.safetensors"
    )
    with pytest.raises(InputError, match="weights in 1 and in 2 files, and no model"):
        ImageGPT.from_pretrained(path)


@pytest.mark.parametrize(
    "change",
    [
        {"n_layer": 10**9},
        {"n_embd": 3 * 2**29, "n_head": 2**20},
        {"n_embd": 10**12},
        {"vocab_size": 10**9},
        {"vocab_size": 65537},
        {"n_positions": 46340**2, "igpt": {"version": 1}},
        {"n_layer": 10**9, "n_embd": 3 * 2**29, "n_head": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_absurd_sizes_are_refused_before_a_model_is_built(
    good_directory: Path,
    change: dict[str, object],
    ending: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "model"
    shutil.copytree(good_directory, path)
    if ending == "bin":
        pickle(load_file(path / "model.safetensors"))(path)
    (path / "preprocessor_config.json").unlink()
    edit_config(n_inner=None, **change)(path)
    monkeypatch.setattr(ImageGPT, "__init__", lambda *_: pytest.fail("a model is built"))
    with pytest.raises(InputError, match=r"do not fit its config\.json|Input should be less than"):
        ImageGPT.from_pretrained(path)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": True},
        {"class_names": ("cat", "dog", "ship"), "objective": "bert"},
        {"positions": "rotary", "n_head": 2},
        {"value_residual": True, "n_layer": 3},
    ],
    ids=str,
)
def test_the_shapes_computed_without_a_model_are_those_of_the_model(
    settings: dict[str, object],
) -> None:
    model = make_model(1, **settings)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert dict(model.config.parameter_shapes()) == expected


def test_a_file_is_not_a_directory(good_directory: Path) -> None:
    with pytest.raises(InputError, match="no model directory"):
        ImageGPT.from_pretrained(good_directory / "model.safetensors")


# Interruptions

SAVE_FOR_EVER_AND_GET_KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from igpt.model.config import ModelConfig
from igpt.model.transformer import ImageGPT

torch.set_num_threads(1)
path = Path(sys.argv[1])
config = ModelConfig(resolution=4, n_colors=11, n_layer=2, n_embd=64, n_head=2)
model = ImageGPT(config)

def save(number):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(number)
    model.save_pretrained(path)

random.seed(0)
last = 1
save(last)
for _ in range(5):
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        while True:
            last += 1
            save(last)
            os.write(send, b"saved")
    os.read(receive, 1)  # the first save has come to its end
    time.sleep(random.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left = len([name for name in os.listdir(path.parent) if name != path.name])
    read = ImageGPT.from_pretrained(path).state_dict()
    numbers = {number for tensor in read.values() for number in tensor.unique().tolist()}
    assert len(numbers) == 1, numbers
    last = int(numbers.pop())
    print(last, left)
"""


def test_a_kill_during_saving_leaves_a_complete_model(tmp_path: Path) -> None:
    """Kill processes that save continuously; the model directory stays complete."""
    path = tmp_path / "model"
    command = [sys.executable, "-c", SAVE_FOR_EVER_AND_GET_KILLED, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    saved, left = zip(*(map(int, line.split()) for line in result.stdout.splitlines()), strict=True)
    assert len(saved) == 5
    assert list(saved) == sorted(set(saved)), "a model saved before a kill is lost"
    assert any(left), "no kill happened during a save"
    ImageGPT.from_pretrained(path).save_pretrained(path)
    assert [file.name for file in tmp_path.iterdir()] == ["model"], (
        "a later save removes what kills left behind"
    )


def test_after_a_kill_between_the_two_renames_the_old_model_is_read_and_the_next_save_is_complete(
    tmp_path: Path,
) -> None:
    path, model, newer = tmp_path / "model", make_model(9), make_model(10)
    model.save_pretrained(path)
    path.rename(tmp_path / ".model.old")
    assert_same(ImageGPT.from_pretrained(path), model)
    assert [file.name for file in tmp_path.iterdir()] == [".model.old"], "reading changes nothing"
    newer.save_pretrained(path)
    assert_same(ImageGPT.from_pretrained(path), newer)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


# The Hub


@pytest.mark.parametrize(
    "name", ["someone/model/part", "nowhere", "./someone/model", "/someone/model", "~/someone"]
)
def test_invalid_hub_ids_are_not_requested(name: str) -> None:
    with pytest.raises(InputError, match="no model directory"):
        ImageGPT.from_pretrained(name)


@pytest.mark.parametrize(
    "name", ["my models/best", "someone/my model", "someone/a..b", "a*/b", "someone/\u00e9"]
)
def test_a_path_that_cannot_be_a_hub_id_is_reported_as_a_path(name: str) -> None:
    with pytest.raises(
        InputError,
        match=r"no model directory .* here, and .* is not a valid name of a model on the Hub",
    ):
        ImageGPT.from_pretrained(name)


ASK_THE_HUB = """
from igpt.errors import InputError
from igpt.model.transformer import ImageGPT
try:
    ImageGPT.from_pretrained("someone/model")
except InputError as error:
    print(error)
"""


def test_an_unreachable_hub_is_given_up_soon(tmp_path: Path) -> None:
    """Three networks, made with proxies: closed, refusing, and silent (packets are dropped).

    The connections are counted, because seconds depend on the load of the machine.
    """
    connections: dict[str, list[socket.socket]] = {"refusing": [], "silent": []}

    def serve(server: socket.socket, kind: str, answer: bytes | None) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connections[kind].append(connection)
            if answer is not None:
                connection.recv(4096)
                connection.sendall(answer)
                connection.close()

    answers = {
        "closed": None,
        "refusing": b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
        "silent": None,
    }
    servers, processes = {}, {}
    for kind, answer in answers.items():
        servers[kind] = socket.create_server(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{servers[kind].getsockname()[1]}"
        if kind == "closed":
            servers[kind].close()
        else:
            threading.Thread(target=serve, args=(servers[kind], kind, answer), daemon=True).start()
        environment = {
            name: value for name, value in os.environ.items() if "proxy" not in name.lower()
        }
        environment |= {"HTTPS_PROXY": proxy, "HF_HOME": str(tmp_path), "HF_HUB_ETAG_TIMEOUT": "1"}
        environment.pop("HF_HUB_OFFLINE", None)
        processes[kind] = subprocess.Popen(
            [sys.executable, "-c", ASK_THE_HUB],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
    try:
        for kind, process in processes.items():
            output, errors = process.communicate(timeout=120)
            message = output.decode().strip()
            assert process.returncode == 0, errors.decode()
            assert "no model directory someone/model here, and the Hub cannot give it" in message, (
                kind
            )
            assert "there is no network, or it broke" in message, kind
            assert message.endswith("/someone/model) and give the path of their folder")
            assert "\n" not in message
        counts = {kind: len(made) for kind, made in connections.items()}
        assert all(1 <= count <= 4 for count in counts.values()), counts
    finally:
        for process in processes.values():
            process.kill()
        for server in servers.values():
            server.close()
