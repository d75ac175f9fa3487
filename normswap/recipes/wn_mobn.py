"""Weight normalization with mean-only batch normalization."""

from __future__ import annotations

from dataclasses import dataclass

from normswap.recipes.mobn import MeanOnlyBatchNormalization
from normswap.records import Site
from normswap.weights import Weight, WeightNorm

__all__ = ["WeightNormMeanOnlyBatchNorm"]


@dataclass(frozen=True)
class WeightNormMeanOnlyBatchNorm(MeanOnlyBatchNormalization):
    """Weight normalization of the layer and mean-only batch normalization in the BatchNorm's place.

    ``W = g v/‖v‖``, ``y = W·u − mean + β``. A reparameterization: ``v = w``, signed ``g = ‖w‖ γ/σ``, running mean
    ``γ(μ − b)/σ``, bias β.

    Args:
        synchronized: Whether the mean is that of all processes' batches, as in SyncBatchNorm, in whose place it always
            is.
        log_gain: Whether the logarithm of g is the parameter, as in ``wn``; the sign is v's then.

    Source: T. Salimans, D. Kingma, *Weight Normalization*, 2016, eq. 2, sections 2.1 and 3.
    """

    log_gain: bool = False

    name = "wn+mobn"
    equation = "W = g v/‖v‖, then x − mean + β"
    paper = "Salimans & Kingma 2016"

    def weight(self, site: Site) -> Weight:
        return WeightNorm(self.log_gain)
