"""Interpolation of position embeddings to another resolution."""

import math

import pytest
import torch
from torch import Tensor

from igpt.model.config import ModelConfig
from igpt.model.objectives import Autoregressive
from igpt.model.resolution import at_resolution
from igpt.model.transformer import ImageGPT


def model_of(resolution: int, **changes: object) -> ImageGPT:
    torch.manual_seed(1)
    shape = {"resolution": resolution, "n_colors": 5, "n_layer": 2, "n_embd": 8, "n_head": 2}
    return ImageGPT(ModelConfig.layered({**shape, **changes}))


def centres(resolution: int) -> Tensor:
    """Return the centres of pixels in an image of side 1."""
    return (torch.arange(resolution) + 0.5) / resolution


def kernel(x: float) -> float:
    """Keys' bicubic kernel, a = -1/2."""
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def weights(old: int, new: int) -> Tensor:
    """Return the weight of every old pixel of a row in every new one, [new, old]."""
    width = max(1.0, old / new)
    rows = []
    for position in range(new):
        middle = (position + 0.5) * old / new
        row = torch.tensor(
            [kernel((other + 0.5 - middle) / width) for other in range(old)], dtype=torch.float64
        )
        rows.append(row / row.sum())
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("resolution", [1, 2, 7, 8, 32])
def test_the_same_resolution_changes_no_bit(resolution: int, dtype: torch.dtype) -> None:
    model = (
        model_of(resolution, class_names=("a", "b"), objective="bert", bias=True).to(dtype).eval()
    )
    same = at_resolution(model, resolution)
    assert same.config == model.config
    assert not same.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(same.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("old", "new"), [(8, 16), (8, 12), (16, 8), (12, 8), (7, 5), (3, 10), (32, 48)]
)
def test_positions_are_weighted_by_the_kernel_of_both_axes(old: int, new: int) -> None:
    model = model_of(old).double()
    one = weights(old, new)
    expected = torch.einsum(
        "yi,xj,ijd->yxd", one, one, model.wpe.weight.detach().unflatten(0, (old, old))
    )
    found = at_resolution(model, new).wpe.weight.detach().unflatten(0, (new, new))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("old", "new"), [(8, 16), (8, 12), (16, 8), (12, 8), (32, 48)])
def test_a_linear_ramp_stays_linear(old: int, new: int) -> None:
    """The first two embeddings are row and column; borders are not compared."""
    model = model_of(old)
    rows, columns = torch.meshgrid(centres(old), centres(old), indexing="ij")
    with torch.no_grad():
        model.wpe.weight[:, 0], model.wpe.weight[:, 1] = rows.flatten(), columns.flatten()
    found = at_resolution(model, new).wpe.weight.detach().unflatten(0, (new, new))
    border = math.ceil(2 * max(1, new / old))
    inner = slice(border, new - border)
    wanted = centres(new)[inner]
    assert len(wanted) >= 4
    within = {
        "rtol": 0,
        "atol": 1e-6 if new > old or old % new == 0 else 0.02 / new,
    }  # a fiftieth of a position
    torch.testing.assert_close(found[inner, :, 0], wanted[:, None].expand(-1, new), **within)
    torch.testing.assert_close(found[:, inner, 1], wanted.expand(new, -1), **within)


@pytest.mark.parametrize("resolution", [4, 12])
def test_the_changed_model_trains(resolution: int) -> None:
    model = model_of(8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = at_resolution(model, resolution)
    assert (model.config.resolution, changed.config.resolution) == (8, resolution)
    for name, tensor in changed.state_dict().items():
        assert name == "wpe.weight" or torch.equal(tensor, before[name]), name
    assert torch.equal(model.wpe.weight, before["wpe.weight"]), "the model itself is unchanged"
    loss, _ = Autoregressive().loss(changed, torch.randint(0, 5, (2, resolution**2)))
    loss.backward()
    assert changed.wpe.weight.grad is not None
    assert changed.wpe.weight.grad.shape == (resolution**2, 8)
