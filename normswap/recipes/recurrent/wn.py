"""Weight normalization of recurrent layers."""

from __future__ import annotations

from dataclasses import dataclass

from normswap.recipes.recurrent.base import RecurrentRecipe
from normswap.weights import Weight, WeightNorm

__all__ = ["RecurrentWeightNormalization"]


@dataclass(frozen=True)
class RecurrentWeightNormalization(RecurrentRecipe):
    """Weight normalization of each row of each matrix: ``W_j = g_j v_j/‖v_j‖``, v the former weight, g its norm.

    Source: T. Salimans, D. Kingma, *Weight Normalization*, 2016, eq. 2, and section 5.3 for an LSTM.
    """

    name = "wn"
    equation = "W_j = g_j v_j/‖v_j‖ per row of each matrix"
    paper = "Salimans & Kingma 2016"
    exact = True

    def weight(self) -> Weight:
        return WeightNorm()
