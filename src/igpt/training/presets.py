"""Named models and recipes: the published ones, and small ones that two CPU cores can train."""

from collections.abc import Mapping
from typing import Any

from igpt.errors import InputError, suggest

# The paper's: batch 128 (XL 64), 1 M updates (XL 2 M), warm-up of one epoch, cosine to 0, no decay,
# no augmentation. It tried learning rates from 0.01 downwards and does not state the chosen ones
# for every size: these are the usual readings. Nor does it speak of clipping gradients: the default
# clips them at a norm of 1.
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
    "patience": 3,  # a hundred photographs are soon known by heart
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
    # About an hour on one H100 by arithmetic (`igpt plan gpu-hour`): half of igpt-s, 5 M images.
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
    # Seconds on two cores: to see whether a data set goes through.
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
    # A minute on two cores at 8 px (64 places).
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
    # Minutes on two cores at 16 px (256 places).
    "photos": _PHOTOS,
    # The same with what won the race to a fixed loss (experiments/speedrun); the paper has none of
    # it.
    "modern": {
        **_PHOTOS,
        "learning_rate": 1e-2,
        "start_from_palette": True,
        "value_residual": True,
        "positions": "rotary",
    },
}


def preset(name: str) -> Mapping[str, Any]:
    """The settings of a named model.

    Raises:
        InputError: there is none of that name; the nearest is named.
    """
    if name not in MODELS:
        raise InputError(f"no preset {name!r}; {suggest(name, MODELS)}")
    return MODELS[name]
