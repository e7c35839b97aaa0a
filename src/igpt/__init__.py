"""Generative Pretraining from Pixels (Chen et al., 2020): tokens, pretraining, probes, samples."""

# The constant of typing, without importing it: Ctrl-C during an import here shows a traceback.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from igpt.api import Run, complete, finetune, prepare, pretrain, probe, quality, sample, score
    from igpt.data.images.palette import Palette
    from igpt.data.tokens.dataset import TokenDataset
    from igpt.evaluation.estimator import ImageGPTFeatures
    from igpt.model.config import ModelConfig
    from igpt.model.transformer import ImageGPT

__version__ = "0.2.0"
__all__ = [
    "ImageGPT",
    "ImageGPTFeatures",
    "ModelConfig",
    "Palette",
    "Run",
    "TokenDataset",
    "__version__",
    "complete",
    "finetune",
    "prepare",
    "pretrain",
    "probe",
    "quality",
    "sample",
    "score",
]

# Modules of the names that are not in igpt.api.
_HOMES = {
    "ImageGPT": "igpt.model.transformer",
    "ImageGPTFeatures": "igpt.evaluation.estimator",
    "ModelConfig": "igpt.model.config",
    "Palette": "igpt.data.images.palette",
    "TokenDataset": "igpt.data.tokens.dataset",
}


def __getattr__(name: str) -> object:
    # Imported when first used, so that `igpt --help` does not import torch.
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(_HOMES.get(name, "igpt.api")), name)
    raise AttributeError(f"module 'igpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
