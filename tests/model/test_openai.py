"""OpenAI's checkpoints: read like TensorFlow reads them, and computed like their graph computes
them.

The checkpoints in fixtures/openai were written by TensorFlow from the released graph (see its
README). `write_bundle` below writes other ones byte by byte, following the definition of the
format.
"""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from igpt.data.images.palette import Palette
from igpt.errors import InputError
from igpt.model.config import ModelConfig
from igpt.model.cost import count_parameters
from igpt.model.openai import _infer_config, _masked_crc32c, _read_index, load_openai, read_bundle
from igpt.model.transformer import ImageGPT

FIXTURES = Path(__file__).parents[1] / "fixtures" / "openai"
OBJECTIVES = ("autoregressive", "bert")
RESULTS = {"tokens", "logits", "mask"}  # in expected.npz, but not variables


def expected_of(objective):
    with np.load(FIXTURES / objective / "expected.npz") as arrays:
        return dict(arrays)


def logits_of(model, expected, objective):
    mask = torch.from_numpy(expected["mask"]) if objective == "bert" else None
    with torch.no_grad():
        return model(torch.from_numpy(expected["tokens"].astype(np.int64)), mask).numpy()


@pytest.fixture
def checkpoint(tmp_path):
    """Return a copy of the autoregressive checkpoint that may be damaged."""
    shutil.copytree(FIXTURES / "autoregressive", tmp_path / "copy")
    return tmp_path / "copy" / "model.ckpt-7"


def refusal(call, *arguments, **options):
    """Return the single sentence with which a call is refused."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The graph, from OpenAI's definitions, in float64 (B batch, n positions, D width, H heads, K head
# width).


def norm(x, gain):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def graph_logits(variables, tokens, mask=None):
    weights = {
        name.removeprefix("model/"): values.astype(np.float64) for name, values in variables.items()
    }
    x = weights["wte"][tokens]  # [B, n, D]
    if mask is None:
        start = np.broadcast_to(weights["sos"], (len(tokens), 1, x.shape[-1]))
        x = np.concatenate([start, x[:, :-1]], axis=1)
    else:
        x = x * ~mask[..., None]
    x = x + weights["wpe"]
    layer = 0
    while f"h{layer}/ln_1/g" in weights:
        block = {name.removeprefix(f"h{layer}/"): values for name, values in weights.items()}
        normed = norm(x, block["ln_1/g"])
        q, k, v = (
            np.einsum("bsf,hef->bhse", normed, block[f"attn/{name}_proj"]) for name in "qkv"
        )  # [B, H, n, K]
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(v.shape[-1])
        if mask is None:
            scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -1e10)
        x = x + np.einsum("bhse,hef->bsf", softmax(scores) @ v, block["attn/c_proj"])
        inner = norm(x, block["ln_2/g"]) @ block["mlp/c_fc/w"]
        x = x + inner / (1 + np.exp(-1.702 * inner)) @ block["mlp/c_proj/w"]
        layer += 1
    return norm(x, weights["ln_f/g"]) @ weights["wtet"].T


# The format, from its definition (LevelDB's table_format.md, TensorFlow's tensor_bundle.proto).


def masked_crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(number):
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def nested(field, content):
    return varint(field << 3 | 2) + varint(len(content)) + content


def entry(kind, shape, offset, size, checksum):
    """Return what an index contains about a variable."""
    sides = b"".join(nested(2, b"\x08" + varint(side)) for side in shape)
    place = b"\x20" + varint(offset) + b"\x28" + varint(size)
    return b"\x08" + varint(kind) + nested(2, sides) + place + b"\x35" + struct.pack("<I", checksum)


def write_bundle(prefix, arrays, *, rows_per_block=100, compression=0, header=b"\x08\x01"):
    """Write a checkpoint of one shard. `arrays`: by name; `header`: states one shard only."""
    data, rows = b"", {"": header}
    kinds = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19}
    for name, array in sorted(arrays.items()):
        content = array.tobytes()
        rows[name] = entry(
            kinds[str(array.dtype)], array.shape, len(data), len(content), masked_crc32c(content)
        )
        data += content
    prefix.with_name(prefix.name + ".data-00000-of-00001").write_bytes(data)
    return write_index(prefix, rows, rows_per_block, compression)


def write_zeros(prefix, shapes):
    """Write a checkpoint of float32 zeros, whose data are sparse on the disk."""
    size, rows, checksums = 0, {"": b"\x08\x01"}, {}
    for name, shape in sorted(shapes.items()):
        count = 4 * math.prod(shape)
        if count not in checksums:
            checksums[count] = _masked_crc32c(bytes(count))
        rows[name] = entry(1, shape, size, count, checksums[count])
        size += count
    with prefix.with_name(prefix.name + ".data-00000-of-00001").open("wb") as file:
        file.truncate(size)
    return write_index(prefix, rows)


def write_index(prefix, rows, rows_per_block=100, compression=0):
    table = b""

    def add_block(pairs):
        nonlocal table
        block, last = b"", b""
        for key, value in pairs:
            shared = max(size for size in range(len(key) + 1) if last.startswith(key[:size]))
            block += (
                varint(shared)
                + varint(len(key) - shared)
                + varint(len(value))
                + key[shared:]
                + value
            )
            last = key
        block += struct.pack("<II", 0, 1)  # one restart point: the first
        handle = varint(len(table)) + varint(len(block))
        block += bytes([compression])
        table += block + struct.pack("<I", masked_crc32c(block))
        return handle

    meta_index = add_block([])
    pairs = [(name.encode(), value) for name, value in rows.items()]
    blocks = [
        pairs[first : first + rows_per_block] for first in range(0, len(pairs), rows_per_block)
    ]
    leaves = [(block[-1][0], add_block(block)) for block in blocks]
    footer = meta_index + add_block(leaves)
    prefix.with_name(prefix.name + ".index").write_bytes(
        table + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    )
    return prefix


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_variables_equal_those_that_tensorflow_reads(objective):
    expected = {
        name: values for name, values in expected_of(objective).items() if name not in RESULTS
    }
    found = read_bundle(FIXTURES / objective / "model.ckpt-7")
    assert found.keys() == expected.keys()  # neither the string nor the variable in slices
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_logits_equal_those_of_the_released_graph(objective):
    expected = expected_of(objective)
    model = load_openai(FIXTURES / objective / "model.ckpt-7", None, objective=objective)
    np.testing.assert_allclose(
        logits_of(model, expected, objective), expected["logits"], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_logits_in_float64_equal_those_of_the_definitions(objective):
    expected = expected_of(objective)
    model = load_openai(FIXTURES / objective / "model.ckpt-7", None, objective=objective).double()
    variables = {name: values for name, values in expected.items() if name.startswith("model/")}
    wanted = graph_logits(variables, expected["tokens"], expected.get("mask"))
    assert wanted.std() > 0.3
    np.testing.assert_allclose(logits_of(model, expected, objective), wanted, rtol=0, atol=1e-9)


def test_model_has_the_checkpoint_s_sizes_and_can_be_trained_and_saved(tmp_path):
    levels = np.linspace(-1, 1, 8, dtype=np.float32)[:, None].repeat(3, axis=1)
    np.save(tmp_path / "kmeans_centers.npy", levels)
    prefix = FIXTURES / "autoregressive" / "model.ckpt-7"
    model = load_openai(prefix, tmp_path / "kmeans_centers.npy")
    config = model.config
    assert (config.resolution, config.n_colors, config.n_layer, config.n_embd, config.n_head) == (
        4,
        8,
        2,
        16,
        2,
    )
    assert not model.training
    for parameter in model.parameters():
        assert parameter.requires_grad
        assert parameter.is_contiguous()
        assert parameter.dtype == torch.float32
    model.save_pretrained(tmp_path / "model")
    again = ImageGPT.from_pretrained(tmp_path / "model")
    assert again.palette is not None
    assert again.palette.fingerprint == Palette.from_centers(levels).fingerprint
    expected = expected_of("autoregressive")
    assert (logits_of(again, expected, "") == logits_of(model, expected, "")).all()


def test_checksums_and_values_of_every_length_and_many_blocks(tmp_path):
    random = np.random.default_rng(0)
    arrays = {
        f"a/{size}": random.standard_normal(size).astype(np.float16)
        for size in (*range(1, 40), 1001)
    }
    arrays |= {"many": random.integers(-9, 9, [3, 0, 2]), "step": np.array(2**40)}
    found = read_bundle(write_bundle(tmp_path / "x", arrays, rows_per_block=7))
    assert found.keys() == arrays.keys()
    for name, values in arrays.items():
        assert found[name].shape == values.shape
        assert found[name].tobytes() == values.tobytes()


def test_published_check_value_of_the_checksum():
    assert (
        masked_crc32c(b"123456789")
        == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) & 0xFFFFFFFF
    )


def test_missing_index(tmp_path):
    message = refusal(load_openai, tmp_path / "model.ckpt-7.index", None)
    assert "model.ckpt-7.index.index is missing" in message
    assert "without endings" in message
    assert "is missing" in refusal(read_bundle, Path())


@pytest.mark.parametrize("content", [b"", b"no table at all" * 9])
def test_index_of_another_format(tmp_path, content):
    (tmp_path / "x.index").write_bytes(content)
    assert "not the index of a TensorFlow checkpoint" in refusal(read_bundle, tmp_path / "x")


def test_truncated_index(checkpoint):
    index = Path(f"{checkpoint}.index")
    index.write_bytes(index.read_bytes()[:-20])
    assert "is cut off" in refusal(load_openai, checkpoint, None)


def test_index_without_its_beginning(checkpoint):
    index = Path(f"{checkpoint}.index")
    index.write_bytes(index.read_bytes()[100:])
    assert "is damaged" in refusal(load_openai, checkpoint, None)


def test_every_changed_byte_of_an_index_s_blocks_is_detected(tmp_path):
    prefix = write_bundle(tmp_path / "x", {"a": np.ones(2, np.float32)})
    index = Path(f"{prefix}.index")
    content = index.read_bytes()
    # All but the empty meta-index at the beginning, its handle, and the end of the footer.
    for position in (*range(13, len(content) - 48), len(content) - 46, len(content) - 45):
        changed = bytearray(content)
        changed[position] ^= 0x55
        index.write_bytes(changed)
        assert "is damaged" in refusal(read_bundle, prefix)


def test_compressed_index(tmp_path):
    assert "is compressed" in refusal(read_bundle, write_bundle(tmp_path / "x", {}, compression=1))


def test_table_that_is_not_a_checkpoint(tmp_path):
    assert "is damaged" in refusal(read_bundle, write_bundle(tmp_path / "x", {}, header=b""))


def test_missing_shard(checkpoint):
    Path(f"{checkpoint}.data-00001-of-00002").unlink()
    assert "data-00001-of-00002 is missing; all 00002 data files" in refusal(
        load_openai, checkpoint, None
    )


def test_truncated_shard(checkpoint):
    shard = Path(f"{checkpoint}.data-00000-of-00002")
    shard.write_bytes(shard.read_bytes()[:5000])
    assert "data-00000-of-00002 is cut off" in refusal(load_openai, checkpoint, None)


def test_damaged_shard(checkpoint):
    shard = Path(f"{checkpoint}.data-00000-of-00002")
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    assert "data-00000-of-00002 is damaged" in refusal(load_openai, checkpoint, None)


@pytest.mark.parametrize("ending", [".index", ".data-00000-of-00002"])
def test_paths_that_are_not_regular_files(checkpoint, ending):
    file = Path(f"{checkpoint}{ending}")
    file.unlink()
    os.mkfifo(file)
    assert f"{file} is a FIFO; a regular file is needed" in refusal(load_openai, checkpoint, None)
    file.unlink()
    file.symlink_to("/dev/zero")
    assert f"{file} is a device; a regular file is needed" in refusal(load_openai, checkpoint, None)
    file.unlink()
    file.mkdir()
    assert f"{file} is missing" in refusal(load_openai, checkpoint, None)


def test_index_of_gigabytes(checkpoint):
    os.truncate(f"{checkpoint}.index", 5 * 10**9)
    assert "has 5,000,000,000 bytes; it is not the index" in refusal(load_openai, checkpoint, None)


@pytest.mark.parametrize(
    "message",
    [
        b"\x0a\x01\x01",  # bytes where the type is
        b"\x10\x01",  # a number where the shape is
        b"\x12\x02\x10\x01",  # a number where a side of the shape is
        b"\x22\x01\x01",  # bytes where the offset is
        b"\x08",  # no value
        b"\x08" + b"\xff" * 100 + b"\x01",  # a number of 700 bits
    ],
)
def test_index_with_valid_checksums_and_invalid_entries(tmp_path, message):
    prefix = write_index(tmp_path / "x", {"": b"\x08\x01", "model/wte": message})
    assert "is damaged" in refusal(read_bundle, prefix)
    for header in (b"\x0a\x01\x01", b"\x08\xff", b"\x08"):
        assert "is damaged" in refusal(
            read_bundle, write_index(tmp_path / "x", {"": header, "model/wte": b""})
        )


def test_entries_that_contradict_the_data(tmp_path):
    variables = {
        key: array for key, array in expected_of("autoregressive").items() if key not in RESULTS
    }
    arrays = {
        key: array
        for key, array in variables.items()
        if "Adam" not in key and array.dtype == np.float32
    }
    prefix = write_bundle(tmp_path / "x", arrays)
    rows = {"": b"\x08\x01"}
    rows |= {name: entry(1, array.shape, 0, 4, 0) for name, array in sorted(arrays.items())}
    write_index(prefix, rows)
    assert "is damaged (a size differs)" in refusal(load_openai, prefix, None)
    rows |= {
        name: entry(1, array.shape, 2**63, 4 * array.size, 0)
        for name, array in sorted(arrays.items())
    }
    write_index(prefix, rows)
    assert f"is cut off before its byte {2**63 + 4 * 16}" in refusal(load_openai, prefix, None)
    huge = {
        name: tuple(2**40 if side == 16 else 2**42 if side == 64 else side for side in array.shape)
        for name, array in arrays.items()
    }
    huge |= {name: (2, 2**39, 2**40) for name in huge if name.endswith("_proj")}
    rows |= {name: entry(1, shape, 0, 4, 0) for name, shape in sorted(huge.items())}
    write_index(prefix, rows)
    assert "is damaged (a size differs)" in refusal(load_openai, prefix, None)


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (np.float16, None),
        (np.float64, None),
        (np.int32, "model/ln_f/g has TensorFlow's type 3; floating-point weights are needed"),
        (np.int64, "model/ln_f/g has TensorFlow's type 9; floating-point weights are needed"),
    ],
)
def test_weights_of_other_types(tmp_path, dtype, said):
    variables = {
        key: array for key, array in expected_of("autoregressive").items() if key not in RESULTS
    }
    arrays = {
        key: array
        for key, array in variables.items()
        if "Adam" not in key and array.dtype == np.float32
    }
    gains = np.arange(16).astype(dtype)
    prefix = write_bundle(tmp_path / "x", {**arrays, "model/ln_f/g": gains})
    if said:
        assert said in refusal(load_openai, prefix, None)
        return
    model = load_openai(prefix, None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    np.testing.assert_array_equal(
        model.ln_f.weight.detach().numpy(), np.arange(16, dtype=np.float32)
    )
    if dtype == np.float64:
        gains[3] += 1e-12
        message = refusal(
            load_openai, write_bundle(tmp_path / "x", {**arrays, "model/ln_f/g": gains}), None
        )
        assert "has float64 values that float32 does not have" in message


def test_optimizer_variables_are_optional(checkpoint):
    entries = expected_of("autoregressive")
    shard = Path(f"{checkpoint}.data-00001-of-00002")
    content = shard.read_bytes()
    slot = entries["model/ln_f/g/Adam"].tobytes()
    shard.write_bytes(content.replace(slot, bytes(len(slot))))
    assert "is damaged" in refusal(read_bundle, checkpoint)
    model = load_openai(checkpoint, None)
    np.testing.assert_allclose(logits_of(model, entries, ""), entries["logits"], rtol=0, atol=1e-5)


def test_checkpoint_of_another_model(tmp_path):
    prefix = write_bundle(
        tmp_path / "x", {"model/h0/attn/c_attn/w": np.ones([1, 4, 12], np.float32)}
    )
    assert "is no image-gpt checkpoint" in refusal(load_openai, prefix, None)


@pytest.mark.parametrize(
    ("name", "values", "complaint"),
    [
        ("model/h1/mlp/c_fc/w", None, "model/h1/mlp/c_fc/w is missing, not (16, 64)"),
        (
            "model/h0/mlp/c_proj/w",
            np.ones([16, 64]),
            "model/h0/mlp/c_proj/w is (16, 64), not (64, 16)",
        ),
        ("model/wpe", np.ones([15, 16]), "model/wpe is (15, 16), not (9, 16)"),
        ("model/h0/attn/q_proj", np.ones([3, 5, 16]), "3 heads do not divide a width of 16"),
        ("model/sos", None, "its objective can only be 'bert'"),
    ],
)
def test_variables_of_wrong_shapes(tmp_path, name, values, complaint):
    variables = {
        key: array for key, array in expected_of("autoregressive").items() if key not in RESULTS
    }
    variables[name] = values if values is None else values.astype(np.float32)
    arrays = {
        key: array for key, array in variables.items() if array is not None and "Adam" not in key
    }
    assert complaint in refusal(load_openai, write_bundle(tmp_path / "x", arrays), None)


def test_objective_that_the_checkpoint_contradicts():
    message = refusal(load_openai, FIXTURES / "bert" / "model.ckpt-7", None)
    assert "no start embedding (model/sos): its objective can only be 'bert'" in message
    with pytest.warns(UserWarning, match="only 'autoregressive' models use"):
        model = load_openai(FIXTURES / "autoregressive" / "model.ckpt-7", None, objective="bert")
    assert not model.wte.weight[-1].any()


def test_palette_of_another_size(tmp_path):
    prefix = FIXTURES / "autoregressive" / "model.ckpt-7"
    np.save(tmp_path / "kmeans_centers.npy", np.zeros([512, 3], np.float32))
    message = refusal(load_openai, prefix, tmp_path / "kmeans_centers.npy")
    assert "the palette has 512 colours, the model 8" in message
    assert "no palette at" in refusal(load_openai, prefix, tmp_path / "absent.npy")


# The published sizes

PUBLISHED = {
    "S": (24, 512, 8, 76),
    "M": (36, 1024, 8, 455),
    "L": (48, 1536, 16, 1362),
}  # layers, width, heads, millions


def published_shapes(size, objective, resolution=32):
    """Return the names and shapes of a released checkpoint (openai/image-gpt, src/model.py)."""
    layers, width, heads, _ = PUBLISHED[size]
    shapes = {
        "wte": (512, width),
        "wtet": (512, width),
        "wpe": (resolution**2, width),
        "ln_f/g": (width,),
    }
    if objective == "autoregressive":
        shapes["sos"] = (width,)
    for layer in range(layers):
        block = {"ln_1/g": (width,), "ln_2/g": (width,)}
        block |= {f"attn/{name}_proj": (heads, width // heads, width) for name in "qkvc"}
        block |= {"mlp/c_fc/w": (width, 4 * width), "mlp/c_proj/w": (4 * width, width)}
        shapes |= {f"h{layer}/{name}": shape for name, shape in block.items()}
    return {f"model/{name}": shape for name, shape in shapes.items()}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("size", PUBLISHED)
def test_index_of_a_published_size(tmp_path, size, objective):
    """Read the configuration from an index alone, without gigabytes of data."""
    layers, width, heads, millions = PUBLISHED[size]
    shapes = published_shapes(size, objective)
    slots = {
        f"{name}/{kind}": shape for name, shape in shapes.items() for kind in ("Adam", "Adam_1")
    }
    rows = {
        name: entry(1, shape, 0, 4 * math.prod(shape), 0)
        for name, shape in (shapes | slots).items()
    }
    prefix = write_index(
        tmp_path / "model.ckpt-1000000", {"": b"\x08\x20", **dict(sorted(rows.items()))}
    )
    found = {name: one.shape for name, one in _read_index(prefix).items()}
    assert found == shapes | slots
    config = _infer_config(found, str(prefix), objective)
    assert config == ModelConfig(
        resolution=32, n_colors=512, n_layer=layers, n_embd=width, n_head=heads, objective=objective
    )
    stored = sum(map(math.prod, shapes.values()))
    assert stored // 10**6 == millions
    start = (
        width if objective == "bert" else 0
    )  # in a BERT model, ours has a row that is never used
    assert count_parameters(config) == stored + start


def test_index_of_l_at_48_pixels(tmp_path):
    config = _infer_config(published_shapes("L", "autoregressive", 48), "x", "autoregressive")
    assert (config.resolution, config.n_pixels, config.n_layer) == (48, 2304, 48)


def test_checkpoint_of_the_published_size_from_import_to_figure(igpt, tmp_path, monkeypatch):
    """Size S as released, but with weights of zero: all 512 colours are equally likely, ln 512
    nats."""
    monkeypatch.chdir(tmp_path)
    write_zeros(tmp_path / "model.ckpt-1000000", published_shapes("S", "autoregressive"))
    np.save(
        "kmeans_centers.npy", np.random.default_rng(0).uniform(-1, 1, (512, 3)).astype(np.float32)
    )
    np.save("imagenet_teX.npy", np.random.default_rng(1).integers(0, 512, (1, 1024)))
    done = igpt("import", "model.ckpt-1000000", "--clusters", "kmeans_centers.npy", "-o", "igpt-s")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "igpt-s: 76.6 M parameters\n"
    done = igpt("score", "igpt-s", "imagenet", "--published")
    assert done.returncode == 0, done.stderr
    assert "6.2383 nats/pixel, 9.0000 bits/pixel, over 1 test images of imagenet" in done.stdout
    said = (
        "published for igpt-s: 2.0895 nats/pixel; "
        "this loss does not agree within four digits (difference +4.1488)"
    )
    assert said in done.stdout
    published = json.loads((tmp_path / "published.json").read_text())["published"]
    assert (published["agrees"], published["model"]) == (False, "igpt-s")
    assert published["difference"] == pytest.approx(math.log(512) - 2.0895, abs=1e-6)


HOLDER = """
import sys
from pathlib import Path
from igpt.locks import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_an_import_that_is_refused_is_one_line_and_leaves_nothing(
    igpt, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name, colours in (("eight.npy", 8), ("nine.npy", 9)):
        np.save(name, np.random.default_rng(0).uniform(-1, 1, (colours, 3)))
    (tmp_path / "taken").mkdir()
    shutil.copytree(FIXTURES / "bert", "bert")
    (tmp_path / "bert" / "model.ckpt-7.data-00001-of-00002").unlink()
    os.mkfifo("fifo.npy")
    np.savez("several.npz", np.zeros((8, 3)))
    np.save("flat.npy", np.zeros(8))
    np.save("wide.npy", np.full((8, 3), 255.0))
    (tmp_path / "file").write_text("text")
    before = sorted(tmp_path.rglob("*"))
    for words, message in (
        ((checkpoint, "-o", "taken"), "taken exists already; remove it or choose another -o"),
        (
            (checkpoint, "-o", "model", "--clusters", "nine.npy"),
            "the palette has 9 colours, the model 8",
        ),
        ((checkpoint, "-o", "model", "--clusters", "ten.npy"), "no palette at ten.npy"),
        ((checkpoint, "-o", "model", "--clusters", f"{checkpoint}.index"), "is not a palette"),
        ((checkpoint, "-o", "model", "--clusters", "fifo.npy"), "fifo.npy is a FIFO"),
        ((checkpoint, "-o", "model", "--clusters", "/dev/zero"), "/dev/zero is a device"),
        ((checkpoint, "-o", "model", "--clusters", "several.npz"), "several.npz is not a palette"),
        ((checkpoint, "-o", "model", "--clusters", "flat.npy"), "flat.npy is not a palette"),
        ((checkpoint, "-o", "model", "--clusters", "wide.npy"), "wide.npy is not a palette"),
        ((checkpoint, "-o", "/"), "cannot be the output"),
        ((checkpoint, "-o", ".."), "cannot be the output"),
        ((checkpoint, "-o", "file"), "file is a file; a folder is to be written there"),
        ((checkpoint, "-o", "file/model"), "file"),
        ((f"{checkpoint}.index", "-o", "model"), "give the path without endings"),
        (("nowhere", "-o", "model"), "no checkpoint: nowhere.index is missing"),
        (("bert/model.ckpt-7", "-o", "model"), "its objective can only be 'bert'"),
        (
            ("bert/model.ckpt-7", "-o", "model", "--objective", "bert"),
            "data-00001-of-00002 is missing",
        ),
    ):
        done = igpt("import", *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), (words, done.stderr)
        assert message in done.stderr, words
        assert sorted(tmp_path.rglob("*")) == before, words
    command = [sys.executable, "-c", HOLDER, tmp_path / "model"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        done = igpt("import", checkpoint, "-o", "model")
        assert done.returncode == 2
        assert f"model is being written by process {other.pid}" in done.stderr
        other.stdin.close()  # which it waits for
    assert sorted(tmp_path.rglob("*")) == before
    done = igpt("import", checkpoint, "--clusters", "eight.npy", "-o", "deep/model")
    assert done.returncode == 0, done.stderr
    assert ImageGPT.from_pretrained("deep/model").config.n_colors == 8
