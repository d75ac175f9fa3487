"""The modules and parametrizations that a converted model may contain, beside those of torch.nn."""

from normswap.nn.filters import FilterLayout, row_moments
from normswap.nn.norms import ChannelAffine, ChannelLayerNorm, MeanOnlyBatchNorm
from normswap.nn.parametrizations import FilterWeightNorm, WeightStandardization, parametrize_weight_norm
from normswap.nn.rank_check import RankCheck

__all__ = [
    "ChannelAffine",
    "ChannelLayerNorm",
    "FilterLayout",
    "FilterWeightNorm",
    "MeanOnlyBatchNorm",
    "RankCheck",
    "WeightStandardization",
    "parametrize_weight_norm",
    "row_moments",
]
