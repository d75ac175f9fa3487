"""Normalization by estimates of the batch statistics, which training with micro-batches updates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normswap.nn.norms import any_sample, per_channel
from normswap.nn.recomputation import refuse_recomputation

__all__ = ["EstimatedStatistics"]


class EstimatedStatistics(nn.Module):
    """``y = (x − μ̂)/sqrt(σ̂² + eps)`` per channel, with μ̂ and σ̂² estimated over the batches of training.

    In training the estimates follow each batch before they are used, μ̂ first, and no gradient goes through them:

        μ̂ ← μ̂ + α (mean x − μ̂),  σ̂² ← σ̂² + α (mean (x − μ̂)² − σ̂²),

    means over batch and space. In evaluation they stay. With α = 0.1 a batch of two samples is normalized by the
    statistics of about twenty. The learnable affine is the following channel normalization's.

    Shape: ``(N, C)`` or ``(N, C, ...)`` to the same; statistics over all axes but 1.

    Args:
        num_features: C.
        eps: Added to the variance.
        momentum: The update rate α; None is the plain average of all batches.
        rank: The number of axes of x where it is known; folding may need it.
        rank_by_example: Whether example inputs alone show it: folding then holds the inputs to it.

    Source: S. Qiao et al., *Micro-Batch Training with Batch-Channel Normalization and Weight Standardization*, 2019,
    the batch statistics of its micro-batch algorithm.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        rank: int | None = None,
        *,
        rank_by_example: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.rank, self.rank_by_example = rank, rank_by_example
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("running_mean", torch.zeros(num_features, **made))
        self.register_buffer("running_var", torch.ones(num_features, **made))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``, in training after the estimates have followed it."""
        if self.training:
            self._follow(x)
        return (x - per_channel(self.running_mean, x)) * per_channel((self.running_var + self.eps).rsqrt(), x)

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        refuse_recomputation("an EstimatedStatistics")
        values, axes = x.to(self.running_mean.dtype), [0, *range(2, x.ndim)]
        self.num_batches_tracked.add_(1)
        rate = 1 / self.num_batches_tracked.to(values.dtype) if self.momentum is None else self.momentum
        some = any_sample(values)
        mean = torch.where(some, values.mean(axes), self.running_mean)
        self.running_mean.add_(rate * (mean - self.running_mean))
        square = (values - per_channel(self.running_mean, values)).square().mean(axes)
        square = torch.where(some, square, self.running_var)
        self.running_var.add_(rate * (square - self.running_var))

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"
