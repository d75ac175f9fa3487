"""Weight standardization, with a gain and, on request, an offset per filter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normswap.nn import FilterLayout, WeightStandardization, row_moments
from normswap.norms.assignment import Along, LinearOf, NewValue
from normswap.weights.base import Weight, WeightEncoding

__all__ = ["WeightStd"]


@dataclass(frozen=True)
class WeightStd(Weight):
    """``W = (gain (v − mean v)/sqrt(var v + eps) + offset)/sqrt(n)``, n values in a filter; see the parametrization.

    Args:
        gain: Whether each filter has a learnable gain.
        offset: Whether each filter has a learnable offset.
        eps: Added to the variance.

    Source: S. Qiao et al., *Weight Standardization*, 2019, eq. 4-5.
    """

    gain: bool = True
    offset: bool = False
    eps: float = 1e-5

    free_length = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return "aws" if self.offset else "ws"

    @property
    def centres(self) -> bool:  # type: ignore[override]
        return not self.offset

    @property
    def reads_inputs(self) -> bool:  # type: ignore[override]
        return self.centres

    def register(self, layer: nn.Module, name: str = "weight") -> None:
        ws = WeightStandardization(FilterLayout.of(layer), gain=self.gain, offset=self.offset, eps=self.eps)
        parametrize.register_parametrization(layer, name, ws)

    def encode(self, layout: FilterLayout, weight: Tensor, factor: Tensor, dtype: torch.dtype) -> WeightEncoding:
        filters = layout.flatten(weight)
        if not self.gain:
            std = (row_moments(filters)[1] + self.eps).sqrt()
            values = {"parametrizations.weight.original": NewValue(weight, (LinearOf("layer.weight"),))}
            return WeightEncoding(values, 1 / (std * factor))
        # The length of v is free, and the gradient grows as it shrinks: a dead channel's filter, near zero, would be
        # flung about by any rate that the others need. None is left shorter than they are in the mean.
        length = filters.norm(dim=1)
        stretch = (length.square().mean().sqrt() / length).clamp(min=1)
        stretch = torch.where(stretch.isfinite(), stretch, torch.ones_like(stretch))
        filters, factor = filters * stretch[:, None], factor / stretch
        mean, var = row_moments(filters)
        std = (var + self.eps).sqrt()
        unit = filters.shape[1] ** 0.5
        v = NewValue(layout.unflatten(filters, weight), (LinearOf("layer.weight", stretch),))
        values = {
            "parametrizations.weight.original0": v,
            "parametrizations.weight.original1": NewValue(
                std * factor * unit,
                (
                    LinearOf("factor", std * unit / stretch),
                    # By so much the gain grows with the filter's length about its mean.
                    LinearOf("layer.weight", factor * stretch * var.sqrt() / std, along=Along.SPREAD),
                ),
            ),
        }
        if self.offset:
            offset = LinearOf("factor", mean * unit / stretch)
            terms = (offset, LinearOf("layer.weight", factor * stretch * unit, along=Along.MEAN))
            values["parametrizations.weight.original2"] = NewValue(mean * factor * unit, terms)
        return WeightEncoding(values, torch.ones_like(factor))
