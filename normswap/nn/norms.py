"""Normalization modules that torch.nn does not have."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ChannelAffine", "ChannelLayerNorm", "MeanOnlyBatchNorm", "per_channel"]


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Return ``values``, ``(C,)``, in the dtype of ``x`` and shaped to broadcast along its axis 1."""
    return values.view(1, -1, *(1,) * (x.ndim - 2)).to(x.dtype)


torch.fx.wrap("per_channel")  # the rank of a proxy is unknown: a trace of these modules calls the function as a whole


class ChannelAffine(nn.Module):
    """``y = weight_c · x + bias_c`` per channel, axis 1; folds into a neighbour or to a depthwise 1×1 convolution.

    Shape: ``(N, C)`` or ``(N, C, ...)`` to the same.

    Args:
        num_features: C.
        rank: The number of axes of x where it is known; folding needs it.
        rank_by_example: Whether example inputs alone show it: folding then holds the inputs to it.
    """

    def __init__(
        self,
        num_features: int,
        rank: int | None = None,
        *,
        rank_by_example: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.rank, self.rank_by_example = num_features, rank, rank_by_example
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift ``x``."""
        return x * per_channel(self.weight, x) + per_channel(self.bias, x)

    def extra_repr(self) -> str:
        return f"{self.num_features}"


class ChannelLayerNorm(nn.LayerNorm):
    """Layer normalization over the channel axis 1 at each position: ``y = γ (x − mean_c x)/sqrt(var_c x + eps) + β``.

    Shape: ``(N, C, ...)`` to the same.

    Source: J. Ba, J. Kiros, G. Hinton, *Layer Normalization*, 2016, eq. 3, with the channels of one position as the
    units of the layer.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` over axis 1."""
        y = F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.movedim(-1, 1)


class MeanOnlyBatchNorm(nn.Module):
    """Mean-only batch normalization: ``y = x − μ + β``, with no division by a standard deviation.

    In training μ is the minibatch's mean per channel over batch and space and ``running_mean`` follows it as
    BatchNorm's does: ``running_mean ← (1 − momentum)·running_mean + momentum·μ``, the plain average of all batches with
    ``momentum=None``. In evaluation μ is ``running_mean``.

    Shape: ``(N, C)`` or ``(N, C, ...)`` to the same; statistics over all axes but 1.

    Args:
        num_features: C.
        momentum: As in BatchNorm.
        rank: The number of axes of x where it is known; folding may need it.
        synchronized: Whether μ is the mean over all processes of the default group, as in SyncBatchNorm.
        rank_by_example: Whether example inputs alone show the rank: folding then holds the inputs to it.

    Source: T. Salimans, D. Kingma, *Weight Normalization*, 2016, section 3.
    """

    running_mean: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.1,
        rank: int | None = None,
        *,
        synchronized: bool = False,
        rank_by_example: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.momentum, self.rank = num_features, momentum, rank
        self.synchronized, self.rank_by_example = synchronized, rank_by_example
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Subtract the mean and add the bias."""
        if not self.training:
            return x + per_channel(self.bias - self.running_mean, x)
        mean = self._batch_mean(x)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            count = self.num_batches_tracked.to(self.running_mean.dtype)
            momentum = 1.0 / count if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        return x + per_channel(self.bias - mean, x)

    def _batch_mean(self, x: Tensor) -> Tensor:
        axes = [0, *range(2, x.ndim)]
        if not (self.synchronized and dist.is_available() and dist.is_initialized()):
            return x.mean(axes)
        from torch.distributed.nn.functional import all_reduce  # differentiable

        total = torch.cat([x.sum(axes), x.new_tensor([float(x.numel() // x.shape[1])])])
        total = all_reduce(total)
        mean: Tensor = total[:-1] / total[-1]
        return mean

    def extra_repr(self) -> str:
        return f"{self.num_features}, momentum={self.momentum}"
