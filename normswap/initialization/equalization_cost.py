"""What standardized weights lose at given channel scales, and coordinate descent towards the scales that lose least.

A channel of scale ``s_c = 1/v_c`` is read by weights that are v_c times as large, and the sum which must be zero is, in
terms of the original's w, ``Σ_c v_c Σ_k w_ck``. Of the layer's output that costs, if what is taken away is the same for
all k,

    Σ_o a_o² (v·w̄_o)² / (vᵀS⁻¹v),

w̄ the filters' means over the kernel, a = γ/σ, S the covariance of the channels' sums over a patch. It is least where v
is large for channels that carry little, or that others carry, too: their weights then make the sums zero. The layers'
costs, as shares of their outputs' variances, are added up, and v, one of 1, 2, 4 and 8, is searched one channel after
the other: finer steps and a larger range gain nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from normswap.graph.channels import FIXED
from normswap.initialization.quadratic_forms import QuadraticForm
from normswap.nn import FilterLayout

__all__ = ["Cost", "connected", "costs_of", "least_cost"]

Values = npt.NDArray[np.float64]
_GRID: Values = np.array([1.0, 2.0, 4.0, 8.0])
_SWEEPS = 8
_GAIN = 1e-3  # the share of the cost that a step must save


@dataclass(frozen=True)
class Cost:
    """What one group of a layer's filters loses, as a share of its output's variance: ``lost(v)/kept(v)``.

    Args:
        numbers: The numbers of the channels that v belongs to. ``(n,)``
        lost: ``Σ_o a_o² (w̄_o·v)² / Σ_o γ_o²``.
        kept: ``vᵀS⁻¹v``.
    """

    numbers: Tensor
    lost: QuadraticForm
    kept: QuadraticForm


def costs_of(layer: nn.Module, gamma_sigma: Tensor, kept: Sequence[QuadraticForm], numbers: Tensor) -> list[Cost]:
    """Return the cost of each of a layer's groups.

    Args:
        layer: The layer.
        gamma_sigma: γ and σ of the norm behind it. ``(2, C)``
        kept: ``vᵀS⁻¹v`` for each group, S the covariance of its channels' sums over a patch.
        numbers: The numbers of the layer's input channels. ``(in_channels,)``
    """
    layout = FilterLayout.of(layer)
    weight = FilterLayout.weight(layer).detach().double().cpu()
    means = _kernel_means(layout, weight).unflatten(0, (layout.groups, -1))  # (groups, out/groups, in/groups)
    gamma, sigma = gamma_sigma.double().cpu()
    size = gamma.square().sum().clamp(min=1e-30)
    means = means * (gamma / sigma / size.sqrt()).view(layout.groups, -1, 1)
    found = []
    for group, own in enumerate(numbers.view(layout.groups, -1)):
        unique, index = own.unique(return_inverse=True)
        if len(unique) > 1:  # a single channel's scale changes nothing
            forms = (QuadraticForm.of_rows(means[group].mT), kept[group])
            found.append(Cost(unique, *(form.joined(index.numpy(), len(unique)) for form in forms)))
    return found


def _kernel_means(layout: FilterLayout, weight: Tensor) -> Tensor:
    """Return each filter's mean over the kernel, per input channel of its group. ``(out, in/groups)``"""
    means = weight.flatten(2).mean(2) if weight.ndim > 2 else weight
    return layout.flatten(means)


def connected(sets: Sequence[Iterable[int]]) -> list[int]:
    """Return a label for each set of numbers, the same where sets have one in common, directly or through others.

    :data:`~normswap.graph.channels.FIXED` connects nothing.
    """
    parents, first = list(range(len(sets))), dict[int, int]()

    def root(place: int) -> int:
        while parents[place] != place:
            parents[place] = parents[parents[place]]
            place = parents[place]
        return place

    for place, numbers in enumerate(sets):
        for number in numbers:
            if number != FIXED:
                parents[root(place)] = root(first.setdefault(number, place))
    return [root(place) for place in range(len(sets))]


def least_cost(costs: Sequence[Cost], count: int) -> Tensor:
    """Return the v, of 1, 2, 4 and 8, of the least sum of costs that coordinate descent from 1 finds. ``(count,)``

    Costs that share no channel do not see one another: the descent goes through all such parts at once, in each to its
    next channel.
    """
    if not costs:
        return torch.ones(count, dtype=torch.float64)
    search = _Search(costs, count)
    moving = search.parts
    for _ in range(_SWEEPS):
        moved: set[int] = set()
        for step in range(max(map(len, moving), default=0)):
            moved.update(search.improve([part[step] for part in moving if step < len(part)]))
        moving = [part for part in moving if not moved.isdisjoint(part)]
    return torch.from_numpy(search.v)


class _Search:
    """The costs at one v, kept up to date as v changes. What a cost holds per channel lies in one row of arrays.

    Attributes:
        v: The scales' inverses. ``(count,)``
        parts: The numbers of each part of the network, in the order of the costs.
    """

    def __init__(self, costs: Sequence[Cost], count: int) -> None:
        self.v = np.ones(count)
        members = [cost.numbers.tolist() for cost in costs]
        parts: dict[int, dict[int, None]] = defaultdict(dict)
        self._uses: dict[int, list[int]] = defaultdict(list)  # the rows of each number
        self._cost: list[int] = []  # of each row, and its channel there
        self._index: list[int] = []
        for place, (label, numbers) in enumerate(zip(connected(members), members, strict=True)):
            first = len(self._cost)
            for number in numbers:
                if number != FIXED:
                    self._uses[number].append(len(self._cost))
                    parts[label][number] = None
                self._cost.append(place)
                self._index.append(len(self._cost) - 1 - first)
        self.parts = [list(part) for part in parts.values()]
        forms = [(cost.lost, cost.kept) for cost in costs]
        self._rows = [[form.rows for form in both] for both in forms]
        self._diagonals = _stacked([[form.diagonal for form in both] for both in forms])  # (rows, 2)
        self._squares = _stacked([[form.squares for form in both] for both in forms])
        self._signs = np.array([[form.sign for form in both] for both in forms])  # (costs, 2)
        self._sums = [[form.rows.sum(0) for form in both] for both in forms]  # Σ_i v_i r_i
        self._own = np.array([[form.diagonal.sum() for form in both] for both in forms])  # Σ_i d_i v_i²
        self._totals = self._own + self._signs * np.array([[total @ total for total in both] for both in self._sums])

    def improve(self, numbers: Sequence[int]) -> list[int]:
        """Give v its best values at numbers that no cost shares, and return those at which it moved."""
        of_numbers = [self._uses[number] for number in numbers]
        counts = [len(rows) for rows in of_numbers]
        rows = [row for own in of_numbers for row in own]
        values = np.empty((len(numbers), len(_GRID) + 1))
        values[:, 0], values[:, 1:] = self.v[numbers], _GRID
        steps = values - values[:, :1]
        if len(rows) == len(numbers):
            found = self._after(rows, values[:, 0], steps)
        else:
            each = self._after(rows, values[:, 0].repeat(counts), steps.repeat(counts, 0))
            found = np.add.reduceat(each, [0, *accumulate(counts[:-1])], 0)
        best = found.argmin(1).tolist()
        moved = []
        for place, (number, index) in enumerate(zip(numbers, best, strict=True)):
            if index and found[place, index] < (1 - _GAIN) * found[place, 0]:
                moved.append(number)
                self._put(number, float(values[place, index]))
        return moved

    def _after(self, rows: Sequence[int], v: Values, steps: Values) -> Values:
        """Return the cost of each row after each of some steps of its v. ``(rows, steps)``"""
        costs = [self._cost[row] for row in rows]
        products = [
            own[self._index[row]].dot(total)
            for row, cost in zip(rows, costs, strict=True)
            for own, total in zip(self._rows[cost], self._sums[cost], strict=True)
        ]
        slopes = self._diagonals[rows] * v[:, None] + self._signs[costs] * np.array(products).reshape(-1, 2)
        x = steps[:, None]
        forms = self._totals[costs][:, :, None] + x * (2 * slopes[:, :, None] + x * self._squares[rows][:, :, None])
        found: Values = np.maximum(forms[:, 0], 0) / np.maximum(forms[:, 1], 1e-30)
        return found

    def _put(self, number: int, value: float) -> None:
        before = float(self.v[number])
        self.v[number] = value
        for row in self._uses[number]:
            cost = self._cost[row]
            self._own[cost] += (value * value - before * before) * self._diagonals[row]
            for own, total in zip(self._rows[cost], self._sums[cost], strict=True):
                total += (value - before) * own[self._index[row]]
            squares = [total.dot(total) for total in self._sums[cost]]
            self._totals[cost] = self._own[cost] + self._signs[cost] * squares


def _stacked(values: Sequence[Sequence[Values]]) -> Values:
    """Return two values for each channel of each cost, from pairs of vectors. ``(rows, 2)``"""
    return np.concatenate([np.stack(pair, 1) for pair in values])
