"""Small models with random weights."""

import torch

from igpt.model.config import ModelConfig
from igpt.model.transformer import ImageGPT


def random_model(objective: str = "autoregressive", **changed: object) -> ImageGPT:
    torch.manual_seed(0)
    shape = {"resolution": 6, "n_colors": 11, "n_layer": 3, "n_embd": 24, "n_head": 3, **changed}
    model = ImageGPT(ModelConfig.layered(shape, {"objective": objective})).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model
