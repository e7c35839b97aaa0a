"""Muon against PyTorch's own, and against a singular value decomposition."""

import pytest
import torch

from igpt.training import muon
from igpt.training.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_steps_equal_pytorchs_in_bf16(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "multiplies_bf16", lambda device: True)
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    mine = Muon([ours], weight_decay=0.1)
    reference = torch.optim.Muon([theirs], weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in (mine, reference):
            optimizer.param_groups[0]["lr"] = 0.02
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert mine.state_dict()["state"][0].keys() == reference.state_dict()["state"][0].keys()


def test_bf16_and_fp32_agree_on_the_singular_vectors() -> None:
    matrix = torch.randn(12, 30, generator=torch.Generator().manual_seed(1))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    for kind, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        inner = left.T @ orthogonalize(matrix, kind).float() @ right.T
        values = inner.diagonal()
        assert values.min() > 0.5
        assert values.max() < 1.5
        torch.testing.assert_close(inner, torch.diag(values), rtol=0, atol=tolerance)
