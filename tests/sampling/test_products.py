"""Products for few rows against plain ones."""

import pytest
import torch

from igpt.errors import InputError
from igpt.sampling.products import product


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("biased", [False, True])
def test_int8_products_are_exact_for_rounded_factors(rows: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 48, generator=generator), torch.randn(30, 48, generator=generator)
    x[0] *= 1e-3  # every row has its own scale
    bias = torch.randn(30, generator=generator) if biased else None
    found = product(weight, bias, "int8")(x)

    def rounded(factor: torch.Tensor) -> torch.Tensor:
        scale = factor.double().abs().amax(1, keepdim=True) / 127
        return (factor / scale).round() * scale

    expected = rounded(x) @ rounded(weight).T + (0 if bias is None else bias)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    error = (found - torch.nn.functional.linear(x, weight, bias)).abs()
    assert error.mean() < 0.01 * x.norm(dim=1).mean() * weight.norm(dim=1).mean()


def test_rows_of_zeros_stay_zeros() -> None:
    found = product(torch.randn(30, 48), None, "int8")(torch.zeros(3, 48))
    assert torch.equal(found, torch.zeros(3, 30))


def test_int8_products_of_a_row_do_not_depend_on_the_others() -> None:
    x = torch.randn(20, 48)
    multiply = product(torch.randn(30, 48), None, "int8")
    assert torch.equal(multiply(x)[7:8], multiply(x[7:8]))


def test_a_build_without_int8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*given: object) -> None:
        raise RuntimeError("not implemented")

    monkeypatch.setattr(torch.ops.onednn, "qlinear_prepack", missing)
    with pytest.raises(InputError, match="int8 needs a build of PyTorch with oneDNN"):
        product(torch.ones(2, 2), None, "int8")
