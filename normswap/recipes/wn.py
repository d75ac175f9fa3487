"""Weight normalization."""

from __future__ import annotations

from dataclasses import dataclass

from normswap.norms import Norm
from normswap.norms.none import Nothing
from normswap.recipes.base import Recipe
from normswap.records import Site
from normswap.weights import Weight, WeightNorm

__all__ = ["WeightNormalization"]


@dataclass(frozen=True)
class WeightNormalization(Recipe):
    """Weight normalization of the layer and no norm: ``W = g v/‖v‖``, with the BatchNorm's affine in g and the bias.

    Args:
        log_gain: Whether the logarithm of g is the parameter, ``g = exp(s)``. A step then changes g by a factor. The
            authors found it no better and slightly slower to train.

    Source: T. Salimans, D. Kingma, *Weight Normalization*, 2016, eq. 2 and section 2.1.
    """

    log_gain: bool = False

    name = "wn"
    equation = "W = g v/‖v‖, no norm"
    paper = "Salimans & Kingma 2016"
    exact = True

    def weight(self, site: Site) -> Weight:
        return WeightNorm(self.log_gain)

    def norm(self, site: Site, num_groups: int | None) -> Norm:
        return Nothing()
