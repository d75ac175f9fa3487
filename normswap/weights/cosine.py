"""Weight normalization of a layer that divides by the lengths of what it reads."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from normswap.nn import FilterLayout
from normswap.nn.cosine import make_cosine
from normswap.norms.assignment import LinearOf
from normswap.weights.base import WeightEncoding
from normswap.weights.weight_norm import WeightNorm

__all__ = ["CosineWeight"]


@dataclass(frozen=True)
class CosineWeight(WeightNorm):
    """``g (v·u)/(‖v‖ ‖u‖)``: the layer of the weight divides by ‖u‖, u what a filter reads.

    Its values are those of a plain layer at inputs of the expected length ρ: ``g = ‖w‖ ρ``.

    Args:
        lengths_read: ρ of each group of filters; ones where nothing is to be made up for. ``(groups,)``

    Source: C. Luo et al., *Cosine Normalization*, 2017.
    """

    lengths_read: Tensor | None = field(default=None, compare=False, repr=False)

    name = "cosine"
    reads_inputs = True

    def for_inputs(self, squares: Tensor) -> CosineWeight:
        return replace(self, lengths_read=squares.sqrt())

    def register(self, layer: nn.Module, name: str = "weight") -> None:
        make_cosine(layer)
        super().register(layer, name)

    def encode(self, layout: FilterLayout, weight: Tensor, factor: Tensor, dtype: torch.dtype) -> WeightEncoding:
        if self.lengths_read is None:
            return super().encode(layout, weight, factor, dtype)
        length = self.lengths_read.to(factor).repeat_interleave(factor.numel() // self.lengths_read.numel())
        encoded = super().encode(layout, weight, factor * length, dtype)
        values = {
            name: replace(
                new, terms=tuple(_times(term, length) if term.old == "factor" else term for term in new.terms)
            )
            for name, new in encoded.values.items()
        }
        return WeightEncoding(values, encoded.excess)


def _times(term: LinearOf, length: Tensor) -> LinearOf:
    return replace(term, factor=length if term.factor is None else term.factor * length)
