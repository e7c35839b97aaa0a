"""The precision "auto" depends only on the processor's instructions."""

from collections.abc import Iterator, Mapping

import pytest
import torch

from igpt.model import precision
from igpt.model.precision import has_bf16_instructions, multiplies_bf16, resolve_precision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _asked_again() -> Iterator[None]:
    multiplies_bf16.cache_clear()
    yield
    multiplies_bf16.cache_clear()


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_tile": False}, False),
        ({"avx512_f": True, "avx512_bf16": True}, True),
        ({"avx512_f": True, "avx512_bf16": False, "amx_tile": True, "amx_bf16": True}, True),
        ({"avx512_f": True, "amx_tile": True, "amx_bf16": False}, False),
        ({"neon": True, "bf16": True}, True),
        ({"neon": True, "bf16": False}, False),
        ({}, False),
    ],
)
def test_instruction_sets(
    capabilities: Mapping[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert has_bf16_instructions() == expected


def test_auto_is_fp32_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert resolve_precision("auto", CPU) == "fp32"


def test_auto_is_bf16_with_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bf16 here")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert resolve_precision("auto", CPU) == "bf16"


def test_auto_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> float:
        raise AssertionError("a measurement depends on what else runs")

    monkeypatch.setattr(precision, "matmul_rate", refuse)
    assert resolve_precision("auto", CPU) in ("bf16", "fp32")


def test_an_explicit_precision_is_kept() -> None:
    assert resolve_precision("fp32", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"
