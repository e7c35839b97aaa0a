"""Generative Pretraining from Pixels (Chen et al., 2020): palette, tokens, pretraining, probes, samples, reports."""

from igpt.data.palette import Palette
from igpt.data.tokens import TokenDataset
from igpt.model.transformer import ImageGPT, ModelConfig

__version__ = "0.1.0"
__all__ = ["ImageGPT", "ModelConfig", "Palette", "TokenDataset", "__version__"]
