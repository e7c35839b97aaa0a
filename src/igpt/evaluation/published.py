"""The test losses that OpenAI published with its models, and their comparison with measured
ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from igpt.model.config import ModelConfig

FORMAT, VERSION = "igpt-published", 1
_SOURCE = "github.com/openai/image-gpt"
# By layers, width and heads: on the 50,000 test images of ImageNet as released (32 px, 512
# colours), nats/pixel.
_IMAGENET = {
    (24, 512, 8): ("igpt-s", 2.0895),
    (36, 1024, 8): ("igpt-m", 2.0614),
    (48, 1536, 16): ("igpt-l", 2.0466),
}


def published_loss(config: ModelConfig, name: str) -> dict[str, Any] | None:
    """Return the loss published for a model of this shape on released arrays, or None.

    Args:
        name: prefix of the arrays' names, such as "downloads/imagenet".
    """
    shape = (config.n_layer, config.n_embd, config.n_head)
    fits = (config.resolution, config.n_colors, config.trained_as.has_likelihood) == (32, 512, True)
    if not fits or Path(name).name != "imagenet" or shape not in _IMAGENET:
        return None
    model, loss = _IMAGENET[shape]
    return {"model": model, "nats_per_pixel": loss, "source": _SOURCE}


def compared(
    found: Mapping[str, Any], published: Mapping[str, Any], *, whole: bool
) -> dict[str, Any]:
    """Compare a measured loss with a published one: their difference, and whether they agree.

    All test images must give the published four digits; a part of them, a mean within two standard
    errors.

    Args:
        found: see `summary`.
        whole: whether all test images were scored.
    """
    loss, error = found["nats_per_pixel"], found["standard_error"]
    difference = loss - published["nats_per_pixel"]
    agrees = (
        round(loss, 4) == published["nats_per_pixel"]
        if whole
        else abs(difference) <= 2 * (error or 0)
    )
    within = "four digits" if whole else "two standard errors"
    return {**published, "difference": difference, "agrees": bool(agrees), "within": within}
