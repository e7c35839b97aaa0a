"""Products for few rows against plain ones."""

import os
import subprocess
import sys

import pytest
import torch

from igpt.errors import InputError
from igpt.sampling import products
from igpt.sampling.products import product

# Instructions to which oneDNN can be limited, and the processors that have them.
INSTRUCTIONS = {
    "AVX2": "avx2",
    "AVX2_VNNI": "avx_vnni",
    "AVX512_CORE_VNNI": "avx512_vnni",
    "AVX512_CORE_AMX": "amx_int8",
}
CAPABILITIES = torch.cpu.get_capabilities()


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("largest", [63, 127])
def test_int8_products_are_exact_for_rounded_factors(
    largest: int, rows: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if largest == 127 and not products._sums_in_32_bits():
        pytest.skip("weights of 8 bits overflow on this processor")
    monkeypatch.setattr(products, "_sums_in_32_bits", lambda: largest == 127)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 48, generator=generator), torch.randn(30, 48, generator=generator)
    x[0] *= 1e-3  # every row has its own scale
    bias = torch.randn(30, generator=generator) if biased else None
    found = product(weight, bias, "int8")(x)

    def rounded(factor: torch.Tensor, largest: int) -> torch.Tensor:
        scale = factor.double().abs().amax(1, keepdim=True) / largest
        return (factor / scale).round() * scale

    expected = rounded(x, 127) @ rounded(weight, largest).T + (0 if bias is None else bias)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    error = (found - torch.nn.functional.linear(x, weight, bias)).abs()
    assert error.mean() < 0.01 * x.norm(dim=1).mean() * weight.norm(dim=1).mean()


def test_inputs_in_bf16_are_not_rounded_further() -> None:
    x, multiply = torch.randn(9, 48).bfloat16(), product(torch.randn(30, 48), None, "int8")
    assert torch.equal(multiply(x), multiply(x.float()))


_LARGEST_SUMS = """
import torch
from igpt.sampling import products
if {seven_bits}:
    products._sums_in_32_bits = lambda: False
limit = 63 if {seven_bits} else 127
generator = torch.Generator().manual_seed(0)
for rows in (1, 4, 20):
    weight = torch.randint(-limit, limit + 1, (64, 512), generator=generator)
    weight[:, 0] = weight[0] = limit  # the largest sums, and scales of 1
    x = torch.randint(-127, 128, (rows, 512), generator=generator)
    x[:, 0] = x[0] = 127
    found = products.product(weight.float(), None, "int8")(x.float())
    expected = x.double() @ weight.double().t()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), rows
"""


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_int8_on_other_processors(instructions: str) -> None:
    """oneDNN is limited to some instructions; its slow reference kernel must not be used."""
    if not CAPABILITIES.get(INSTRUCTIONS[instructions]):
        pytest.skip(f"this processor has no {INSTRUCTIONS[instructions]}")
    code = _LARGEST_SUMS.format(seven_bits=instructions == "AVX2")
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions, "ONEDNN_VERBOSE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "matmul" in done.stdout
    assert "ref_int8" not in done.stdout


def test_rows_of_zeros_stay_zeros() -> None:
    found = product(torch.randn(30, 48), None, "int8")(torch.zeros(3, 48))
    assert torch.equal(found, torch.zeros(3, 30))


def test_int8_products_of_a_row_do_not_depend_on_the_others() -> None:
    x = torch.randn(20, 48)
    multiply = product(torch.randn(30, 48), None, "int8")
    assert torch.equal(multiply(x)[7:8], multiply(x[7:8]))


@pytest.mark.parametrize("name", ["qlinear_prepack", "qlinear_pointwise"])
def test_a_build_without_int8_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*given: object) -> None:
        raise RuntimeError("not implemented")

    monkeypatch.setattr(torch.ops.onednn, name, missing)
    with pytest.raises(InputError, match="int8 needs a build of PyTorch with oneDNN"):
        product(torch.ones(2, 2), None, "int8")
