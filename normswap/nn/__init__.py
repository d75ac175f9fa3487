"""The modules and parametrizations that a converted model may contain, beside those of torch.nn."""

from normswap.nn.batch_norm_cells import BatchNormGRUCell, BatchNormLSTMCell, BatchNormRNNCell
from normswap.nn.batch_norm_rnn import BatchNormGRU, BatchNormLSTM, BatchNormRNN
from normswap.nn.cosine import (
    CosineConv1d,
    CosineConv2d,
    CosineConv3d,
    CosineConvTranspose1d,
    CosineConvTranspose2d,
    CosineConvTranspose3d,
    CosineLinear,
)
from normswap.nn.estimated import EstimatedStatistics
from normswap.nn.filters import FilterLayout, row_moments
from normswap.nn.layer_norm_cells import LayerNormGRUCell, LayerNormLSTMCell, LayerNormRNNCell
from normswap.nn.layer_norm_rnn import LayerNormGRU, LayerNormLSTM, LayerNormRNN
from normswap.nn.norms import ChannelAffine, ChannelLayerNorm, MeanOnlyBatchNorm
from normswap.nn.parametrizations import (
    FilterWeightNorm,
    ScalarMultiplier,
    WeightStandardization,
    parametrize_weight_norm,
)
from normswap.nn.rank_check import RankCheck
from normswap.nn.streaming import StreamingNorm

__all__ = [
    "BatchNormGRU",
    "BatchNormGRUCell",
    "BatchNormLSTM",
    "BatchNormLSTMCell",
    "BatchNormRNN",
    "BatchNormRNNCell",
    "ChannelAffine",
    "ChannelLayerNorm",
    "CosineConv1d",
    "CosineConv2d",
    "CosineConv3d",
    "CosineConvTranspose1d",
    "CosineConvTranspose2d",
    "CosineConvTranspose3d",
    "CosineLinear",
    "EstimatedStatistics",
    "FilterLayout",
    "FilterWeightNorm",
    "LayerNormGRU",
    "LayerNormGRUCell",
    "LayerNormLSTM",
    "LayerNormLSTMCell",
    "LayerNormRNN",
    "LayerNormRNNCell",
    "MeanOnlyBatchNorm",
    "RankCheck",
    "ScalarMultiplier",
    "StreamingNorm",
    "WeightStandardization",
    "parametrize_weight_norm",
    "row_moments",
]
