"""Batch-channel normalization: estimated statistics of the batches, and a group normalization behind them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from normswap.nn import EstimatedStatistics
from normswap.norms.assignment import NewValue
from normswap.norms.base import Norm
from normswap.norms.group import Groups
from normswap.norms.records import Affine, Bias, Encoding, Incoming, Stays, Takes
from normswap.records import Site

__all__ = ["BatchChannel", "BatchEstimates"]


class BatchEstimates(Norm):
    """``y = (x − μ̂)/sqrt(σ̂² + eps)`` by estimates; it stands in front of a batch-channel normalization's groups."""

    modules = (EstimatedStatistics,)
    follows_batches = True

    @classmethod
    def why_kept(cls, module: nn.Module) -> str:
        return "it is a batch-channel normalization's batch part, from an earlier conversion"

    @classmethod
    def deployed(cls, module: nn.Module) -> Affine | Stays | nn.Module:
        assert isinstance(module, EstimatedStatistics)
        factor = (module.running_var.double() + module.eps).rsqrt()
        return Affine(factor, -factor * module.running_mean.double(), module.rank, module.rank_by_example)


@dataclass(frozen=True)
class BatchChannel(Groups):
    """``t = (x − μ̂)/sqrt(σ̂² + eps)``, then ``y = γ (t − mean_g t)/sqrt(var_g t + eps) + β``.

    μ̂ and σ̂² are estimates over the batches, which are the BatchNorm's at first: t is exactly what it normalized to.

    Args:
        momentum: The rate at which the estimates follow the batches; None is the plain average.

    Source: S. Qiao et al., *Micro-Batch Training with Batch-Channel Normalization and Weight Standardization*, 2019.
    """

    momentum: float | None = 0.1

    takes = Takes.NOTHING
    bias = Bias.REMOVED
    removes_mean = False  # what is in front takes any offset that is chosen for a channel away again

    def in_front(self, site: Site, like: Tensor) -> nn.Module:
        return EstimatedStatistics(
            site.num_features,
            self.eps,
            self.momentum,
            site.rank,
            rank_by_example=site.rank_by_example,
            device=like.device,
            dtype=like.dtype,
        )

    def encode(self, incoming: Incoming) -> Encoding:
        """Give the estimates the statistics of what the layer gives, whose form may keep no scale.

        With the layer's output ``excess·x`` they make ``h·(x − μ)/σ`` of it, ``h = excess·σ/sqrt(var·excess² + eps)``.
        """
        state, excess = incoming.state, incoming.excess
        assert state.var is not None
        var = state.var.double() * excess.square()
        remaining = excess / state.inverse_std / (var + self.eps).sqrt()
        estimates = {"running_mean": NewValue(incoming.mean), "running_var": NewValue(var)}
        if state.batches is not None:  # with momentum=None the count is the estimates' weight
            estimates["num_batches_tracked"] = NewValue(state.batches)
        groups = replace(incoming, excess=remaining).normalized(self.num_groups, self.eps)
        return Encoding(groups.values, front=estimates)

    def follow(self, front: nn.Module, means: Tensor, squares: Tensor) -> None:
        assert isinstance(front, EstimatedStatistics)
        mean = means.mean(0)
        front.running_mean.copy_(mean)
        front.running_var.copy_(squares.mean(0) - mean.square())

    def divisor(self, means: Tensor, squares: Tensor) -> Tensor:
        return (squares.mean(0) - means.mean(0).square()).clamp(min=0).double().sqrt()

    def __str__(self) -> str:
        return f"estimated batch statistics, {super().__str__()}"
