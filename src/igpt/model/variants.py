"""Variants of the paper's model: rotary positions and value residuals.

T positions, K head width, R resolution.
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from igpt.config import Config
from igpt.errors import InputError
from igpt.model import cpu

Positions = Literal["learned", "rotary"]
_REMOVED = {"qk_norm": False, "activation": "quick_gelu"}  # variants of earlier versions, off
_BASE = 100.0  # of the wavelengths, for grids of some tens of pixels (arXiv 2403.13298)


class Variants(Config):
    """The settings in which a model can differ from the paper's; by default it does not."""

    positions: Positions = Field(
        "learned", description="learned position embeddings, or rotary queries and keys (2-D RoPE)"
    )
    value_residual: bool = Field(
        False, description="mix each block's values with the first block's"
    )

    @classmethod
    def layered(cls, *layers: Mapping[str, Any], where: str = "settings") -> Self:
        """Return the settings as `Config.layered` does.

        Files of earlier versions may contain removed variants; they are accepted when off.

        Raises:
            InputError: as `Config.layered`, or a removed variant is on.
        """
        for layer in layers:
            for name, off in _REMOVED.items():
                if layer.get(name, off) != off:
                    raise InputError(
                        f"{where} has {name} = {layer[name]!r}, a variant that this version of "
                        "igpt no longer has"
                    )
        known = ({k: v for k, v in layer.items() if k not in _REMOVED} for layer in layers)
        return super().layered(*known, where=where)

    @property
    def faithful(self) -> bool:
        """Whether it is the paper's model, which transformers' ImageGPT computes too."""
        return self.variants == Variants()

    @property
    def variants(self) -> "Variants":
        """These settings alone."""
        return Variants(**{name: getattr(self, name) for name in Variants.model_fields})


def rope_table(positions: Tensor, head_width: int, resolution: int) -> Tensor:
    """Return cosines and signed sines of `apply_rope_2d`, float64: [T] -> [T, 2, K].

    The first half of K is rotated by the row of a position, the second half by its column. Each
    half is K/4 pairs of numbers, all first ones and then all second ones; pair p is rotated by the
    angle (row or column) / 100^(4p/K). Sines of first numbers are negative.
    """
    quarter = head_width // 4
    frequencies = _BASE ** (
        -torch.arange(quarter, dtype=torch.float64, device=positions.device) / quarter
    )
    axes = torch.stack([positions // resolution, positions % resolution], dim=-1)  # [T, 2]
    angles = axes[..., None] * frequencies  # [T, 2, K/4]
    cos, sin = angles.cos(), angles.sin()
    both = torch.stack([torch.stack([cos, cos], -2), torch.stack([-sin, sin], -2)], dim=-4)
    return both.flatten(-3)  # [T, 2 (cos, sin), 2 (axes), 2 (of a pair), K/4] -> [T, 2, K]


def apply_rope_2d(x: Tensor, table: Tensor) -> Tensor:
    """Apply rotary position embeddings of a grid: [..., T, K] -> [..., T, K].

    The product of a query and a key then depends only on the offset of their positions (arXiv
    2104.09864; two axes: arXiv 2403.13298).

    Args:
        table: `rope_table` of the T positions, [..., T, 2, K].
    """
    if cpu.trains_on_cpu(x):
        return cpu.lean_rotation(x, *table.to(x.dtype).unbind(-2))
    kind = torch.promote_types(x.dtype, torch.float32)
    return cpu.rotate(x.to(kind), *table.to(kind).unbind(-2)).to(x.dtype)
