"""No norm."""

from __future__ import annotations

from dataclasses import dataclass

from normswap.norms import Norm
from normswap.norms.none import Nothing
from normswap.recipes.base import Recipe
from normswap.records import Site
from normswap.weights import PlainWeight, ScaledWeight, Weight

__all__ = ["NoNorm"]


@dataclass(frozen=True)
class NoNorm(Recipe):
    """The norm folded away: its affine goes into the layer's plain weight and bias.

    ``W ← W γ/σ``, ``b ← β + γ(b − μ)/σ``.

    Args:
        multiplier: Whether the layer that ends a residual branch has a scalar multiplier, ``W = a V``, as
            ``init="fixup"`` wants it.

    Source: B. Jacob et al., *Quantization and Training of Neural Networks*, 2018, section 3.2; the multiplier:
    H. Zhang, Y. Dauphin, T. Ma, *Fixup Initialization*, 2019.
    """

    multiplier: bool = False

    name = "none"
    equation = "W γ/σ, b = β + γ(b − μ)/σ"
    paper = "Jacob et al. 2018"
    exact = True

    def weight(self, site: Site) -> Weight:
        return ScaledWeight() if self.multiplier and site.ends_branch else PlainWeight()

    def norm(self, site: Site, num_groups: int | None) -> Norm:
        return Nothing()
