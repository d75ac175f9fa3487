"""Streaming normalization."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from normswap.nn import StreamingNorm
from normswap.norms.assignment import LinearOf, NewValue
from normswap.norms.base import Norm
from normswap.norms.batch import BatchNormalization
from normswap.norms.records import Affine, Bias, Encoding, Incoming, NormState, Stays, Takes
from normswap.records import Site

__all__ = ["Streaming"]


@dataclass(frozen=True)
class Streaming(Norm):
    """``y = γ (x − μ̂)/sqrt(σ̂² + eps) + β``, in training with long-term and present statistics mixed.

    In evaluation it is the BatchNorm whose place it takes: it has its values, but for the layer's bias, which goes into
    the mean.

    Args:
        eps: Added to the variance.
        momentum: The rate at which what is long-term follows the batches; None is the plain average.
        alpha: What long-term statistics count in training.
        beta: What long-term gradients count.

    Source: Q. Liao, K. Kawaguchi, T. Poggio, *Streaming Normalization*, 2016.
    """

    eps: float
    momentum: float | None = 0.1
    alpha: float = 0.7
    beta: float = 0.7

    modules = (StreamingNorm,)
    converts = True
    follows_batches = True
    takes = Takes.NOTHING
    bias = Bias.REMOVED
    is_fitted = False

    @classmethod
    def read(cls, module: nn.Module) -> NormState:
        return BatchNormalization.read(module)

    @classmethod
    def deployed(cls, module: nn.Module) -> Affine | Stays | nn.Module:
        assert isinstance(module, StreamingNorm)
        return replace(
            BatchNormalization.affine(module), rank=module.rank, rank_by_example=module.rank_by_example, otherwise=None
        )

    def build(self, site: Site, like: Tensor) -> nn.Module:
        return StreamingNorm.of_rank(site.rank)(
            site.num_features,
            self.eps,
            self.momentum,
            self.alpha,
            self.beta,
            site.rank,
            rank_by_example=site.rank_by_example,
            device=like.device,
            dtype=like.dtype,
        )

    def encode(self, incoming: Incoming) -> Encoding:
        """Give it what the BatchNorm has, and ones, zeros and the data's statistics for what that has not."""
        state = replace(incoming.state, affine=(True, True), stored=True)
        values = dict(BatchNormalization().encode(replace(incoming, state=state)).values)
        values["bias"] = NewValue(incoming.beta, (LinearOf("norm.bias"),))
        if state.batches is not None:  # with momentum=None the count is the statistics' weight
            values["num_batches_tracked"] = NewValue(state.batches)
        return Encoding(values)

    def __str__(self) -> str:
        return "StreamingNorm"
