"""Pretrained models that training starts from."""

from pathlib import Path

import torch

from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError
from igpt.model.conditions import with_conditions
from igpt.model.match import require_match
from igpt.model.resolution import at_resolution
from igpt.model.transformer import ImageGPT


def pretrained_model(path: Path, data: TokenDataset) -> ImageGPT:
    """Load a pretrained model, to train it on tokens of its palette.

    Raises:
        InputError: it cannot be read, its weights are not finite, or its palette is not the data's.
    """
    model = ImageGPT.from_pretrained(path)
    if model.palette is not None:
        require_match(model, data, path, any_size=True)
    broken = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise InputError(
            f"the weights in {path} are broken: {broken[0]} is not finite ({len(broken)} such)"
        )
    return model


def generative_part(
    model: ImageGPT, data: TokenDataset, conditions: tuple[str, ...] | None
) -> ImageGPT:
    """Return a model without its class head, at the resolution and with the palette of the data.

    Position embeddings are interpolated if the resolution differs. Weights are shared.

    Args:
        conditions: see `with_conditions`.

    Raises:
        InputError: the model and the data do not have the same number of colours.
    """
    if model.config.n_colors != len(data.palette):
        raise InputError(
            f"the model has {model.config.n_colors} colours, {data.path} has {len(data.palette)}"
        )
    resized = with_conditions(at_resolution(model, data.resolution), conditions)
    weights = {
        name: tensor.detach()
        for name, tensor in resized.state_dict().items()
        if not name.startswith("score.")
    }
    config = resized.config.model_copy(update={"class_names": None})
    with torch.device("meta"):
        generative = ImageGPT(config, data.palette)
    generative.load_state_dict(weights, assign=True)
    return generative
