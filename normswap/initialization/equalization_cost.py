"""What standardized weights lose at given channel scales, and coordinate descent towards the scales that lose least.

A channel of scale ``s_c = 1/v_c`` is read by weights that are v_c times as large, and the sum which must be zero is, in
terms of the original's w, ``Σ_c v_c Σ_k w_ck``. Of the layer's output that costs, if what is taken away is the same for
all k,

    Σ_o a_o² (v·w̄_o)² / (vᵀS⁻¹v),

w̄ the filters' means over the kernel, a = γ/σ, S the covariance of the channels' sums over a patch. It is least where v
is large for channels that carry little, or that others carry, too: their weights then make the sums zero. The layers'
costs, as shares of their outputs' variances, are added up, and v, between 1 and 10, is searched one channel after the
other: a larger range gains nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from normswap.graph.channels import FIXED
from normswap.nn import FilterLayout

__all__ = ["Cost", "costs_of", "least_cost"]

Values = npt.NDArray[np.float64]
_GRID: Values = 10.0 ** np.linspace(0, 1, 9)
_SWEEPS = 8
_GAIN = 1e-3  # the share of the cost that a step must save
_RIDGE = 1e-3  # of the mean variance


@dataclass
class Cost:
    """What one group of a layer's filters loses, as a share of its output's variance: ``vᵀ lost v / vᵀ kept v``.

    Args:
        numbers: The numbers of the channels that v belongs to. ``(n,)``
        lost: ``Σ_o a_o² w̄_o w̄_oᵀ / Σ_o γ_o²``. ``(n, n)``
        kept: S⁻¹. ``(n, n)``
    """

    numbers: Tensor
    lost: Tensor
    kept: Tensor

    def __post_init__(self) -> None:  # values are read and set one by one, which NumPy does faster than torch
        self._forms = np.stack((self.lost.numpy(), self.kept.numpy()))  # (2, n, n)
        self._squares = self._forms.diagonal(axis1=1, axis2=2)
        self._v = np.ones(len(self.numbers))
        self._products = np.stack([form @ self._v for form in self._forms])
        self._totals = self._sums()

    def _sums(self) -> Values:
        return np.array([[self._v @ product] for product in self._products])

    def after(self, index: int, doubles: Values, squares: Values) -> Values:
        """Return the cost after each of some steps of v at one index, of which twice and the square are given."""
        lost, kept = self._totals + doubles * self._products[:, index, None] + squares * self._squares[:, index, None]
        found: Values = np.maximum(lost, 0) / np.maximum(kept, 1e-30)
        return found

    def put(self, index: int, value: float) -> None:
        """Set v at one index."""
        step = value - self._v[index]
        self._v[index] = value
        self._products += step * self._forms[:, index]
        self._totals = self._sums()


def costs_of(layer: nn.Module, gamma_sigma: Tensor, covariance: Tensor, numbers: Tensor) -> list[Cost]:
    """Return the cost of each of a layer's groups.

    Args:
        layer: The layer.
        gamma_sigma: γ and σ of the norm behind it. ``(2, C)``
        covariance: S: the covariance, for each group, of its channels' sums over a patch. ``(groups, n, n)``
        numbers: The numbers of the layer's input channels. ``(in_channels,)``
    """
    layout = FilterLayout.of(layer)
    weight = FilterLayout.weight(layer).detach().double().cpu()
    means = _kernel_means(layout, weight).unflatten(0, (layout.groups, -1))  # (groups, out/groups, in/groups)
    gamma, sigma = gamma_sigma.double().cpu()
    size = gamma.square().sum().clamp(min=1e-30)
    means = means * (gamma / sigma).view(layout.groups, -1, 1)
    n = covariance.shape[-1]
    ridge = _RIDGE * covariance.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    kept = torch.linalg.inv(covariance + ridge[:, None, None] * torch.eye(n, dtype=covariance.dtype))
    lost = means.mT @ means / size
    found = []
    for group, own in enumerate(numbers.view(layout.groups, -1)):
        unique, index = own.unique(return_inverse=True)
        if len(unique) > 1:  # a single channel's scale changes nothing
            found.append(Cost(unique, *(_joined(form[group], index, len(unique)) for form in (lost, kept))))
    return found


def _joined(form: Tensor, index: Tensor, count: int) -> Tensor:
    """Return a quadratic form of values that are one where ``index`` is, as a form of these. ``(count, count)``"""
    rows = form.new_zeros(count, form.shape[1]).index_add_(0, index, form)
    return form.new_zeros(count, count).index_add_(1, index, rows)


def _kernel_means(layout: FilterLayout, weight: Tensor) -> Tensor:
    """Return each filter's mean over the kernel, per input channel of its group. ``(out, in/groups)``"""
    means = weight.flatten(2).mean(2) if weight.ndim > 2 else weight
    return layout.flatten(means)


def least_cost(costs: Sequence[Cost], count: int) -> Tensor:
    """Return the v, of 1 to 10, of the least sum of costs that coordinate descent from 1 finds. ``(count,)``"""
    uses_of: dict[int, list[tuple[Cost, int]]] = defaultdict(list)
    for cost in costs:
        for index, number in enumerate(cost.numbers.tolist()):
            if number != FIXED:
                uses_of[number].append((cost, index))
    v = np.ones(count)
    for _ in range(_SWEEPS):
        moved = False
        for number, uses in uses_of.items():
            values = np.concatenate([v[number : number + 1], _GRID])
            step = values - v[number]
            doubles, squares = 2 * step, step * step
            found = sum(cost.after(index, doubles, squares) for cost, index in uses)
            assert isinstance(found, np.ndarray)
            best = int(found.argmin())
            if found[best] < (1 - _GAIN) * found[0]:
                moved, v[number] = True, values[best]
                for cost, index in uses:
                    cost.put(index, values[best])
        if not moved:
            break
    return torch.from_numpy(v)
