"""Model directories in the Hub's ImageGPT layout, which transformers can read and write too.

    config.json                transformers' ImageGPTConfig; igpt's settings under "igpt" (format
                               version, objective, settings of a variant). A variant has the
                               model_type "igpt", so that transformers refuses it.
    model.safetensors          transformers' names; Conv1D matrices are transposed, [in, out]
    preprocessor_config.json   the palette ("clusters", and "transparent_token" where its last entry
                               stands for transparent pixels) and the resolution

Weights may also be in several files, named by an index, as transformers writes them.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from igpt.builtin_models import find_builtin, nearest_name
from igpt.data.images.palette import HubPalette, Palette
from igpt.errors import InputError
from igpt.files import (
    Stored,
    atomic_folder,
    expanded,
    folder_to_read,
    read_json,
    require_regular,
    require_schema,
)
from igpt.hub import download
from igpt.model.config import VERSION, VERSION_TRANSPARENT, HubConfig, ModelConfig, Shape
from igpt.model.locate import model_and_run

_PREPROCESSOR = "preprocessor_config.json"
_INDEX = ".index.json"
# The first one that exists is read, as transformers does.
_WEIGHTS = (
    "model.safetensors",
    f"model.safetensors{_INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{_INDEX}",
)
_LONGEST_HEADER = 8 << 20  # bytes of a safetensors header, enough for 60,000 tensors
_CONV1D = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_HEADS = ("lm_head.weight", "score.weight")
# Constants that older versions of transformers stored.
_CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")
_SAFETENSORS_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
_READ_TYPES = frozenset(_SAFETENSORS_TYPES.values())


@dataclass(frozen=True)
class ModelDirectory:
    """The contents of a model directory; tensors have igpt's names and shapes."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    palette: Palette | None


class _Sides(Stored):
    height: int
    width: int


class _Preprocessor(HubPalette):
    """Schema of `preprocessor_config.json`; old versions of transformers have one size."""

    size: _Sides | int | None = None


class _Index(Stored):
    """Schema of an index of weights."""

    weight_map: dict[str, str]


class _Found(NamedTuple):
    """A tensor in a file of weights; `loaded` if reading its shape already loads it."""

    file: Path
    shape: Shape
    kind: str
    loaded: Tensor | None


def write_directory(path: Path, directory: ModelDirectory) -> None:
    """Write a model directory atomically.

    Raises:
        InputError: `path` is a folder with something else than a model.
    """
    path = expanded(path)
    if path.is_dir() and any(path.iterdir()) and not (path / "model.safetensors").exists():
        raise InputError(
            f"{path} holds something else than a model; give a new folder, or empty that one"
        )
    resolution = directory.config.resolution
    config = directory.config.to_hub()
    transparent = directory.palette is not None and directory.palette.transparent
    version = VERSION_TRANSPARENT if transparent else VERSION
    config["igpt"] = {"version": version, **config["igpt"]}
    preprocessor: dict[str, Any] = {
        "image_processor_type": "ImageGPTImageProcessor",
        "do_resize": True,
        "size": {"height": resolution, "width": resolution},
        "do_normalize": True,
        "do_color_quantize": True,
    }
    if directory.palette is not None:
        preprocessor |= directory.palette.to_hub()
    with atomic_folder(path) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / _PREPROCESSOR).write_text(json.dumps(preprocessor) + "\n", encoding="utf-8")
        try:
            save_file(
                _to_hub(directory.tensors), folder / "model.safetensors", metadata={"format": "pt"}
            )
        except SafetensorError as error:  # it hides the system's error number in its text
            raise OSError(f"cannot write {path / 'model.safetensors'}: {error}") from None


def read_directory(name: str | Path, dtype: torch.dtype = torch.float32) -> ModelDirectory:
    """Read the model directory of a path, of a run or of a built-in model, or one of the Hub.

    Names, shapes and types of the weights are checked against `config.json` before their values are
    loaded.

    Args:
        dtype: of the tensors. Stored values must be exact in it.

    Raises:
        InputError: the directory is missing, of a later format, damaged or not an ImageGPT, or its
            weights do not fit its configuration.
    """
    if dtype not in (torch.float32, torch.float64):
        raise InputError(f"models are read as torch.float32 or torch.float64, not as {dtype}")
    path = _locate(name)
    hub = _read_config(path / "config.json")
    found = _find_tensors(path, hub)
    named = _igpt_names(found)
    config = ModelConfig.from_hub(hub, named, path / "config.json")
    for hub_name in named.values():
        tensor = found[hub_name]
        if tensor.kind not in _READ_TYPES:
            raise InputError(
                f"{hub_name} in {tensor.file} is stored as {tensor.kind}; floating-point weights "
                "are needed (quantized ones must be converted first)"
            )
    config.require_shapes(
        {name: _igpt_shape(name, found[hub_name].shape) for name, hub_name in named.items()},
        str(name),
    )
    palette = _read_palette(path / _PREPROCESSOR, config)
    if palette and palette.transparent != (hub.igpt.version == VERSION_TRANSPARENT):
        raise InputError(
            f"{path}: igpt's version in config.json is {hub.igpt.version}, so {_PREPROCESSOR} "
            f"should have {'no' if palette.transparent else 'a'} transparent_token; was it edited?"
        )
    tensors = _load(found, named, dtype)
    biases = [name for name in tensors if name.endswith(".bias")]
    if biases and not any(bool(tensors[name].any()) for name in biases):
        # transformers' layers always have biases; those of the paper's models are zero.
        tensors = {name: tensor for name, tensor in tensors.items() if name not in biases}
        config = config.model_copy(update={"bias": False})
    return ModelDirectory(config, tensors, palette)


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names and bytes of tensors, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# The folder and its JSON files.


def _locate(name: str | Path) -> Path:
    """Return the folder of a model: a local or built-in one, or one downloaded from the Hub."""
    if builtin := find_builtin(name):
        return builtin
    path = folder_to_read(model_and_run(expanded(name))[0])
    if path.is_dir():
        return path
    if not path.exists() and (near := nearest_name(name)):
        raise InputError(f"no model {str(name)!r}; the nearest built-in name is {near!r}")
    if path.exists() or str(name).startswith(("/", ".", "~")) or str(name).count("/") != 1:
        raise InputError(f"no model directory {name}; `igpt pretrain` writes one as RUN/model")
    return _download(str(name))


def _download(name: str) -> Path:
    """Return the folder in the Hub's cache; weights are downloaded only if config.json is valid."""
    folder = download(name, "model directory", "config.json")
    try:
        hub = _read_config(folder / "config.json")
    except InputError as error:
        raise InputError(f"the Hub's {name}: {error}") from None

    def first(files: Collection[str]) -> list[str]:
        palette = [_PREPROCESSOR] if _PREPROCESSOR in files else []
        return palette + _weight_files(files, hub)

    def second(files: Collection[str]) -> list[str]:
        return [*first(files), *_require_all(parts, files, index.name)]

    folder = download(name, "model directory", "config.json", first)
    index = folder / _weight_files([file.name for file in folder.iterdir()], hub)[0]
    if not index.name.endswith(_INDEX):
        return folder
    parts = sorted(set(_read_index(index).values()))
    return download(name, "model directory", "config.json", second)


def _read_config(file: Path) -> HubConfig:
    """Return a validated config.json of an ImageGPT in this format version."""
    values = read_json(file, "model")
    if values.get("model_type") not in ("imagegpt", "igpt"):
        raise InputError(
            f"{file} is of a model of type {values.get('model_type')!r}; 'imagegpt' is needed"
        )
    settings = values.get("igpt")
    version = settings.get("version", VERSION) if isinstance(settings, dict) else VERSION
    if version not in (VERSION, VERSION_TRANSPARENT):
        raise InputError(
            f"{file} has model format version {version!r:.40}; this igpt reads {VERSION} and "
            f"{VERSION_TRANSPARENT}"
        )
    require_schema(values, HubConfig, file)
    return HubConfig.model_validate(values)


def _read_palette(file: Path, config: ModelConfig) -> Palette | None:
    """Return the palette in a preprocessor_config.json, checked against the model."""
    if not file.exists():
        return None
    found = _Preprocessor.model_validate(read_json(file, "palette", _Preprocessor))
    size, side = found.size, config.resolution
    sides = (size.height, size.width) if isinstance(size, _Sides) else (size, size)
    if size is not None and sides != (side, side):
        raise InputError(
            f"{file} has a size of {sides[0]} x {sides[1]} pixels; the model has {side} x {side}"
        )
    if found.clusters is None:
        return None
    try:
        palette = Palette.from_hub(found.model_dump())
    except InputError as error:
        raise InputError(f"the clusters in {file} are no palette: {error}") from None
    if len(palette) != config.n_colors:
        raise InputError(
            f"{file}: the palette has {len(palette)} colours, the model {config.n_colors}"
        )
    return palette


# The files with the weights.


def _weight_files(files: Collection[str], hub: HubConfig) -> list[str]:
    """Return the files with the weights, or the index that names them.

    As in transformers: the file that config.json names, or else the first of `_WEIGHTS`. Files
    without an index, which transformers does not read, are found by their numbers.
    """
    if hub.transformers_weights is not None:
        _require_plain(hub.transformers_weights, "config.json", ".safetensors")
        return _require_all([hub.transformers_weights], files, "config.json")
    for name in _WEIGHTS:
        if name in files:
            return [name]
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        found = (re.fullmatch(rf"{stem}-\d{{5}}-of-(\d{{5}})\.{ending}", file) for file in files)
        counts = sorted({int(match[1]) for match in found if match})
        if len(counts) > 1:
            raise InputError(
                f"there are weights in {counts[0]} and in {counts[-1]} files, and no "
                f"{stem}.{ending}{_INDEX} to choose between them; remove the files of one of them"
            )
        if counts:
            parts = [
                f"{stem}-{part:05d}-of-{counts[0]:05d}.{ending}" for part in range(1, counts[0] + 1)
            ]
            if missing := [part for part in parts if part not in files]:
                raise InputError(
                    f"{missing[0]} is missing ({len(missing)} of {len(parts)} files); "
                    "download them again"
                )
            return parts
    raise InputError("there are no weights: model.safetensors is missing")


def _read_index(file: Path) -> dict[str, str]:
    """Return the file name of each tensor, from an index; the files are in the same folder."""
    index = _Index.model_validate(read_json(file, "index of weights", _Index)).weight_map
    if not index:
        raise InputError(
            f"{file}: weight_map is empty; the names of tensors and their files are needed"
        )
    ending = Path(file.name.removesuffix(_INDEX)).suffix
    for part in sorted(set(index.values())):
        _require_plain(part, f"{file}: weight_map", ending)
    return index


def _require_plain(name: str, where: str, ending: str) -> None:
    """Check that a name is a plain file name, not a path that leads out of the folder."""
    if (
        name.startswith(".")
        or not re.fullmatch(r"[^/\\\0*?\[\]]+", name)
        or not name.removesuffix(_INDEX).endswith(ending)
    ):
        raise InputError(
            f"{where} names {name!r}; the plain name of a {ending} file in the same folder is "
            "needed"
        )


def _require_all(names: list[str], files: Collection[str], where: str) -> list[str]:
    for name in names:
        if name not in files:
            raise InputError(f"{name}, which {where} names, is missing")
    return names


# Their tensors.


def _find_tensors(path: Path, hub: HubConfig) -> dict[str, _Found]:
    """Return the tensors of a model by their names in the files."""
    files = [file.name for file in path.iterdir()]
    index: dict[str, str] = {}
    try:
        parts = _weight_files(files, hub)
        if parts[0].endswith(_INDEX):
            index = _read_index(path / parts[0])
            parts = _require_all(sorted(set(index.values())), files, parts[0])
    except InputError as error:
        raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    found: dict[str, _Found] = {}
    for part in parts:
        inside = (
            _find_safetensors(path / part)
            if part.endswith(".safetensors")
            else _read_pickle(path / part)
        )
        if double := sorted(found.keys() & inside.keys()):
            raise InputError(
                f"{path}: {double[0]} is both in {found[double[0]].file.name} and in {part}"
            )
        found |= inside
    for name, part in index.items():
        if name not in found or found[name].file.name != part:
            raise InputError(
                f"{path}: {name} is not in {part}, where the index of the weights names it"
            )
    return found


def _find_safetensors(file: Path) -> dict[str, _Found]:
    """Return the tensors of a safetensors file, from its header alone."""
    require_regular(file)
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if _LONGEST_HEADER < length < file.stat().st_size:
        raise InputError(
            f"{file} has a header of {length:,} bytes; a model's has at most {_LONGEST_HEADER:,}"
        )
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            found = {
                name: (tuple(part.get_shape()), str(part.get_dtype()))
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise InputError(f"{file} is damaged ({error}); write or download it again") from None
    return {
        name: _Found(file, shape, _SAFETENSORS_TYPES.get(kind, kind.lower()), None)
        for name, (shape, kind) in found.items()
    }


def _read_pickle(file: Path) -> dict[str, _Found]:
    """Return the tensors of a pickle, without running any code from it."""
    require_regular(file)
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a damaged file can raise anything
        reason = " ".join(repr(error).split())
        raise InputError(
            f"{file} cannot be read safely; convert it to safetensors ({reason:.200})"
        ) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise InputError(
            f"{file} holds something else than named tensors; a model's state dict is needed"
        )
    found = {}
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            kind = f"a tensor without plain values ({tensor.layout}, {tensor.device.type})"
        elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(f"{file} is damaged: {name} is larger than its stored values")
        found[name] = _Found(file, tuple(tensor.shape), kind, tensor.detach())
    return found


def _igpt_names(found: Mapping[str, _Found]) -> dict[str, str]:
    """Return the names in the files by igpt's names; skip causal masks."""
    named: dict[str, str] = {}
    for hub_name, tensor in found.items():
        name = hub_name.removeprefix("transformer.")
        if name.endswith(_CAUSAL_MASKS):
            continue
        if name in named:
            raise InputError(
                f"{tensor.file.parent}: {named[name]} and {hub_name} name the same tensor"
            )
        named[name] = hub_name
    return named


def _load(
    found: Mapping[str, _Found], named: Mapping[str, str], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the tensors with igpt's names and shapes, in one type."""
    tensors = {}
    for file in {found[hub_name].file for hub_name in named.values()}:
        inside = {
            name: hub_name for name, hub_name in named.items() if found[hub_name].file == file
        }
        loaded = {hub_name: found[hub_name].loaded for hub_name in inside.values()}
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                loaded = {hub_name: opened.get_tensor(hub_name) for hub_name in inside.values()}
        for name, hub_name in inside.items():
            stored = loaded[hub_name]
            assert stored is not None, "a tensor of a pickle is loaded with it"
            converted = stored.to(dtype)
            if stored.dtype == torch.float64 and not _are_equal(stored, converted):
                raise InputError(
                    f"{hub_name} in {file} is stored as float64 with values that "
                    f"{str(dtype).removeprefix('torch.')} does not have; save the model in float32"
                )
            tensors[name] = converted.t().contiguous() if _is_conv1d(name) else converted
    return tensors


def _are_equal(first: Tensor, second: Tensor) -> bool:
    same = (first == second.to(first.dtype)) | first.isnan()
    return bool(same.all())


# The names and shapes of igpt and of transformers.


def _is_conv1d(name: str) -> bool:
    return name.endswith(".weight") and name.removesuffix(".weight").endswith(_CONV1D)


def _igpt_shape(name: str, shape: Shape) -> Shape:
    return shape[::-1] if _is_conv1d(name) and len(shape) == 2 else shape


def _to_hub(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    hub = {}
    for name, tensor in tensors.items():
        hub_name = name if name in _HEADS else f"transformer.{name}"
        hub[hub_name] = (tensor.t() if _is_conv1d(name) else tensor).contiguous()
        if _is_conv1d(name) and name.removesuffix("weight") + "bias" not in tensors:
            # transformers' Conv1D always has a bias.
            hub[hub_name.removesuffix("weight") + "bias"] = tensor.new_zeros(tensor.shape[0])
    return hub
