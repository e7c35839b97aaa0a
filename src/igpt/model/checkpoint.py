"""A model directory, in the Hub's ImageGPT layout, so that transformers reads what we write and the reverse.

    config.json                transformers' ImageGPTConfig keys, and ours under "igpt" (format version, objective)
    model.safetensors          transformers' names; its Conv1D matrices are transposed [in, out]
    preprocessor_config.json   the palette ("clusters") and the resolution

This file knows the disk and the names; what the weights mean is in transformer.py.
"""

import hashlib
import json
from collections.abc import Mapping
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
    config = read_json(path / "config.json", "model")
    if config.get("model_type") != "imagegpt":
        raise InputError(f"{name} holds a model of type {config.get('model_type')!r}; 'imagegpt' is needed")
    ours = config.get("igpt", {})
    version = ours.get("version", VERSION) if isinstance(ours, dict) else ours
    if version != VERSION:
        raise InputError(f"{name} has model format version {version}; this igpt reads {VERSION}")
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
    path = folder_to_read(Path(name).expanduser())
    if path.is_dir():
        return path
    if path.exists() or str(name).startswith(("/", ".", "~")) or str(name).count("/") != 1:
        raise InputError(f"no model directory {name}; `igpt pretrain` writes one as RUN/model")
    from huggingface_hub import constants, model_info, snapshot_download

    silence: Exception | None = None
    try:  # snapshot_download has no time limit of its own: where packets vanish it would wait for ever
        model_info(str(name), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # the network fails in many ways, proxies among them; the cache may have the model
        silence = error
    patterns = ["*.json", "*.safetensors", "pytorch_model.bin"]
    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns, local_files_only=silence is not None))
    except Exception as error:
        raise InputError(
            f"no model directory {name} here, and the Hub cannot give it ({type(silence or error).__name__}); "
            "download it elsewhere and give the folder's path"
        ) from None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    # transformers cuts large models up.
    for part in sorted(path.glob("model-*-of-*.safetensors")) + sorted(path.glob("model.safetensors")):
        try:
            tensors.update(load_file(part))
        except SafetensorError as error:
            raise InputError(f"{part} is damaged ({error}); write or download it anew") from None
    if tensors:
        return tensors
    pickled = path / "pytorch_model.bin"
    if not pickled.exists():
        raise InputError(f"no weights in {path}: model.safetensors is missing")
    try:
        tensors = torch.load(pickled, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling raises, the file is at fault
        raise InputError(f"{pickled} cannot be read safely; convert it to safetensors ({error!r:.200})") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise InputError(f"{pickled} holds something else than named tensors; a model's state dict is needed")
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
