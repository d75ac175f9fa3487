"""Weight standardization of recurrent layers."""

from __future__ import annotations

from dataclasses import dataclass

from normswap.recipes.recurrent.base import RecurrentRecipe, Start, why_no_deviation
from normswap.records import RecurrentSite
from normswap.weights import Weight, WeightStd

__all__ = ["RecurrentStandardization"]


@dataclass(frozen=True)
class RecurrentStandardization(RecurrentRecipe):
    """Weight standardization of each row of the matrices that read the input and the state, with a learnable gain.

    ``W_j = g_j (v_j − mean v_j)/√(var v_j + eps)/√n``, n values in a row. A row loses its mean, where data show that
    this costs least, and the bias makes up for what the mean gave. A projection stays: it has no bias.

    Args:
        eps: Added to the variance.

    Source: S. Qiao et al., *Weight Standardization*, 2019, eq. 4-5, which have no gain.
    """

    eps: float = 1e-5

    name = "ws"
    equation = "W_j = g_j (v_j − mean v_j)/√(var v_j + eps)/√n per row of each matrix"
    paper = "Qiao et al. 2019"
    exact = False
    start = Start.CENTRED_ROWS

    def weight(self) -> Weight:
        return WeightStd(eps=self.eps)

    def matrices(self, site: RecurrentSite) -> tuple[str, ...]:
        return tuple(name for name in site.matrices if not name.startswith("weight_hr"))

    def refuse(self, site: RecurrentSite) -> str | None:
        if not site.bias:
            return "it has no biases, which make up for the means that the rows lose"
        return why_no_deviation(site, self.matrices(site))
