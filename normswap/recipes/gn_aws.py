"""Group normalization with affine weight standardization."""

from __future__ import annotations

from dataclasses import dataclass

from normswap.recipes.base import GroupedRecipe
from normswap.records import Site
from normswap.weights import PlainWeight, Weight, WeightStd

__all__ = ["GroupNormalizationAffineWeightStandardization"]


@dataclass(frozen=True)
class GroupNormalizationAffineWeightStandardization(GroupedRecipe):
    """Group normalization, and weight standardization with a learnable gain and offset per filter.

    ``W = (gain (v − mean v)/sqrt(var v + eps) + offset)/sqrt(n)``: every weight can be written so, and the layer's
    function is kept exactly. A filter of one value (fan-in 1) has no deviation: there the recipe is ``gn``.

    Source: S. Qiao et al., *Weight Standardization*, 2019, eq. 4-5; gain and offset as in mmcv's ``ConvAWS2d``, where
    they are buffers.
    """

    name = "gn+aws"
    equation = "W = (gain (v − mean v)/sqrt(var v + eps) + offset)/sqrt(n), then gn"
    paper = "Qiao et al. 2019, Wu & He 2018"
    exact = False

    def weight(self, site: Site) -> Weight:
        return WeightStd(offset=True) if site.fan_in > 1 else PlainWeight()

    def notes(self, site: Site) -> tuple[str, ...]:
        own = ("fan-in 1: the weight is not standardized",) if site.fan_in == 1 else ()
        return (*own, *super().notes(site))
