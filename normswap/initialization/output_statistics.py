"""The statistics of a layer's output along its channels, of all processes."""

from __future__ import annotations

import torch
from torch import Tensor

from normswap.runs.processes import alone, summed
from normswap.runs.writes import unwatched

__all__ = ["statistics_along"]


@unwatched()
def statistics_along(x: Tensor, axis: int, where: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and deviation per channel and the centred values, several times faster than ``torch.std_mean``."""
    values = x if x.dtype in (torch.float32, torch.float64) else x.float()
    axes = [a for a in range(x.ndim) if a != axis]
    count = x.numel() / x.shape[axis]
    if alone():
        mean = values.mean(axes, keepdim=True)
        centred = values - mean
        return mean.flatten(), torch.linalg.vector_norm(centred, dim=axes) / count**0.5, centred
    sums = values.sum(axes, keepdim=True, dtype=torch.float64)
    total, number = summed(f"the mean at '{where}'", sums, values.new_tensor(count))
    mean = (total / number).to(values.dtype)
    centred = values - mean
    squares = torch.linalg.vector_norm(centred, dim=axes, dtype=torch.float64).square()
    (squares,) = summed(f"the deviation at '{where}'", squares)
    return mean.flatten(), (squares / number).sqrt().to(values.dtype), centred
