"""Weight normalization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normswap.nn import FilterLayout, parametrize_weight_norm
from normswap.norms.assignment import Along, LinearOf, NewValue
from normswap.weights.base import Weight, WeightEncoding

__all__ = ["WeightNorm"]


@dataclass(frozen=True)
class WeightNorm(Weight):
    """``W = g v/‖v‖`` (Salimans & Kingma 2016, eq. 2)."""

    name = "wn"
    free_length = True

    def register(self, layer: nn.Module, name: str = "weight") -> None:
        parametrize_weight_norm(layer, name)

    def encode(self, layout: FilterLayout, weight: Tensor, factor: Tensor, dtype: torch.dtype) -> WeightEncoding:
        filters = layout.flatten(weight)
        norm = filters.norm(dim=1)
        # v = w, but for two kinds of filter. A zero v has no direction: g = 0 makes the filter zero for any other v, in
        # value and finitely in gradient. And the squares of a tiny v vanish in its dtype: it is stretched to length 1.
        tiny = norm < 1e3 * torch.finfo(dtype).tiny ** 0.5
        v = torch.where(tiny[:, None], filters / norm.clamp(min=1e-300)[:, None], filters)
        v = layout.unflatten(torch.where((norm == 0)[:, None], torch.ones_like(filters), v), weight)
        stretch = torch.where(tiny, 1 / norm.clamp(min=1e-300), torch.ones_like(norm))
        values = {
            "parametrizations.weight.original0": NewValue(
                _shaped(norm * factor, layout, weight),
                (LinearOf("factor", norm), LinearOf("layer.weight", factor, along=Along.DIRECTION)),
            ),
            "parametrizations.weight.original1": NewValue(v, (LinearOf("layer.weight", stretch),)),
        }
        return WeightEncoding(values, torch.ones_like(factor))


def _shaped(g: Tensor, layout: FilterLayout, weight: Tensor) -> Tensor:
    """Return g in the shape that torch's weight norm gives it, or as it is where the filters lie along no one axis."""
    if layout.axis is None:
        return g
    shape = [1] * weight.ndim
    shape[layout.axis] = -1
    return g.view(shape)
