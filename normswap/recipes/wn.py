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

    Source: T. Salimans, D. Kingma, *Weight Normalization*, 2016, eq. 2.
    """

    name = "wn"
    equation = "W = g v/‖v‖, no norm"
    paper = "Salimans & Kingma 2016"
    exact = True

    def weight(self, site: Site) -> Weight:
        return WeightNorm()

    def norm(self, site: Site, num_groups: int | None) -> Norm:
        return Nothing()
