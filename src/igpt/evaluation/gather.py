"""The images to evaluate a model on, as tokens of the model."""

from os import PathLike
from pathlib import Path

from igpt.data.image_set import ImageSetConfig, Selection, source_images, stored_images
from igpt.data.tokens.dataset import TokenDataset
from igpt.data.tokens.manifest import FORMAT, MANIFEST
from igpt.files import read_json
from igpt.model.match import palette_of, require_match
from igpt.model.transformer import ImageGPT


def select_images(
    model: ImageGPT,
    source: str,
    config: ImageSetConfig,
    *,
    name: str | PathLike[str] = "MODEL",
) -> Selection:
    """Select images of a token data set or of any source, to be read as tokens of a model.

    Args:
        source: folder of a token data set, or see `source_images`.
        name: the model's directory, for messages.

    Raises:
        InputError: the source cannot be used, or its tokens are not those of the model.
    """
    path = Path(source).expanduser()
    # A folder of images may have a dataset.json too: StyleGAN's tools write one.
    if (path / MANIFEST).exists() and read_json(path / MANIFEST, "token data set").get(
        "format"
    ) == FORMAT:
        data = TokenDataset(path)
        require_match(model, data, Path(name))
        return stored_images(data, config)
    return source_images(source, palette_of(model), model.config.resolution, config)
