"""Group normalization."""

from __future__ import annotations

from dataclasses import dataclass

from normswap.recipes.base import GroupedRecipe

__all__ = ["GroupNormalization"]


@dataclass(frozen=True)
class GroupNormalization(GroupedRecipe):
    """Group normalization in the BatchNorm's place; the weights stay plain.

    ``y = γ (x − mean_g x)/sqrt(var_g x + eps) + β``, mean and variance per sample over each group of channels
    and space.

    Source: Y. Wu, K. He, *Group Normalization*, 2018, eq. 1-7.
    """

    name = "gn"
    equation = "γ (x − mean_g)/sqrt(var_g + eps) + β"
    paper = "Wu & He 2018"
    exact = False
