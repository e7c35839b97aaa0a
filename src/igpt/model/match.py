"""Whether token data sets have the palette and the resolution of a model."""

import shlex
from pathlib import Path

from igpt.config import flags
from igpt.data.images.palette import Palette
from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError
from igpt.model.transformer import ImageGPT


def palette_of(model: ImageGPT) -> Palette:
    """Return the model's palette.

    Raises:
        InputError: its directory contains none.
    """
    if model.palette is None:
        raise InputError("the model's directory holds no palette; add its preprocessor_config.json")
    return model.palette


def require_match(
    model: ImageGPT, data: TokenDataset, name: str | Path = "MODEL", *, any_size: bool = False
) -> None:
    """Refuse tokens of another palette or resolution than the model's.

    Args:
        name: the model's directory, for the message.
        any_size: accept another resolution.

    Raises:
        InputError: they differ; the message has the command that prepares tokens for the model.
    """
    palette, side = palette_of(model), model.config.resolution
    differences = []
    if data.resolution != side and not any_size:
        differences.append(f"the model sees {side} px, {data.path} has {data.resolution} px")
    if data.palette.fingerprint != palette.fingerprint:
        differences.append(
            f"the palettes differ: the model has {palette.description}, {data.path} has "
            f"{data.palette.description}"
        )
    if differences:
        where = Path(name)
        run = where.parent.name if where.name == "model" else where.name
        out = data.path.with_name(f"{data.path.name}-for-{run}")
        size = data.resolution if any_size else side
        command = _prepare_command(data, out, size=size, palette=str(name))
        raise InputError(f"{'; '.join(differences)}; prepare tokens for this model: {command}")


def _prepare_command(data: TokenDataset, out: Path, *, size: int, palette: str) -> str:
    """Return the command that prepares the images of a token data set again, otherwise.

    Args:
        out: the token data set that it writes.
    """
    from igpt.data.prepare import PrepareConfig  # training must import without image libraries

    # The given palette decides how many colours there are, and whether one is transparent.
    recorded = data.manifest["made"]["config"]
    kept = {key: value for key, value in recorded.items() if key not in ("colors", "transparent")}
    settings = {**kept, "size": size, "palette": palette}
    words = flags(PrepareConfig, settings, always={"size", "palette"})
    return shlex.join(["igpt", "prepare", data.manifest["source"], *words, "-o", str(out)])
