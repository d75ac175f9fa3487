"""Cross-layer equalization (Nagel et al. 2019): scale channels such that standardizing the weights takes little away.

A channel that is multiplied by a scale s > 0, wherever it is made, and divided by it, wherever it is read
(:mod:`normswap.graph.channels`), leaves the network the same function. A standardized filter sums to zero, so a layer
no longer sees what all values of a patch have in common; behind ReLUs, where all values are positive, that is much. How
much it is depends on the scales (:mod:`normswap.initialization.equalization_cost`), and so they are chosen, among
powers of two: these round nothing, and can be taken out again (:mod:`normswap.initialization.channel_scales`).

M. Nagel et al., *Data-Free Quantization Through Weight Equalization and Bias Correction*, 2019, moves scales from layer
to layer to quantize weights; here the scales are those that weight standardization loses least with.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normswap.checks.self_check import eval_output, keeps_output
from normswap.errors import Text, argument
from normswap.graph.channels import FIXED, Channels, find_channels
from normswap.graph.dataflow import Dataflow
from normswap.initialization.centring import centred_layers
from normswap.initialization.channel_scales import InPlace, scale_channels, scales_of_parameters
from normswap.initialization.equalization_cost import Cost, connected, costs_of, least_cost
from normswap.initialization.noise import noises_like, shaped_by_statistics
from normswap.initialization.patches import with_filters
from normswap.initialization.quadratic_forms import CovarianceSums
from normswap.nn import FilterLayout
from normswap.records import NormKind
from normswap.runs.batches import sample_count, some_samples
from normswap.runs.calling import Batch
from normswap.runs.guard import copy_of
from normswap.runs.inputs import Inputs, make_up_inputs
from normswap.runs.processes import alone, everywhere, offsets, summed_by_name
from normswap.runs.tensors import at_positions, tensors_of
from normswap.runs.watching import watch_inputs
from normswap.stages.bound import BoundPlan
from normswap.stages.moves import Scale

__all__ = ["EQUALIZED", "Equalized", "choose_scales", "equalize"]

EQUALIZED = Text(
    "channels between layers were scaled, so that standardizing the weights takes less away: features taken from "
    f"within the model differ from the original's by a factor per channel ({argument('scale', False)} leaves them)"
)
"""What a person should know of an equalized model."""
_SAMPLES_TO_SCALE, _LARGE_SAMPLES_TO_SCALE = 128, 32
_LARGE = 2**17  # values of a sample, which then has many positions
_MOST_ROWS = 2**14  # positions of one batch
_MOST_VALUES = 2**22  # of quadratic forms at once, in float64, where one group of channels needs no more


@dataclass(frozen=True)
class Equalized:
    """A model, the same function, whose channels' scales suit standardized weights.

    Args:
        source: A copy that is scaled; the model itself where that is to be scaled in place, or where no scale is used.
        scales: The scales of the channels that each norm gives, by fqn.
        factors: The scale of each parameter, by name.
        in_place: Scales the source, and takes the scales out again where what is done within fails.
    """

    source: nn.Module
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    factors: Mapping[str, Scale] = field(default_factory=dict)
    in_place: Callable[[], AbstractContextManager[None]] = nullcontext


def equalize(
    bound: BoundPlan,
    flow: Dataflow,
    batches: Sequence[Batch] | None,
    example: Inputs | None,
    *,
    inplace: bool = False,
) -> Equalized:
    """Choose the scales of a captured model's channels; none where nothing is gained or its output would not stay.

    Nor where it cannot be copied and is not to be scaled in place.

    Args:
        bound: What is going to be done.
        flow: The original's dataflow.
        batches: Calibration data.
        example: Inputs that the scaled model is checked on.
        inplace: Whether the model is to be scaled itself. It is as it was when this returns.
    """
    model = flow.capture.model
    gamma_sigma = dict(_gamma_sigma(bound))
    if not gamma_sigma or any(p.is_meta for p in model.parameters()):
        return Equalized(model)
    inputs = example if example is not None else make_up_inputs(model)
    if inputs is None:
        return Equalized(model)
    norms = {
        step.site.norm: tuple(one for _, one in step.source.after)
        for step in bound.modules
        if not step.site.rank_by_example or step.held_rank is not None
    }
    channels = find_channels(flow, norms, [step.site.layer for step in bound.modules if step.site.layer])
    scales = _from_data_or_noise(model, gamma_sigma, channels, batches, inputs)
    if scales is None:
        return Equalized(model)
    given = {norm: scales[channels.outputs[norm]] for norm in norms if norm in channels.outputs}
    factors = scales_of_parameters(model, channels, scales)
    expected = eval_output(model, inputs)
    if inplace:
        in_place = InPlace(model, channels, scales)
        try:
            in_place.put_in()
            result = keeps_output(expected, model, inputs)
        finally:
            in_place.take_out()
        equalized = Equalized(model, given, factors, in_place.unless_failed)
    else:
        try:
            scaled = copy_of(model)
        except Exception:  # whatever a user's class does on being copied: it converts in place nevertheless
            return Equalized(model)
        scale_channels(scaled, channels, scales)
        result = keeps_output(expected, scaled, inputs)
        equalized = Equalized(scaled, given, factors)
    return equalized if everywhere("scaled channels", result is None or result.ok) else Equalized(model)


def _from_data_or_noise(
    model: nn.Module,
    gamma_sigma: Mapping[str, Tensor],
    channels: Channels,
    batches: Sequence[Batch] | None,
    inputs: Inputs,
) -> Tensor | None:
    """Return the scales chosen on the first calibration samples or, without any, on noise that the model takes."""
    if batches is not None:
        return choose_scales(model, gamma_sigma, channels, _first_samples(batches), shaped=False)
    for noise in noises_like(inputs):
        try:
            return choose_scales(model, gamma_sigma, channels, [noise], shaped=True)
        except Exception:  # a model may take no other batch size than the example's
            continue
    return None


def _gamma_sigma(bound: BoundPlan) -> Iterator[tuple[str, Tensor]]:
    """Yield the layers whose filters are centred, each with γ and σ of the norm behind it. ``(2, C)``"""
    for layer, step in centred_layers(bound):
        state = step.state
        if step.site.kind == NormKind.MODULE and state.var is not None:
            yield layer, torch.stack([state.gamma.double(), (state.var.double() + state.eps).sqrt()])


def _first_samples(batches: Sequence[Batch]) -> Sequence[Batch]:
    """Return the first batches that hold as many samples as the choice of scales needs."""
    firsts, _ = offsets("samples", [sample_count(batch) for batch in batches])
    chosen = []
    for batch, first in zip(batches, firsts, strict=True):
        values = sum(value.numel() for value in tensors_of(some_samples(batch, 1)))
        if first >= (_LARGE_SAMPLES_TO_SCALE if values >= _LARGE else _SAMPLES_TO_SCALE):
            break
        chosen.append(batch)
    return chosen


def choose_scales(
    model: nn.Module,
    gamma_sigma: Mapping[str, Tensor],
    channels: Channels,
    batches: Iterable[Batch],
    *,
    shaped: bool,
) -> Tensor | None:
    """Return the scale of each number of ``channels``; None where none is worth it.

    Args:
        model: The original; it is only read.
        gamma_sigma: γ and σ of the norm behind each layer that will be standardized, by the layer's fqn. ``(2, C)``
        channels: The channels.
        batches: Inputs of the model.
        shaped: Whether they are noise, to be shaped by each BatchNorm.
    """
    numbers = {name: channels.inputs[name] for name in gamma_sigma if name in channels.inputs}
    layers = [name for name, own in numbers.items() if bool((own != FIXED).any())]
    sums: dict[str, CovarianceSums] = {}

    def see(name: str, layer: nn.Module, given: Sequence[Any]) -> None:
        sums.setdefault(name, CovarianceSums()).add(_patch_sums(layer, given[0]))

    with shaped_by_statistics(model) if shaped else nullcontext():
        watch_inputs(model, layers, batches, see)
    if not alone():
        products = summed_by_name("sums over patches", {name: one.sums for name, one in sums.items()})
        sums = {name: CovarianceSums(found) for name, found in products.items()}
    v = torch.ones(channels.count, dtype=torch.float64)
    for part in _parts({name: model.get_submodule(name) for name in sums}, numbers):
        costs: list[Cost] = []
        for name in part:
            kept = sums.pop(name).inverse()
            if kept is None:
                return None
            costs += costs_of(model.get_submodule(name), gamma_sigma[name], kept, numbers[name])
        v *= least_cost(costs, channels.count)  # which is 1 at the channels of other parts
    return None if bool((v == 1).all()) else 1 / v


def _parts(layers: Mapping[str, nn.Module], numbers: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Yield the layers whose costs are held at once: those that share channels, and others while all are small.

    The largest come last, when the others' sums are there no more.
    """
    labels = connected([numbers[name].tolist() for name in layers])
    together: dict[int, list[str]] = defaultdict(list)
    for name, label in zip(layers, labels, strict=True):
        together[label].append(name)
    part: list[str] = []
    values = 0
    sizes = {label: sum(_values_of_forms(layers[name]) for name in names) for label, names in together.items()}
    for label in sorted(together, key=lambda label: sizes[label]):
        if part and values + sizes[label] > _MOST_VALUES:
            yield part
            part, values = [], 0
        part, values = part + together[label], values + sizes[label]
    if part:
        yield part


def _values_of_forms(layer: nn.Module) -> int:
    """Return how many values the cost of a layer holds, at most."""
    layout, weight = FilterLayout.of(layer), FilterLayout.weight(layer)
    inputs, outputs = layout.in_channels(weight), layout.out_channels(weight)
    return inputs * (inputs + outputs) // layout.groups


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
    rows: Tensor = at_positions(sums, some).unflatten(-1, (layout.groups, -1))
    return rows.transpose(0, 1)
