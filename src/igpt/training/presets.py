"""Presets: the published models, and small ones that two CPU cores can train."""

from collections.abc import Mapping
from typing import Any

from igpt.errors import InputError, suggest

# The paper: batch size 128 (XL: 64), 1 M steps (XL: 2 M), warm-up of one epoch, cosine to 0, no
# weight decay, no augmentation. It tried learning rates from 0.01 downwards, and does not state the
# selected ones for every size: these are the usual assumptions. It does not mention gradient
# clipping, which is at a norm of 1 by default here.
_PUBLISHED = {"batch_size": 128, "steps": 1_000_000, "warmup_steps": "epoch"}
_L = {"n_layer": 48, "n_embd": 1536, "n_head": 16, "learning_rate": 1e-3, **_PUBLISHED}

_PHOTOS = {
    "n_layer": 6,
    "n_embd": 128,
    "n_head": 4,
    "batch_size": 16,
    "steps": 700,
    "warmup_steps": 50,
    "optimizer": "muon",
    "learning_rate": 5e-3,
    "flip": True,
    "log_every": 25,
    "validate_every": 50,
    "validation_images": 256,
    "patience": 3,  # a hundred photographs are soon memorized
    "checkpoint_every": 100,
}

MODELS: Mapping[str, Mapping[str, Any]] = {
    "igpt-s": {
        "resolution": 32,
        "n_layer": 24,
        "n_embd": 512,
        "n_head": 8,
        "learning_rate": 3e-3,
        **_PUBLISHED,
    },
    "igpt-m": {
        "resolution": 32,
        "n_layer": 36,
        "n_embd": 1024,
        "n_head": 8,
        "learning_rate": 3e-3,
        **_PUBLISHED,
    },
    "igpt-l": {"resolution": 32, **_L},
    "igpt-l-48": {"resolution": 48, **_L},
    "igpt-xl": {
        "resolution": 64,
        "n_layer": 60,
        "n_embd": 3072,
        "n_head": 48,
        "learning_rate": 1e-3,
        **_PUBLISHED,
        "batch_size": 64,
        "steps": 2_000_000,
    },
    # About an hour on one H100 by `igpt plan gpu-hour`: half of igpt-s, 5 M images.
    "gpu-hour": {
        "resolution": 32,
        "n_layer": 12,
        "n_embd": 512,
        "n_head": 8,
        "learning_rate": 3e-3,
        "batch_size": 128,
        "steps": 40_000,
        "warmup_steps": 1_000,
    },
    # Seconds on two cores, to check that a data set works.
    "tiny": {
        "n_layer": 4,
        "n_embd": 64,
        "n_head": 2,
        "batch_size": 32,
        "steps": 200,
        "warmup_steps": 20,
        "learning_rate": 3e-3,
        "log_every": 20,
        "validate_every": 100,
        "checkpoint_every": 100,
    },
    # A minute on two cores at 8 px (64 pixels).
    "digits": {
        "n_layer": 6,
        "n_embd": 128,
        "n_head": 4,
        "batch_size": 32,
        "steps": 500,
        "warmup_steps": 50,
        "optimizer": "muon",
        "learning_rate": 5e-3,
        "shift": 1,
        "log_every": 20,
        "validate_every": 100,
        "checkpoint_every": 100,
    },
    # Minutes on two cores at 16 px (256 pixels).
    "photos": _PHOTOS,
    # The recipe of experiments/speedrun that reached a fixed loss fastest. Its variants are not in
    # the paper. Minutes on two cores at 16 px.
    "modern": {
        "n_layer": 6,
        "n_embd": 192,
        "n_head": 3,
        "batch_size": 8,
        "steps": 960,
        "warmup_steps": 48,
        "optimizer": "muon",
        "share_color_updates": True,
        "learning_rate": 3e-3,
        "start_from_palette": True,
        "value_residual": True,
        "positions": "rotary",
        "log_every": 40,
        "validate_every": 240,
        "validation_images": 1024,
        "checkpoint_every": 240,
    },
}

# What each is for, in a few words.
PURPOSES: Mapping[str, str] = {
    "igpt-s": "the paper's iGPT-S, 76 M parameters",
    "igpt-m": "the paper's iGPT-M, 455 M",
    "igpt-l": "the paper's iGPT-L, 1.4 B",
    "igpt-l-48": "the paper's iGPT-L at 48 px",
    "igpt-xl": "the paper's iGPT-XL, 6.8 B",
    "gpu-hour": "an hour on one H100 (an estimate)",
    "tiny": "seconds on a CPU",
    "digits": "a minute or two on two cores at 8 px",
    "photos": "minutes on two cores at 16 px",
    "modern": "minutes on two cores at 16 px, the fastest recipe of the speedrun",
}


# Presets for CPUs, with the resolution in pixels that each is made for.
FOR_CPUS: Mapping[str, int] = {"tiny": 8, "digits": 8, "photos": 16, "modern": 16}

# A pretrained model that is adapted to other images: a tenth of the learning rate, and few steps.
ADAPTING: Mapping[str, Any] = {
    "batch_size": 32,
    "steps": 2000,
    "warmup_steps": 100,
    "learning_rate": 3e-4,
    "validate_every": 200,
    "checkpoint_every": 200,
}


def preset(name: str) -> Mapping[str, Any]:
    """Return the settings of a preset.

    Raises:
        InputError: there is no such preset; the nearest is named.
    """
    if name not in MODELS:
        raise InputError(f"no preset {name!r}; {suggest(name, MODELS)}")
    return MODELS[name]
