"""Weight standardization in front of a BatchNorm."""

from __future__ import annotations

from dataclasses import dataclass

from normswap.norms import Norm
from normswap.norms.batch import BatchNormalization
from normswap.recipes.base import Recipe
from normswap.records import Site
from normswap.weights import Weight, WeightStd

__all__ = ["WeightStandardizationOnly"]


@dataclass(frozen=True)
class WeightStandardizationOnly(Recipe):
    """Weight standardization of the layer; the BatchNorm stays.

    ``W = gain (v − mean v)/sqrt(n (var v + eps))``.

    Args:
        gain: Whether each filter has a learnable gain, else the weight is standardized as published.
        depthwise: Whether the filters of depthwise convolutions are standardized, too; see ``gn+ws``.

    Source: S. Qiao et al., *Weight Standardization*, 2019, eq. 4-5.
    """

    gain: bool = True
    depthwise: bool = False

    name = "ws"
    equation = "W = gain (v − mean v)/sqrt(n (var v + eps)), the BatchNorm stays"
    paper = "Qiao et al. 2019"
    exact = False
    needs_layer = True

    def refuse(self, site: Site) -> str | None:
        if reason := super().refuse(site):
            return reason
        if site.fan_in == 1:
            return "a filter of one value has no deviation to divide by"
        if site.depthwise and not self.depthwise:
            return "without its mean a depthwise filter is blind to what only it sees (depthwise=True does it)"
        return None

    def weight(self, site: Site) -> Weight:
        return WeightStd(gain=self.gain)

    def norm(self, site: Site, num_groups: int | None) -> Norm:
        return BatchNormalization()
