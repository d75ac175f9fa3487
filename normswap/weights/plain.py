"""A plain weight: no parametrization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normswap.nn import FilterLayout
from normswap.norms.assignment import Along, LinearOf, NewValue
from normswap.weights.base import Weight, WeightEncoding

__all__ = ["PlainWeight"]


@dataclass(frozen=True)
class PlainWeight(Weight):
    """The weight as it is: ``W ← factor · W`` per output channel."""

    name = None

    def register(self, layer: nn.Module, name: str = "weight") -> None:
        return None

    def encode(self, layout: FilterLayout, weight: Tensor, factor: Tensor, dtype: torch.dtype) -> WeightEncoding:
        share = torch.where(factor == 0, torch.zeros_like(factor), 1 / factor)
        terms = (LinearOf("layer.weight", factor), LinearOf("factor", share, along=Along.FILTERS))
        scaled = NewValue(layout.multiply_outputs(weight, factor), terms)
        return WeightEncoding({"weight": scaled}, torch.ones_like(factor))
