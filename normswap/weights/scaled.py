"""A plain weight behind one scalar multiplier."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normswap.nn import FilterLayout, ScalarMultiplier
from normswap.norms.assignment import NewValue
from normswap.weights.base import Weight, WeightEncoding
from normswap.weights.plain import PlainWeight

__all__ = ["ScaledWeight"]


@dataclass(frozen=True)
class ScaledWeight(Weight):
    """``W = a V`` with one scalar a, which begins at 1 (Zhang et al. 2019, the multiplier of a residual branch)."""

    name = "scaled"

    def register(self, layer: nn.Module, name: str = "weight") -> None:
        parametrize.register_parametrization(layer, name, ScalarMultiplier())

    def encode(self, layout: FilterLayout, weight: Tensor, factor: Tensor, dtype: torch.dtype) -> WeightEncoding:
        plain = PlainWeight().encode(layout, weight, factor, dtype)
        values = {
            "parametrizations.weight.original0": NewValue(weight.new_ones(())),
            "parametrizations.weight.original1": plain.values["weight"],
        }
        return WeightEncoding(values, plain.excess)
