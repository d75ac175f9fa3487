"""Signs and offsets for sites that are not fitted, from what reaches each norm on data or, without any, on noise.

Note [Steady without data]
What :mod:`normswap.initialization.steadying` asks for is how the channels' means vary together from sample to sample.
Most of that is the layer's own doing: where it has more outputs than inputs, the means are tied to each other whatever
it reads. So noise shows it, too, with each channel brought to the mean and the variance that its BatchNorm has recorded
(Note [Data-free moments]). Few samples span few directions, and offsets would lie along those in which none happened to
vary; so the means are those of strips of each sample, which count as so many samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.initialization.noise import noises_like, shaped_by_statistics
from normswap.initialization.steadying import steady
from normswap.norms import Takes
from normswap.runs.calling import Batch
from normswap.runs.inputs import Inputs, make_up_inputs
from normswap.runs.processes import gathered
from normswap.runs.watching import watch_inputs
from normswap.stages.bound import BoundPlan, BoundStep

__all__ = ["Steadied", "steadied"]

Steadied = tuple[Tensor, Tensor]
"""Signs and offsets of t's channels, ``(C,)`` each, in float64."""

_STRIPS = 16


def steadied(
    bound: BoundPlan, model: nn.Module, batches: Sequence[Batch] | None, example: Inputs | None, spread: float
) -> dict[str, Steadied]:
    """Return the signs and offsets of the sites whose norms leave them free, by the old norms' fqns.

    Nothing is returned for sites that neither data nor noise reaches.

    Args:
        bound: What is going to be done.
        model: The original; read-only.
        batches: Calibration data.
        example: Inputs of the model.
        spread: As for :func:`normswap.initialization.steadying.steady`.
    """
    steps = {step.site.norm: step for step in bound.modules if _is_free(step)}
    if not steps or any(p.is_meta for p in model.parameters()):
        return {}
    if batches is not None:
        return _on(model, steps, batches, 1, spread)
    inputs = example if example is not None else make_up_inputs(model)
    for noise in () if inputs is None else noises_like(inputs):
        try:
            with shaped_by_statistics(model):
                return _on(model, steps, [noise], _STRIPS, spread)
        except Exception:  # a model may take no other batch size than the example's
            continue
    return {}


def _is_free(step: BoundStep) -> bool:
    norm = step.norm
    return norm.takes is Takes.NORMALIZATION and norm.removes_mean and (norm.groups is not None or norm.per_position)


def _on(
    model: nn.Module, steps: dict[str, BoundStep], batches: Sequence[Batch], strips: int, spread: float
) -> dict[str, Steadied]:
    units: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def see(name: str, _: nn.Module, given: Sequence[Any]) -> None:
        if given[0].numel():
            units.setdefault(name, []).append(_units(steps[name], given[0], strips))

    watch_inputs(model, list(steps), batches, see)
    found = {}
    for name, step in steps.items():
        own = units.pop(name, None) or [(step.state.gamma.new_empty(0, step.state.num_features),) * 2]
        means, squares = (gathered("means", torch.cat(parts)) for parts in zip(*own, strict=True))
        if len(means) > 1 and bool(means.isfinite().all()) and bool(squares.isfinite().all()):
            signs, offsets = steady(means, squares, step.norm.groups or 1, spread)
            found[name] = signs.to(means).double(), offsets.to(means).double()
    return found


def _units(step: BoundStep, x: Tensor, strips: int) -> tuple[Tensor, Tensor]:
    """Return mean and mean square of each channel in each strip of each sample, ``(n, C)`` each.

    Of the channels at the mean 0 and the variance that the BatchNorm gives them on its own data. A norm over the
    channels of one position takes single positions.
    """
    x = x.flatten(2) if x.ndim > 2 else x[..., None]
    x = x if x.dtype == torch.float64 else x.float()
    x = x - x.mean((0, 2), keepdim=True)
    count = min(max(strips, _STRIPS) if step.norm.per_position else strips, x.shape[2])
    if step.norm.per_position:
        x = x[:, :, torch.linspace(0, x.shape[2] - 1, count).long()]
    assert step.state.var is not None
    var = x.square().mean((0, 2))
    ratio = step.state.var.to(x) * step.state.inverse_std.to(x).square()
    x = x * torch.where(var > 0, (ratio / var).sqrt(), torch.zeros_like(var))[:, None]
    means, squares = (F.adaptive_avg_pool1d(v, count).mT.flatten(0, 1) for v in (x, x.square()))
    return means, squares
