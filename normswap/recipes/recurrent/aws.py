"""Weight standardization of recurrent layers, with an offset per row."""

from __future__ import annotations

from dataclasses import dataclass

from normswap.recipes.recurrent.base import RecurrentRecipe, why_no_deviation
from normswap.records import RecurrentSite
from normswap.weights import Weight, WeightStd

__all__ = ["RecurrentAffineStandardization"]


@dataclass(frozen=True)
class RecurrentAffineStandardization(RecurrentRecipe):
    """Weight standardization of each row of each matrix, with a learnable gain and offset: the same function.

    ``W_j = (g_j (v_j − mean v_j)/√(var v_j + eps) + o_j)/√n``, n values in a row.

    Args:
        eps: Added to the variance.

    Source: S. Qiao et al., *Weight Standardization*, 2019, eq. 4-5, which have neither gain nor offset.
    """

    eps: float = 1e-5

    name = "aws"
    equation = "W_j = (g_j (v_j − mean v_j)/√(var v_j + eps) + o_j)/√n per row of each matrix"
    paper = "Qiao et al. 2019"
    exact = True

    def refuse(self, site: RecurrentSite) -> str | None:
        return why_no_deviation(site, self.matrices(site))

    def weight(self) -> Weight:
        return WeightStd(offset=True, eps=self.eps)
