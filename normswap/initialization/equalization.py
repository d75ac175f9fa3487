"""Cross-layer equalization (Nagel et al. 2019): scale channels such that standardizing the weights takes little away.

A channel that is multiplied by a scale s > 0, wherever it is made, and divided by it, wherever it is read
(:mod:`normswap.graph.channels`), leaves the network the same function. A standardized filter sums to zero, so a layer
no longer sees what all values of a patch have in common; behind ReLUs, where all values are positive, that is much. How
much it is depends on the scales (:mod:`normswap.initialization.equalization_cost`), and so they are chosen.

M. Nagel et al., *Data-Free Quantization Through Weight Equalization and Bias Correction*, 2019, moves scales from layer
to layer to quantize weights; here the scales are those that weight standardization loses least with.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from normswap.checks.self_check import eval_output, keeps_output
from normswap.errors import Text, argument
from normswap.graph.channels import FIXED, Channels, find_channels
from normswap.graph.dataflow import Dataflow
from normswap.initialization.centring import centred_layers
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

__all__ = ["EQUALIZED", "choose_scales", "equalize", "scale_channels"]

EQUALIZED = Text(
    "channels between layers were scaled, so that standardizing the weights takes less away: features taken from "
    f"within the model differ from the original's by a factor per channel ({argument('scale', False)} leaves them)"
)
"""What a person should know of an equalized model."""
_SAMPLES_TO_SCALE, _LARGE_SAMPLES_TO_SCALE = 128, 32
_LARGE = 2**17  # values of a sample, which then has many positions
_MOST_ROWS = 2**14  # positions of one batch
_MOST_VALUES = 2**22  # of quadratic forms at once, in float64, where one group of channels needs no more


def equalize(
    bound: BoundPlan, flow: Dataflow, batches: Sequence[Batch] | None, example: Inputs | None
) -> tuple[nn.Module, dict[str, Tensor], dict[str, Scale]]:
    """Return a copy of the captured model, the same function, whose channels' scales suit standardized weights.

    And the scales of the channels that each norm gives, by fqn, and of each parameter, by name. The model itself, and
    no scales, where nothing is gained, where it cannot be copied, or where its output would not stay.

    Args:
        bound: What is going to be done.
        flow: The original's dataflow.
        batches: Calibration data.
        example: Inputs that the copy is checked on.
    """
    model = flow.capture.model
    gamma_sigma = dict(_gamma_sigma(bound))
    if not gamma_sigma or any(p.is_meta for p in model.parameters()):
        return model, {}, {}
    inputs = example if example is not None else make_up_inputs(model)
    if inputs is None:
        return model, {}, {}
    norms = {
        step.site.norm: tuple(one for _, one in step.source.after)
        for step in bound.modules
        if not step.site.rank_by_example or step.held_rank is not None
    }
    channels = find_channels(flow, norms, [step.site.layer for step in bound.modules if step.site.layer])
    scales = _from_data_or_noise(model, gamma_sigma, channels, batches, inputs)
    if scales is None:
        return model, {}, {}
    try:
        scaled = copy_of(model)
    except Exception:  # whatever a user's class does on being copied: it converts in place nevertheless
        return model, {}, {}
    scale_channels(scaled, channels, scales)
    result = keeps_output(eval_output(model, inputs), scaled, inputs)
    if not everywhere("scaled channels", result is None or result.ok):
        return model, {}, {}
    given = {norm: scales[channels.outputs[norm]] for norm in norms if norm in channels.outputs}
    return scaled, given, _of_parameters(model, channels, scales)


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


def scale_channels(model: nn.Module, channels: Channels, scales: Tensor) -> None:
    """Give each channel of ``model`` its scale, in place: ``scales`` holds one for each of ``channels``' numbers."""
    with torch.no_grad():
        for name, numbers in channels.outputs.items():
            _scale_outputs(model.get_submodule(name), scales[numbers])
        for name, numbers in channels.inputs.items():
            layer, factor = model.get_submodule(name), scales[numbers]
            if bool((factor != 1).any()):
                weight = FilterLayout.weight(layer)
                weight.copy_(FilterLayout.of(layer).multiply_inputs(weight.double(), 1 / factor.to(weight.device)))


def _of_parameters(model: nn.Module, channels: Channels, scales: Tensor) -> dict[str, Scale]:
    """Return what :func:`scale_channels` multiplies each parameter with, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, Scale] = {}
    for fqn in dict.fromkeys((*channels.outputs, *channels.inputs)):
        module = model.get_submodule(fqn)
        outputs = scales[channels.outputs[fqn]] if fqn in channels.outputs else None
        inputs = 1 / scales[channels.inputs[fqn]] if fqn in channels.inputs else None
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in names:
                of_weight = inputs if key == "weight" else None
                found[names[id(parameter)]] = Scale(_bare(outputs), _bare(of_weight), FilterLayout.of(module))
    return {name: one for name, one in found.items() if one.outputs is not None or one.inputs is not None}


def _bare(factor: Tensor | None) -> Tensor | None:
    return None if factor is None or bool((factor == 1).all()) else factor


def _scale_outputs(module: nn.Module, factor: Tensor) -> None:
    if bool((factor == 1).all()):
        return
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    factor = factor.to(weight.device)
    layout = FilterLayout() if weight.ndim == 1 else FilterLayout.of(module)
    weight.copy_(layout.multiply_outputs(weight.double(), factor))
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
    rows: Tensor = at_positions(sums, some).unflatten(-1, (layout.groups, -1))
    return rows.transpose(0, 1)
