"""Models for another resolution than the one they were trained at.

R resolution, n = R^2 places, D width.
"""

import torch
import torch.nn.functional as F

from igpt.model.transformer import ImageGPT


def at_resolution(model: ImageGPT, resolution: int) -> ImageGPT:
    """The model for images of another resolution: its position embeddings interpolated, all other weights shared.

    Embeddings [n, D] are resampled on their R x R grid by Keys' bicubic kernel with a = -1/2,
    widened when the grid shrinks. Away from the border, linear ramps stay what they are (where the
    grid shrinks by a fraction, to a fiftieth of a place); at the model's own resolution every bit
    does. Rotary positions need no change.
    """
    side = model.config.resolution
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if (places := weights.get("wpe.weight")) is not None:
        grid = places.double().unflatten(0, (side, side)).permute(2, 0, 1)  # [D, R, R]
        # Without antialias, PyTorch takes a = -3/4, by which ramps become stairs.
        resampled = F.interpolate(
            grid[None], (resolution, resolution), mode="bicubic", antialias=True
        )[0]
        weights["wpe.weight"] = resampled.flatten(1).t().to(places.dtype).contiguous()
    with torch.device("meta"):
        changed = ImageGPT(
            model.config.model_copy(update={"resolution": resolution}), model.palette
        )
    changed.load_state_dict(weights, assign=True)
    return changed.train(model.training)
