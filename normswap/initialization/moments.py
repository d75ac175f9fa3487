"""Moments of a layer's input patches, and weight centring: the projection to zero mean that costs the output least."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normswap.initialization.noise import shaped_by_statistics
from normswap.initialization.patches import random_patches
from normswap.initialization.symmetric import gram, ridged_factor
from normswap.nn import FilterLayout
from normswap.runs.calling import Batch
from normswap.runs.processes import alone, gathered
from normswap.runs.watching import not_finite, watch_inputs

__all__ = ["Moments", "centre", "input_moments", "moments_of", "moments_of_covariance"]

_DATA_RIDGE, _NOISE_RIDGE, _MEAN_RIDGE = 1e-3, 3e-3, 1e-2


@dataclass(frozen=True)
class Moments:
    """What the centring of a layer's filters needs of its input patches x.

    Args:
        mean: E[x]. ``(groups, fan_in)``, float64.
        direction: ``C⁻¹1 / (1ᵀC⁻¹1)``, C the ridged covariance. ``(groups, fan_in)``, float64.
        square: E‖x‖². ``(groups,)``, float64.
        assumed: Whether they are those of noise.
    """

    mean: Tensor
    direction: Tensor
    square: Tensor
    assumed: bool = False

    def corrected(self, layout: FilterLayout, weight: Tensor, output_mean: Tensor) -> Moments:
        """Return moments whose mean agrees better with what the layer's own BatchNorm has recorded of its output.

        E[x] is changed by the d of ``min ‖W(E[x] + d) − m‖² + λ‖d‖²``, m the recorded mean less the bias. This matters
        where no BatchNorm has shaped the layer's input, as in a first layer.
        """
        filters = layout.flatten(weight).unflatten(0, (layout.groups, -1))  # (groups, out/groups, fan_in)
        missing = output_mean.view(layout.groups, -1, 1) - filters @ self.mean[:, :, None]
        ridge = _MEAN_RIDGE * filters.square().sum(2).mean(1)[:, None, None].clamp(min=1e-30)
        # Wᵀ(WWᵀ + λ)⁻¹ = (WᵀW + λ)⁻¹Wᵀ: of the two matrices the smaller one is solved with
        many = filters.shape[1] > filters.shape[2]
        product = gram(filters.mT if many else filters)
        product.diagonal(dim1=1, dim2=2).add_(ridge[..., 0])
        factor = torch.linalg.cholesky(product)
        if many:
            change = torch.cholesky_solve(filters.mT @ missing, factor)
        else:
            change = filters.mT @ torch.cholesky_solve(missing, factor)
        return Moments(self.mean + change[..., 0], self.direction, self.square, self.assumed)


def centre(layout: FilterLayout, weight: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
    """Project each filter to zero mean where that costs least: min Var[(w − w₀)·x] subject to 1ᵀw = 0.

    ``w = w₀ − C⁻¹1 (1ᵀw₀)/(1ᵀC⁻¹1)``.

    Returns:
        The weight, and per filter ``E[(w₀ − w)·x]``, which the bias must add. ``(C,)``
    """
    filters = layout.flatten(weight).unflatten(0, (layout.groups, -1))  # (groups, out/groups, fan_in)
    sums = filters.sum(-1, keepdim=True)
    shift = sums[..., 0] * (moments.direction * moments.mean).sum(-1, keepdim=True)
    centred = torch.addcmul(filters, sums, moments.direction[:, None], value=-1)
    return layout.unflatten(centred.flatten(0, 1), weight), shift.flatten()


def moments_of(samples: Tensor, assumed: bool = False) -> Moments:
    """Return the moments of patches, ``(samples, groups, fan_in)``.

    The ridge, relative to the mean variance, grows to a tenth of fan_in/samples where samples are few.
    """
    x = samples.to(torch.float64, copy=True).transpose(0, 1)  # (groups, samples, fan_in)
    n, fan_in = x.shape[1:]
    mean, square = x.mean(1), x.square().sum(2).mean(1)
    x -= mean[:, None]
    if n >= fan_in or not bool(x.isfinite().all()):
        covariance = gram(x.mT).div_(n)
        del x  # the largest of all
        return moments_of_covariance(mean, covariance, n, assumed)
    # Woodbury: the same solution out of the samples' smaller Gram matrix
    ridge = _ridge(x.square().mean((1, 2)), fan_in / n, assumed)
    ones = x.new_ones(x.shape[0], fan_in, 1)
    factor, ridge = ridged_factor(gram(x), n * ridge)
    solved = (ones - x.mT @ torch.cholesky_solve(x @ ones, factor)) / (ridge[:, None, None] / n)
    return _moments(mean, square, solved, assumed)


def moments_of_covariance(mean: Tensor, covariance: Tensor, samples: int, assumed: bool = False) -> Moments:
    """Return the moments of so many patches whose mean, ``(groups, fan_in)``, and covariance are known.

    Raises:
        InitializationError: They are not finite.
    """
    if not bool(covariance.isfinite().all()):
        raise not_finite("a layer")
    fan_in = covariance.shape[-1]
    ridge = _ridge(covariance.diagonal(dim1=1, dim2=2).mean(1), fan_in / samples, assumed)
    factor, _ = ridged_factor(covariance, ridge)
    square = covariance.diagonal(dim1=1, dim2=2).sum(1) + mean.square().sum(1)
    return _moments(mean, square, torch.cholesky_solve(torch.ones_like(mean)[..., None], factor), assumed)


def _ridge(variance: Tensor, fan_in_per_sample: float, assumed: bool) -> Tensor:
    ridge = variance * max(_NOISE_RIDGE if assumed else _DATA_RIDGE, 0.1 * fan_in_per_sample)
    return torch.where(variance > 0, ridge, torch.ones_like(ridge))


def _moments(mean: Tensor, square: Tensor, solved: Tensor, assumed: bool) -> Moments:
    return Moments(mean, solved[..., 0] / solved.sum(1), square, assumed)


def input_moments(
    model: nn.Module,
    layers: Sequence[str],
    batches: Iterable[Batch],
    *,
    shaped: bool,
) -> dict[str, Moments]:
    """Return the moments at the inputs of ``layers``, by fqn; read-only.

    Args:
        model: The model, before the swap.
        layers: The layers' fqns.
        batches: Inputs of the model.
        shaped: Whether the inputs are noise, to be shaped by each BatchNorm (Note [Data-free moments]).
    """
    if shaped:
        with shaped_by_statistics(model):
            return _moments_on_noise(model, layers, list(batches))
    generator = torch.Generator().manual_seed(0)
    kept = _Kept()

    def collect(name: str, layer: nn.Module, given: Sequence[Any]) -> None:
        kept.add(name, random_patches(layer, given[0], kept.count(name), generator))

    watch_inputs(model, layers, batches, collect)
    patches = {name: torch.cat(rows) for name, rows in kept.rows.items()}
    if not alone():
        patches = {
            name: gathered(f"patches of '{name}'", patches.get(name, _no_patches(model.get_submodule(name))))
            for name in layers
        }
    return {name: moments_of(rows) for name, rows in patches.items() if len(rows) > 1}


class _Kept:
    """Patches by their layer's fqn."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Tensor]] = {}

    def add(self, name: str, rows: Tensor) -> None:
        self.rows.setdefault(name, []).append(rows)

    def count(self, name: str) -> int:
        return sum(map(len, self.rows.get(name, ())))


def _moments_on_noise(model: nn.Module, layers: Sequence[str], batches: Sequence[Batch]) -> dict[str, Moments]:
    """Return the moments at the inputs of ``layers``, whose patches are let go as soon as their layer was called.

    Of all layers they would take more memory than the model. A layer that is called again gets its moments in a second
    run, from the same patches as if all had been kept.
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Moments] = {}
    counts: dict[str, int] = defaultdict(int)
    states: dict[str, list[Tensor]] = defaultdict(list)  # of the generator, in front of each call
    kept = _Kept()

    def collect(name: str, layer: nn.Module, given: Sequence[Any]) -> None:
        states[name].append(generator.get_state())
        rows = random_patches(layer, given[0], counts[name], generator)
        counts[name] += len(rows)
        if len(rows) == counts[name] > 1:
            found[name] = moments_of(rows, assumed=True)

    def collect_again(name: str, layer: nn.Module, given: Sequence[Any]) -> None:
        generator.set_state(states[name].pop(0))
        kept.add(name, random_patches(layer, given[0], kept.count(name), generator))

    watch_inputs(model, layers, batches, collect)
    again = [name for name, several in states.items() if len(several) > 1]
    if again:
        watch_inputs(model, again, batches, collect_again)
    for name in again:
        rows = torch.cat(kept.rows.pop(name))
        if len(rows) > 1:
            found[name] = moments_of(rows, assumed=True)
    return {name: found[name] for name in layers if name in found}


def _no_patches(layer: nn.Module) -> Tensor:
    layout, weight = FilterLayout.of(layer), FilterLayout.weight(layer).detach()
    return weight.new_empty(0, layout.groups, layout.fan_in(weight))
