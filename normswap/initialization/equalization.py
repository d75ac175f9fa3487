"""Scale a network's channels, which leaves it the same function, such that standardizing its weights takes little away.

A standardized filter sums to zero, so a layer no longer sees what all values of a patch have in common; behind ReLUs,
where all values are positive, that is much. But a channel of scale ``s_c = 1/v_c`` is met by weights that are v_c times
as large, and the sum which must be zero is, in terms of the original's w, ``Σ_c v_c Σ_k w_ck``. Of the layer's output
that costs, if what is taken away is the same for all k,

    Σ_o a_o² (v·w̄_o)² / (vᵀS⁻¹v),

w̄ the filters' means over the kernel, a = γ/σ, S the covariance of the channels' sums over a patch. It is least where v
is large for channels that tell little, or that others tell, too: their weights then make the sums zero. The scales are
chosen such that the layers' costs, as shares of their outputs' variances, have the least sum, by a search along one
channel after the other. v lies between 1 and 10: more gains nothing.

A channel is scaled wherever it is met (:mod:`normswap.graph.channels`). That scales can be moved from layer to layer
was used before to quantize weights: M. Nagel et al., *Data-Free Quantization Through Weight Equalization and Bias
Correction*, 2019.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from normswap.graph.channels import FIXED, Channels
from normswap.initialization.moments import watch_inputs, with_filters
from normswap.nn import FilterLayout
from normswap.runs.calling import Batch
from normswap.runs.tensors import at_positions

__all__ = ["Cost", "choose_scales", "costs_of", "least", "scale_channels"]

Values = npt.NDArray[np.float64]
_GRID: Values = 10.0 ** np.linspace(0, 1, 9)
_SWEEPS = 8
_GAIN = 1e-3  # the share of the cost that a step must save
_RIDGE = 1e-3  # of the mean variance
_MOST_ROWS = 2**14  # positions of one batch


def choose_scales(
    model: nn.Module,
    gains: Mapping[str, Tensor],
    channels: Channels,
    batches: Iterable[Batch],
    *,
    shaped: bool,
) -> Tensor | None:
    """Return the scale of each number of ``channels``; None where none is worth it.

    Args:
        model: The original; it is only read.
        gains: γ and σ of the norm behind each layer that will be standardized, by the layer's fqn. ``(2, C)``
        channels: The channels.
        batches: Inputs of the model.
        shaped: Whether they are noise, to be shaped by each BatchNorm.
    """
    layers = [name for name in gains if name in channels.inputs and bool((channels.inputs[name] != FIXED).any())]
    sums: dict[str, list[Tensor]] = {}

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        rows = _patch_sums(layer, x)
        found = [torch.tensor(float(rows.shape[1]), dtype=rows.dtype), rows.sum(1), rows.mT @ rows]
        sums[name] = [a + b for a, b in zip(sums[name], found, strict=True)] if name in sums else found

    watch_inputs(model, layers, batches, see, shaped=shaped)
    costs: list[Cost] = []
    for name, (n, first, second) in sums.items():
        mean = first / n
        covariance = second / n - mean[:, :, None] * mean[:, None]
        if not bool(covariance.isfinite().all()):
            return None
        costs += costs_of(model.get_submodule(name), gains[name], covariance.cpu(), channels.inputs[name])
    v = least(costs, channels.count)
    return None if bool((v == 1).all()) else 1 / v


def scale_channels(model: nn.Module, channels: Channels, scales: Tensor) -> None:
    """Give each channel of ``model`` its scale, in place: ``scales`` holds one for each of ``channels``' numbers."""
    with torch.no_grad():
        for name, numbers in channels.outputs.items():
            _scale_outputs(model.get_submodule(name), scales[numbers])
        for name, numbers in channels.inputs.items():
            layer, factor = model.get_submodule(name), scales[numbers]
            if bool((factor != 1).any()):
                weight = FilterLayout.weight(layer)
                weight.copy_(FilterLayout.of(layer).scale_inputs(weight.double(), 1 / factor.to(weight.device)))


def _scale_outputs(module: nn.Module, factor: Tensor) -> None:
    if bool((factor == 1).all()):
        return
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    factor = factor.to(weight.device)
    layout = FilterLayout() if weight.ndim == 1 else FilterLayout.of(module)
    weight.copy_(layout.scale(weight.double(), factor))
    if isinstance(bias, Tensor):
        bias.copy_(bias.double() * factor)


def _patch_sums(layer: nn.Module, x: Tensor) -> Tensor:
    """Return each input channel's sum over the patches at some positions. ``(groups, positions, in/groups)``"""
    layout = FilterLayout.of(layer)
    if isinstance(layer, nn.Linear):
        sums = x.flatten(0, -2)
    else:  # a convolution of each channel by itself, with ones
        weight = FilterLayout.weight(layer)
        channels = layout.in_channels(weight)
        sums = with_filters(layer, weight.new_ones(channels, 1, *weight.shape[2:]), groups=channels)(x)
    positions = sums.numel() // sums.shape[1]
    some = torch.arange(0, positions, max(1, positions // _MOST_ROWS), device=sums.device)
    rows: Tensor = at_positions(sums, some).double().unflatten(-1, (layout.groups, -1))
    return rows.transpose(0, 1)


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

    def __post_init__(self) -> None:  # single numbers are looked at, one after the other: NumPy's are the faster ones
        self._forms = self.lost.numpy(), self.kept.numpy()
        self._v = np.ones(len(self.numbers))
        self._products = [form @ self._v for form in self._forms]

    def after(self, place: int, values: Values) -> Values:
        """Return the cost with each of ``values`` in one place of v."""
        step = values - self._v[place]
        lost, kept = (
            self._v @ product + 2 * step * product[place] + step * step * form[place, place]
            for form, product in zip(self._forms, self._products, strict=True)
        )
        found: Values = np.maximum(lost, 0) / np.maximum(kept, 1e-30)
        return found

    def put(self, place: int, value: float) -> None:
        """Set one place of v."""
        step = value - self._v[place]
        self._v[place] = value
        for form, product in zip(self._forms, self._products, strict=True):
            product += step * form[place]


def costs_of(layer: nn.Module, gains: Tensor, covariance: Tensor, numbers: Tensor) -> list[Cost]:
    """Return the cost of each of a layer's groups.

    Args:
        layer: The layer.
        gains: γ and σ of the norm behind it. ``(2, C)``
        covariance: S: the covariance, for each group, of its channels' sums over a patch. ``(groups, n, n)``
        numbers: The numbers of the layer's input channels. ``(in_channels,)``
    """
    layout = FilterLayout.of(layer)
    weight = FilterLayout.weight(layer).detach().double().cpu()
    means = _kernel_means(layout, weight).unflatten(0, (layout.groups, -1))  # (groups, out/groups, in/groups)
    gamma, sigma = gains.double().cpu()
    size = gamma.square().sum().clamp(min=1e-30)
    means = means * (gamma / sigma).view(layout.groups, -1, 1)
    n = covariance.shape[-1]
    ridge = _RIDGE * covariance.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    kept = torch.linalg.inv(covariance + ridge[:, None, None] * torch.eye(n, dtype=covariance.dtype))
    lost = means.mT @ means / size
    found = []
    for group, own in enumerate(numbers.view(layout.groups, -1)):
        unique, place = own.unique(return_inverse=True)
        if len(unique) > 1:  # a single channel's scale changes nothing
            spread = torch.zeros(n, len(unique), dtype=lost.dtype).scatter_(1, place[:, None], 1.0)
            found.append(Cost(unique, spread.T @ lost[group] @ spread, spread.T @ kept[group] @ spread))
    return found


def _kernel_means(layout: FilterLayout, weight: Tensor) -> Tensor:
    """Return each filter's mean over the kernel, per input channel of its group. ``(out, in/groups)``"""
    means = weight.flatten(2).mean(2) if weight.ndim > 2 else weight
    return layout.flatten(means)


def least(costs: Sequence[Cost], count: int) -> Tensor:
    """Return the v, of 1 to 10, of the least sum of costs that a search along each channel finds. ``(count,)``"""
    met: dict[int, list[tuple[Cost, int]]] = defaultdict(list)
    for cost in costs:
        for place, number in enumerate(cost.numbers.tolist()):
            if number != FIXED:
                met[number].append((cost, place))
    v = np.ones(count)
    for _ in range(_SWEEPS):
        moved = False
        for number, places in met.items():
            values = np.concatenate([v[number : number + 1], _GRID])
            found = sum(cost.after(place, values) for cost, place in places)
            assert isinstance(found, np.ndarray)
            best = int(found.argmin())
            if found[best] < (1 - _GAIN) * found[0]:
                moved, v[number] = True, values[best]
                for cost, place in places:
                    cost.put(place, values[best])
        if not moved:
            break
    return torch.from_numpy(v)
