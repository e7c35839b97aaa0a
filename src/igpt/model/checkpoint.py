"""A model directory, in the Hub's ImageGPT layout, so that transformers reads what we write and the reverse.

    config.json                transformers' ImageGPTConfig keys, and ours under "igpt" (format version, objective)
                               a variant (variants.py) has its settings there, and model_type "igpt": transformers,
                               which does not compute it, refuses it
    model.safetensors          transformers' names; its Conv1D matrices are transposed [in, out]
    preprocessor_config.json   the palette ("clusters") and the resolution

This file knows the disk and the names; what the weights mean is in transformer.py.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from igpt.data.palette import Palette
from igpt.errors import InputError
from igpt.files import atomic_folder, folder_to_read, read_json
from igpt.hub import download

VERSION = 1
_CONV1D = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_HEADS = ("lm_head.weight", "score.weight")


@dataclass(frozen=True)
class ModelDirectory:
    """What a model directory holds; tensors under our names and shapes."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    palette: Palette | None


def write_directory(path: Path, directory: ModelDirectory) -> None:
    """Writes a model directory; it is whole or, after any interruption, the one that was there before.

    Raises:
        InputError: `path` is taken by something else than a model.
    """
    path = path.expanduser()
    if path.is_dir() and any(path.iterdir()) and not (path / "model.safetensors").exists():
        raise InputError(f"{path} holds something else than a model; give a new folder, or empty that one")
    config = {**directory.config, "igpt": {"version": VERSION, **directory.config["igpt"]}}
    resolution = config["igpt"]["resolution"]
    preprocessor: dict[str, Any] = {
        "image_processor_type": "ImageGPTImageProcessor",
        "do_resize": True,
        "size": {"height": resolution, "width": resolution},
        "do_normalize": True,
        "do_color_quantize": True,
    }
    if directory.palette is not None:
        preprocessor["clusters"] = directory.palette.centers_.tolist()
    with atomic_folder(path) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor) + "\n")
        try:
            save_file(_to_hub(directory.tensors), folder / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:  # safetensors hides the system's error number in its text
            raise OSError(f"cannot write {path / 'model.safetensors'}: {error}") from None


def read_directory(name: str | Path) -> ModelDirectory:
    """Reads a model directory, or downloads a Hub model and reads that.

    Raises:
        InputError: nothing there, a later format, a damaged file, or an architecture that is not ImageGPT.
    """
    path = _locate(name)
    config = _read_config(path, name)
    palette = None
    preprocessor = path / "preprocessor_config.json"
    if preprocessor.exists():
        clusters = read_json(preprocessor, "palette").get("clusters")
        try:
            palette = None if clusters is None else Palette.from_centers(clusters)
        except (TypeError, ValueError) as error:
            raise InputError(f"the clusters in {preprocessor} are no palette: {error}") from None
    return ModelDirectory(config, _from_hub(_read_tensors(path)), palette)


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors: of their names and bytes, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _locate(name: str | Path) -> Path:
    """The folder of a model; of one on the Hub, weights are downloaded only when its config.json fits."""
    path = folder_to_read(Path(name).expanduser())
    if path.is_dir():
        return path
    if path.exists() or str(name).startswith(("/", ".", "~")) or str(name).count("/") != 1:
        raise InputError(f"no model directory {name}; `igpt pretrain` writes one as RUN/model")
    _read_config(download(str(name), "model directory", "config.json"), name)
    return download(str(name), "model directory", "config.json", _besides_config)


def _read_config(path: Path, name: str | Path) -> dict[str, Any]:
    """A model's config.json; what is no ImageGPT, or of a later format, is refused."""
    config = read_json(path / "config.json", "model")
    if config.get("model_type") not in ("imagegpt", "igpt"):
        raise InputError(f"{name} holds a model of type {config.get('model_type')!r}; 'imagegpt' is needed")
    ours = config.get("igpt", {})
    version = ours.get("version", VERSION) if isinstance(ours, dict) else ours
    if version != VERSION:
        raise InputError(f"{name} has model format version {version}; this igpt reads {VERSION}")
    return config


def _besides_config(files: Collection[str]) -> list[str]:
    """Of the files of a model, those with its palette and its weights."""
    return [name for name in ("preprocessor_config.json",) if name in files] + _weights(files)


def _weights(files: Collection[str]) -> list[str]:
    """Of the files of a model, those with its weights, as transformers names them: one, or all parts of one."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        if f"{stem}.{ending}" in files:
            return [f"{stem}.{ending}"]
        found = (re.fullmatch(rf"{stem}-\d{{5}}-of-(\d{{5}})\.{ending}", file) for file in files)
        if count := max((int(match[1]) for match in found if match), default=0):
            parts = [f"{stem}-{part:05d}-of-{count:05d}.{ending}" for part in range(1, count + 1)]
            if missing := [part for part in parts if part not in files]:
                raise InputError(f"{missing[0]} is missing ({len(missing)} of {count} parts); download them anew")
            return parts
    raise InputError("no weights are there: model.safetensors is missing")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        files = _weights([file.name for file in path.iterdir()])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read_safetensors(path / file) if file.endswith(".safetensors") else _read_pickle(path / file)
    return tensors


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file} is damaged ({error}); write or download it anew") from None


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """Named tensors; a pickle that holds anything else is refused before any of it runs."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling raises, the file is at fault
        raise InputError(f"{file} cannot be read safely; convert it to safetensors ({error!r:.200})") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise InputError(f"{file} holds something else than named tensors; a model's state dict is needed")
    return tensors


def _is_conv1d(name: str) -> bool:
    return name.endswith(".weight") and name.removesuffix(".weight").endswith(_CONV1D)


def _to_hub(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    hub = {}
    for name, tensor in tensors.items():
        hub_name = name if name in _HEADS else f"transformer.{name}"
        hub[hub_name] = (tensor.t() if _is_conv1d(name) else tensor).contiguous()
        if _is_conv1d(name) and name.removesuffix("weight") + "bias" not in tensors:
            # transformers' Conv1D has biases; the paper's layers have none.
            hub[hub_name.removesuffix("weight") + "bias"] = tensor.new_zeros(tensor.shape[0])
    return hub


def _from_hub(hub: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {}
    for hub_name, tensor in hub.items():
        name = hub_name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks that older versions stored
            continue
        tensors[name] = tensor.t().contiguous() if _is_conv1d(name) and tensor.ndim == 2 else tensor
    biases = [name for name in tensors if name.endswith(".bias")]
    if not any(bool(tensors[name].any()) for name in biases):
        for name in biases:
            del tensors[name]
    return tensors
