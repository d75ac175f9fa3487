"""Mean-only batch normalization."""

from __future__ import annotations

from dataclasses import dataclass

from normswap.norms import Norm
from normswap.norms.mean_only import MeanOnly
from normswap.norms.none import Nothing
from normswap.recipes.base import Recipe
from normswap.records import Site

__all__ = ["MeanOnlyBatchNormalization"]


@dataclass(frozen=True)
class MeanOnlyBatchNormalization(Recipe):
    """Mean-only batch normalization in the BatchNorm's place; the scale γ/σ goes into the layer's plain weight.

    ``y = x − mean + β``. A frozen BatchNorm takes no mean of its batch: there the rest goes into the layer's bias.

    Args:
        synchronized: Whether the mean is that of all processes' batches, as in SyncBatchNorm, in whose place it always
            is.

    Source: T. Salimans, D. Kingma, *Weight Normalization*, 2016, section 3.
    """

    synchronized: bool = False

    name = "mobn"
    equation = "x − mean + β"
    paper = "Salimans & Kingma 2016"
    exact = True

    def norm(self, site: Site, num_groups: int | None) -> Norm:
        return Nothing() if site.frozen else MeanOnly(site.momentum, self.synchronized or site.synchronized)

    def notes(self, site: Site) -> tuple[str, ...]:
        if not site.frozen:
            return ()
        return ("its mean goes into the bias" if site.held else "frozen: its mean goes into the bias",)
