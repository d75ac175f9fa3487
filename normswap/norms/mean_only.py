"""Mean-only batch normalization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normswap.nn import MeanOnlyBatchNorm
from normswap.norms.assignment import LinearOf, NewValue
from normswap.norms.base import Norm
from normswap.norms.records import Affine, Bias, Encoding, Incoming, Stays, Takes
from normswap.records import Site

__all__ = ["MeanOnly"]


@dataclass(frozen=True)
class MeanOnly(Norm):
    """``y = x − μ + β``, μ the batch's mean in training and the running mean in evaluation.

    Args:
        momentum: How the running mean follows the batches; None is the plain average.
        synchronized: Whether the mean is over all processes.

    Source: T. Salimans, D. Kingma, *Weight Normalization*, 2016, section 3.
    """

    momentum: float | None = 0.1
    synchronized: bool = False

    modules = (MeanOnlyBatchNorm,)
    follows_batches = True
    takes = Takes.AFFINE
    bias = Bias.REMOVED

    @classmethod
    def why_kept(cls, module: nn.Module) -> str:
        return "it is a mean-only BatchNorm already, from an earlier conversion"

    @classmethod
    def synchronizes(cls, module: nn.Module) -> bool:
        return _mean_only(module).synchronized

    @classmethod
    def deployed(cls, module: nn.Module) -> Affine | Stays | nn.Module:
        norm = _mean_only(module)
        shift = norm.bias.detach().double() - norm.running_mean.double()
        return Affine(torch.ones_like(shift), shift, norm.rank, norm.rank_by_example)

    def build(self, site: Site, like: Tensor) -> nn.Module:
        return MeanOnlyBatchNorm.of_rank(site.rank)(
            site.num_features,
            self.momentum,
            site.rank,
            synchronized=self.synchronized,
            rank_by_example=site.rank_by_example,
            device=like.device,
            dtype=like.dtype,
        )

    def encode(self, incoming: Incoming) -> Encoding:
        values = {
            "running_mean": NewValue(incoming.mean),
            "bias": NewValue(incoming.beta, (LinearOf("norm.bias"),)),
        }
        if incoming.state.batches is not None:  # with momentum=None the count is the running mean's weight
            values["num_batches_tracked"] = NewValue(incoming.state.batches)
        return Encoding(values)

    def __str__(self) -> str:
        return "MeanOnlyBatchNorm" + ", synchronized" * self.synchronized


def _mean_only(module: nn.Module) -> MeanOnlyBatchNorm:
    assert isinstance(module, MeanOnlyBatchNorm)
    return module
