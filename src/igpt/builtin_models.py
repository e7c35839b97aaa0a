"""The models that are part of the package, and how their names are resolved.

Each is a model directory `igpt/builtin/NAME`, with its card (README.md), the probe of its layers
(probe.json), and the pictures of the card. Its weights are stored in bf16.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from igpt.errors import InputError

DEFAULT_MODEL = "photos-16"  # used by commands that generate or evaluate when no model is given
NAMES = (DEFAULT_MODEL,)
# Where they are; tests replace it by a folder of their own.
FOLDER = Path(str(files("igpt"))) / "builtin"
WEIGHTS, CARD = "model.safetensors", "README.md"


def folder_of(name: str) -> Path:
    """Return the place of a built-in model, which may be empty: see `has_builtin`."""
    return FOLDER / name


def has_builtin(name: str) -> bool:
    """Return whether this build contains the weights of a built-in model."""
    return (folder_of(name) / WEIGHTS).is_file()


def find_builtin(
    name: str | Path, local_files: Iterable[str] = ("config.json", "model/config.json")
) -> Path | None:
    """Return the folder of the built-in model of a name, or None if the name means something else.

    A local folder of the same name is meant instead if it has one of `local_files`, by default
    those of a model directory and of a run.

    Raises:
        InputError: it is the name of a built-in model that this build does not contain.
    """
    if str(name) not in NAMES or any((Path(name) / file).exists() for file in local_files):
        return None
    if not has_builtin(str(name)):
        raise InputError(
            f"this build of igpt has no built-in model {name}; give a run or model directory"
        )
    return folder_of(str(name))


def nearest_name(name: str | Path) -> str | None:
    """Return the name of a built-in model that a word resembles, or None."""
    return next(iter(get_close_matches(str(name), NAMES, n=1, cutoff=0.6)), None)
