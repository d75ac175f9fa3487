"""Batch-channel normalization with weight standardization."""

from __future__ import annotations

from dataclasses import dataclass

from normswap.norms import Norm
from normswap.norms.batch_channel import BatchChannel
from normswap.recipes.gn_ws import GroupNormalizationWeightStandardization
from normswap.records import Site

__all__ = ["BatchChannelNormalization"]


@dataclass(frozen=True)
class BatchChannelNormalization(GroupNormalizationWeightStandardization):
    """Estimated batch statistics and group normalization in the BatchNorm's place, and weight standardization.

    ``t = (x − μ̂)/sqrt(σ̂² + eps)``, ``y = γ (t − mean_g t)/sqrt(var_g t + eps) + β``, with the estimates μ̂ and σ̂² of
    what reaches the norm in training, for batches of a few samples. Up to the group normalization the swap is exact
    where the weights are not standardized; a BatchNorm that is frozen becomes that of ``gn+ws``.

    Source: S. Qiao et al., *Micro-Batch Training with Batch-Channel Normalization and Weight Standardization*, 2019.
    """

    name = "bcn"
    equation = "W as gn+ws, (x − μ̂)/sqrt(σ̂² + eps) by estimates, then gn"
    paper = "Qiao et al. 2019"
    exact = False

    def norm(self, site: Site, num_groups: int | None) -> Norm:
        assert num_groups is not None
        if site.frozen:
            return super().norm(site, num_groups)
        return BatchChannel(num_groups, site.eps if self.eps is None else self.eps, site.momentum)

    def notes(self, site: Site) -> tuple[str, ...]:
        own: tuple[str, ...] = ()
        if site.frozen:
            own = ("frozen: no estimates, its statistics go into the weight",)
        elif site.synchronized:
            own = ("the estimates are each process's own",)
        return (*own, *super().notes(site))
