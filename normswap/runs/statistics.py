"""Mean and variance of what reaches a norm on data, added up batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Statistics"]


@dataclass(frozen=True)
class Statistics:
    """What reaches a norm on data: per channel ``(C,)``, in float64.

    Args:
        mean: E[x].
        var: E[(x − E[x])²].
        values: How many values of a channel these are of.
        samples: Of how many samples.
    """

    mean: Tensor
    var: Tensor
    values: int
    samples: int

    @classmethod
    def of(cls, x: Tensor) -> Statistics:
        """Return the statistics of ``(N, C, …)``."""
        x = x if x.dtype == torch.float64 else x.float()
        var, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
        return cls(mean.double(), var.double(), x[:, 0].numel(), len(x))

    def __add__(self, other: Statistics) -> Statistics:
        values = self.values + other.values
        share = other.values / values
        step = other.mean - self.mean
        var = (1 - share) * self.var + share * other.var + share * (1 - share) * step.square()
        return Statistics(self.mean + share * step, var, values, self.samples + other.samples)
