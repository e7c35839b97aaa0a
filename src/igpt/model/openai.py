"""Import of OpenAI's checkpoints (github.com/openai/image-gpt) without TensorFlow.

A checkpoint is a "tensor bundle" (tensorflow/core/util/tensor_bundle): PREFIX.index, a LevelDB
table from names to protobuf entries (tensorflow/core/protobuf/tensor_bundle.proto), and
PREFIX.data-00000-of-000NN, the raw values. The parts of LevelDB's format and of protobuf that
bundles use are implemented here. D width, H heads, K head width, V colours, n pixels.
"""

import math
import warnings
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from igpt.data.images.palette import Palette
from igpt.errors import InputError
from igpt.files import require_regular
from igpt.model.config import ModelConfig
from igpt.model.objectives import DEFAULT_OBJECTIVE, OBJECTIVES, ObjectiveName
from igpt.model.transformer import ImageGPT

# NumPy types by TensorFlow's DataType: plain numbers, and those of them that weights may have.
_DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}
_FLOATS = (1, 2, 19)
_MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")  # the last bytes of a table
_FOOTER = 48  # bytes
_LARGEST_INDEX = 64 << 20  # bytes; the released checkpoints have about 100 kB
_LONGEST_VARINT = 10  # bytes of a 64-bit number
_CASTAGNOLI = np.uint32(0x82F63B78)  # the polynomial of CRC-32C, lowest bit first
_CRC_START = bytes.fromhex("54641f64")  # takes a checksum register from zero to all ones


def read_bundle(prefix: Path) -> dict[str, NDArray[Any]]:
    """Return the variables of a TensorFlow checkpoint (bundle V2) that are plain numbers, by name.

    The CRC-32C of every block of the index and of every tensor is checked (about 0.3 s for 100 MB).

    Raises:
        InputError: the index or a data file is missing, cut off, damaged or not of this format.
    """
    entries = {name: entry for name, entry in _read_index(prefix).items() if entry.dtype in _DTYPES}
    _check_data_files(list(entries.values()))
    return {name: entry.read() for name, entry in entries.items()}


def load_openai(
    prefix: Path, clusters: Path | None, *, objective: ObjectiveName = DEFAULT_OBJECTIVE
) -> ImageGPT:
    """Return the model in one of OpenAI's checkpoints, such as `model.ckpt-1000000`, in float32.

    Names and shapes are those of the released graph (openai/image-gpt, src/model.py). Optimizer
    variables and a classification head (whose class names are not stored) are ignored.

    Args:
        prefix: path of the checkpoint without `.index`.
        clusters: the palette (`kmeans_centers.npy`); None for a model without one.
        objective: of the model. A causal objective needs a start embedding; with any other, a start
            embedding gives a warning.

    Raises:
        InputError: as `read_bundle`; or it is not an image-gpt checkpoint, or has another objective
            or palette size.
    """
    entries = _read_index(prefix)
    config = _infer_config(
        {name: entry.shape for name, entry in entries.items()}, str(prefix), objective
    )
    used = {name: entries[f"model/{name}"] for name in _expected_shapes(config)}
    for name, entry in used.items():
        if entry.dtype not in _FLOATS:
            raise InputError(
                f"{prefix}: model/{name} has TensorFlow's type {entry.dtype}; "
                "floating-point weights are needed"
            )
    _check_data_files(list(used.values()))
    if clusters is not None:
        require_regular(clusters)
    palette = None if clusters is None else Palette.load(clusters)
    with torch.device("meta"):
        model = ImageGPT(config, palette)
    model.load_state_dict(_read_tensors(used, config), assign=True)
    return model.eval()


def _infer_config(
    shapes: dict[str, tuple[int, ...]], where: str, objective: ObjectiveName
) -> ModelConfig:
    """Return the configuration for variables of these shapes; none may be missing."""
    table, positions, query = (
        shapes.get(f"model/{name}", ()) for name in ("wte", "wpe", "h0/attn/q_proj")
    )
    if (len(table), len(positions), len(query)) != (2, 2, 3):
        raise InputError(
            f"{where} is no image-gpt checkpoint: it lacks model/wte, model/wpe or "
            "model/h0/attn/q_proj"
        )
    has_start = "model/sos" in shapes
    fitting = " or ".join(repr(name) for name, one in OBJECTIVES.items() if one.causal == has_start)
    causal = objective in OBJECTIVES and OBJECTIVES[objective].causal
    if causal and not has_start:
        raise InputError(
            f"{where} has no start embedding (model/sos): its objective can only be {fitting}"
        )
    if has_start and not causal:  # the model would run, and compute noise
        warnings.warn(
            f"{where} has a start embedding, which only {fitting} models use", stacklevel=3
        )
    values: dict[str, Any] = {
        "resolution": math.isqrt(positions[0]),
        "n_colors": table[0],
        "n_embd": table[1],
    }
    values["n_layer"] = len({name.split("/")[1] for name in shapes if name.startswith("model/h")})
    config = ModelConfig.layered(values, {"n_head": query[0], "objective": objective}, where=where)
    for name, expected in _expected_shapes(config).items():
        if shapes.get(f"model/{name}") != expected:
            found = shapes.get(f"model/{name}", "missing")
            raise InputError(
                f"{where} is not a complete image-gpt checkpoint: model/{name} is {found}, "
                f"not {expected}"
            )
    return config


def _expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the names of the released graph's variables, without "model/", and their shapes."""
    width, table = config.n_embd, (config.n_colors, config.n_embd)
    shapes = {"wte": table, "wtet": table, "wpe": (config.n_pixels, width), "ln_f/g": (width,)}
    block: dict[str, tuple[int, ...]] = {"ln_1/g": (width,), "ln_2/g": (width,)}
    block |= {
        f"attn/{name}_proj": (config.n_head, width // config.n_head, width) for name in "qkvc"
    }
    block |= {"mlp/c_fc/w": (width, 4 * width), "mlp/c_proj/w": (4 * width, width)}
    shapes |= {
        f"h{layer}/{name}": shape
        for layer in range(config.n_layer)
        for name, shape in block.items()
    }
    return shapes | ({"sos": (width,)} if config.trained_as.causal else {})


def _read_tensors(entries: "dict[str, _Entry]", config: ModelConfig) -> dict[str, torch.Tensor]:
    """Return the state dict of the model."""

    def read(name: str) -> torch.Tensor:
        stored = entries[name].read()
        with np.errstate(over="ignore"):  # an overflow is an error below
            values = stored.astype(np.float32)  # a copy, because the bytes read are not writable
        if not np.array_equal(stored, values.astype(stored.dtype), equal_nan=True):
            raise InputError(
                f"model/{name} in {entries[name].path} has float64 values that float32 does not "
                "have"
            )
        # The graph computes x @ w, so that its matrices are [in, out], except q, k and v [H, K, D].
        if name.endswith(("/w", "c_proj")):
            values = values.reshape(-1, values.shape[-1]).T.copy()
        return torch.from_numpy(values)

    # A BERT model has no start token; that row stays zero and is never looked up.
    start = read("sos") if "sos" in entries else torch.zeros(config.n_embd)
    tensors = {"wte.weight": torch.cat([read("wte"), start[None]]), "lm_head.weight": read("wtet")}
    tensors |= {"wpe.weight": read("wpe"), "ln_f.weight": read("ln_f/g")}
    for layer in range(config.n_layer):
        query_key_value = torch.cat([read(f"h{layer}/attn/{name}_proj") for name in "qkv"])
        tensors[f"h.{layer}.attn.c_attn.weight"] = query_key_value.flatten(0, 1)
        for name in ("ln_1/g", "ln_2/g", "attn/c_proj", "mlp/c_fc/w", "mlp/c_proj/w"):
            ours = name.removesuffix("/g").removesuffix("/w").replace("/", ".")
            tensors[f"h.{layer}.{ours}.weight"] = read(f"h{layer}/{name}")
    return tensors


@dataclass(frozen=True)
class _Entry:
    """The position of a variable in a data file, and its checksum."""

    dtype: int
    shape: tuple[int, ...]
    path: Path
    offset: int
    size: int
    checksum: int

    @property
    def stored_as(self) -> np.dtype[Any]:
        return np.dtype(_DTYPES.get(self.dtype, "V1"))

    def read(self) -> NDArray[Any]:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if _masked_crc32c(content) != self.checksum:
            raise InputError(f"{self.path} is damaged (a checksum differs); download it again")
        return np.frombuffer(content, self.stored_as).reshape(self.shape)


def _check_data_files(entries: list[_Entry]) -> None:
    """Check, before anything is read, that the data files exist and have the sizes of the index."""
    for entry in sorted(entries, key=lambda entry: (entry.path, entry.offset + entry.size)):
        path, end = entry.path, entry.offset + entry.size
        require_regular(path)
        if not path.is_file():
            raise InputError(f"{path} is missing; all {path.name[-5:]} data files are needed")
        if path.stat().st_size < end:
            raise InputError(f"{path} is cut off before its byte {end}; download it again")
        if entry.size != math.prod(entry.shape) * entry.stored_as.itemsize:
            raise InputError(f"{path} is damaged (a size differs); download it again")


def _read_index(prefix: Path) -> dict[str, _Entry]:
    """Return the variables of a checkpoint, except those stored in slices."""
    path = Path(f"{prefix}.index")
    require_regular(path)
    if not path.is_file():
        raise InputError(
            f"no checkpoint: {path} is missing; give the path without endings, "
            "as in model.ckpt-1000000"
        )
    if path.stat().st_size > _LARGEST_INDEX:
        raise InputError(
            f"{path} has {path.stat().st_size:,} bytes; it is not the index of a checkpoint"
        )
    content = path.read_bytes()
    if len(content) < _FOOTER or not content.endswith(_MAGIC):
        raise InputError(
            f"{path} is cut off or not the index of a TensorFlow checkpoint (bundle V2); "
            "download it again"
        )
    try:
        return _parse_index(content, prefix, path)
    except InputError:
        raise
    except (IndexError, KeyError, TypeError, ValueError, OverflowError):
        raise InputError(
            f"{path} is damaged (its parts contradict each other); download it again"
        ) from None


def _parse_index(content: bytes, prefix: Path, path: Path) -> dict[str, _Entry]:
    """Return the variables that an index describes."""
    rows: dict[bytes, bytes] = {}
    # The footer has two handles of two numbers: the empty meta-index, and the index of blocks.
    index = _parse_varints(content, len(content) - _FOOTER, 4)[0][2:]
    for leaf in _read_block(content, index, path).values():
        rows |= _read_block(content, _parse_varints(leaf, 0, 2)[0], path)
    n_files = _parse_message(rows.pop(b""))[1][0]
    entries = {}
    for name, message in rows.items():
        fields = _parse_message(message)
        shape = tuple(
            (_parse_message(side)[1] or [0])[0]
            for part in fields[2]
            for side in _parse_message(part)[2]
        )
        dtype, file_number, offset, size, checksum = (
            (fields[number] or [0])[0] for number in (1, 3, 4, 5, 6)
        )
        if not all(
            isinstance(number, int)
            for number in (dtype, file_number, offset, size, checksum, n_files, *shape)
        ):
            raise ValueError("a number is needed")
        data = Path(f"{prefix}.data-{file_number:05d}-of-{n_files:05d}")
        if not fields[7] and not name.startswith(b"\0"):
            entries[name.decode(errors="replace")] = _Entry(
                dtype, shape, data, offset, size, checksum
            )
    return entries


def _read_block(content: bytes, handle: list[int], path: Path) -> dict[bytes, bytes]:
    """Return the rows of the block at a handle; each key shares a prefix with the one before it."""
    offset, end = handle[0], sum(handle)
    if _masked_crc32c(content[offset : end + 1]) != int.from_bytes(
        content[end + 1 : end + 5], "little"
    ):
        raise InputError(f"{path} is damaged (a checksum differs); download it again")
    if content[end] != 0:
        raise InputError(
            f"{path} is compressed; an uncompressed index, as tf.train.Saver writes it, is needed"
        )
    # A block ends with a list of restart offsets and its length.
    end -= 4 * (1 + int.from_bytes(content[end - 4 : end], "little"))
    rows, key = {}, b""
    while offset < end:
        (shared, fresh, length), offset = _parse_varints(content, offset, 3)
        key = key[:shared] + content[offset : offset + fresh]
        offset += fresh + length
        rows[key] = content[offset - length : offset]
    return rows


def _parse_varints(data: bytes, position: int, count: int) -> tuple[list[int], int]:
    """Return `count` varints (seven bits per byte, lowest first) and the position after them."""
    values = [0] * count
    for index in range(count):
        first = position
        while position == first or data[position - 1] >= 128:
            if position - first == _LONGEST_VARINT:
                raise ValueError("a number of more than 64 bits")
            values[index] |= (data[position] & 127) << 7 * (position - first)
            position += 1
    return values, position


def _parse_message(data: bytes) -> defaultdict[int, list[Any]]:
    """Return the values of a protobuf message by field number; nested messages are bytes."""
    fields: defaultdict[int, list[Any]] = defaultdict(list)
    position = 0
    while position < len(data):
        (tag,), position = _parse_varints(data, position, 1)
        if tag & 7 == 5:  # 32 bits
            number, position = int.from_bytes(data[position : position + 4], "little"), position + 4
        else:
            (number,), position = _parse_varints(data, position, 1)
        inside = tag & 7 == 2  # that many bytes follow
        fields[tag >> 3].append(data[position : position + number] if inside else number)
        position += number if inside else 0
    return fields


def _masked_crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) as bundles store it: rotated, and a constant added."""
    # The checksum is linear: the first words, advanced by n words, can be XORed into the last n.
    # Each round halves the data. Leading zeros change nothing; they fill the first word.
    words = np.frombuffer(bytes(-len(data) % 4) + _CRC_START + data, "<u4").copy()
    while len(words) > 1:
        level = (len(words) - 1).bit_length() - 1
        head, words = words[: -(1 << level)], words[-(1 << level) :]
        words[-len(head) :] ^= _advance(head, level)
    crc = int(_advance(words, 0)[0]) ^ 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _advance(registers: NDArray[np.uint32], level: int) -> NDArray[np.uint32]:
    """Return checksum registers after 2^level more words, all zero."""
    tables = _advance_tables(level)
    return tables[0][registers & 0xFFFF] ^ tables[1][registers >> 16]  # type: ignore[no-any-return]


@cache
def _advance_tables(level: int) -> NDArray[np.uint32]:
    """Return `_advance` of every lower and every upper half of a register, [2, 65536]."""
    registers: NDArray[Any] = np.arange(65536, dtype=np.uint32) << np.array([[0], [16]], np.uint32)
    for _ in range(2 if level else 32):
        registers = (
            _advance(registers, level - 1)
            if level
            else registers >> 1 ^ (registers & 1) * _CASTAGNOLI
        )
    return registers
