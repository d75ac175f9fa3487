"""The statistics of a layer's output along its channels, of all processes."""

from __future__ import annotations

import torch
from torch import Tensor

from normswap.runs.processes import alone, summed
from normswap.runs.writes import unwatched

__all__ = ["factors_to", "scaled", "statistics_along"]


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


@unwatched()
def factors_to(mean: Tensor, std: Tensor, wanted: float) -> tuple[Tensor, Tensor]:
    """Return what gives each channel that deviation, and which are constant: rounding noise must not be blown up."""
    constant = std <= 1e-6 * torch.maximum(mean.abs(), std.amax())
    return torch.where(constant, 1.0, wanted / std.clamp(min=torch.finfo(std.dtype).tiny)), constant


@unwatched()
def scaled(centred: Tensor, factor: Tensor, mean: Tensor, axis: int) -> Tensor:
    """Return what has the given mean and ``factor`` times the deviation of ``centred``, which is overwritten."""
    shape = [-1 if a == axis else 1 for a in range(centred.ndim)]
    return centred.mul_(factor.view(shape)).add_(mean.view(shape))
