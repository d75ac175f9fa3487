"""Cosine normalization."""

from __future__ import annotations

from dataclasses import dataclass

from normswap.nn.kinds import LAYERS
from normswap.norms import Norm
from normswap.norms.none import Fitted
from normswap.recipes.base import Recipe
from normswap.records import Site
from normswap.weights import CosineWeight, Weight

__all__ = ["CosineNormalization"]

_OWN = frozenset(kind.__name__ for kind in LAYERS)


@dataclass(frozen=True)
class CosineNormalization(Recipe):
    """Cosine normalization of the layer and no norm: ``g (v·u)/(‖v‖ ‖u‖) + b``, u what a filter reads.

    g and b begin such that at the expected length of u it is what the layer and the BatchNorm were.

    Source: C. Luo et al., *Cosine Normalization: Using Cosine Similarity Instead of Dot Product in Neural Networks*,
    2017, which has neither g nor b.
    """

    name = "cosine"
    equation = "g v·u/(‖v‖ ‖u‖) + b, no norm"
    paper = "Luo et al. 2017"
    exact = False
    needs_layer = True

    def refuse(self, site: Site) -> str | None:
        if reason := super().refuse(site):
            return reason
        if site.layer_type not in _OWN:
            return f"{site.layer_type} is a class of its own, whose forward may do more than multiply"
        if site.fan_in == 1:
            return "the cosine of single values is their sign"
        return None

    def weight(self, site: Site) -> Weight:
        return CosineWeight()

    def norm(self, site: Site, num_groups: int | None) -> Norm:
        return Fitted()
