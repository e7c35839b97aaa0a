"""The start tokens of the classes of class-conditional models."""

import torch

from igpt.model.transformer import ImageGPT


def with_conditions(model: ImageGPT, conditions: tuple[str, ...] | None) -> ImageGPT:
    """Return the model with start tokens of other classes, or of none; other weights are shared.

    A class that the model has already keeps its start token, and a new one begins with a copy of
    the start token of no class.
    """
    if model.config.conditions == conditions:
        return model
    colors, known = model.config.n_colors, model.config.conditions or ()
    rows = [
        colors + 1 + known.index(name) if name in known else colors for name in conditions or ()
    ]
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    weights["wte.weight"] = weights["wte.weight"][[*range(colors + 1), *rows]]
    config = model.config.model_copy(update={"conditions": conditions})
    with torch.device("meta"):
        changed = ImageGPT(config, model.palette)
    changed.load_state_dict(weights, assign=True)
    return changed.train(model.training)
