"""Layer normalization over the channels of each position."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from normswap.nn import ChannelLayerNorm
from normswap.norms.base import Norm
from normswap.norms.records import Affine, Encoding, Incoming, Stays
from normswap.records import Site

__all__ = ["LayerNormChannels", "LayerNormLastAxes"]


@dataclass(frozen=True)
class LayerNormChannels(Norm):
    """``y = γ (x − mean_c x)/sqrt(var_c x + eps) + β``, mean and variance over the channels of each position.

    Args:
        eps: Added to the variance.

    Source: J. Ba, J. Kiros, G. Hinton, *Layer Normalization*, 2016, eq. 3-4.
    """

    eps: float

    modules = (ChannelLayerNorm,)
    per_position = True

    @classmethod
    def deployed(cls, module: nn.Module) -> Affine | Stays | nn.Module:
        return Stays("torch.nn has no layer normalization over channels: normswap must be there to load the model")

    def build(self, site: Site, like: Tensor) -> nn.Module:
        return ChannelLayerNorm(site.num_features, self.eps, device=like.device, dtype=like.dtype)

    def encode(self, incoming: Incoming) -> Encoding:
        return incoming.normalized(1, self.eps)

    def __str__(self) -> str:
        return "LayerNorm over channels"


class LayerNormLastAxes(Norm):
    """torch's layer normalization over the last axes, which stands in models only."""

    modules = (nn.LayerNorm,)
