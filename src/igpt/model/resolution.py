"""Models at another resolution than they were trained at. R resolution, n = R^2 pixels, D width."""

import torch
import torch.nn.functional as F

from igpt.model.transformer import ImageGPT


def at_resolution(model: ImageGPT, resolution: int) -> ImageGPT:
    """Return the model for images of another resolution, with interpolated position embeddings.

    All other weights are shared. The embeddings [n, D] are resampled on their R x R grid by Keys'
    bicubic kernel with a = -1/2, widened when the grid shrinks. Away from the border, linear ramps
    are preserved (up to a fiftieth of a pixel where the grid shrinks by a fraction). At the model's
    own resolution every bit is the same. Rotary positions need no change.
    """
    side = model.config.resolution
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if (embeddings := weights.get("wpe.weight")) is not None:
        grid = embeddings.double().unflatten(0, (side, side)).permute(2, 0, 1)  # [D, R, R]
        # Without antialias, PyTorch takes a = -3/4, which turns ramps into stairs.
        resampled = F.interpolate(
            grid[None], (resolution, resolution), mode="bicubic", antialias=True
        )[0]
        weights["wpe.weight"] = resampled.flatten(1).t().to(embeddings.dtype).contiguous()
    config = model.config.model_copy(update={"resolution": resolution})
    with torch.device("meta"):
        changed = ImageGPT(config, model.palette)
    changed.load_state_dict(weights, assign=True)
    return changed.train(model.training)
