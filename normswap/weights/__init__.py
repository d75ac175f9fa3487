"""Weight parametrizations: how a layer's weight is written, one file each."""

from normswap.weights.base import Weight, WeightEncoding
from normswap.weights.cosine import CosineWeight
from normswap.weights.plain import PlainWeight
from normswap.weights.scaled import ScaledWeight
from normswap.weights.weight_norm import WeightNorm
from normswap.weights.weight_standardization import WeightStd

__all__ = ["CosineWeight", "PlainWeight", "ScaledWeight", "Weight", "WeightEncoding", "WeightNorm", "WeightStd"]
