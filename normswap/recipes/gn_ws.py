"""Group normalization with weight standardization."""

from __future__ import annotations

from dataclasses import dataclass

from normswap.recipes.base import GroupedRecipe
from normswap.records import Site
from normswap.weights import PlainWeight, Weight, WeightStd

__all__ = ["GroupNormalizationWeightStandardization"]


@dataclass(frozen=True)
class GroupNormalizationWeightStandardization(GroupedRecipe):
    """Group normalization in the BatchNorm's place and weight standardization of the layer in front of it.

    ``W = gain (v − mean v)/sqrt(n (var v + eps))`` per filter of n values, then group normalization. A filter of one
    value (fan-in 1) has no deviation: there, and for depthwise filters, the recipe is ``gn``.

    Args:
        gain: Whether each filter has a learnable gain, which keeps a pretrained filter's scale; without it the weight
            is standardized as published.
        depthwise: Whether the filters of depthwise convolutions are standardized, too. Without its mean such a filter
            is blind to its only channel's local mean, which no other filter sees: what the network has learnt is lost.
        input_offset: Whether the filters that read the model's input have a learnable offset, as in ``gn+aws``. What a
            zero-mean filter cannot see of a raw image, its brightness, no later layer sees either.

    Source: S. Qiao et al., *Weight Standardization*, 2019, eq. 4-5; Y. Wu, K. He, *Group Normalization*, 2018.
    """

    gain: bool = True
    depthwise: bool = False
    input_offset: bool = True

    name = "gn+ws"
    equation = "W = gain (v − mean v)/sqrt(n (var v + eps)), then gn"
    paper = "Qiao et al. 2019, Wu & He 2018"
    exact = False

    def weight(self, site: Site) -> Weight:
        plain = site.fan_in == 1 or (site.depthwise and not self.depthwise)
        return PlainWeight() if plain else WeightStd(gain=self.gain, offset=self._has_offset(site))

    def notes(self, site: Site) -> tuple[str, ...]:
        own: tuple[str, ...] = ()
        if site.fan_in == 1:
            own = ("fan-in 1: the weight is not standardized",)
        elif site.depthwise and not self.depthwise:
            own = ("depthwise: the weight is not standardized",)
        elif self._has_offset(site):
            own = ("reads the model's input: its filters have an offset",)
        return (*own, *super().notes(site))

    def _has_offset(self, site: Site) -> bool:
        return site.reads_input and self.input_offset and self.gain
