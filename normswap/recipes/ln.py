"""Layer normalization."""

from __future__ import annotations

from dataclasses import dataclass

from normswap.errors import InputError, Text, argument
from normswap.norms import Norm
from normswap.norms.group import Groups
from normswap.norms.layer import LayerNormChannels
from normswap.recipes.base import Recipe
from normswap.records import Site

__all__ = ["LayerNormalization"]


@dataclass(frozen=True)
class LayerNormalization(Recipe):
    """Layer normalization in the BatchNorm's place.

    ``y = γ (x − mean x)/sqrt(var x + eps) + β`` per sample; on feature maps over all channels and positions, which is
    ``GroupNorm(1, C)`` and Ba et al.'s "all units of the layer"; with ``axes="channel"`` over the channels of each
    position.

    Args:
        axes: ``"all"`` or ``"channel"``.
        eps: Added to the variance; default that of the norm it replaces.

    Source: J. Ba, J. Kiros, G. Hinton, *Layer Normalization*, 2016, eq. 3-4, with an affine per channel.
    """

    axes: str = "all"
    eps: float | None = None

    name = "ln"
    equation = "γ (x − mean)/sqrt(var + eps) + β"
    paper = "Ba et al. 2016"
    exact = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axes not in ("all", "channel"):
            raise InputError(f"axes={self.axes!r} is unknown", code="unknown-axes", hint="give 'all' or 'channel'")

    def refuse(self, site: Site) -> str | None:
        if site.num_features > 1:
            return None
        if self.axes == "channel" or site.rank == 2 or site.spatial == 1:
            return "the norm would see one value, which normalizes to zero"
        if site.rank:
            return None
        return Text(f"the norm may see one value, which normalizes to zero: give {argument('example_inputs')}")

    def groups_at(self, site: Site) -> int | None:
        return 1 if self.axes == "all" else None

    def norm(self, site: Site, num_groups: int | None) -> Norm:
        eps = site.eps if self.eps is None else self.eps
        return Groups(1, eps) if self.axes == "all" else LayerNormChannels(eps)
