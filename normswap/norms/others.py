"""Norms of torch that are recognized and stay as they are: no BatchNorm's statistics are theirs to take over."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from normswap.norms.base import Norm

__all__ = ["InstanceNormalization", "LocalResponseNormalization", "RootMeanSquareNormalization"]


class InstanceNormalization(Norm):
    """``y = γ (x − mean)/sqrt(var + eps) + β`` per sample and channel: it shares nothing between samples already.

    Source: D. Ulyanov, A. Vedaldi, V. Lempitsky, *Instance Normalization*, 2016.
    """

    modules = (_InstanceNorm,)


class RootMeanSquareNormalization(Norm):
    """``y = γ x/sqrt(mean x² + eps)`` over the last axes.

    Source: B. Zhang, R. Sennrich, *Root Mean Square Layer Normalization*, 2019.
    """

    modules = (nn.RMSNorm,)


class LocalResponseNormalization(Norm):
    """``y = x/(k + α/n Σ x²)^β`` over neighbouring channels.

    Source: A. Krizhevsky, I. Sutskever, G. Hinton, *ImageNet Classification with Deep Convolutional Networks*, 2012.
    """

    modules = (nn.LocalResponseNorm,)
