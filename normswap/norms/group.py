"""Group normalization."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from normswap.norms.base import Norm
from normswap.norms.records import Encoding, Incoming
from normswap.records import Site

__all__ = ["Groups"]


@dataclass(frozen=True)
class Groups(Norm):
    """``y = γ (x − mean_g x)/sqrt(var_g x + eps) + β`` per sample, over each group of channels and all positions.

    With one group it is layer normalization over all units of a sample.

    Args:
        num_groups: The number of groups.
        eps: Added to the variance.

    Source: Y. Wu, K. He, *Group Normalization*, 2018, eq. 1-7.
    """

    num_groups: int
    eps: float

    modules = (nn.GroupNorm,)

    @property
    def groups(self) -> int:
        return self.num_groups

    def build(self, site: Site, like: Tensor) -> nn.Module:
        return nn.GroupNorm(self.num_groups, site.num_features, self.eps, device=like.device, dtype=like.dtype)

    def encode(self, incoming: Incoming) -> Encoding:
        return incoming.normalized(self.num_groups, self.eps)

    def __str__(self) -> str:
        return f"GroupNorm, {self.num_groups} group{'s' if self.num_groups > 1 else ''}"
