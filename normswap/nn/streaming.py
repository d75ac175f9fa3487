"""Streaming normalization: statistics, and their gradients, accumulated over the batches of training."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from normswap.nn.norms import any_sample, per_channel
from normswap.nn.recomputation import refuse_recomputation

__all__ = ["StreamingNorm"]


class _Streamed(torch.autograd.Function):
    """What goes on of a statistic s and its gradient g: ``α₁ s_long + α₂ s`` and, backwards, ``β₁ g_long + β₃ g``.

    The accumulated gradient follows: ``g_long ← κ₃ g_long + κ₄ g``.
    """

    @staticmethod
    def forward(
        ctx: Any, now: Tensor, long: Tensor, gradient: Tensor, alpha: float, beta: float, rate: float | Tensor
    ) -> Tensor:
        ctx.gradient, ctx.beta, ctx.rate = gradient, beta, rate
        return alpha * long + (1 - alpha) * now

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        now, long = gradients[0], ctx.gradient
        found = ctx.beta * long + (1 - ctx.beta) * now
        long.lerp_(now.to(long.dtype), ctx.rate)
        return found, None, None, None, None, None


def _in_training(
    x: Tensor,
    affine: tuple[Tensor, Tensor],
    running: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    settings: tuple[float, float, float | Tensor, float],
) -> Tensor:
    """Normalize ``x`` by long-term and present statistics, which then become long-term ones."""
    alpha, beta, rate, eps = settings
    if alpha > 0:
        refuse_recomputation("a StreamingNorm")
    mean, var = running
    values, axes, some = x.to(mean.dtype), [0, *range(2, x.ndim)], any_sample(x)
    of_batch = torch.where(some, values.mean(axes), mean)
    used = _Streamed.apply(of_batch, mean, gradients[0], alpha, beta, rate)  # type: ignore[no-untyped-call]
    centre = used.detach()
    square = torch.where(some, (values - per_channel(centre, values)).square().mean(axes), var)
    long = var + (mean - centre).square()
    about = _Streamed.apply(square, long, gradients[1], alpha, beta, rate)  # type: ignore[no-untyped-call]
    y = (x - per_channel(used, x)) * per_channel(affine[0] * (about + eps).rsqrt(), x) + per_channel(affine[1], x)
    with torch.no_grad():
        moved = of_batch - mean
        own = torch.where(some, square - (of_batch - centre).square(), var)
        var.copy_(((1 - rate) * (var + rate * moved.square()) + rate * own).clamp(min=0))
        mean.add_(rate * moved)
    return y


torch.fx.wrap("_in_training")


class StreamingNorm(_BatchNorm):
    """Streaming normalization: ``y = γ (x − μ̂)/sqrt(σ̂² + eps) + β`` per channel, with accumulated statistics.

    In training a statistic s of the batch, its mean or its mean square about μ̂ over batch and space, is mixed with the
    long-term one, and so is the gradient g of the loss with respect to it:

        ŝ = α₁ s_long + α₂ s,  s_long ← κ₁ s_long + κ₂ s,
        ĝ = β₁ g_long + β₃ g,  g_long ← κ₃ g_long + κ₄ g.

    ŝ = (μ̂, σ̂²) normalizes, and ĝ is what goes back from s to x: the gradient is not that of a loss, but
    with α₂ = β₃ = 1, where this is BatchNorm in training. A batch may be a single sample with a single position. In
    evaluation the long-term statistics normalize: it is a BatchNorm with the mean ``running_mean`` and the variance
    ``running_var``, exactly.

    From the paper are the four equations, of which it has a further term, the *short-term* ``α₂ s_short`` and
    ``β₂ g_short``, averages since the last update of the weights. Chosen here are:

    - that each batch is taken as followed by an update, so that short-term is what is of the present batch, and β₂ and
      β₃ come to one;
    - that the statistics are mean and mean square. Long-term ones are held as mean and variance, so that those of a
      BatchNorm can stand for them: both forms follow the equations as one;
    - that α₁ + α₂ = β₁ + β₃ = κ₁ + κ₂ = 1, κ₃ = κ₁, and that g_long begins with 0;
    - that evaluation takes the long-term statistics alone.

    Its statistics are shared between samples: it is no norm for differential privacy. It is a BatchNorm by class, of a
    subclass by :meth:`of_rank` a BatchNorm1d, 2d or 3d, so that what looks for BatchNorms finds it, and
    ``SyncBatchNorm.convert_sync_batchnorm`` makes a SyncBatchNorm of it. Each process has statistics of its own.

    Shape: ``(N, C)`` or ``(N, C, ...)`` to the same.

    Args:
        num_features: C.
        eps: Added to the variance.
        momentum: κ₂ = κ₄, the rate at which what is long-term follows; None is the plain average of all batches.
        alpha: α₁, what the long-term statistics count in training.
        beta: β₁, what the long-term gradients count.
        rank: The number of axes of x where it is known; folding may need it.
        rank_by_example: Whether example inputs alone show it: folding then holds the inputs to it.

    Source: Q. Liao, K. Kawaguchi, T. Poggio, *Streaming Normalization: Towards Simpler and More Biologically-plausible
    Normalizations for Online and Recurrent Learning*, 2016.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    mean_gradient: Tensor
    var_gradient: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.3,
        alpha: float = 0.7,
        beta: float = 0.7,
        rank: int | None = None,
        *,
        rank_by_example: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, device=device, dtype=dtype)
        self.alpha, self.beta = alpha, beta
        self.rank, self.rank_by_example = rank, rank_by_example
        for name in ("mean_gradient", "var_gradient"):
            self.register_buffer(name, torch.zeros(num_features, device=device, dtype=dtype))

    @staticmethod
    def of_rank(rank: int | None) -> type[StreamingNorm]:
        """Return the class for inputs of so many axes, which is also torch's BatchNorm for them."""
        return {2: StreamingNorm1d, 3: StreamingNorm1d, 4: StreamingNorm2d, 5: StreamingNorm3d}.get(
            rank or 0, StreamingNorm
        )

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``; in training the long-term statistics follow it."""
        if not self.training:
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        self.num_batches_tracked.add_(1)
        count = self.num_batches_tracked.to(self.running_mean.dtype)
        rate = 1 / count if self.momentum is None else self.momentum
        affine, running = (self.weight, self.bias), (self.running_mean, self.running_var)
        gradients = (self.mean_gradient, self.var_gradient)
        return _in_training(input, affine, running, gradients, (self.alpha, self.beta, rate, self.eps))

    def reset_running_stats(self) -> None:
        """Forget all that is long-term."""
        super().reset_running_stats()
        for gradient in (self._buffers.get("mean_gradient"), self._buffers.get("var_gradient")):
            if gradient is not None:
                gradient.zero_()

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, alpha={self.alpha}, beta={self.beta}"


class StreamingNorm1d(StreamingNorm, nn.BatchNorm1d):
    """Streaming normalization where a BatchNorm1d was."""


class StreamingNorm2d(StreamingNorm, nn.BatchNorm2d):
    """Streaming normalization where a BatchNorm2d was."""


class StreamingNorm3d(StreamingNorm, nn.BatchNorm3d):
    """Streaming normalization where a BatchNorm3d was."""
