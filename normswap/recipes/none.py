"""No norm."""

from __future__ import annotations

from dataclasses import dataclass

from normswap.norms import Norm
from normswap.norms.none import Nothing
from normswap.recipes.base import Recipe
from normswap.records import Site

__all__ = ["NoNorm"]


@dataclass(frozen=True)
class NoNorm(Recipe):
    """The norm folded away: its affine goes into the layer's plain weight and bias.

    ``W ← W γ/σ``, ``b ← β + γ(b − μ)/σ``.

    Source: B. Jacob et al., *Quantization and Training of Neural Networks*, 2018, section 3.2.
    """

    name = "none"
    equation = "W γ/σ, b = β + γ(b − μ)/σ"
    paper = "Jacob et al. 2018"
    exact = True

    def norm(self, site: Site, num_groups: int | None) -> Norm:
        return Nothing()
