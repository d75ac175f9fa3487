"""No norm at all, and what stands in a norm's place where no layer could take its scale: a per-channel affine."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from normswap.nn import ChannelAffine
from normswap.norms.assignment import LinearOf, NewValue
from normswap.norms.base import Norm
from normswap.norms.records import Affine, Encoding, Incoming, Stays, Takes
from normswap.records import Site

__all__ = ["Fitted", "Nothing"]


@dataclass(frozen=True)
class Nothing(Norm):
    """No norm: the layer's bias takes the rest, ``b' = β + γ(b − μ)/σ``.

    Source: B. Jacob et al., *Quantization and Training of Neural Networks*, 2018, section 3.2.
    """

    modules = (ChannelAffine,)
    takes = Takes.AFFINE
    leaves_nothing = True

    @classmethod
    def why_kept(cls, module: nn.Module) -> str:
        return "it is a per-channel affine, from an earlier conversion"

    @classmethod
    def deployed(cls, module: nn.Module) -> Affine | Stays | nn.Module:
        assert isinstance(module, ChannelAffine)
        factor, shift = module.weight.detach().double(), module.bias.detach().double()
        return Affine(factor, shift, module.rank, module.rank_by_example)

    def build(self, site: Site, like: Tensor) -> None:
        return None

    def encode(self, incoming: Incoming) -> Encoding:
        per_gamma = -incoming.centre * incoming.state.inverse_std
        terms = (
            LinearOf("norm.bias"),
            LinearOf("norm.weight", per_gamma),
            LinearOf("layer.bias", incoming.factor),
        )
        return Encoding(bias=NewValue(incoming.beta - incoming.mean, terms))

    def __str__(self) -> str:
        return "nothing"


@dataclass(frozen=True)
class Fitted(Nothing):
    """No norm, behind a layer that is not what it was: where there is data, its weight and bias are fitted to that."""

    leaves_nothing = False  # what the layer in front gives is normalized by its own form
    removes_mean = False

    @property
    def is_fitted(self) -> bool:
        return True
