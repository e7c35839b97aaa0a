"""The images to evaluate a model on, as tokens of the model."""

from os import PathLike
from pathlib import Path

from igpt.data.image_set import ImageSetConfig, Selection, source_images, stored_images
from igpt.data.tokens.dataset import TokenDataset
from igpt.data.tokens.manifest import FORMAT, MANIFEST
from igpt.files import read_json
from igpt.model.match import palette_of, require_match
from igpt.model.transformer import ImageGPT
from igpt.remote import file_system, reasons, url_of


def select_images(
    model: ImageGPT,
    source: str,
    config: ImageSetConfig,
    *,
    name: str | PathLike[str] = "MODEL",
) -> Selection:
    """Select images of a token data set or of any source, to be read as tokens of a model.

    Args:
        source: folder or URL of a token data set, or see `source_images`.
        name: the model's directory, for messages.

    Raises:
        InputError: the source cannot be used, or its tokens are not those of the model.
    """
    if _is_token_dataset(source):
        data = TokenDataset(url_of(source) or Path(source).expanduser())
        require_match(model, data, Path(name))
        return stored_images(data, config)
    return source_images(source, palette_of(model), model.config.resolution, config)


def _is_token_dataset(source: str) -> bool:
    if (url := url_of(source)) and not url.startswith("http"):
        system, path = file_system(url)
        with reasons(url):
            return bool(system.exists(f"{path}/{MANIFEST}"))
    # A folder of images may have a dataset.json too: StyleGAN's tools write one.
    manifest = Path(source).expanduser() / MANIFEST
    return manifest.exists() and read_json(manifest, "token data set").get("format") == FORMAT
