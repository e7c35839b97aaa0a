"""Where the model of a run is, and where results about a model are written."""

import os
from pathlib import Path

from igpt.files import folder_to_read


def model_and_run(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Return the model directory that a run or model directory means, and where its results belong.

    Results about a model without a run belong into the current folder. Names of built-in models and
    of models on the Hub are returned unchanged.
    """
    path = Path(path)
    if (folder_to_read(path / "model") / "config.json").exists():
        return path / "model", path
    if path.name == "model" and (path.parent / "config.yaml").exists():
        return path, path.parent
    return path, Path()
